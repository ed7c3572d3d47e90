"""A method built for the first size of a schedule runs at all; sizes that cannot be are named before training."""

import pytest
import timm
import torch
import torch.nn.functional as F

import main_pretrain
from models.encoders.build import build_encoder
from models.encoders.weights import load_state
from models.mim.recipes import fastmim, maskfeat, simmim
from tests.test_main import PRETRAIN, SMALL, fill_folder
from util.config import Data
from util.errors import UserError
from util.start import try_sizes

SCHEDULE = (128, 160, 192)
GROWING = {
    "swin_tiny_patch4_window7_224": {
        "embed_dim": 8,
        "depths": (2, 2, 2, 2),
        "num_heads": (1, 1, 2, 2),
        "window_size": 4,
    },
    "swinv2_tiny_window8_256": {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 1, 2, 2), "window_size": 4},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 32), "num_heads": (1, 1, 2, 2)},
    "cswin_tiny": {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (2, 2, 2, 2)},
    "mvitv2_tiny": {},
    "convnextv2_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
    "vit_base_patch16_224": {"position": "sincos", "embed_dim": 32, "depth": 1, "num_heads": 2},
    "beit_base_patch16_224": {"embed_dim": 32, "depth": 1, "num_heads": 2},
}


def grown(name, first=SCHEDULE[0]):
    torch.manual_seed(0)
    return build_encoder(name, img_size=first, **GROWING[name])


@pytest.mark.parametrize("name", GROWING)
def test_a_method_of_the_first_size_steps_at_all(name):
    mim = fastmim(grown(name), depth=1, width=32, heads=2)
    for size in SCHEDULE:
        mim.zero_grad()
        loss = mim({"image": torch.randn(2, 3, size, size)})["loss"]
        loss.backward()
        assert loss.isfinite()
        unused = {key for key, p in mim.named_parameters() if p.requires_grad and p.grad is None}
        assert not unused, unused


@pytest.mark.parametrize("side", [64, 96, 128, 160, 192, 224])
@torch.no_grad()
def test_pvt_and_cswin_take_every_size_that_32_divides(side):
    for name in ("pvt_v2_b0", "cswin_tiny"):
        for method in (fastmim, simmim, maskfeat):
            size = {"depth": 1, "width": 32, "heads": 2} if method is fastmim else {}
            assert method(grown(name), **size)({"image": torch.randn(1, 3, side, 64)})["loss"].isfinite()


# MViTv2, whose positions are tables of one size


def stretched(table, length):
    return F.interpolate(table.T[None], length, mode="linear")[0].T


@torch.no_grad()
def test_mvit_at_another_size_is_timms_with_stretched_tables():
    encoder = grown("mvitv2_tiny", 64).eval()
    for parameter in encoder.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.3)
    theirs = timm.create_model("mvitv2_tiny", num_classes=0, img_size=96).eval()
    ours = {
        key.replace("stem.", "patch_embed.proj.").removeprefix("backbone."): v
        for key, v in encoder.state_dict().items()
    }
    for key, value in theirs.state_dict().items():
        if "rel_pos" in key:
            assert len(ours[key]) < len(value)
            ours[key] = stretched(ours[key], len(value))
    theirs.load_state_dict(ours)
    images = torch.randn(1, 3, 96, 96)
    for one, two in zip(encoder(images).maps, theirs.forward_intermediates(images, norm=True, intermediates_only=True)):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
    other = grown("mvitv2_tiny", 96).eval()
    line = load_state(other, encoder.state_dict())
    assert "resized: positions of" in line and "fresh" not in line
    torch.testing.assert_close(other(images).maps[-1], encoder(images).maps[-1], atol=1e-4, rtol=1e-4)


def test_mvit_of_images_that_are_not_square():
    encoder = build_encoder("mvitv2_tiny", img_size=(64, 96)).eval()
    assert len(encoder.backbone.stages[0].blocks[0].attn.rel_pos_h) == 2 * 96 // 4 - 1
    with torch.no_grad():
        assert encoder(torch.randn(1, 3, 64, 96)).maps[-1].shape[-2:] == (2, 3)


# sizes that cannot be


def told(size, **args):
    mim = fastmim(grown("swin_tiny_patch4_window7_224"), **{"depth": 1, "width": 32, "heads": 2} | args)
    with pytest.raises(UserError) as error:
        try_sizes(mim, Data(root="", size=size), 3, torch.device("cpu"))
    assert mim.training and "\n" not in str(error.value)
    return str(error.value)


def test_all_sizes_that_do_not_fit_are_named():
    line = told([[0, 128], [1, 100], [2, 160], [3, [96, 200]], [4, 250]])
    assert line.startswith("data.size: 100 and 96 x 200 and 250 px do not fit: ")
    for reason in ("100 px is no whole number of 32 px cells: use 96 or 128 px", "200 px", "250 px"):
        assert reason in line
    assert "128 px do" not in line and "160" not in line.replace("use 192 or 224", "")


def test_cells_that_the_grid_cannot_hold():
    assert (
        told(32, unit=64)
        == "data.size: 32 px does not fit: an image side of 32 px is no whole number of 64 px cells: use 64 px"
    )
    assert "ratio 0.75 hides 1 of 1 cells of 32 px" in told(32)
    assert told([[0, 32], [1, 32]]).count("hides 1 of 1") == 1


def test_a_schedule_is_tried_before_training(tmp_path):
    """Through the main, with real images."""
    argv = [*PRETRAIN, *SMALL, "--data.root", fill_folder(tmp_path / "images", "RGB", 8)]
    argv += ["--run.folder", str(tmp_path / "run"), "--data.size", "[[0, 28], [1, 30], [2, 33]]", "--data.batch", "4"]
    with pytest.raises(UserError, match="data.size: 30 and 33 px do not fit: .*use 28 or 35"):
        main_pretrain.main(argv)
    assert not (tmp_path / "run" / "last.pt").exists()
