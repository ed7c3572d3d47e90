"""The held-out figures mean what they say: fixed masks, trivial guesses, effective rank, exact over processes."""

import pytest
import torch

from models.encoders.vit import ViT
from models.mim import recipes
from models.mim.masker import RandomMasker
from models.monitor.health import TRIVIAL, Spectrum, bilinear_fill, health, mean_fill, verdict, visible_mean
from models.targets.target import Target
from util import dist


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def tiny(method="mae", in_chans=3, **args):
    torch.manual_seed(0)
    encoder = ViT("vit_tiny_patch16_224", in_chans, patch_size=4, img_size=16, embed_dim=16, depth=2, num_heads=2)
    return getattr(recipes, method)(encoder, **args)


def small_mae(**args):
    return tiny(depth=1, width=16, heads=2, **args)


def batches(count=4, size=6):
    images = torch.randn(count * size, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return [{"image": x} for x in images.split(size)]


def test_masks_are_fixed_and_nothing_is_disturbed():
    mim = small_mae().train()
    mim.encoder.vit.norm.eval()
    before, modes = torch.get_rng_state(), [part.training for part in mim.modules()]
    first = health(mim, batches(), seed=3)
    assert torch.equal(before, torch.get_rng_state()) and modes == [part.training for part in mim.modules()]
    torch.rand(5)
    assert health(mim, batches(), seed=3) == first
    assert health(mim, batches(), seed=4)["heldout"] != first["heldout"]


def test_every_image_counts_the_same():
    mim, seen = small_mae(), []
    mim.register_forward_hook(lambda module, inputs, losses: seen.append(losses["loss"].item()))
    uneven = [{"image": torch.randn(n, 3, 16, 16)} for n in (1, 5, 2)]
    figures = health(mim, uneven)
    assert figures["heldout"] == pytest.approx((seen[0] + 5 * seen[1] + 2 * seen[2]) / 8)
    assert figures["images"] == 8 and figures["dim"] == 16


def test_trivial_guesses_are_judged_as_the_method_is():
    mim = small_mae(target="pixels")
    flat = health(mim, [{"image": torch.full((2, 3, 16, 16), 0.7)}])
    assert all(flat[name] == pytest.approx(0, abs=1e-9) for name in TRIVIAL) and flat["heldout"] > 0
    ramp = torch.linspace(-1, 1, 16).expand(8, 3, 16, 16)
    sloped = health(small_mae(target="pixels", ratio=0.5), [{"image": ramp}])
    assert sloped["bilinear_fill"] < 0.5 * sloped["mean_fill"]
    normal = health(small_mae(target="normalized"), batches())
    assert 0.9 < normal["mean_cell"] < 1.3  # noise cannot be guessed


@pytest.mark.parametrize("fill", [mean_fill, bilinear_fill])
@pytest.mark.parametrize("size", [(24, 24), (20, 36)])
def test_fills_see_visible_pixels_alone(fill, size):
    images = torch.randn(3, 2, *size)
    hidden = RandomMasker(4, 0.75)(images).at(1)
    filled = fill(images, hidden)
    assert torch.equal(filled.movedim(1, -1)[~hidden], images.movedim(1, -1)[~hidden])
    others = torch.where(hidden[:, None], 9.0, images)
    assert torch.equal(fill(others, hidden), filled)
    for image, mask, mean in zip(filled, hidden, visible_mean(images, hidden)):
        assert image.isfinite().all()
        if fill is mean_fill:
            torch.testing.assert_close(image[:, mask], mean[:, 0].expand(-1, int(mask.sum())))


@pytest.mark.parametrize("method", ["mae", "simmim", "fastmim"])
@pytest.mark.parametrize("target", ["pixels", "normalized", "hog"])
def test_all_methods_and_targets(method, target):
    args = {"cell": 4, "target": target, "unit": 4}
    mim = tiny(method, **args) if method == "simmim" else tiny(method, depth=1, width=16, heads=2, **args)
    figures = health(mim, batches(2))
    assert set(figures) == {"heldout", *TRIVIAL, "rank", "spread", "dim", "images"}
    assert all(isinstance(x, float) and x >= 0 for x in figures.values())


def test_class_ids_have_no_trivial_guesses():
    class Ids(Target):
        unit, dim = 4, 48

        def forward(self, images):
            return (images[:, 0, ::4, ::4] > 0).long()

    mim = small_mae(target="pixels")
    mim.target, mim.distance = Ids(), lambda guess, truth: guess.var(-1) + truth
    assert set(health(mim, batches())) == {"heldout", "rank", "spread", "dim", "images"}


def spectrum(vectors, pieces=1):
    sums = Spectrum(vectors.shape[1], vectors.device)
    for piece in vectors.chunk(pieces):
        sums.add(piece)
    return sums.figures()


def test_effective_rank_and_spread():
    directions = torch.linalg.qr(torch.randn(64, 64)).Q
    for k in (1, 5, 64):
        x = torch.randn(20000, k) @ directions[:k] + 3 * directions[0]
        assert spectrum(x)["rank"] == pytest.approx(k, rel=0.01)
        centred = (x - x.mean(0)).double()
        singular = torch.linalg.svdvals(centred)
        p = singular / singular.sum()
        assert spectrum(x, 7)["rank"] == pytest.approx(torch.special.entr(p).sum().exp().item(), rel=1e-4)
    assert spectrum(torch.randn(20000, 64))["spread"] == pytest.approx(1, abs=0.01)
    same = spectrum(torch.randn(1, 64).expand(100, 64))
    assert same["spread"] < 1e-6 and "COLLAPSED" in verdict({"heldout": 1.0, **same})
    assert spectrum(torch.zeros(10, 4))["rank"] == 1
    assert spectrum(torch.full((10, 4), torch.nan))["rank"] != spectrum(torch.zeros(10, 4))["rank"]


def test_no_images():
    with pytest.raises(ValueError, match="no held-out image"):
        health(small_mae(), [])


def test_two_processes_are_one(monkeypatch):
    """Each process in turn tells what it would sum; then the first is answered with the sums."""
    mim, alone, told = small_mae(), health(small_mae(), batches(3)), {0: [], 1: []}
    monkeypatch.setattr(dist, "world", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(dist, "total", lambda x, rank=rank: told[rank].append(x) or x)
        health(mim, batches(3)[rank::2])
    sums = iter([a + b for a, b in zip(told[0], told[1], strict=True)])
    monkeypatch.setattr(dist, "rank", lambda: 0)
    monkeypatch.setattr(dist, "total", lambda x: next(sums))
    assert health(mim, batches(3)[0::2]) == pytest.approx(alone, rel=1e-6)


NOW = {"heldout": 0.412, "mean_fill": 0.98, "bilinear_fill": 0.63, "mean_cell": 0.9}
NOW |= {"rank": 214.2, "spread": 0.5, "dim": 768.0, "images": 5000.0}


def test_verdict():
    assert verdict({**NOW, "knn": 0.61}, {**NOW, "heldout": 0.42}, 2) == (
        "held-out 0.412 (mean fill 0.98, bilinear 0.63, mean cell 0.9): 35 % below the best trivial guess; "
        "improving 0.95 % per epoch; rank 214 of 768; k-NN 0.610"
    )
    assert "NO BETTER THAN A TRIVIAL GUESS (bilinear)" in verdict({**NOW, "heldout": 0.7})
    assert "no longer improving" in verdict(NOW, NOW, 10)
    assert "GETTING WORSE by 5 % per epoch" in verdict({**NOW, "heldout": 0.63}, {**NOW, "heldout": 0.42}, 10)
    assert "NO NUMBER" in verdict({**NOW, "heldout": float("nan")}, NOW, 1)
    assert "rank 20 of 95 (96 images)" in verdict({**NOW, "rank": 20.0, "images": 96.0})
    assert "\n" not in verdict(NOW, NOW, 1)
