"""Pretrained without its last blocks, an encoder is whole again in fine-tuning, and what is fresh is named."""

import json

import pytest
import torch
from safetensors import safe_open

from models.encoders.build import build_encoder
from models.encoders.weights import load_encoder
from models.mim.recipes import fastmim, simmim
from models.transfer.classify import Classify
from tests.test_main import fill_folder, finetune, pretrain
from tests.test_weights import NORMALIZATION, exported, random
from util.checkpoint import export
from util.errors import UserError

PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
WINDOWS = {"img_size": 64, "embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 1, 2, 2), "window_size": 2}
STAGES = {"depths": (1, 2, 2, 2), "dims": (8, 8, 16, 16)}
WHOLE = {
    "vit_base_patch16_224": PLAIN | {"drop_path_rate": 0.3},
    "beit_base_patch16_224": PLAIN,
    "swin_tiny_patch4_window7_224": WINDOWS,
    "swinv2_tiny_window8_256": WINDOWS,
    "pvt_v2_b0": {"depths": (1, 2, 2, 2), "embed_dims": (8, 16, 16, 32), "num_heads": (1, 1, 2, 2)},
    "convnextv2_atto": STAGES,
    "cswin_tiny": {"embed_dim": 8, "depths": (1, 2, 2, 2), "num_heads": (2, 2, 2, 2), "drop_path_rate": 0.3},
}
PYRAMIDS = [name for name in WHOLE if WHOLE[name] not in (PLAIN, PLAIN | {"drop_path_rate": 0.3})]
every = pytest.mark.parametrize("name", WHOLE)


def pair(name, drop_last):
    """The whole encoder, and the one without its last blocks, with the same weights."""
    whole = random(build_encoder(name, **WHOLE[name]))
    short = build_encoder(name, drop_last=drop_last, **WHOLE[name]).eval()
    kept = {key: value for key, value in whole.state_dict().items() if key in short.state_dict()}
    short.load_state_dict(kept)
    return whole, short


def blocks(encoder):
    backbone = getattr(encoder, "vit", getattr(encoder, "backbone", encoder))
    stages = getattr(backbone, "stages", getattr(backbone, "layers", [backbone]))
    return [block for stage in stages for block in stage.blocks]


@every
@pytest.mark.parametrize("drop_last", [1, 2, 3])
@torch.no_grad()
def test_the_blocks_that_stay_compute_what_they_did(name, drop_last):
    whole, short = pair(name, drop_last)
    assert len(blocks(short)) == len(blocks(whole)) - drop_last
    seen = []
    last = blocks(whole)[-1 - drop_last]
    last.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    blocks(short)[-1].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    images = torch.randn(2, 3, 64, 64)
    whole(images), short(images)
    assert torch.equal(*seen)
    rates = [
        [getattr(part, "drop_prob", 0.0) for part in blocks(e)[-1 - n].modules()]
        for e, n in ((whole, drop_last), (short, 0))
    ]
    assert rates[0] == rates[1]


@pytest.mark.parametrize("name", PYRAMIDS)
@torch.no_grad()
def test_a_stage_without_blocks_goes_whole(name):
    whole, short = pair(name, 2)
    assert (short.strides, short.dims) == ([4, 8, 16], whole.dims[:3]) and not short.normed
    images = torch.randn(1, 3, 64, 64)
    for one, two in zip(short(images).maps, whole(images).maps):
        assert torch.equal(one, two)
    assert pair(name, 3)[1].strides == [4, 8, 16] and pair(name, 1)[1].strides == [4, 8, 16, 32]


@every
@pytest.mark.parametrize("drop_last", [1, 2])
def test_every_parameter_of_a_short_encoder_is_used_and_in_a_layer(name, drop_last):
    _, short = pair(name, drop_last)
    short.train()
    features = short(torch.randn(2, 3, 64, 64))
    (features.maps[-1] * torch.randn_like(features.maps[-1])).sum().backward()
    layered = [id(p) for layer in short.layers for p in layer]
    assert len(layered) == len(set(layered))
    assert all(p.grad is not None for p in short.parameters() if p.requires_grad)
    rest = {key for key, p in short.named_parameters() if id(p) not in layered}
    assert all(".norm." in f".{key}" and "blocks" not in key for key in rest)


def test_methods_take_what_is_left():
    """The last stride is 16 px now: guesses are made from there."""
    short = pair("swin_tiny_patch4_window7_224", 2)[1]
    assert simmim(short).target.unit == 16
    for mim in (simmim(short), fastmim(short, depth=1, width=32, heads=2)):
        assert mim({"image": torch.randn(2, 3, 64, 64)})["loss"].isfinite()


# weights


@every
def test_a_file_says_what_it_lacks_and_comes_back_as_it_is(name, tmp_path):
    short, lines = exported(tmp_path, name, drop_last=2, **WHOLE[name]), []
    again = load_encoder(str(tmp_path), log=lines.append)
    n = len(short.state_dict())
    assert again.plan["args"]["drop_last"] == 2 and f"encoder {n}/{n} tensors" in lines[0] and "fresh" not in lines[0]
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(images).maps[-1], short(images).maps[-1])


