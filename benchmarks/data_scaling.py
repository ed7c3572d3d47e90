"""How models profit from data: pretrain each on fractions of it, and draw held-out loss against downstream scores.

python -m benchmarks.data_scaling --config configs/quickstart/pretrain.yaml --folder output/scaling \
    --fractions 0.1 0.3 1 --models "small=--encoder.args.depth 2" "large=--encoder.args.depth 4" \
    --transfers configs/quickstart/knn.yaml configs/quickstart/linear.yaml --run.epochs null --run.steps 2000
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import torch

from main_finetune import finetune
from main_pretrain import pretrain
from util import dist
from util.config import Finetune, Pretrain
from util.errors import UserError, command
from util.options import claim_folder, read

Run = tuple[Callable, object, dict]  # what runs it, its config, and that as a plain dict


def main(argv: list[str] | None = None) -> None:
    """Run what of the grid is not finished yet, then write scaling.json and scaling.png into its folder."""
    need_matplotlib()
    options, rest = parser().parse_known_args(argv)
    rows = []
    for model, fraction, runs in plan(options, rest):
        figures = {name: finish(*run) for name, run in runs.items()}
        scores = {name: found["top1"] for name, found in figures.items() if name != "pretrain"}
        rows.append({"model": model, "fraction": fraction, "heldout": figures["pretrain"]["heldout"], "top1": scores})
        if dist.rank() == 0:
            write(options.folder, rows)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="all other options go to each pretraining", allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="yaml of the pretraining")
    parser.add_argument("--folder", required=True, type=Path, help="of everything that is written")
    parser.add_argument("--root", help="data.root of all runs; by default that of each yaml")
    parser.add_argument("--fractions", required=True, nargs="+", type=float, help="values of data.fraction")
    parser.add_argument("--models", nargs="+", default=["model="], help='"NAME=options of main_pretrain.py", one each')
    parser.add_argument(
        "--transfers", required=True, nargs="+", help='"YAML options of main_finetune.py", one each, on all images'
    )
    return parser


def read_model(text: str) -> tuple[str, list[str]]:
    """ "small=--encoder.args.depth 2" as a name and options."""
    name, equals, words = text.partition("=")
    if not equals or not name or "/" in name:
        raise UserError(f'--models {text} has to be a name, "=" and options, as in "small=--encoder.args.depth 2"')
    return name, shlex.split(words)


def plan(options: argparse.Namespace, rest: list[str]) -> list[tuple[str, float, dict[str, Run]]]:
    """The cells as (model, fraction, runs), all their configs read; `rest` goes to each pretraining."""
    models = [read_model(text) for text in options.models]
    fractions = sorted(set(options.fractions))
    return [
        (name, part, plan_cell(options, name, part, [*rest, *words])) for name, words in models for part in fractions
    ]


def plan_cell(options: argparse.Namespace, model: str, fraction: float, words: list[str]) -> dict[str, Run]:
    """The runs of a model on a fraction by name, pretraining first."""
    folder, root = options.folder / model / f"{fraction:g}", ["--data.root", options.root] if options.root else []
    argv = ["--config", options.config, *words, *root, "--data.fraction", str(fraction)]
    runs: dict[str, Run] = {"pretrain": (pretrain, *read(Pretrain, [*argv, "--run.folder", f"{folder}/pretrain"]))}
    for transfer in options.transfers:
        path, *more = shlex.split(transfer)
        argv = ["--config", path, *more, *root, "--weights", f"{folder}/pretrain"]
        name = Path(path).stem
        if name in runs:
            raise UserError(f"--transfers has two of the name {name}")
        runs[name] = (finetune, *read(Finetune, [*argv, "--run.folder", f"{folder}/{name}"]))
    return runs


def finish(run: Callable, config, plain: dict) -> dict[str, float]:
    """The final figures of a run, which is started or continued unless its folder has them already."""
    dist.init(config.run.device)
    folder = Path(config.run.folder)
    if not (folder / "report.json").exists():
        torch.compiler.reset()  # a cell is compiled as if it were alone
        return run(config, plain)
    if dist.rank() == 0:
        claim_folder(folder, plain, type(config))  # refuses the figures of another run
    return json.loads((folder / "report.json").read_text())


def write(folder: Path, rows: list[dict]) -> None:
    """scaling.json, and the same as a picture: for each transfer, a line for each model through its fractions."""
    (folder / "scaling.json").write_text(json.dumps(rows, indent=2) + "\n")
    from matplotlib.figure import Figure

    transfers, models = list(rows[0]["top1"]), list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure((5 * len(transfers), 4), layout="constrained")
    for axes, transfer in zip(figure.subplots(1, len(transfers), squeeze=False)[0], transfers):
        for model in models:
            of_model = [row for row in rows if row["model"] == model]
            losses, scores = [row["heldout"] for row in of_model], [100 * row["top1"][transfer] for row in of_model]
            (line,) = axes.plot(losses, scores, marker="o", label=model)
            place = {"xytext": (5, 5), "textcoords": "offset points", "fontsize": 8, "color": line.get_color()}
            for row, x, y in zip(of_model, losses, scores):
                axes.annotate(f"{row['fraction']:g}", (x, y), **place)
        axes.set(xlabel="loss on held-out images", ylabel=f"{transfer}: top-1 in %")
        axes.margins(0.12)
        axes.grid(alpha=0.3)
    figure.suptitle("pretrained on a fraction of the training images, written at each point", fontsize=10)
    figure.axes[0].legend()
    figure.savefig(folder / "scaling.png", dpi=150)


def need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(f"the figure is drawn by matplotlib: pip install matplotlib ({error})") from error


if __name__ == "__main__":
    command(main)
