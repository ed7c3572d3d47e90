"""Hierarchical encoders from files of others: Swins, mmpretrain's spelling, timm's own; nobody names a layout."""

import json
import re
import time

import pytest
import torch
import torch.nn.functional as F
from timm.models import swin_transformer
from timm.models.swin_transformer import get_relative_position_index
from torch import nn

from models.encoders import released
from models.encoders.build import build_encoder
from models.encoders.layers import sincos
from models.encoders.released import mmpretrain
from models.encoders.released import timm as timms
from models.encoders.released.derived import shifted_mask
from models.encoders.released.source import open_weights
from models.encoders.weights import load_encoder, load_normalization, load_state
from models.mim.recipes import mae, mixmim, simmim
from models.mim.weights import load_method
from tests.official import golden
from tests.test_encoders import CASES, small

SWIN = {"img_size": 96, "window_size": 6, "embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 1, 2, 2)}
V1, V2 = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"


def random(name, in_chans=3, **args):
    torch.manual_seed(0)
    encoder = build_encoder(name, in_chans, **args)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.2)
    return encoder.eval()


def official_swin(encoder, buffers=True):
    """The tensors of a Swin as Microsoft's code writes them, with what that code keeps beside the weights."""
    state = {}
    for key, value in encoder.state_dict().items():
        key = key.replace("stem.", "patch_embed.", 1).removeprefix("backbone.")
        state[re.sub(r"^layers\.(\d+)\.down", lambda found: f"layers.{int(found[1]) - 1}.down", key)] = value
    for i, stage in enumerate(encoder.backbone.layers):
        for j, block in enumerate(stage.blocks if buffers else ()):
            place, (window, _) = f"layers.{i}.blocks.{j}.", block.window_size
            state[f"{place}attn.relative_position_index"] = get_relative_position_index(window, window)
            if hasattr(block.attn, "relative_coords_table"):
                state[f"{place}attn.relative_coords_table"] = block.attn.relative_coords_table
            if block.shift_size[0]:
                state[f"{place}attn_mask"] = shifted_mask(SWIN["img_size"] // 4 // 2**i // window, window)
    return state | {"head.weight": torch.zeros(3, 64), "head.bias": torch.zeros(3)}


def saved(folder, state, name="official.pth"):
    torch.save({"model": state, "epoch": 3}, folder / name)
    return str(folder / name)


def same_features(encoder, again, side=96):
    images = torch.randn(2, encoder.in_chans, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for ours, theirs in zip(encoder(images).maps, again(images).maps, strict=True):
            torch.testing.assert_close(ours, theirs)


# Microsoft's Swin and SwinV2


@pytest.mark.parametrize("name", [V1, V2])
@pytest.mark.parametrize("channels", [3, 4])
def test_an_official_swin_tells_all_of_itself(name, channels, tmp_path):
    encoder, lines = random(name, channels, **SWIN), []
    again = load_encoder(saved(tmp_path, official_swin(encoder)), log=lines.append)
    n = len(encoder.state_dict())
    assert f"encoder {n}/{n} tensors" in lines[0] and "head 2" in lines[0] and "resized" not in lines[0]
    assert again.plan["args"]["img_size"] == 96 and again.plan["args"]["window_size"] == 6
    same_features(encoder, again)


def test_a_pretrained_swinv2_comes_with_its_decoder(tmp_path):
    mim = simmim(random(V2, **SWIN), unit=32)
    state = {f"encoder.{key}": value for key, value in official_swin(mim.encoder).items() if "head" not in key}
    state |= {"encoder.mask_token": torch.randn(1, 1, 8)}
    state |= {"decoder.0.weight": torch.randn(3072, 64, 1, 1), "decoder.0.bias": torch.randn(3072)}
    lines = []
    again = load_method(saved(tmp_path, state), lines.append)
    assert type(again.hide).__name__ == "Replace" and "decoder 3/3" in lines[1] and "simmim" in lines[1]
    same_features(mim.encoder, again.encoder)


@pytest.mark.parametrize("before", [(4, 4, 4, 2), (6, 6, 6, 3), (0, 0, 0, 0)])
def test_windows_of_pretraining_are_read_off_coordinates(before, tmp_path):
    encoder = random(V2, pretrained_window_sizes=before, **SWIN)
    again = load_encoder(saved(tmp_path, official_swin(encoder)))
    assert again.plan["args"]["pretrained_window_sizes"] == (before if any(before) else (6, 6, 6, 3))
    same_features(encoder, again)
    wider = load_encoder(saved(tmp_path, official_swin(encoder)), window_size=8, img_size=128)
    told = random(V2, **SWIN | {"window_size": 8, "img_size": 128},
                  pretrained_window_sizes=before if any(before) else (6, 6, 6, 3))  # fmt: skip
    same_features(told, wider, 128)


def test_a_swinv2_without_buffers_says_what_was_taken_for_granted(tmp_path):
    encoder, lines = random(V2, **SWIN), []
    source = saved(tmp_path, official_swin(encoder, buffers=False))
    load_encoder(source, log=lines.append)
    assert f"no tensor tells the windows: window_size and img_size as in {V2}" in lines[0]
    same_features(encoder, load_encoder(source, window_size=6, img_size=96))


def test_coordinates_of_another_geometry_are_told(tmp_path):
    state = official_swin(random(V2, **SWIN))
    key = next(key for key in state if key.endswith("relative_coords_table"))
    with pytest.raises(ValueError, match="relative_coords_table .*another geometry"):
        load_encoder(saved(tmp_path, state | {key: state[key].flip(1)}))


def test_bias_tables_go_to_another_window(tmp_path):
    state, lines = official_swin(random(V1, **SWIN)), []
    again = load_encoder(saved(tmp_path, state), log=lines.append, window_size=7, img_size=224)
    assert "resized: bias tables 6x6 to 7x7 (6), bias tables 3x3 to 7x7 (2)" in lines[0]
    assert again.backbone.layers[0].blocks[0].attn.relative_position_bias_table.shape == (169, 1)


# mmpretrain


MLP = (("mlp.fc1", "ffn.layers.0.0"), ("mlp.fc2", "ffn.layers.1"))
BACKBONE = {  # official, mmpretrain
    "vit": ((r"^blocks\.", "layers."), (r"norm(\d)\.", r"ln\1."), (r"^norm\.", "ln1.")),
    "mixmim": ((r"norm(\d)\.", r"ln\1."),),
    "swin": ((r"^layers\.", "stages."), (r"\.attn\.", ".attn.w_msa."), (r"^norm\.", "norm3.")),
    "convnext": ((r"\.dwconv", ".depthwise_conv"), (r"\.pwconv", ".pointwise_conv"), (r"^norm\.", "norm3.")),
}
NECK = (
    (r"^fill\.token", "mask_token"),
    (r"^project\.", "decoder_embed."),
    (r"^cells\.linear\.", "decoder_pred."),
    (r"^blocks\.", "decoder_blocks."),
    (r"^norm\.", "ln1."),
    (r"norm(\d)\.", r"ln\1."),
    *MLP,
)


def renamed(key, names):
    for old, new in names:
        key = re.sub(old, new, key)
    return key


def in_mmpretrain(state, kind, v2=False):
    """Official tensors by mmpretrain's keys, in its order: what its converters do."""
    found = {}
    for key, value in state.items():
        if key.endswith(("attn_mask", "relative_coords_table")) or key.startswith("head."):
            continue
        if key.endswith("downsample.reduction.weight"):
            value = value.unflatten(1, (4, -1))[:, [0, 2, 1, 3]].transpose(1, 2).flatten(1)
        elif "downsample.norm." in key and not v2:
            value = value.unflatten(0, (4, -1))[[0, 2, 1, 3]].T.flatten()
        if v2:
            key = re.sub(r"^layers\.(\d+)\.down", lambda found: f"layers.{int(found[1]) + 1}.down", key)
        found["backbone." + renamed(key, (("embed.proj", "embed.projection"), *MLP, *BACKBONE[kind]))] = value
    return found | {"data_preprocessor.mean": torch.zeros(3)}


def with_head(state):
    return state | {"head.fc.weight": torch.zeros(3, 4)}


def neck(head):
    return {f"neck.{renamed(key, NECK)}": value for key, value in head.state_dict().items()}


@pytest.mark.parametrize("name, kind", [(V1, "swin"), (V2, "swin"), ("mixmim_base", "mixmim")])
def test_swins_of_mmpretrain(name, kind, tmp_path):
    encoder, lines = random(name, **SWIN | ({"window_size": (6, 6, 6, 3)} if kind == "mixmim" else {})), []
    state = official_swin(encoder)
    if kind == "mixmim":
        state["absolute_pos_embed"] = encoder.positions(24, 24, 8, torch.device("cpu")).flatten(0, 1)[None]
    source = saved(tmp_path, with_head(in_mmpretrain(state, kind, name == V2)))
    changes = {"window_size": 6, "img_size": 96} if name == V2 else {}
    again = load_encoder(source, log=lines.append, **changes)
    n = len(encoder.state_dict())
    assert f"encoder {n}/{n} tensors" in lines[0]
    same_features(encoder, again)


def test_merging_layers_of_mmpretrain_give_what_timms_do():
    """nn.Unfold has the channel before the place: numbers, not names, prove the order."""
    merge, x = swin_transformer.PatchMerging(6, 12), torch.randn(2, 8, 8, 6)
    for parameter in merge.parameters():
        nn.init.normal_(parameter)
    theirs = in_mmpretrain({f"layers.0.downsample.{key}": value for key, value in merge.state_dict().items()}, "swin")
    weight, gain, bias = (theirs[f"backbone.stages.0.downsample.{key}"] for key in
                          ("reduction.weight", "norm.weight", "norm.bias"))  # fmt: skip
    columns = F.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)
    y = F.linear(F.layer_norm(columns, (24,), gain, bias), weight)
    torch.testing.assert_close(y, merge(x).flatten(1, 2), atol=1e-4, rtol=1e-4)
    back = mmpretrain.official(theirs)
    assert all(torch.equal(back[f"layers.0.downsample.{key}"], value) for key, value in merge.state_dict().items())


@pytest.mark.parametrize("name", ["convnext_tiny", "convnextv2_tiny"])
def test_convnexts_of_mmpretrain(name, tmp_path):
    encoder = random(name, **CASES[name])
    state = {}
    for key, value in encoder.state_dict().items():
        key = key.replace("stem.", "downsample_layers.0.", 1).removeprefix("backbone.")
        key = re.sub(r"^stages\.(\d+)\.downsample", r"downsample_layers.\1", key).replace(".blocks.", ".")
        for old, new in (("conv_dw", "dwconv"), ("mlp.fc", "pwconv"), ("mlp.grn.weight", "grn.gamma")):
            key = key.replace(old, new)
        state[key.replace("mlp.grn.bias", "grn.beta")] = value
    again = load_encoder(saved(tmp_path, with_head(in_mmpretrain(state, "convnext"))))
    assert again.plan["name"].startswith(name.partition("_")[0] + "_")
    same_features(encoder, again, 64)


def test_methods_of_mmpretrain_come_with_their_necks(tmp_path):
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}
    mim = mae(random("vit_base_patch16_224", position="sincos", **size), depth=1, width=32, heads=2).eval()
    state = {key.removeprefix("vit."): value for key, value in mim.encoder.state_dict().items()}
    table = torch.cat([torch.zeros(1, 32), sincos(4, 4, 32).flatten(0, 1)])[None]
    state = in_mmpretrain(state, "vit") | neck(mim.head) | {"neck.decoder_pos_embed": table}
    lines = []
    again = load_method(saved(tmp_path, state), lines.append, heads=2)
    assert "(mae)" in lines[0] and "tensors; " not in lines[1]
    images = {"image": torch.randn(2, 3, 32, 32)}
    losses = []
    for method in (mim, again):
        torch.manual_seed(3)
        losses.append(method(images)["loss"])
    torch.testing.assert_close(*losses)


