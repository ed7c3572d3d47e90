"""Every command of the README, in its order, on tiny encoders and images; torchrun's own part is in test_main.py."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import main_finetune
import main_pretrain
from benchmarks import data_scaling
from models.encoders.weights import load_encoder

ROOT = Path(__file__).parent.parent
TINY = {
    "vit": {"embed_dim": 24, "depth": 2, "num_heads": 2},
    "swinv2": {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
    "swin": {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
}
MAINS = {"main_pretrain.py": main_pretrain.main, "main_finetune.py": main_finetune.main}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def commands():
    return [line for block in blocks("bash") for line in block.splitlines() if "main_" in line]


def tiny(argv):
    """Options that make a command of the README small, and change nothing else of it."""
    options = dict(zip(argv[::2], argv[1::2]))
    config = yaml.safe_load((ROOT / options["--config"]).read_text())
    more = ["--config", str(ROOT / options.pop("--config"))]
    more += ["--data.batch", "4", "--data.workers", "0", "--run.dtype", "float32"]
    more += ["--run.steps", "2"] if "steps" in config["run"] else ["--run.epochs", "1"]
    more += ["--data.size", options.get("--data.size", "64")]
    name = options.get("--encoder.name") or config.get("encoder", {}).get("name")
    if name:
        args = config.get("encoder", {}).get("args", {}) | TINY[name.split("_")[0]]
        more += ["--encoder.args", yaml.safe_dump(args, default_flow_style=True, width=10_000).strip()]
    if "per_device" in config["run"]:
        more += ["--run.per_device", "4"]
    if "method" in config and config["method"]["name"] != "simmim":
        method = config["method"].get("args", {}) | {"depth": 1, "width": 16, "heads": 2}
        more += ["--method.args", yaml.safe_dump(method, default_flow_style=True, width=10_000).strip()]
    kept = [
        "--run.folder",
        "--weights",
        "--encoder.name",
        "--data.root",
        "--data.mean",
        "--data.std",
        "--data.fraction",
        "--task.args.to",
        "--task.args.what",
    ]
    assert options.keys() <= {*kept, "--data.batch", "--data.size", "--run.epochs", "--run.per_device"}, (
        "an option that this test does not pass on"
    )
    return more + [word for key in kept if key in options for word in (key, options[key])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands run: data/imagenet with train and val, data/my_images."""
    folder = tmp_path_factory.mktemp("readme")
    rng = np.random.default_rng(0)
    for place in ("imagenet/train/n01", "imagenet/train/n02", "imagenet/val/n01", "imagenet/val/n02", "my_images/a/b"):
        (folder / "data" / place).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (70, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "data" / place / f"{i}.jpg")
    return folder


def test_every_command(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert len(commands()) >= 8
    for command in commands():
        words = shlex.split(command.replace(" /data/", f" {folder}/data/"))
        main = next(word for word in words if word in MAINS)
        MAINS[main](tiny(words[words.index(main) + 1 :]))
    for run in (folder / "output").iterdir():
        assert (run / "report.json").exists() and (run / "config.yaml").exists(), run


def test_the_command_of_the_grid():
    """It is run in test_data_scaling; here its options are read, and those of its yamls."""
    (line,) = [line for block in blocks("bash") for line in block.splitlines() if "benchmarks" in line]
    cells = data_scaling.plan(*data_scaling.parser().parse_known_args(shlex.split(line)[3:]))
    assert len(cells) == 6 and cells[0][2].keys() == {"pretrain", "knn", "linear"}


def test_the_make_commands_are_targets():
    said = [line.split()[1] for block in blocks("bash") for line in block.splitlines() if line.startswith("make ")]
    targets = re.findall(r"^([\w.]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert said == ["quickstart", "test"] and set(said) <= set(targets)


def test_the_python_examples(folder, monkeypatch):
    """After the commands above, which leave output/mae_vit_base."""
    monkeypatch.chdir(folder)
    if not (folder / "output/mae_vit_base").exists():
        test_every_command(folder, monkeypatch)
    space = {"images": torch.zeros(2, 3, 64, 64)}
    for block in blocks("python"):
        if "features.npy" not in block:
            exec(block, space)
    assert space["loss"].isfinite()
    assert space["features"].maps[-1].shape == (2, 24, 4, 4) and space["features"].prefix.shape == (2, 1, 24)
    assert load_encoder("output/mae_vit_base").plan["name"] == "vit_base_patch16_224"


def test_the_example_of_features(folder, monkeypatch):
    monkeypatch.chdir(folder)
    if not (folder / "output/my_features").exists():
        test_every_command(folder, monkeypatch)
    space = {}
    exec(next(block for block in blocks("python") if "my_features" in block), space)
    assert space["features"].shape == (4, 24) and len(space["paths"]) == 4
    assert (folder / "output/mae_vit_base_export/onnx/README.md").exists()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target
