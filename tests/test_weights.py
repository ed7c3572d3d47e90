"""Files of weights: ours and official ones go in whole, resized where asked, or are refused in one clear line."""

import argparse
import json

import pytest
import torch
from safetensors.torch import load_file

from models.encoders import released
from models.encoders.build import build_encoder
from models.encoders.released.common import DERIVED
from models.encoders.released.derived import shifted_mask
from models.encoders.resize import adapt_channels, resize_table
from models.encoders.weights import load_encoder, load_normalization, load_state
from models.mim.recipes import mae, simmim
from tests.official import GOLDEN, enter
from util.checkpoint import export

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 8, "depths": (2, 1), "num_heads": (1, 2), "window_size": 4}
RELEASED = sorted(path.stem for path in (GOLDEN / "keylists").glob("*.json"))
NORMALIZATION = {"mean": [0.1], "std": [0.2], "size": 16}


def official(name):
    facts = json.loads((GOLDEN / f"{name}.json").read_text())
    state = load_file(GOLDEN / f"{name}.safetensors")
    return facts["constructor"]["args"], {k[6:]: v for k, v in state.items() if k.startswith("state.")}


def random(encoder):
    """An encoder without a zero or a one, as if trained."""
    torch.manual_seed(1)
    for parameter in encoder.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return encoder.eval()


def exported(folder, name, in_chans=3, **args):
    encoder = random(build_encoder(name, in_chans, **args))
    export(folder / "encoder.safetensors", encoder, NORMALIZATION)
    return encoder


# our own files