def test_simmim_and_mixmim_of_mmpretrain(tmp_path):
    mim = simmim(random(V1, **SWIN), unit=32)
    state = in_mmpretrain(official_swin(mim.encoder), "swin") | {
        "backbone.mask_token": torch.randn(1, 1, 8),
        "neck.decoder.0.weight": torch.randn(3072, 64, 1, 1),
        "neck.decoder.0.bias": torch.randn(3072),
    }
    lines = []
    same_features(mim.encoder, load_method(saved(tmp_path, state), lines.append).encoder)
    assert "simmim" in lines[1] and "decoder 3/3" in lines[1]
    mix = mixmim(random("mixmim_base", **SWIN | {"window_size": (6, 6, 6, 3)}), depth=1, width=16, heads=2)
    positions = mix.encoder.positions(24, 24, 8, torch.device("cpu")).flatten(0, 1)[None]
    state = official_swin(mix.encoder) | {"absolute_pos_embed": positions}
    state = in_mmpretrain(state, "mixmim") | neck(mix.head.head)
    state["neck.decoder_pos_embed"] = sincos(3, 3, 16).flatten(0, 1)[None]
    lines = []
    same_features(mix.encoder, load_method(saved(tmp_path, state), lines.append, heads=2).encoder)
    assert "mixmim" in lines[1]


