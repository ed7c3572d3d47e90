"""What pretraining gained in the quickstart: a table, and report.json (python -m util.summary FOLDER)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from util.start import report

# what a row is called, the folder of its runs, its key in report.json, and what its baseline is called there
ROWS = (
    ("k-NN on frozen features", "knn", "knn", "random"),
    ("linear probe", "linear", "linear", "random"),
    ("fine-tuned on 1,000 labels", "finetune", "finetune_1000", "scratch"),
)


def summarize(folder: Path) -> str:
    """Collect the top-1 of a quickstart's transfers in folder/report.json; gives them as a table."""
    lines, figures = [f"{'top-1 on the test images':28}{'random':>10}{'pretrained':>12}{'gained':>9}"], {}
    for title, task, key, baseline in ROWS:
        without, with_ = (json.loads((folder / task / run / "report.json").read_text())["top1"]
                          for run in ("scratch", "pretrained"))  # fmt: skip
        lines.append(f"{title:28}{without:10.4f}{with_:12.4f}{with_ - without:+9.4f}")
        figures |= {f"{key}.{baseline}": without, f"{key}.pretrained": with_}
    report(folder, figures)
    return "\n".join(lines)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    panels = sorted((root / "pretrain" / "reconstructions").glob("*.png"))
    print(f"\n{summarize(root)}\n")
    print(f"figures         {root / 'report.json'}")
    print(f"reconstruction  {panels[-1] if panels else 'none'}")
    print(f"curves          tensorboard --logdir {root / 'pretrain' / 'tensorboard'}")