@pytest.mark.parametrize(
    "name, args",
    [
        ("vit_base_patch16_224", VIT | {"position": "sincos"}),
        ("beit_base_patch16_224", VIT),
        ("swin_tiny_patch4_window7_224", SWIN),
        ("convnextv2_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}),
        ("mixmim_base", SWIN | {"window_size": (4, 2)}),
        ("regnety_002", {}),  # has batch norms' running statistics
    ],
)
def test_our_own_file_comes_back(name, args, tmp_path):
    encoder, lines = exported(tmp_path, name, 1, **args), []
    again = load_encoder(str(tmp_path), log=lines.append).eval()
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(again(images).maps[-1], encoder(images).maps[-1])
    n = len(encoder.state_dict())
    assert f"encoder {n}/{n} tensors" in lines[0] and "ignored" not in lines[0] and "resized" not in lines[0]
    assert load_normalization(str(tmp_path / "encoder.safetensors")) == NORMALIZATION


def test_changes_are_made_and_told(tmp_path):
    exported(tmp_path, "vit_base_patch16_224", **VIT)
    lines = []
    encoder = load_encoder(str(tmp_path), log=lines.append, img_size=(24, 32), in_chans=5, final_norm=False)
    assert encoder.vit.pos_embed.shape == (1, 1 + 6 * 8, 24) and encoder.in_chans == 5 and not encoder.normed
    for what in ("encoder 28/28 tensors", "positions 4x4 to 6x8", "3 to 5 channels", "; ignored: norm 2"):
        assert what in lines[0]


def test_positions_of_a_grid_that_is_not_square(tmp_path):
    wide = exported(tmp_path, "vit_base_patch16_224", **VIT | {"img_size": (8, 32)})  # 2 x 8 places: as many as 4 x 4
    with torch.no_grad():
        wide.vit.pos_embed[:, 1:] = torch.arange(2.0).repeat_interleave(8)[None, :, None]  # tells the row
    export(tmp_path / "encoder.safetensors", wide, NORMALIZATION)
    rows = load_encoder(str(tmp_path), img_size=(8, 16)).vit.pos_embed[0, 1:].unflatten(0, (2, 4))
    assert rows[0].abs().max() < 0.2 and (rows[1] - 1).abs().max() < 0.2


def test_sincos_positions_stay_exact_on_another_grid(tmp_path):
    exported(tmp_path, "vit_base_patch16_224", position="sincos", **VIT)
    encoder = load_encoder(str(tmp_path), img_size=32)
    fresh = build_encoder("vit_base_patch16_224", position="sincos", **VIT | {"img_size": 32})
    assert torch.equal(encoder.vit.pos_embed, fresh.vit.pos_embed)


@pytest.mark.parametrize("name, args, change", [("swin_tiny_patch4_window7_224", SWIN, {"window_size": 8}),
                                                ("mixmim_base", SWIN, {"window_size": 8}),
                                                ("beit_base_patch16_224", VIT, {"img_size": 28})])  # fmt: skip
def test_tables_of_relative_positions_take_another_window(name, args, change, tmp_path):
    encoder, lines = exported(tmp_path, name, **args), []
    again = load_encoder(str(tmp_path), log=lines.append, **change)
    assert "resized: bias tables 4x4 to " in lines[0]  # and how many
    key = next(key for key in encoder.state_dict() if "bias_table" in key or "tables" in key)
    extra = 3 * (name[:4] == "beit")
    table, wider = encoder.state_dict()[key], again.state_dict()[key]
    side = (len(wider) - extra) ** 0.5
    assert side == (15 if extra == 0 else 13) and torch.equal(table[len(table) - extra :], wider[len(wider) - extra :])
    torch.testing.assert_close(table[24], wider[(len(wider) - extra) // 2])  # no offset stays no offset


def test_tables_are_the_same_in_the_same_window_and_may_be_narrow():
    table = torch.randn(49, 2)
    torch.testing.assert_close(resize_table(table[:1], (3, 2)), table[:1].expand(15, -1))
    assert resize_table(table[:9], (4, 3)).shape == (35, 2)


def test_channels_are_repeated_or_summed():
    weight = torch.randn(4, 3, 2, 2)
    images = torch.randn(1, 1, 2, 2)
    grey = torch.einsum("oixy,bixy->bo", weight, images.expand(-1, 3, -1, -1))
    for n in (1, 2, 6):
        adapted = adapt_channels(weight, n)
        assert adapted.shape == (4, n, 2, 2)
        if n % 3 == 0 or n == 1:  # a grey image says the same
            torch.testing.assert_close(torch.einsum("oixy,bixy->bo", adapted, images.expand(-1, n, -1, -1)), grey)


# official files


@pytest.mark.parametrize("name", RELEASED)
def test_every_key_of_a_released_model_is_read_or_known(name):
    assert len(RELEASED) >= 9
    shapes = json.loads((GOLDEN / "keylists" / f"{name}.json").read_text())["shapes"]
    state = {key: torch.zeros(()).expand(size) for key, size in shapes.items()}  # takes no memory
    _, family, _ = released.recognise(state)
    rename, describe = family.rename, family.describe
    encoder_name, args = describe(state)
    with torch.device("meta"):
        encoder = build_encoder(encoder_name, **args)
    own = {key: value.numel() for key, value in encoder.state_dict().items()}
    assert {rename(key): value.numel() for key, value in state.items() if rename(key)} == own
    known = ("decoder", "mask_token", "proj.", "pred.", "absolute_pos_embed", "fc_norm", "head", "norm.", *DERIVED)
    assert all(any(word in key for word in known) for key in state if rename(key) is None)


@pytest.mark.parametrize("name", RELEASED)
def test_a_file_of_every_released_model_goes_in_whole(name, tmp_path):
    """Names and shapes are the official ones, numbers are not; nobody says whose file it is."""
    shapes = json.loads((GOLDEN / "keylists" / f"{name}.json").read_text())["shapes"]
    torch.save({"model": {key: torch.ones(size) for key, size in shapes.items()}}, tmp_path / "official.pth")
    lines = []
    encoder = load_encoder(str(tmp_path / "official.pth"), log=lines.append)
    n = len(encoder.state_dict())
    assert f"encoder {n}/{n} tensors" in lines[0] and "fresh" not in lines[0] and "unread" not in lines[0]


def test_official_files_go_in_by_themselves(tmp_path):
    args, state = official("mae")
    path, lines = tmp_path / "mae.pth", []
    state = {f"module.{key}": value for key, value in state.items()}
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-3), "epoch": 3}, path)
    encoder = load_encoder(f"mae:{path}", log=lines.append, num_heads=args["num_heads"])
    assert encoder.fixed and encoder.normed and encoder.patch == args["patch_size"]
    n = sum(key.startswith("module.decoder") for key in state)
    assert f"decoder {n}" in lines[0] and "mask_token 1" in lines[0]
    assert load_normalization(f"mae:{path}")["mean"][0] == 0.485
    with pytest.raises(ValueError, match="give num_heads"):
        load_encoder(f"mae:{path}")
    with pytest.raises(ValueError, match="positions are not .* position="):  # a table that is not the fixed one
        torch.save({k: v + 0.1 * k.endswith(".pos_embed") for k, v in state.items()}, path)
        load_encoder(f"mae:{path}", num_heads=args["num_heads"], position="sincos")
    assert not load_encoder(f"mae:{path}", num_heads=args["num_heads"]).fixed


