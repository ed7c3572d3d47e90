"""Hiera at other sizes, poolings and channels, and what of it is refused."""

import re

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.encoders.build import build_encoder
from models.encoders.grid import Mask
from models.encoders.hiera import roll, unroll
from models.encoders.released.hiera import describe_hiera
from models.encoders.weights import load_encoder, load_state
from models.mim.head import FuseDecoder
from models.mim.hide import Replace, Skip
from models.mim.masker import RandomMasker
from models.mim.recipes import hiera, mae
from models.targets.target import Pixels
from tests.official import enter, golden
from tests.test_configs import PRETRAIN, encoder_of
from util.checkpoint import export
from util.config import Pretrain
from util.options import read

UNITS = {"img_size": 64, "embed_dim": 8, "stages": (1, 2, 1, 1)}
ABSWIN = {"abs_win_pos_embed": True, "global_pos_size": (4, 4)}


def small(in_chans=3, **args):
    torch.manual_seed(0)
    encoder = build_encoder("hiera_tiny_224", in_chans, **UNITS | args).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return encoder


# the order of tokens


def test_unrolled_tokens_are_pooled_four_by_four():
    """A maximum over the first quarter of the order is one over 2 x 2 places, as often as there are stages to come."""
    x = torch.randn(2, 3, 8, 8, 5)
    line = unroll(x)
    assert torch.equal(roll(line, 3), x)
    for _ in range(3):
        x = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).amax((3, 5))
        line = line.unflatten(1, (4, -1)).amax(1)
        assert torch.equal(roll(line, 3), x)


# sizes


@pytest.mark.parametrize("args", [{}, ABSWIN, {"q_pool": 2}], ids=["table", "two tables", "q_pool 2"])
@pytest.mark.parametrize("size", [(96, 64), (64, 128), (192, 192)])
@torch.no_grad()
def test_another_size_gives_what_a_model_built_for_it_gives(args, size):
    encoder = small(**args)
    other = build_encoder("hiera_tiny_224", **UNITS | args | {"img_size": size}).eval()
    line = load_state(other, encoder.state_dict(), img_size=64)
    images = torch.randn(2, 3, *size)
    theirs = timm.create_model("hiera_tiny_224", num_classes=0, **UNITS | args | {"img_size": size}).eval()
    state = {key.removeprefix("backbone."): value for key, value in other.state_dict().items()}
    theirs.load_state_dict({key.replace("stem.", "patch_embed."): value for key, value in state.items()}, strict=False)
    found = theirs.forward_intermediates(images, intermediates_only=True)
    for one, two, three in zip(encoder(images).maps, other(images).maps, found):
        assert torch.equal(one, two) and torch.equal(two, three)
    assert ("positions 16x16 to" in line) == (args is not ABSWIN)