FIXTURES = {"mae": "vit", "milan": "vit", "beit": "vit", "simmim_vit": "vit", "simmim_swin": "swin", "mixmim": "mixmim",
            "convnextv2": "convnext"}  # fmt: skip


@pytest.mark.parametrize("name, kind", FIXTURES.items())
def test_official_fixtures_come_back_from_mmpretrains_spelling(name, kind):
    _, state, *_ = golden(name)
    state = {key.removeprefix("encoder."): value for key, value in state.items() if not key.startswith("head.")}
    state = {key: value for key, value in state.items() if not key.endswith("attn_mask")}
    beside = ("decoder",) if name.startswith(("beit", "simmim")) else ("decoder", "mask_token")
    encoder = {k: v for k, v in state.items() if not k.startswith((*beside, "lm_head."))}
    spelled = {k: v for k, v in in_mmpretrain(encoder, kind).items() if k.startswith("backbone.")}
    names = ((r"^decoder_norm\.", "ln1."), (r"norm(\d)\.", r"ln\1."), *MLP)
    spelled |= {f"neck.{renamed(k, names)}": v for k, v in state.items() if k.startswith(beside)}
    spelled |= {k.replace("lm_head.", "head.cls_head."): v for k, v in state.items() if k.startswith("lm_head.")}
    assert mmpretrain.speaks(spelled) and not any(key in state for key in spelled)
    back = mmpretrain.official(spelled)
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
    assert released.recognise(spelled)[:2] == released.recognise(state)[:2]
    assert released.normalization(name, spelled) == released.IMAGENET  # its BEiT, too