@pytest.mark.parametrize("name, word", [("simmim_swin", "attn_mask"), ("simmim_swin", "relative_position_index"),
                                        ("simmim_vit", "relative_position_index")])  # fmt: skip
def test_computed_buffers_are_checked_before_they_are_dropped(name, word, tmp_path):
    args, state = official(name)
    path, lines = tmp_path / "simmim.pth", []
    torch.save({"model": state}, path)
    encoder = load_encoder(f"simmim:{path}", log=lines.append)
    assert "buffers" in lines[0]
    if name == "simmim_swin":
        depths = [len(stage.blocks) for stage in encoder.backbone.layers]
        heads = [stage.blocks[0].attn.num_heads for stage in encoder.backbone.layers]
        assert depths == list(args["depths"]) and heads == list(args["num_heads"])
    key = next(key for key in state if key.endswith(word))
    torch.save({"model": state | {key: state[key].flip(0)}}, path)
    with pytest.raises(ValueError, match=f"{word}.*another geometry"):
        load_encoder(str(path))
    torch.save({"model": state | {key: torch.zeros_like(state[key])}}, path)  # a placeholder
    again = load_encoder(str(path), log=lines.append)
    assert f"{key}, which is not what is computed in its place" in lines[1] and "in its place" not in lines[0]
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize("window, side", [(4, 16), (3, 12), (2, 8), (7, 14)])
def test_mask_of_shifted_windows_is_timms(window, side):
    args = {"img_size": side * 4, "depths": (2,), "num_heads": (1,), "embed_dim": 8, "window_size": window}
    encoder = build_encoder("swin_tiny_patch4_window7_224", **args)
    block = encoder.backbone.layers[0].blocks[1]
    theirs = block.get_attn_mask(torch.zeros(1, side, side, 8))
    assert torch.equal(shifted_mask(side // window, window), theirs)


def test_a_shared_table_is_copied_to_every_block(tmp_path):
    _, state = official("simmim_vit")
    path = tmp_path / "simmim.pth"
    torch.save({"model": state}, path)
    shared = load_encoder(f"simmim:{path}").eval()
    each = load_encoder(f"simmim:{path}", use_shared_rel_pos_bias=False, use_rel_pos_bias=True).eval()
    assert len(shared.tables) == 1 and len(each.tables) == len(each.vit.blocks) > 1
    images = torch.randn(1, shared.in_chans, 32, 32)
    torch.testing.assert_close(each(images).maps[-1], shared(images).maps[-1])


# what does not fit


def test_weights_that_do_not_fit_are_refused_with_figures(tmp_path):
    encoder = build_encoder("vit_base_patch16_224", **VIT)
    state = encoder.state_dict()
    n = len(state)
    less = {key: value for key, value in state.items() if ".1." not in key}
    k = len(less)
    for given, message in [
        (less, rf"encoder {k}/{n} tensors, .* k/.* k parameters.*missing {n - k}: vit.blocks.1.norm1.weight, "),
        (state | {"vit.blocks.2.norm1.weight": torch.zeros(24)}, "unread 1: vit.blocks.2.norm1.weight; allow_partial"),
        (state | {"vit.norm.bias": torch.zeros(7)}, r"of other shape 1: vit.norm.bias \(7 in the file, 24 here\)"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            load_state(encoder, given)
        assert "\n" not in str(error.value)
    before = encoder.vit.blocks[1].norm1.weight.clone()
    line = load_state(encoder, less | {"vit.cls_token": torch.ones(1, 1, 24)}, allow_partial=True)
    assert f"fresh {n - k}: vit.blocks.1.norm1.weight" in line
    assert (encoder.vit.cls_token == 1).all() and torch.equal(encoder.vit.blocks[1].norm1.weight, before)


def test_load_encoder_refuses_and_takes_a_part(tmp_path):
    exported(tmp_path, "vit_base_patch16_224", **VIT)
    with pytest.raises(ValueError, match="missing"):
        load_encoder(str(tmp_path), depth=3)
    assert len(load_encoder(str(tmp_path), allow_partial=True, depth=3).vit.blocks) == 3


def test_files_that_cannot_be_read(tmp_path):
    encoder = exported(tmp_path, "vit_base_patch16_224", **VIT)
    whole = (tmp_path / "encoder.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    torch.save(encoder.state_dict(), tmp_path / "state.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "state.pth").read_bytes()[:5000])
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "empty.pth").write_bytes(b"")
    for source, message in [
        ("cut.safetensors", "is a safetensors file cut short or damaged"),
        ("mae:cut.pth", "is a zip archive that is cut short or damaged at 5000 bytes"),
        ("mae:empty.pth", "is empty"),
        ("mae:list.pth", "holds no tensors by name"),
        ("state.pth", "holds no encoder that is known here; its keys begin with vit.cls_token"),
        ("mae:state.pth", "holds no encoder that is known here"),
        ("nothing.pth", "there are no weights at .*nothing.pth"),
        ("moco:state.pth", "there are no weights at moco:"),
    ]:
        kind, _, name = source.rpartition(":")
        with pytest.raises(ValueError, match=message) as error:
            load_encoder(f"{kind}{':' * bool(kind)}{tmp_path if kind != 'moco' else ''}/{name}")
        assert "\n" not in str(error.value)


# methods


@pytest.mark.parametrize("name, kind", [("mae", "mae"), ("simmim_swin", "simmim")])
def test_a_missing_or_unread_key_of_a_method_fails(name, kind, tmp_path):
    args, state = official(name)
    path = tmp_path / "official.pth"
    torch.save({"model": state}, path)
    encoder = load_encoder(f"{kind}:{path}", **({"num_heads": args["num_heads"]} if kind == "mae" else {}))
    if kind == "mae":
        size = {key: args[f"decoder_{key}"] for key in ("depth", "num_heads", "embed_dim")}
        mim = mae(encoder, depth=size["depth"], width=size["embed_dim"], heads=size["num_heads"])
    else:
        mim = simmim(encoder, unit=encoder.strides[-1])
    enter(mim, state)
    for key in state:
        if key.endswith(("relative_position_index", "attn_mask", "decoder_pos_embed")):
            continue
        with pytest.raises(ValueError, match="missing 1: |it has no |is missing"):
            enter(mim, {k: v for k, v in state.items() if k != key})
    key = next(key for key in state if "blocks.0.norm1.bias" in key)
    for new in (key.replace("blocks.0", "blocks.77"), "another"):
        with pytest.raises(ValueError, match=rf"unread 1: (\w+\.)*{new.removeprefix('encoder.')}"):
            enter(mim, state | {new: state[key]})
    with pytest.raises(ValueError, match="of other shape 1"):
        enter(mim, state | {key: torch.zeros(3)})