@pytest.mark.parametrize("args", [{}, {"q_pool": 2}], ids=["q_pool 3", "q_pool 2"])
@torch.no_grad()
def test_only_visible_units_are_computed_and_as_timm_does(args):
    encoder, images = small(**args), torch.randn(2, 3, 64, 96)
    mask = RandomMasker(32, 0.5)(images)
    theirs = timm.create_model("hiera_tiny_224", num_classes=0, **UNITS | args | {"img_size": (64, 96)}).eval()
    wide = build_encoder("hiera_tiny_224", **UNITS | args | {"img_size": (64, 96)})
    load_state(wide, encoder.state_dict(), img_size=64)
    state = {key.removeprefix("backbone."): value for key, value in wide.state_dict().items()}
    theirs.load_state_dict({key.replace("stem.", "patch_embed."): value for key, value in state.items()}, strict=False)
    _, units = theirs.forward_features(images, mask=~mask.cells.flatten(1), return_intermediates=True)
    tokens = []
    handles = [b.register_forward_hook(lambda _, x, y: tokens.append(x[0].shape[1])) for b in encoder.backbone.blocks]
    maps = Skip(encoder)(images, mask).maps
    assert tokens[0] == (6 - mask.count) * 64 and tokens == sorted(tokens, reverse=True)
    for handle in handles:
        handle.remove()
    for ours, stride, unit in zip(maps, encoder.strides, units):
        cells = ours.unfold(2, 32 // stride, 32 // stride).unfold(3, 32 // stride, 32 // stride)
        cells = cells.flatten(2, 3).permute(0, 2, 3, 4, 1)[~mask.cells.flatten(1)]  # (B * n, p, q, C)
        torch.testing.assert_close(cells, unit.flatten(0, 1))


def test_units_that_do_not_fit_are_refused_in_one_line():
    encoder = small()
    finer = Mask(torch.zeros(1, 4, 4, dtype=torch.bool), 16, 0)
    for build, message in [
        (lambda: encoder(torch.randn(1, 3, 64, 80)), "80 px does not divide into mask units of 32 px: use 64 or 96 px"),
        (lambda: encoder.encode(encoder.embed(torch.randn(1, 3, 64, 64)), finer), "16 px cells has no grid of 32 px"),
        (lambda: hiera(encoder, unit=16), "16 px, Skip hides whole units of 32 px .*: 32 or 64 px would do"),
        (lambda: mae(small(q_pool=2)), "16 px, Skip hides whole units of 32 px"),
        (lambda: hiera(encoder, unit=48), "48 px, Skip hides whole units of 32 px .*: 32 or 64 px would do"),
        (lambda: Replace(encoder), r"overlap.*Paint \(fastmim\) instead, or Skip \(hiera\)"),
        (lambda: small(mask_unit_size=(16, 16)), r"with 4 stages, q_stride is \(2, 2\) and mask_unit_size at most 8"),
        (lambda: small(q_pol=2), 'no argument "q_pol"; the nearest is "q_pool"'),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            build()
        assert "\n" not in str(error.value)


# files


def test_its_own_file_comes_back_with_another_size_pooling_and_channels(tmp_path):
    encoder, lines = small(1, q_pool=2, drop_path_rate=0.5), []
    export(tmp_path / "encoder.safetensors", encoder, {"mean": [0.1], "std": [0.2]})
    images = torch.randn(2, 1, 64, 64)
    again, deeper = load_encoder(str(tmp_path)), load_encoder(str(tmp_path), q_pool=3)
    assert again.strides == [4, 8, 16, 16] and again.backbone.blocks[-1].drop_path1.drop_prob == 0.5
    assert all(torch.equal(one, two) for one, two in zip(again(images).maps, encoder(images).maps))
    assert all(torch.equal(one, two) for one, two in zip(deeper(images).maps[:3], encoder(images).maps[:3]))
    assert deeper.strides == [4, 8, 16, 32] and deeper(images).maps[3].shape == (2, 64, 2, 2)
    wide = load_encoder(str(tmp_path), log=lines.append, img_size=(64, 96), in_chans=3)
    assert "positions 16x16 to 16x24" in lines[0] and "1 to 3 channels" in lines[0]
    assert torch.equal(wide.positions(16, 24), encoder.positions(16, 24)) and wide.grid == (16, 24)
    torch.testing.assert_close(wide.embed(images.expand(-1, 3, -1, -1)), encoder.embed(images))


def test_an_official_pretraining_goes_in_and_on_to_classify(tmp_path):
    facts, state, given, _ = golden("hiera_mae")
    args, images = facts["constructor"]["args"], given["imgs"]
    path, lines = tmp_path / "hiera.pth", []
    torch.save({"model_state": state}, path)
    changes = {"num_heads": args["num_heads"], "img_size": args["input_size"]}
    encoder = load_encoder(f"hiera:{path}", log=lines.append, **changes)
    pools = args.get("q_pool", 3)
    assert encoder.strides == [4 * 2 ** min(stage, pools) for stage in range(len(args["stages"]))]
    for ignored in (f"multi_scale_fusion_heads {2 * pools}", "encoder_norm 2", "mask_token 1"):
        assert ignored in lines[0]
    deeper = load_encoder(f"hiera:{path}", q_pool=len(args["stages"]) - 1, **changes)
    assert torch.equal(deeper(images).maps[0], encoder(images).maps[0])
    assert deeper.strides[-1] == deeper.mask_unit


@pytest.mark.parametrize("size", ["tiny", "small", "base", "base_plus", "large", "huge"])
def test_every_released_size_is_read_off_its_tensors(size):
    with torch.device("meta"):
        encoder = build_encoder(f"hiera_{size}_224")
        state = {key.removeprefix("backbone."): value for key, value in encoder.state_dict().items()}
        name, args = describe_hiera({key.replace("stem.", "patch_embed."): value for key, value in state.items()})
        again = build_encoder(name, **args)
    assert name == f"hiera_{size}_224" and args["img_size"] == 224
    for ours, theirs in zip(again.backbone.blocks, encoder.backbone.blocks, strict=True):
        assert (ours.attn.heads, ours.attn.q_stride) == (theirs.attn.heads, theirs.attn.q_stride)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in encoder.state_dict().items()}


def test_heads_that_no_tensor_tells_are_asked_for(tmp_path):
    state = {key.removeprefix("backbone."): value for key, value in small().state_dict().items()}
    path = tmp_path / "hiera.pth"
    torch.save({key.replace("stem.", "patch_embed."): value for key, value in state.items()}, path)
    with pytest.raises(ValueError, match="give num_heads"):
        load_encoder(f"hiera:{path}")
    assert load_encoder(f"hiera:{path}", num_heads=1).grid == (16, 16)


def test_a_missing_or_unread_key_of_the_method_fails():
    facts, state, given, _ = golden("hiera_mae")
    args = facts["constructor"]["args"]
    size = {key: args[key] for key in ("embed_dim", "num_heads", "stages", "q_pool", "mlp_ratio") if key in args}
    encoder = build_encoder("hiera_base_224", given["imgs"].shape[1], args["input_size"], **size)
    stride = encoder.strides[-1]
    mim = hiera(encoder, cell=stride, depth=args["decoder_depth"], width=args["decoder_embed_dim"],
                heads=args["decoder_num_heads"])  # fmt: skip
    mim.head = FuseDecoder(encoder, mim.target, args["decoder_depth"], args["decoder_embed_dim"],
                           args["decoder_num_heads"], args.get("mlp_ratio", 4.0))  # fmt: skip
    enter(mim, state)
    for key in state:
        with pytest.raises(ValueError, match="missing 1: |it has no |is missing"):
            enter(mim, {k: v for k, v in state.items() if k != key})
    with pytest.raises(ValueError, match="unread 1: backbone.another"):
        enter(mim, state | {"another": state["mask_token"]})


# the decoder


@pytest.mark.parametrize("q_pool", [1, 2, 3])
def test_every_map_finer_than_the_last_is_fused(q_pool):
    encoder = small(q_pool=q_pool)
    head = FuseDecoder(encoder, Pixels(8, 3, normalize=True), depth=1, width=16, heads=2)
    assert [conv.kernel_size[0] for conv in head.fuse] == [2 ** (q_pool - i) for i in range(q_pool)]
    images = torch.randn(2, 3, 64, 64)
    features = Skip(encoder)(images, RandomMasker(32, 0.5)(images))
    fused = head.read(features)
    for i, m in enumerate(features.maps):
        features.maps[i] = m + torch.randn_like(m)
        counts = i < q_pool or i == 3  # a map of the last stride that is not the last is left out
        assert torch.equal(head.read(features), fused) != counts
        features.maps[i] = m


def test_positions_of_the_decoder_follow_the_image():
    encoder = small(q_pool=2, img_size=(64, 96))
    head = FuseDecoder(encoder, Pixels(16, 3, normalize=True), depth=1, width=16, heads=2)
    assert head.grid == (4, 6) and torch.equal(head.places(4, 6).flatten(0, 1), head.table[0])
    with torch.no_grad():
        head.table.copy_(torch.arange(4.0).repeat_interleave(6)[None, :, None])  # tells the row
    rows = head.places(8, 3)
    assert rows.shape == (8, 3, 16) and (rows.diff(dim=0) > 0).all() and rows.diff(dim=1).abs().max() < 1e-4


def test_other_encoders_that_skip_may_be_fused():
    convnext = build_encoder("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))
    mim = hiera(convnext, depth=1, width=16, heads=2)
    assert mim.head.grid == (7, 7) and mim({"image": torch.randn(2, 3, 96, 64)})["loss"].isfinite()


# sizes of the paper


HIERAS = [path for path in PRETRAIN if path.stem.startswith("hiera_")]


@pytest.mark.parametrize("path", HIERAS, ids=lambda path: path.stem)
def test_multiply_adds_of_a_classifier_are_the_papers(path):
    """To the whole numbers that the paper gives, at 224 px."""
    assert len(HIERAS) == 6
    giga = int(re.search(r"(\d+) G multiply-adds as a classifier", path.read_text())[1])
    encoder = encoder_of(read(Pretrain, ["--config", str(path)])[0], q_pool=3).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(torch.zeros(1, 3, 224, 224, device="meta"))
    assert round(counter.get_total_flops() / 2e9) == giga
