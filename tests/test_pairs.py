"""Every method with every kind of encoder: what is accepted sees nothing hidden and trains whole; the rest is refused.

A pair is refused when it is built, in one line that says what to use instead.
"""

import pytest
import torch

from models.encoders.build import build_encoder
from models.mim.method import MIM
from models.mim.recipes import METHODS
from tests.methods import PLAIN, RESIDUAL, STAGES, UNITS, WINDOWS, small

ENCODERS = {
    "vit_base_patch16_224": PLAIN | {"position": "sincos"},
    "vit_base_patch16_siglip_224": PLAIN,  # no class token
    "beit_base_patch16_224": PLAIN | {"taps": (0, -1), "final_norm": False},
    "eva02_tiny_patch14_224": PLAIN,
    "swin_tiny_patch4_window7_224": WINDOWS,
    "swinv2_tiny_window8_256": WINDOWS | {"window_size": 4},
    "mixmim_base": WINDOWS,
    "pvt_v2_b0": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 32), "num_heads": (1, 1, 2, 2)},
    "mvitv2_tiny": {"img_size": 64},
    "cswin_tiny": {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (2, 2, 2, 2)},
    "convnext_atto": STAGES,
    "convnextv2_atto": STAGES,
    "resnet50": RESIDUAL,
    "hiera_tiny_224": UNITS | {"q_pool": 2},
}
PLAINS = ("vit_base_patch16_224", "vit_base_patch16_siglip_224", "beit_base_patch16_224", "eva02_tiny_patch14_224")
SKIPPING = (*PLAINS, "convnext_atto", "convnextv2_atto", "resnet50", "hiera_tiny_224")
FROM_SKIP = {"mae", "milan", "hiera", "fcmae", "spark"}
MASKED = sorted(METHODS.keys() - {"vqkd"})  # which hides nothing
PAIRS = [(name, encoder) for name in MASKED for encoder in ENCODERS]


def refusal(name, encoder):
    """What the refusal of a pair says, None if it is accepted."""
    if name in FROM_SKIP and encoder not in SKIPPING:
        return r"Skip needs .*Replace \(simmim\) or Paint \(fastmim\)"
    if name == "mixmim" and encoder != "mixmim_base":
        return "Mix needs .*mixmim_base"
    if name == "beitv2" and encoder != "beit_base_patch16_224":
        known = encoder in ("vit_base_patch16_224", "eva02_tiny_patch14_224")
        return r"taps: \[0, -1\], final_norm: false" if known else "a plain transformer with a class token"
    return None


def encoder_of(name):
    torch.manual_seed(0)
    encoder = build_encoder(name, **ENCODERS[name])
    for parameter in encoder.parameters():
        if parameter.requires_grad:  # so that all of it matters
            torch.nn.init.normal_(parameter, std=0.1, mean=float(parameter.ndim == 1))
    return encoder


def units(name, encoder):
    """Masks of 16 px cells, or as the encoder must have them; Hiera's own cells of 16 px fit its own encoder alone."""
    return {"unit": max(encoder.mask_unit, 16)} | ({"cell": min(encoder.strides[-1], 16)} if name == "hiera" else {})


def test_at_least_forty_pairs_are_accepted_and_the_others_listed():
    accepted = [pair for pair in PAIRS if refusal(*pair) is None]
    assert len(accepted) >= 90 and len(PAIRS) - len(accepted) >= 40
    for name in MASKED:
        assert any(pair[0] == name for pair in accepted)
    for encoder in ENCODERS:
        assert sum(pair[1] == encoder for pair in accepted) >= 5


@pytest.mark.parametrize(("name", "encoder"), [pair for pair in PAIRS if refusal(*pair) is not None])
def test_refused_pairs_say_what_to_use(name, encoder):
    encoder = encoder_of(encoder)
    with pytest.raises(ValueError, match=refusal(name, encoder.plan["name"])) as error:
        small(name, encoder, **units(name, encoder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "encoder"), [pair for pair in PAIRS if refusal(*pair) is None])
def test_accepted_pairs_hide_and_train(name, encoder):
    """No guess of a hidden cell changes with any hidden pixel; with visible ones it does; every parameter learns."""
    encoder = encoder_of(encoder)
    mim = small(name, encoder, **units(name, encoder))
    assert isinstance(mim, MIM)
    images = torch.randn(2, 3, 64, 128)
    mim.train()({"image": images})["loss"].backward()
    unused = [key for key, p in mim.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused, unused
    mim.eval()
    with torch.no_grad():
        mask, images = mim.masker(images), images.double()
        mim.hide.double(), mim.head.double()
        hidden = mask.at(1)[:, None]
        inside, outside = (torch.where(where, torch.randn_like(images), images) for where in (hidden, ~hidden))
        one, two, three = (guess_where_hidden(mim, x, mask) for x in (images, inside, outside))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


def guess_where_hidden(mim, images, mask):
    return mim.head(mim.hide(images, mask), mask)[mask.at(mim.target.unit)]
