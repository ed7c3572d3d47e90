"""Encoders for timm, torchvision, detectron2 and open_clip: each gives what the encoder gives, and all comes back."""

import json
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import load_file

from models.encoders.weights import load_encoder, load_normalization
from models.export import detectron2, open_clip, torchvision
from models.export import timm as to_timm
from tests.test_encoders import CASES, small

V2, CLIP = "swinv2_tiny_window8_256", "vit_base_patch16_clip"
WINDOWS = {"img_size": 64, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2), "window_size": 8}  # one for all
ROUND = [
    "vit_base_patch16_224", "vit_base_patch16_clip_224", "deit_tiny_distilled_patch16_224",
    "beit_base_patch16_224", "beitv2_base_patch16_224", "eva_giant_patch14_224", "eva02_tiny_patch14_224",
    "vit_small_patch16_dinov3", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "pvt_v2_b0",
    "davit_tiny", "mvitv2_tiny", "convnext_tiny", "convnextv2_atto", "hiera_tiny_224", "hiera_small_abswin_256",
    "resnet50",
]  # fmt: skip


def facts(encoder, size=None):
    size = size or encoder.plan["args"].get("img_size") or 64
    size = (size, size) if isinstance(size, int) else size
    mean = [0.1 * i for i in range(encoder.in_chans)]
    return SimpleNamespace(
        mean=mean, std=[2.0] * encoder.in_chans, size=size, licence="apache-2.0", origin="ours", notes=[]
    )


def images(encoder, told):
    return torch.randn(2, encoder.in_chans, *told.size, generator=torch.Generator().manual_seed(0))


def compared(form, encoder, folder, size=None):
    """Write, read by the other library, and compare the last map and the prefix; gives the file's facts."""
    told = facts(encoder, size)
    form.write(encoder, told, folder)
    batch = images(encoder, told)
    with torch.no_grad():
        ours = encoder(batch)
    theirs = form.read(folder, encoder)(batch)
    torch.testing.assert_close(theirs.maps[-1], ours.maps[-1], atol=1e-5, rtol=1e-5)
    if theirs.prefix is not None:
        torch.testing.assert_close(theirs.prefix, ours.prefix, atol=1e-5, rtol=1e-5)
    return told


def same_tensors(encoder, again):
    ours, theirs = encoder.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", ROUND)
def test_to_timm_and_back_every_bit_is_the_same(name, tmp_path):
    encoder = small(name)
    told = compared(to_timm, encoder, tmp_path)
    source, lines = str(tmp_path / "model.safetensors"), []
    again = load_encoder(source, log=lines.append)
    n = len(encoder.state_dict())
    assert "(timm)" in lines[0] and f"encoder {n}/{n} tensors" in lines[0] and "resized" not in lines[0]
    same_tensors(encoder, again)
    batch = images(encoder, told)
    with torch.no_grad():
        assert torch.equal(again(batch).maps[-1], encoder(batch).maps[-1])
    assert load_normalization(source) == {"mean": told.mean, "std": told.std}


@pytest.mark.parametrize(
    "name", ["vit_base_patch16_224", "swinv2_tiny_window8_256", "convnextv2_atto", "hiera_tiny_224"]
)
def test_timm_loads_the_folder_and_the_file(name, tmp_path, monkeypatch):
    encoder = small(name)
    told = compared(to_timm, encoder, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    file = timm.create_model(name, checkpoint_path=tmp_path / "model.safetensors", **config["model_args"]).eval()
    folder = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    batch = images(encoder, told)
    with torch.no_grad():
        assert torch.equal(file(batch), folder(batch))
    data = timm.data.resolve_model_data_config(folder)
    assert list(data["mean"]) == told.mean and list(data["input_size"]) == [3, *told.size]
    monkeypatch.chdir(tmp_path)
    shape = {"channels": 3, "height": told.size[0], "width": told.size[1]}
    left = {}
    exec(to_timm.USE.format(name=name, mean=told.mean, std=told.std, **shape), left)
    assert left["features"].isfinite().all()


@pytest.mark.parametrize(
    "name, args, channels, size",
    [
        ("vit_base_patch16_224", {"final_norm": False}, 3, None),  # as fine-tuning on the mean has it
        ("beit_base_patch16_224", {"final_norm": False}, 3, None),
        ("vit_base_patch16_224", {"position": "sincos", "drop_last": 1}, 1, None),
        ("vit_base_patch16_224", {"taps": (0, 1)}, 3, None),
        ("swin_tiny_patch4_window7_224", {}, 5, (96, 64)),
        ("hiera_tiny_224", {"q_pool": 2}, 3, None),
        ("convnextv2_atto", {"layer_groups": "group", "grn": "batch"}, 4, (64, 96)),
    ],
)
def test_timm_takes_other_sizes_and_options(name, args, channels, size, tmp_path):
    encoder = small(name, channels, **args)
    compared(to_timm, encoder, tmp_path, size)
    same_tensors(encoder, load_encoder(str(tmp_path / "model.safetensors")))


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "swinv2_tiny_window8_256", "swin_tiny_patch4_window7_224",
                                  "convnext_tiny", "resnet18", "resnext50_32x4d"])  # fmt: skip
