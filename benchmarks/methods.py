"""Every method at equal wall-clock on Fashion-MNIST: pretrain, then k-NN, a linear probe and fine-tuning.

python -m benchmarks.methods --seconds 60

Writes FOLDER/methods.json and FOLDER/methods.md, a table with the command of each row. What is finished is not run
again, so the same command continues after an interruption.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
from pathlib import Path
from statistics import median

import yaml

import main_finetune
import main_pretrain

CONFIGS = Path("configs/fashion_mnist")
IMAGES = 60_000  # in an epoch
TRIAL = 30  # steps that measure a method's speed
TASKS = {  # the task's config, and what differs from the quickstart's
    "knn": ["--data.labels", "10000"],
    "linear": ["--data.labels", "10000", "--run.epochs", "5", "--optim.warmup", "0.5"],
    "finetune": ["--run.epochs", "15", "--optim.warmup", "2"],
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="of pretraining, for each method")
    parser.add_argument("--folder", type=Path, default=Path("output/methods"))
    parser.add_argument("--root", default="fashion_mnist", help="data.root")
    parser.add_argument("--methods", nargs="*", help="names of files in configs/fashion_mnist; by default all")
    options = parser.parse_args(argv)
    rows = []
    for names in order(options.methods):
        configs = [CONFIGS / f"{name}.yaml" for name in names]
        speeds = measure(configs, options.folder, options.root)
        rows += [row(path, speeds[path.stem] * options.seconds, options.folder, options.root) for path in configs]
    (options.folder / "methods.json").write_text(json.dumps(rows, indent=2) + "\n")
    (options.folder / "methods.md").write_text(table(rows))
    print(table(rows))


def order(wanted: list[str] | None) -> list[list[str]]:
    """The wanted configs by name, in groups: first what others learn from, a teacher and a tokenizer."""
    names = [path.stem for path in sorted(CONFIGS.glob("*.yaml")) if not wanted or path.stem in wanted]
    first = [[name] for name in ("mae", "vqkd") if name in names]
    return [*first, [name for name in names if [name] not in first]]


def measure(configs: list[Path], folder: Path, root: str) -> dict[str, float]:
    """Images per second of each method in training, in two rounds over all, so that a slow minute hits all alike."""
    path = folder / "speeds.json"
    speeds: dict[str, list[float]] = json.loads(path.read_text()) if path.exists() else {}
    for turn in range(2):
        for config in configs:
            if len(speeds.get(config.stem, [])) <= turn:
                trial = folder / "trials" / f"{config.stem}_{turn}"
                pretrain(config, TRIAL * 256 / IMAGES, trial, root, "--run.log_every", "5", "--run.probe", "64")
                lines = map(json.loads, (trial / "log.jsonl").read_text().splitlines())
                rates = [line["images_per_s"] for line in lines if "images_per_s" in line]
                speeds.setdefault(config.stem, []).append(median(rates[1:]))
                path.write_text(json.dumps(speeds))
    return {name: max(rates) for name, rates in speeds.items()}


def row(config: Path, images: float, folder: Path, root: str) -> dict:
    """One method: its pretraining on so many images and its transfers, fine-tuning beside the same from scratch."""
    epochs = round(images / IMAGES, 2)
    run = folder / config.stem
    command = pretrain(config, epochs, run, root)
    figures = {"method": config.stem, "epochs": epochs, "command": command}
    encoder = yaml.safe_load(config.read_text())["encoder"]
    untrained = folder / f"random_{encoder['name']}_{digest(encoder)}"
    for task, changes in TASKS.items():
        figures[task] = transfer(task, str(run / "encoder.safetensors"), run / task, config, root, changes)
    figures["scratch"] = transfer("finetune", "none", untrained / "finetune", config, root, TASKS["finetune"])
    return figures


def digest(encoder: dict) -> str:
    """Letters that follow from an encoder's config alone."""
    return hashlib.blake2b(json.dumps(encoder, sort_keys=True).encode(), digest_size=4).hexdigest()


def pretrain(config: Path, epochs: float, folder: Path, root: str, *more: str) -> str:
    """Pretrain unless it is done; gives the command."""
    argv = ["--config", str(config), "--data.root", root, "--run.epochs", f"{epochs:g}", "--run.folder", str(folder)]
    if not (folder / "report.json").exists():
        main_pretrain.main([*argv, *more])
    return shlex.join(["python", "main_pretrain.py", *argv, *more])


def transfer(task: str, weights: str, folder: Path, config: Path, root: str, changes: list[str]) -> float:
    """Top-1 of a transfer of weights, run unless it is done."""
    if not (folder / "report.json").exists():
        trained = yaml.safe_load(config.read_text())
        encoder = yaml.safe_dump(trained["encoder"]["args"], default_flow_style=True, width=10_000).strip()
        argv = ["--config", f"configs/quickstart/{task}.yaml", "--weights", weights, "--data.root", root]
        argv += ["--encoder.name", trained["encoder"]["name"], "--encoder.args", encoder]
        argv += ["--data.size", str(trained["data"]["size"]), "--run.folder", str(folder), *changes]
        main_finetune.main(argv)
    return json.loads((folder / "report.json").read_text())["top1"]


def table(rows: list[dict]) -> str:
    """The rows in Markdown."""
    lines = ["| method | epochs | k-NN | linear | fine-tuned | from scratch |", "|---|---|---|---|---|---|"]
    for one in sorted(rows, key=lambda one: -one["knn"]):
        cells = [f"{100 * one[task]:.1f}" for task in (*TASKS, "scratch")]
        lines.append(f"| `{one['method']}` | {one['epochs']:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
