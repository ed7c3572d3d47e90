"""SwinV2 knows places by their coordinates: with larger windows they are computed anew, and nothing is interpolated."""

import pytest
import torch

from models.encoders.build import build_encoder
from models.encoders.weights import load_encoder
from models.mim.recipes import simmim
from models.transfer.classify import Classify
from tests.test_weights import exported

NAME = "swinv2_base_window12_192"  # at half its size: windows of 6, and of 3 where the grid is no larger
SMALL = {"img_size": 96, "window_size": 6, "embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 1, 2, 2)}
LARGER = {"img_size": 128, "window_size": 8}
BEFORE = (6, 6, 6, 3)


def attentions(encoder):
    return [[block.attn for block in stage.blocks] for stage in encoder.backbone.layers]


def log_spaced(window, before):
    """Offsets in a window, on the scale of the window of pretraining: (2 window - 1,)."""
    offset = torch.arange(1.0 - window, window) * 8 / (before - 1)
    return offset.sign() * (offset.abs() + 1).log2() / 3


def test_larger_windows_take_all_weights_and_no_interpolation(tmp_path):
    small, lines = exported(tmp_path, NAME, **SMALL), []
    large = load_encoder(str(tmp_path), log=lines.append, pretrained_window_sizes=BEFORE, **LARGER)
    n = len(small.state_dict())
    assert f"encoder {n}/{n} tensors" in lines[0] and not {"resized", "fresh", "missing"} & set(lines[0].split())
    assert all(torch.equal(value, small.state_dict()[key]) for key, value in large.state_dict().items())
    assert [stage[0].window_size for stage in attentions(small)] == [(side, side) for side in BEFORE]
    assert [stage[0].window_size for stage in attentions(large)] == [(8, 8), (8, 8), (8, 8), (4, 4)]
    for stage, window, before in zip(attentions(large), (8, 8, 8, 4), BEFORE):
        for attention in stage:
            along = log_spaced(window, before)
            expected = torch.stack(torch.meshgrid(along, along, indexing="ij"), -1)[None]
            torch.testing.assert_close(attention.relative_coords_table, expected)


def bias(attention):
    """What attention adds for each offset, (2 h - 1, 2 w - 1, heads)."""
    return attention.cpb_mlp(attention.relative_coords_table)[0]


@torch.no_grad()
def test_an_offset_means_in_a_larger_window_what_it_did(tmp_path):
    small = exported(tmp_path, NAME, **SMALL)
    large = load_encoder(str(tmp_path), pretrained_window_sizes=BEFORE, **LARGER)
    other = load_encoder(str(tmp_path), **LARGER)  # on the scale of its own windows: the configs do not do this
    for before, after, without in zip(*(sum(attentions(encoder), []) for encoder in (small, large, other))):
        edge = after.window_size[0] - before.window_size[0]
        inner = slice(edge, -edge)
        torch.testing.assert_close(bias(after)[inner, inner], bias(before))
        assert (bias(without)[inner, inner] - bias(before)).abs().max() > 1e-4


def test_it_pretrains_and_fine_tunes(tmp_path):
    encoder = build_encoder(NAME, **SMALL)
    loss = simmim(encoder, target="local")({"image": torch.randn(2, 3, 96, 96)})["loss"]
    loss.backward()
    assert loss.isfinite()
    exported(tmp_path, NAME, **SMALL)
    large = load_encoder(str(tmp_path), pretrained_window_sizes=BEFORE, drop_path_rate=0.1, **LARGER)
    assert Classify(large, 5).logits(torch.randn(2, 3, 128, 128)).shape == (2, 5)


@pytest.mark.parametrize(("width", "heads", "mega"), [(352, (11, 22, 44, 88), 658), (448, (14, 28, 56, 112), 1061)])
def test_the_largest_build(width, heads, mega):
    with torch.device("meta"):
        encoder = build_encoder("swinv2_large_window12_192", embed_dim=width, num_heads=heads)
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(mega, rel=0.01)
