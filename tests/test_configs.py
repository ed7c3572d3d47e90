"""Every yaml loads, and builds its model at full size without memory for it; sizes agree with the papers."""

import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.encoders.build import build_encoder
from models.mim.recipes import METHODS
from models.transfer.recipes import TASKS
from util import flops
from util.config import Finetune, Pretrain
from util.data.loader import read_schedule
from util.optim import build_optimizer
from util.options import build, read

ROOT = Path(__file__).parent.parent / "configs"
PRETRAIN = sorted((ROOT / "pretrain").glob("*.yaml")) + [ROOT / "quickstart/pretrain.yaml"]
TRANSFERS = [
    *sorted((ROOT / "finetune").glob("*.yaml")),
    *(ROOT / f"quickstart/{t}.yaml" for t in ("linear", "finetune")),
]
FINETUNE = [path for path in TRANSFERS if path.stem not in ("knn", "embed", "export")]


def encoder_of(config, in_chans=3, **changes):
    size = read_schedule(config.data.size)[-1][1]
    with torch.device("meta"):
        return build_encoder(config.encoder.name, in_chans, **{"img_size": size} | config.encoder.args | changes)


def pretrained(name):
    return read(Pretrain, ["--config", str(ROOT / "pretrain" / f"{name}.yaml")])[0]


@pytest.mark.parametrize("path", PRETRAIN, ids=lambda path: path.stem)
def test_pretraining_configs_build(path):
    config, _ = read(Pretrain, ["--config", str(path)])
    if config.encoder is None:  # that of the pretraining that it continues
        config.encoder = pretrained(Path(config.weights).name).encoder
    task = build("method", config.method, METHODS, encoder_of(config))
    optim = config.optim
    groups = build_optimizer(task, optim.name, optim.weight_decay, no_decay=optim.no_decay).param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, optim.weight_decay}
    for word in optim.no_decay:
        assert any(word in name for name, _ in task.named_parameters()), f"{word} is in no name"
    unit = task.masker.unit if hasattr(task, "masker") else task.encoder.patch  # a tokenizer is trained without masks
    for _, size in read_schedule(config.data.size):
        assert all(side % unit == 0 for side in size)


@pytest.mark.parametrize("path", FINETUNE, ids=lambda path: path.stem)
def test_transfer_configs_build(path):
    """With the encoder of the pretraining that the config names, and its changes."""
    config, _ = read(Finetune, ["--config", str(path)])
    if config.encoder is None:
        config.encoder = pretrained(Path(config.weights).parent.name).encoder
    task = build("task", config.task, TASKS, encoder_of(config, **config.changes), 1000)
    optim = config.optim
    groups = build_optimizer(
        task, optim.name, optim.weight_decay, layer_decay=optim.layer_decay, no_decay=optim.no_decay
    ).param_groups
    scales = {group["lr_scale"] for group in groups}
    assert max(scales) == 1 and (len(scales) > 5) == (optim.layer_decay < 1)


def test_every_config_says_how_to_run_it_and_what_to_expect():
    for path in ROOT.rglob("*.yaml"):
        header = [line for line in path.read_text().splitlines() if line.startswith("#")]
        folder = f"configs/{path.parent.name}/{path.name}"
        assert any(f"--config {folder}" in line for line in header), path
        assert "top-1" in " ".join(header), path


SAYS = re.compile(r"# Paper: ([\d.]+) M parameters(?:, ([\d.]+) G multiply-adds at (\d+) px)?")
SAYING = [path for path in PRETRAIN if SAYS.search(path.read_text())]


@pytest.mark.parametrize("path", SAYING, ids=lambda path: path.stem)
def test_sizes_are_those_that_the_headers_quote(path):
    """Within 2 %, with a classifier of 1,000 classes, as the papers count."""
    config, _ = read(Pretrain, ["--config", str(path)])
    mega, giga, size = SAYS.search(path.read_text()).groups()
    encoder = encoder_of(config, **({"img_size": int(size)} if size else {})).eval()
    classifier = 1000 * (encoder.dims[-1] + 1)
    assert (flops.parameters(encoder) + classifier) / 1e6 == pytest.approx(float(mega), rel=0.02)
    if giga:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            encoder(torch.zeros(1, 3, int(size), int(size), device="meta"))
        assert counter.get_total_flops() / 2e9 == pytest.approx(float(giga), rel=0.02)


@pytest.mark.parametrize(
    ("name", "args", "giga", "mega"),
    [
        ("vit_base_patch16_224", {}, 17.58, 86),
        ("vit_large_patch16_224", {}, 61.6, 304),
        ("swin_base_patch4_window7_224", {}, 15.4, 88),
        ("convnextv2_tiny", {}, 4.47, 28.6),
        ("pvt_v2_b2", {}, 4.0, 25.4),
        ("mvitv2_tiny", {}, 4.7, 24),
    ],
)
def test_sizes_agree_with_the_papers(name, args, giga, mega):
    """Multiply-adds within 2 %; parameters within 3 %, since the papers count a classifier too."""
    encoder = build_encoder(name, **args)
    assert flops.flops(encoder, torch.zeros(1, 3, 224, 224)) / 1e9 == pytest.approx(giga, rel=0.02)
    assert flops.parameters(encoder) / 1e6 == pytest.approx(mega, rel=0.03)
