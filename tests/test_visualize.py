"""Panels show what was seen, guessed and true, in the right colours and without flattery."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from models.encoders.vit import ViT
from models.mim import recipes
from models.monitor.draw import draw
from models.monitor.picture import reconstruct
from models.targets.target import HOG, Target
from util.errors import UserError
from util.visualize import GAP, panel, save_panel, tile, wrap


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def mae(in_chans=3, target="normalized"):
    encoder = ViT("vit_tiny_patch16_224", in_chans, patch_size=4, img_size=16, embed_dim=16, depth=1, num_heads=2)
    return recipes.mae(encoder, target=target, depth=1, width=16, heads=2)


class Knows(nn.Module):
    """A head that knows the truth."""

    def __init__(self, truth):
        super().__init__()
        self.truth = truth

    def forward(self, features, mask):
        return self.truth


@pytest.mark.parametrize("in_chans", [1, 3, 5])
@pytest.mark.parametrize("target", ["pixels", "normalized"])
def test_a_perfect_guess_is_the_original(target, in_chans):
    photos = torch.rand(3, in_chans, 16, 24)
    mean, std = torch.linspace(0.2, 0.6, in_chans).tolist(), torch.linspace(0.2, 0.3, in_chans).tolist()
    shape = (1, -1, 1, 1)
    images = (photos - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    mim = mae(in_chans, target)
    mim.head = Knows(mim.target(images))
    pictures = reconstruct(mim, images, mean, std)
    masked, guess, pasted, original = pictures.columns.values()
    torch.testing.assert_close(original, photos)
    torch.testing.assert_close(guess, photos, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pasted, photos, atol=1e-4, rtol=1e-4)
    hidden = masked.isnan()
    assert hidden.float().mean() == pytest.approx(18 / 24) and torch.equal(masked[~hidden], original[~hidden])
    assert ("borrowed" in pictures.caption) == (target == "normalized") and "stretched" not in pictures.caption


def test_data_in_a_small_part_of_their_range_are_stretched():
    photos = 0.5 + 0.01 * torch.randn(4, 1, 16, 16)  # say, 16 bit thermal images
    pictures = reconstruct(mae(1), (photos - 0.5) / 0.01, [0.5], [0.01])
    torch.testing.assert_close(pictures.columns["original"], ((photos - 0.46) / 0.08).clamp(0, 1))
    assert "black is 0.46, white 0.54" in pictures.caption


def test_pasted_cells_are_the_visible_ones():
    mim, images = mae(target="pixels"), torch.rand(2, 3, 16, 16)
    masked, guess, pasted, original = reconstruct(mim, images, (0, 0, 0), (1, 1, 1)).columns.values()
    hidden = masked.isnan()
    assert torch.equal(pasted[~hidden], original[~hidden]) and torch.equal(pasted[hidden], guess[hidden])
    assert not torch.equal(guess[~hidden], original[~hidden])


def test_nothing_is_disturbed_and_masks_are_fixed():
    mim, images = mae().train(), torch.rand(2, 3, 16, 16)
    before = torch.get_rng_state()
    first = reconstruct(mim, images, (0, 0, 0), (1, 1, 1), seed=1)
    assert torch.equal(before, torch.get_rng_state()) and mim.training and mim.encoder.training
    again = reconstruct(mim, images, (0, 0, 0), (1, 1, 1), seed=1)
    assert all(torch.equal(a.nan_to_num(-1), again.columns[title].nan_to_num(-1)) for title, a in first.columns.items())


def test_glyphs_follow_edges():
    upright = torch.zeros(1, 3, 16, 16)
    upright[..., 4:12] = 1
    target = HOG(8, 3)
    for image, along, across in ((upright, 2, 3), (upright.mT, 3, 2)):
        drawn = draw(target, target(image), image)
        assert drawn.shape == (1, 1, 32, 32) and drawn.min() >= 0 and drawn.max() <= 1
        light = drawn[:, :, :16, :16]
        assert light.sum(along).max() > 3 * light.sum(across).max()
    guessed = reconstruct(mae(target="hog"), torch.rand(2, 3, 16, 16), (0, 0, 0), (1, 1, 1))
    masked, _, pasted, truth, original = guessed.columns.values()
    assert pasted.shape == truth.shape == (2, 1, 48, 48) and masked.shape == original.shape == (2, 3, 16, 16)
    seen = ~masked[:, :1].isnan().repeat_interleave(3, 2).repeat_interleave(3, 3)
    assert torch.equal(pasted[seen], truth[seen]) and "Strokes" in guessed.caption


def test_a_target_without_pictures_has_no_panel():
    mim = mae()
    mim.target = Target()
    assert reconstruct(mim, torch.rand(1, 3, 16, 16), (0, 0, 0), (1, 1, 1)) is None


def test_panel_lays_out_columns(tmp_path):
    colour = torch.tensor([0.2, 0.4, 0.8]).view(1, 3, 1, 1).expand(9, 3, 28, 28)
    glyphs = torch.rand(9, 1, 112, 112)
    picture = panel({"input": colour * math.nan, "glyphs": glyphs, "original": colour}, "a caption " * 30)
    assert picture.dtype == np.uint8 and picture.shape[1:] == (GAP + 3 * (112 + GAP), 3)
    assert picture.shape[0] > 8 * (112 + GAP) + GAP
    row = picture[picture.shape[0] // 2 - 30]
    assert (row[-GAP - 56] == [51, 102, 204]).all()  # the right colour
    assert {tuple(x) for x in row[GAP : GAP + 112]} == {(128, 128, 128), (158, 158, 158)}  # hatched
    save_panel(tmp_path / "new" / "panel.png", picture)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "panel.png")), picture)


def test_tiles_are_enlarged_without_blur():
    image = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    assert (tile(image, 6, None)[..., 0] == np.kron([[0, 255], [255, 0]], np.ones((3, 3)))).all()
    assert panel({"a": torch.rand(20, 3, 300, 200)}).shape[0] < 2100  # six rows


def test_bands():
    image = torch.arange(5.0).view(5, 1, 1).expand(5, 4, 4) / 5
    assert (tile(image, 4, None)[0, 0] == [0, 51, 102]).all()
    assert (tile(image, 4, (4, 2, 1))[0, 0] == [204, 102, 51]).all()
    assert (tile(image, 4, (3,))[0, 0] == 153).all()
    assert (tile(image[1:3], 4, None)[0, 0] == 51).all()  # of two channels, the first
    assert (tile(image[1:2], 4, (4, 2, 1))[0, 0] == 51).all()  # grey and glyphs have no bands
    with pytest.raises(UserError, match="0 to 4"):
        tile(image, 4, (5, 2, 1))


def test_wrap_keeps_every_word():
    from PIL import ImageFont

    font, text = ImageFont.load_default(13), "one two three four five six seven"
    lines = wrap(text, font, 60)
    assert " ".join(lines) == text and all(font.getlength(line) <= 60 for line in lines)
