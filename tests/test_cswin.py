"""CSWin: sizes are the paper's, each head sees its stripe and no more, and stripes fit any grid."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch.utils.flop_counter import FlopCounterMode

from models.encoders.build import OWN, build_encoder
from models.encoders.cswin import Block, fitting
from models.encoders.grid import Mask
from util import flops


@pytest.mark.parametrize(
    ("name", "mega", "giga"),
    [
        ("cswin_tiny", 22.3, 4.3),  # the paper rounds to 23 M
        ("cswin_small", 35, 6.9),
        ("cswin_base", 78, 15.0),
        ("cswin_large", 173, 33.1),  # the paper says 31.5 G; its code computes as much as ours
    ],
)
def test_sizes_are_the_papers(name, mega, giga):
    """Within 2 %, with a classifier of 1,000 classes."""
    with torch.device("meta"):
        encoder = build_encoder(name).eval()
    assert (flops.parameters(encoder) + 1000 * (encoder.dims[-1] + 1)) / 1e6 == pytest.approx(mega, rel=0.02)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(torch.zeros(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(giga, rel=0.02)
    assert encoder.strides == [4, 8, 16, 32] and encoder.overlaps and not encoder.skips


def stripe_of(h, w, rows, columns):
    """Which places share a stripe: (h * w, h * w) bool."""
    row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    stripe = (row // rows * w + column // columns).flatten()
    return stripe[:, None] == stripe


def plain_block(block, x):
    """A block written without stripes: attention over all places, those of other stripes masked away."""
    b, h, w, c = x.shape
    qkv = block.qkv(block.norm1(x)).reshape(b, h * w, 3, c)
    parts = []
    for half, place in enumerate((block.upright, block.level)):
        shape = (h, fitting(block.stripe, w)) if half == 0 else (fitting(block.stripe, h), w)
        together = stripe_of(h, w, *shape)
        channels = slice(half * c // 2, (half + 1) * c // 2)
        q, k, v = (qkv[:, :, i, channels].unflatten(-1, (block.heads, -1)).transpose(1, 2) for i in range(3))
        scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        attended = scores.masked_fill(~together, -torch.inf).softmax(-1) @ v
        attended = attended.transpose(1, 2).flatten(2)
        values = rearrange(qkv[:, :, 2, channels], "b (h w) c -> b c h w", h=h)
        patches = F.unfold(values, 3, padding=1).unflatten(1, (c // 2, 9))  # the 3 x 3 places around each
        index = (
            F.unfold(torch.arange(1.0, h * w + 1).view(1, 1, h, w), 3, padding=1)[0].long() - 1
        )  # -1 beyond the edge
        seen = torch.stack([(index[n] >= 0) & together[torch.arange(h * w), index[n]] for n in range(9)])
        lepe = (patches * seen * place.weight.reshape(1, c // 2, 9, 1)).sum(2) + place.bias[:, None]
        parts.append(attended + lepe.transpose(1, 2))
    x = x + block.proj(torch.cat(parts, -1)).unflatten(1, (h, w))
    return x + block.mlp(block.norm2(x))


@pytest.mark.parametrize("stripe", [1, 2, 7, None])
@pytest.mark.parametrize("grid", [(4, 6), (8, 7)])
@torch.no_grad()
def test_a_block_is_attention_within_stripes(stripe, grid):
    torch.manual_seed(0)
    block, x = Block(16, 4, stripe, drop_path=0.0).double(), torch.randn(2, *grid, 16).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    torch.testing.assert_close(block(x), plain_block(block, x))


def test_stripes_fit_the_grid():
    assert [fitting(7, side) for side in (14, 8, 10, 12, 7, 4, 11)] == [7, 4, 5, 6, 7, 4, 1]
    assert [fitting(2, side) for side in (28, 16, 7)] == [2, 2, 1] and fitting(None, 9) == 9


def test_sizes_can_be_given_and_names_are_known():
    args = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2)}
    encoder = build_encoder("cswin_base", 1, img_size=64, **args)  # an image size is not needed
    assert encoder.plan["name"] == "cswin_base" and encoder.dims == [8, 16, 32, 64]
    for build, message in [
        (lambda: build_encoder("cswin_tinny"), 'no encoder is called "cswin_tinny"; the nearest are cswin_tiny'),
        (lambda: build_encoder("cswin_tiny", depth=(1, 1, 1, 1)), 'no argument "depth"; the nearest is "depths"'),
        (lambda: build_encoder("cswin_tiny", num_heads=(1, 2, 4, 8)), "must be even and divide the widths"),
        (lambda: build_encoder("cswin_tiny", depths=(1, 1)), "an entry for each stage"),
        (lambda: encoder.encode(torch.zeros(1, 8, 8, 8), Mask(torch.ones(1, 1, 1).bool(), 32, 1)), "Replace or Paint"),
    ]:
        with pytest.raises(ValueError, match=message):
            build()
    assert set(OWN) >= {"cswin_tiny", "cswin_small", "cswin_base", "cswin_large"}
