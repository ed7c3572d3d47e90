"""Nothing hidden is seen: no visible feature changes with what is hidden, and every method learns under that rule."""

import math

import pytest
import torch

from models.encoders.build import build_encoder
from models.encoders.grid import Mask
from models.mim.hide import Paint, Replace, Skip
from models.mim.masker import BlockMasker, RandomMasker, hide_top
from models.mim.recipes import mae, maskfeat, mixmim, simmim
from tests.methods import PLAIN, RESIDUAL, STAGES, UNITS, WINDOWS

SKIPPING = {
    "vit_base_patch16_224": PLAIN | {"position": "sincos"},
    "vit_base_patch16_siglip_224": PLAIN,
    "deit3_small_patch16_224": PLAIN,
    "beit_base_patch16_224": PLAIN,
    "beitv2_base_patch16_224": PLAIN | {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
    "eva02_tiny_patch14_224": PLAIN,
    "vit_small_patch16_dinov3": PLAIN,
    "convnext_atto": STAGES,
    "convnext_tiny": STAGES,
    "convnextv2_atto": STAGES,
    "convnextv2_tiny": STAGES,
    "hiera_tiny_224": UNITS | {"q_pool": 2},
    "hiera_small_224": UNITS,
    "hiera_small_abswin_256": UNITS | {"global_pos_size": (4, 4)},
    "convnextv2_nano": STAGES | {"grn": "batch"},
    "convnext_atto_ols": STAGES,  # patches overlap: hidden pixels are no pixels at all
    "resnet50": RESIDUAL,
    "resnet18": RESIDUAL | {"channels": (64, 8, 8, 8)},  # a first block without a convolution in its shortcut
    "seresnet50": RESIDUAL,
}
OTHERS = {
    "swin_tiny_patch4_window7_224": WINDOWS,
    "swinv2_tiny_window8_256": WINDOWS | {"window_size": 4},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 32), "num_heads": (1, 1, 2, 2)},
    "mvitv2_tiny": {"img_size": 128},
    "cswin_tiny": {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (2, 2, 2, 2)},
    "convnext_atto": STAGES,
    "resnet50": RESIDUAL,
    "vit_base_patch16_224": PLAIN,
    "hiera_tiny_224": UNITS,
    "mixmim_base": WINDOWS,
}
OVERLAPPING = ("pvt_v2_b0", "mvitv2_tiny", "cswin_tiny", "resnet50", "hiera_tiny_224")


def small(name, cases):
    torch.manual_seed(0)
    encoder = build_encoder(name, **cases[name]).double().eval()
    for parameter in encoder.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)  # attention and GRN that matter
    return encoder


def images_and_mask(encoder):
    unit = max(encoder.mask_unit, 16)
    images = torch.randn(2, encoder.in_chans, 4 * unit, 3 * unit, dtype=torch.float64)
    return images, RandomMasker(unit, 0.5)(images)


def visible(features, mask, encoder):
    """Every visible number of every map, and the prefix."""
    seen = [m.movedim(1, -1)[~mask.at(s)] for m, s in zip(features.maps, encoder.strides)]
    return torch.cat([x.flatten() for x in [*seen, *([] if features.prefix is None else [features.prefix])]])


def other_where_hidden(images, mask):
    return torch.where(mask.at(1)[:, None], torch.randn_like(images), images)


@pytest.mark.parametrize("name", SKIPPING)
@torch.no_grad()
def test_no_visible_feature_is_computed_from_a_hidden_token(name):
    encoder = small(name, SKIPPING)
    images, mask = images_and_mask(encoder)
    tokens = encoder.embed(images)
    others = torch.where(mask.at(encoder.patch)[..., None], torch.randn_like(tokens), tokens)
    one, two = (visible(encoder.encode(t, mask), mask, encoder) for t in (tokens, others))
    assert torch.equal(one, two)
    one, two = (visible(encoder.encode(t), mask, encoder) for t in (tokens, others))
    assert (one - two).abs().max() > 1e-4  # without the mask they do reach it, or the test would say nothing
    hidden = [m.movedim(1, -1)[mask.at(s)] for m, s in zip(encoder.encode(tokens, mask).maps, encoder.strides)]
    assert not any(h.any() for h in hidden)


@pytest.mark.parametrize("name", SKIPPING)
@torch.no_grad()
def test_skip_hides_pixels(name):
    encoder = small(name, SKIPPING)
    images, mask = images_and_mask(encoder)
    others, hide = other_where_hidden(images, mask), Skip(encoder)
    one, two = (visible(hide(x, mask), mask, encoder) for x in (images, others))
    assert torch.equal(one, two)
    one, two = (visible(encoder(x), mask, encoder) for x in (images, others))
    assert (one - two).abs().max() > 1e-4


def ways(name):
    """Replace is not for overlapping patches: see test_wrong_combinations_say_what_to_use."""
    return [Paint] if name in OVERLAPPING else [Replace, Paint]


@pytest.mark.parametrize(("name", "way"), [(name, way) for name in OTHERS for way in ways(name)])
@torch.no_grad()
def test_replace_and_paint_hide_pixels(name, way):
    encoder = small(name, OTHERS)
    images, mask = images_and_mask(encoder)
    others, hide = other_where_hidden(images, mask), way(encoder).double()
    for one, two in zip(hide(images, mask).maps, hide(others, mask).maps):
        assert torch.equal(one, two)  # not even at hidden places
    assert (encoder(images).maps[-1] - encoder(others).maps[-1]).abs().max() > 1e-4
    one, two = (hide(images + shift, mask).maps[-1] for shift in (0.0, 1e-2 * ~mask.at(1)[:, None]))
    assert not torch.equal(one, two)  # visible pixels count