@every
@pytest.mark.parametrize("drop_last", [1, 2])
def test_the_whole_encoder_is_built_and_the_fresh_blocks_are_named(name, drop_last, tmp_path):
    short, lines = exported(tmp_path, name, drop_last=drop_last, **WHOLE[name]), []
    encoder = load_encoder(str(tmp_path), log=lines.append, whole=True)
    own, kept = encoder.state_dict(), short.state_dict()
    assert (
        own.keys() == build_encoder(name, **WHOLE[name]).state_dict().keys() and "drop_last" not in encoder.plan["args"]
    )
    assert all(torch.equal(own[key], value) for key, value in kept.items())
    assert f"encoder {len(kept)}/{len(own)} tensors" in lines[0]
    said = lines[0].partition("; left out in pretraining, now fresh: ")[2]
    fresh = [part.split(" (")[0] for part in said.split(", ")]
    missing = own.keys() - kept.keys()
    assert missing == {key for key in own if any(key == part or key.startswith(f"{part}.") for part in fresh)}
    counted = sum(int(part.split("(")[1].split()[0]) if "(" in part else 1 for part in said.split(", "))
    assert counted == len(missing) == len(own) - len(kept)
    if name == "vit_base_patch16_224":
        named = ", ".join(f"vit.blocks.{i} (12 tensors)" for i in range(4 - drop_last, 4))
        assert said == named


def test_other_gaps_are_still_refused(tmp_path):
    exported(tmp_path, "vit_base_patch16_224", drop_last=1, **PLAIN)
    with pytest.raises(ValueError, match="missing 12: vit.blocks.3.*and 9 more"):
        load_encoder(str(tmp_path), whole=True, depth=5)
    assert len(load_encoder(str(tmp_path), whole=True, drop_last=2, allow_partial=True).vit.blocks) == 2
    lines = []
    assert len(load_encoder(str(tmp_path), log=lines.append, drop_last=0).vit.blocks) == PLAIN["depth"]
    assert "left out in pretraining, now fresh: vit.blocks." in lines[0]
    with safe_open(tmp_path / "encoder.safetensors", "pt") as file:
        assert json.loads(file.metadata()["encoder"])["args"]["drop_last"] == 1


def test_a_whole_stage_and_its_norm_come_back_with_changes(tmp_path):
    """Windows grow, and the norm after the last stage is there again."""
    export(tmp_path / "encoder.safetensors", pair("swin_tiny_patch4_window7_224", 2)[1], NORMALIZATION)
    lines = []
    encoder = load_encoder(str(tmp_path), log=lines.append, whole=True, window_size=4, drop_path_rate=0.1)
    assert encoder.normed and encoder.strides[-1] == 32
    assert "resized: bias tables 2x2 to 4x4 (6)" in lines[0]
    assert "backbone.layers.3 (29 tensors), backbone.norm (2 tensors)" in lines[0]
    assert Classify(encoder, 5).logits(torch.randn(2, 3, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("vit_base_patch16_224", PLAIN | {"drop_last": 4}, "drop_last is 4 of 4 blocks: it must be from 0 to 3"),
        ("swin_tiny_patch4_window7_224", WINDOWS | {"drop_last": 8}, "drop_last is 8 of 8 blocks"),
        ("cswin_tiny", WHOLE["cswin_tiny"] | {"drop_last": -1}, "drop_last is -1 of 7 blocks"),
        ("regnetx_002", {"drop_last": 1}, "not made of stages of blocks"),
        (
            "vit_base_patch16_224",
            PLAIN | {"drop_last": 1, "taps": (1, 3)},
            "taps are .1, 3., but there are blocks 0 to 2",
        ),
        ("vit_base_patch16_224", PLAIN | {"drop_lst": 1}, 'no argument "drop_lst"; the nearest is "drop_last"'),
    ],
)
def test_what_cannot_be_left_out_is_said(name, args, message):
    with pytest.raises(ValueError, match=message):
        build_encoder(name, **args)


# the mains

DEEPER = "{patch_size: 7, embed_dim: 16, depth: 3, num_heads: 2, position: sincos, drop_last: 2}"


def test_from_pretraining_to_fine_tuning(tmp_path, capsys):
    root = fill_folder(tmp_path / "images", "RGB", 20)
    pretrain(root, tmp_path / "run", "--encoder.args", DEEPER)
    capsys.readouterr()
    finetune("finetune", tmp_path / "run", root, tmp_path / "whole")
    said = capsys.readouterr().out
    assert "left out in pretraining, now fresh: vit.blocks.1 (12 tensors), vit.blocks.2 (12 tensors)" in said
    assert len(blocks(load_encoder(str(tmp_path / "whole")))) == 3
    for task in ("knn", "linear"):  # nothing would train what is fresh
        finetune(task, tmp_path / "run", root, tmp_path / task)
        said = capsys.readouterr().out
        assert "now fresh" not in said and "tensors" in said
    with pytest.raises(UserError, match="drop_last is 3 of 3 blocks"):
        pretrain(root, tmp_path / "none", "--encoder.args", DEEPER.replace("drop_last: 2", "drop_last: 3"))