# timm's own


@pytest.mark.parametrize("name", ["test_convnext", "test_resnet", "hiera_tiny_224", "pvt_v2_b0", "mvitv2_tiny",
                                  "coatnet_pico_rw_224", "davit_tiny"])  # fmt: skip
def test_timms_own_files_are_known_by_their_shapes(name, tmp_path):
    began = time.process_time()
    outline, lines = timms.outline(name, in_chans=4), []
    assert name in timms.architectures(timms.outline(name))
    state = {key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in outline.items()}
    encoder = load_encoder(saved(tmp_path, state), log=lines.append)
    assert encoder.plan["name"] == name and encoder.in_chans == 4
    assert f"taken for {name}" in lines[0] and "resized" not in lines[0] and time.process_time() - began < 10


def test_where_several_fit_the_file_may_bear_the_name(tmp_path):
    state = {key: torch.zeros(()).expand(value.shape) for key, value in timms.outline("resnet18").items()}
    lines = []
    assert load_encoder(saved(tmp_path, state), log=lines.append).plan["name"] == "resnet18"
    assert "taken for resnet18 (resnetblur18 would fit, too)" in lines[0]
    assert load_encoder(saved(tmp_path, state, "resnetblur18.pth")).plan["name"] == "resnetblur18"


def test_timms_config_tells_architecture_and_normalization(tmp_path):
    name = "focalnet_tiny_srf"
    encoder = small(name)
    keys = {**{f"stem.{k}": f"stem.{k}" for k in encoder.stem.state_dict()}}
    state = {keys.get(key, key.removeprefix("backbone.")): value for key, value in encoder.state_dict().items()}
    config = {
        "architecture": f"{name}",
        "model_args": {"num_classes": 7},
        "pretrained_cfg": {"mean": [0.1], "std": [2]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = load_encoder(saved(tmp_path, state))
    same_features(encoder, again, 64)
    assert load_normalization(str(tmp_path / "official.pth")) == {"mean": [0.1], "std": [2]}


@pytest.mark.parametrize("name", [V1, V2, "convnextv2_tiny"])
def test_timms_swins_and_convnexts_of_any_size_need_no_name(name, tmp_path):
    encoder = random(name, **(SWIN if "swin" in name else CASES[name]))
    stem = "patch_embed." if "swin" in name else "stem."
    state = {key.replace("stem.", stem, 1).removeprefix("backbone."): v for key, v in encoder.state_dict().items()}
    changes = {"window_size": 6, "img_size": 96} if name == V2 else {}
    same_features(encoder, load_encoder(saved(tmp_path, state), **changes))


def test_another_size_of_other_families_needs_the_name(tmp_path):
    encoder = small("pvt_v2_b0")
    state = {key.replace("stem.", "patch_embed.", 1).removeprefix("backbone."): value
             for key, value in encoder.state_dict().items()}  # fmt: skip
    source = saved(tmp_path, state)
    with pytest.raises(ValueError, match="of timm's pvt_v2, but none of the architectures there.* give encoder"):
        load_encoder(source)
    same_features(encoder, load_encoder(source, encoder="pvt_v2_b0", **CASES["pvt_v2_b0"]), 64)


# sizes


SIZES = ("base_patch4_window7_224", "base_patch4_window12_384", "large_patch4_window7_224")


@pytest.mark.parametrize(
    "name", [*(f"swin_{size}" for size in SIZES), "swinv2_base_window8_256", "swinv2_large_window12_192"]
)
def test_every_key_of_a_full_sized_swin_is_known(name):
    with torch.device("meta"):
        encoder = build_encoder(name)
        state = official_swin(encoder, buffers=False)
    origin, family, state = released.recognise(state)
    described, args, *_ = family.describe(state)
    with torch.device("meta"):
        again = build_encoder(described, **args)
    ours = {family.rename(key): value for key, value in state.items() if family.rename(key)}
    line = load_state(again, ours)
    n = len(encoder.state_dict())
    assert f"encoder {n}/{n} tensors" in line and "resized" not in line and family.name == name.partition("_")[0]


@pytest.mark.parametrize("name", ["swinv2_base_window8_256", "convnextv2_base"])
def test_a_file_of_base_size_goes_in_within_ten_seconds(name, tmp_path):
    state = {key: torch.zeros(()).expand(value.shape) for key, value in timms.outline(name).items()}
    source, began, lines = saved(tmp_path, state), time.process_time(), []
    load_encoder(source, log=lines.append)
    assert time.process_time() - began < 10 and "taken for" in lines[0]
    assert open_weights(source).name == name