def test_overlapping_patches_are_painted():
    for name in OTHERS:
        encoder = small(name, OTHERS)
        assert encoder.overlaps == (name in OVERLAPPING)
        assert {type(m(encoder).hide) for m in (simmim, maskfeat)} == {ways(name)[0]}


@pytest.mark.parametrize("name", SKIPPING)
@torch.no_grad()
def test_with_nothing_to_hide_a_mask_changes_nothing(name):
    encoder = small(name, SKIPPING)
    images, mask = images_and_mask(encoder)
    images, nothing = images[:1], Mask(torch.zeros_like(mask.cells[:1]), mask.unit, 0)
    for one, two in zip(encoder.encode(encoder.embed(images), nothing).maps, encoder(images).maps):
        torch.testing.assert_close(one, two)


@torch.no_grad()
def test_an_image_is_encoded_as_if_hidden_cells_were_cut_off():
    """A convolution at the border of what is visible reads what it would read at the border of the image: zeros."""
    encoder = small("convnextv2_atto", SKIPPING)
    images = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    cells = torch.zeros(1, 2, 3, dtype=torch.bool)
    cells[..., 2] = True
    whole, cut = Skip(encoder)(images, Mask(cells, 32, 2)), encoder(images[..., :64])
    for one, two in zip(whole.maps, cut.maps):
        torch.testing.assert_close(one[..., : two.shape[-1]], two)


# methods


def test_wrong_combinations_say_what_to_use():
    vit = build_encoder("vit_base_patch16_224", **PLAIN)
    swin = build_encoder("swin_tiny_patch4_window7_224", **WINDOWS)
    overlapping = build_encoder("pvt_v2_b0", **OTHERS["pvt_v2_b0"])
    for build, message in [
        (lambda: mae(swin), r"Skip needs .*plain ViT, ConvNeXt.*Replace \(simmim\) or Paint \(fastmim\)"),
        (lambda: mae(overlapping), r"Skip needs .*Replace \(simmim\) or Paint \(fastmim\)"),
        (lambda: Replace(overlapping), r"overlap.*Paint \(fastmim\)"),
        (lambda: mixmim(vit), r"Mix needs .*mixmim_base.*ViT does not"),
        (lambda: mae(vit, unit=12), "12 px.*8 px"),
        (lambda: simmim(swin, unit=6), "6 px"),
        (lambda: simmim(swin, cell=24), "24 px.*(8|16) px would"),
        (lambda: mae(vit, target="pixel"), 'no target is called "pixel"; there are pixels, normalized'),
        (lambda: mae(vit, width=30, heads=4), "heads is 4, which does not divide width 30: 3 would"),
        (lambda: mae(vit, ratio=0.99)({"image": torch.randn(1, 3, 32, 32)}), "ratio 0.99 hides 16 of 16 cells of 8 px"),
        (lambda: mae(vit, ratio=0.0)({"image": torch.randn(1, 3, 32, 32)}), "ratio is 0.0: it has to lie"),
        (lambda: mae(vit)({"image": torch.randn(1, 3, 36, 32)}), "36 px.*32 or 40 px"),
        (lambda: simmim(swin)({"image": torch.randn(1, 3, 80, 64)}), "80 px.*64 or 96 px"),
        (lambda: swin.encode(torch.randn(1, 16, 16, 8), Mask(torch.ones(1, 2, 2).bool(), 32, 4)), "Replace"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            build()
        assert "\n" not in str(error.value)


# masks


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9])
@pytest.mark.parametrize("side", [4, 5, 7, 10, 14])
def test_a_ratio_rounds_up(ratio, side):
    count = math.ceil(round(ratio * side * side, 6))  # without floating point's dust
    mask = hide_top(torch.rand(3, side, side), ratio, 16)
    assert mask.count == count and (mask.cells.sum((1, 2)) == count).all()
    mask = BlockMasker(16, ratio, least=4)(torch.zeros(3, 1, 16 * side, 16 * side))
    assert mask.count == count and (mask.cells.sum((1, 2)) == count).all()


def test_random_masks_are_uniform_and_may_be_shared():
    images = torch.zeros(4000, 1, 48, 32)
    torch.manual_seed(0)
    mask = RandomMasker(16, 0.5)(images)
    assert (mask.cells.float().mean(0) - 0.5).abs().max() < 0.04
    shared = RandomMasker(16, 0.5, shared=True)(images).cells
    assert (shared == shared[:1]).all()


def test_a_mask_on_finer_grids():
    mask = RandomMasker(16, 0.4)(torch.zeros(3, 1, 64, 96))
    fine = mask.at(4)
    assert fine.shape == (3, 16, 24) and torch.equal(fine[:, ::4, ::4], mask.cells)
    indices = mask.visible(4)
    seen = torch.ones_like(fine).flatten(1).scatter(1, indices, False)
    assert torch.equal(seen.view_as(fine), fine) and (indices.diff(dim=1) > 0).all()
    assert torch.equal((~mask).cells, ~mask.cells) and (~mask).count == 24 - mask.count
    with pytest.raises(ValueError, match="16 px cells has no grid of 5 px"):
        mask.at(5)