def test_torchvision_gives_the_same(name, tmp_path, monkeypatch):
    monkeypatch.setitem(CASES, "resnet18", {"layers": (1, 1, 1, 1)})  # torchvision fixes its widths
    monkeypatch.setitem(CASES, "resnext50_32x4d", {"layers": (1, 1, 1, 1)})
    monkeypatch.setitem(CASES, "swin_tiny_patch4_window7_224", WINDOWS)
    monkeypatch.setitem(CASES, "swinv2_tiny_window8_256", WINDOWS)
    encoder = small(name)
    told = compared(torchvision, encoder, tmp_path)
    monkeypatch.chdir(tmp_path)
    left, size = {}, {"height": told.size[0], "width": told.size[1]}
    exec(torchvision.USE.format(name=name, mean=told.mean, std=told.std, channels=3, **size), left)
    assert left["features"].shape == (1, 1000)


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "swin_tiny_patch4_window7_224", "resnet50"])
def test_detectron2s_keys_hold_the_tensors(name, tmp_path, monkeypatch):
    monkeypatch.setitem(CASES, "swin_tiny_patch4_window7_224", WINDOWS)
    encoder = small(name)
    told = compared(detectron2, encoder, tmp_path)
    keys = torch.load(tmp_path / "model.pth", weights_only=True)["model"].keys()
    expected = {
        "vit": "backbone.net.blocks.1.mlp.fc1.weight",
        "swi": "backbone.bottom_up.layers.0.downsample.reduction.weight",
        "res": "backbone.bottom_up.res3.0.shortcut.norm.running_var",
    }
    assert expected[name[:3]] in keys and "detectron2 was not asked" in told.notes[0]
    assert ("vit.cls_token" in told.notes[-1]) == (name[:3] == "vit")


@pytest.mark.parametrize("name", [f"{CLIP}_224", f"{CLIP}_quickgelu_224", "test_vit", "test_convnext"])
def test_open_clip_builds_the_tower(name, tmp_path, monkeypatch):
    monkeypatch.setitem(CASES, f"{CLIP}_quickgelu_224", CASES[f"{CLIP}_224"])
    monkeypatch.setitem(CASES, name, CASES.get(name, {}))
    encoder = small(name)
    told = compared(open_clip, encoder, tmp_path, None if "clip" in name else 160)
    keys = load_file(tmp_path / "open_clip_model.safetensors").keys()
    assert all(key.startswith("visual.") for key in keys)
    assert ("visual.transformer.resblocks.0.attn.in_proj_weight" in keys) == ("clip" in name)
    monkeypatch.chdir(tmp_path)
    left, size = {}, {"height": told.size[0], "width": told.size[1]}
    exec(open_clip.USE.format(name=name, mean=told.mean, std=told.std, channels=3, **size), left)
    assert left["features"].isfinite().all()
    if "clip" in name:
        same_tensors(encoder, load_encoder(str(tmp_path / "open_clip_model.safetensors"), encoder=name, num_heads=2))


@pytest.mark.parametrize(
    "form, name, message",
    [
        (to_timm, "mixmim_base", "timm has no mixmim_base; safetensors and onnx take it"),
        (to_timm, "cswin_tiny", "timm has no cswin_tiny"),
        (torchvision, "mixmim_base", "torchvision has no mixmim_base; it has vit, swin, swinv2, convnext and resnet"),
        (torchvision, "convnextv2_atto", "torchvision has no model that equals this convnextv2_atto: .*layer_scale"),
        (torchvision, "swin_tiny_patch4_window7_224", "another shape of .*relative_position_bias_table"),
        (detectron2, "hiera_tiny_224", "detectron2 has no hiera_tiny_224; it has plain vit, swin and resnet"),
        (detectron2, "deit3_small_patch16_224", "detectron2 has no deit3_small_patch16_224"),
        (detectron2, "swin_tiny_patch4_window7_224", "one window size, and this .* has several"),
        (open_clip, "vit_base_patch16_224", "open_clip builds timm's vit_base_patch16_224 only in timm's own size"),
    ],
)
def test_what_a_library_has_not_is_refused_in_one_line(form, name, message, tmp_path):
    encoder = small(name)
    with pytest.raises(ValueError, match=message) as error:
        form.write(encoder, facts(encoder), tmp_path)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
