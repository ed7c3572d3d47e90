"""Several roots with weights; fractions that can be compared; memory for millions of images."""

import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from models.encoders.build import build_encoder
from models.mim.recipes import mae
from models.monitor.health import health
from tests.test_loader import joined, same
from util.config import Data, Run
from util.data.dice import hash_names
from util.data.images import open_images
from util.data.loader import Loader
from util.data.names import Names
from util.data.order import Order, apportion
from util.data.subsets import choose, hold_out
from util.data.survey import measure
from util.data.transforms import RandomCrop
from util.errors import UserError
from util.plan import make_plan
from util.start import Batches
from util.times import Time

PLAIN = {"mean": [0.0] * 3, "std": [1.0] * 3}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """30 bright images in three classes, and 10 dark ones, and some to validate."""
    folder = tmp_path_factory.mktemp("roots")
    rng = np.random.default_rng(0)
    for name, count, least in (("bright", 30, 128), ("dark", 10, 0), ("val", 12, 0)):
        for i in range(count):
            path = folder / name / "abc"[i % 3] / f"{name}{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(least, least + 128, (16, 16, 3), np.uint8)).save(path)
    return folder


def find(roots, **options):
    return open_images([str(roots / "bright"), str(roots / "dark")], str(roots / "val"), **options)


def load(images, start=0, steps=10, batch=8, weights=(1, 3), **options):
    plan = make_plan(len(images), batch, None, 16, Time(100), options.get("world", 1))
    batches = Loader(images, RandomCrop(), plan, **PLAIN, weights=weights, **options).batches(start)
    found = list(itertools.islice(batches, sum(plan.at(step).accumulate for step in range(start, start + steps))))
    batches.close()
    return found


def test_an_epoch_of_weighted_sources_has_its_length_and_their_shares(roots):
    images = find(roots).train
    assert images.bounds.tolist() == [0, 30, 40]
    batches = load(images)  # two epochs of 5 steps
    for epoch in (batches[:5], batches[5:]):
        index = torch.cat([batch["index"] for batch in epoch])
        assert len(index) == 40 and (index < 30).sum() == 10  # a quarter of 40 images
        counts = torch.bincount(index, minlength=40)
        assert counts[:30].max() == 1 and counts[30:].tolist() == [3] * 10
    both = torch.cat([batch["index"] for batch in batches])
    assert not torch.equal(both[:40], both[40:])
    bright = both[both < 30]
    assert len(set(bright.tolist())) == 20  # the second epoch goes on where the first one was
    for batch in batches:
        assert float(batch["figures"]["drawn/1"]) == (batch["index"] < 30).float().mean()
        assert float(batch["figures"]["drawn/1"] + batch["figures"]["drawn/2"]) == 1


def test_copies_within_an_epoch_are_augmented_differently(roots):
    first = joined(load(find(roots).train, 0, 5))
    dark = [image for i, image in first if i == 31]
    assert len(dark) == 3 and not torch.equal(dark[0], dark[1]) and not torch.equal(dark[1], dark[2])


def test_weighted_order_is_the_same_for_any_start_and_any_processes(roots):
    images = find(roots).train
    whole = joined(load(images, 0, 17))
    assert same(joined(load(images, 7, 10)), whole[7 * 8 :])
    assert same(joined(load(images, 3, 4, workers=1)), whole[3 * 8 : 7 * 8])
    parts = [joined(load(images, 4, 3, world=2, rank=rank)) for rank in (0, 1)]
    for step in range(3):
        both = parts[0][4 * step : 4 * step + 4] + parts[1][4 * step : 4 * step + 4]
        assert same(both, whole[8 * (4 + step) : 8 * (5 + step)])
    assert not same(joined(load(images, 0, 1, seed=1)), whole[:8])


def test_without_weights_an_epoch_is_every_image_once_and_says_what_was_drawn(roots):
    batches = load(find(roots).train, weights=None)
    assert sorted(int(i) for batch in batches[:5] for i in batch["index"]) == list(range(40))
    assert np.mean([float(batch["figures"]["drawn/1"]) for batch in batches[:5]]) == pytest.approx(0.75)


def test_the_walk_through_a_source_takes_all_its_images_before_any_again():
    order = Order(np.array([0, 7, 1000]), [1, 99], seed=3)
    walked = order.walk(0, 4, 24)  # from the fifth of a pass on: 3, 7, 7 and 7
    positions, copies = walked % 1000, walked // 1000
    assert (np.diff(copies) >= 0).all() and np.bincount(copies).tolist() == [3, 7, 7, 7]
    for copy in (1, 2, 3):
        assert sorted(positions[copies == copy]) == list(range(7))
    assert np.array_equal(np.concatenate([order.walk(1, 0, 5), order.walk(1, 5, 9)]), order.walk(1, 0, 14))


def test_shares_come_out_as_near_as_whole_images_can():
    assert apportion(10, np.array([1, 1, 1]) / 3).sum() == 10
    assert apportion(100, np.array([0.335, 0.665])).tolist() in ([33, 67], [34, 66])
    assert np.array_equal(apportion(7, np.array([0.5, 0.25, 0.25])), [3, 2, 2])


def test_roots_are_described_and_an_empty_one_is_told():
    lines = Order(np.array([0, 30, 40]), [1, 3]).describe(["/data/bright", "/data/dark"])
    assert lines[0] == "source 1  /data/bright: 30 images, each 0.333 times an epoch, 25 % of what is drawn"
    assert "10 images, each 3 times an epoch, 75 %" in lines[1]
    assert Order(np.array([0, 30])).describe(["/data/bright"]) == []
    with pytest.raises(UserError, match="root 2 of data.root has no image to train on"):
        Order(np.array([0, 30, 30]), [1, 1])


def test_all_that_a_fraction_is_judged_by_is_the_same_for_all(roots, tmp_path):
    """Held-out images, their masks, normalisation and the k-NN bank; hence a model's held-out loss, to the bit."""
    seen = []
    torch.manual_seed(0)
    encoder = build_encoder("vit_tiny_patch16_224", 3, img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2)
    model = mae(encoder, depth=1, width=16, heads=2)
    for fraction in (0.1, 0.5, 1.0):
        found = find(roots, labels=True, fraction=fraction)
        data = Data(["bright", "dark"], size=16, batch=4, workers=0, fraction=fraction)
        batches = Batches(data, Run(str(tmp_path)), found, None, torch.device("cpu"), lambda line: None)
        bank = list(batches.once(found.pool, 20))
        heldout = health(model, batches.once(found.val, 10))
        seen.append((len(found.train), batches.mean, batches.std, joined(bank), heldout))
    assert [part[0] for part in seen] == [4, 20, 40]
    for part in seen[1:]:
        assert part[1:3] == seen[0][1:3] and same(part[3], seen[0][3]) and part[4] == seen[0][4]
    assert len({tuple(measure(find(roots, fraction=fraction).train)[0]) for fraction in (0.1, 0.5, 1.0)}) == 3


def test_channels_are_those_of_all_images_whatever_the_fraction(tmp_path):
    for i in range(40):
        Image.new("RGB" if i == 7 else "L", (8, 8)).save(tmp_path / f"{i}.png")
    found = [open_images(str(tmp_path), str(tmp_path), fraction=fraction) for fraction in (0.05, 1.0)]
    assert [len(one.train) for one in found] == [2, 40] and {one.train.channels for one in found} == {3}
    assert "2 to train on (of 40)" in str(found[0].survey) and "(of" not in str(found[1].survey)


def peak(work, *args):
    """The most memory, in bytes, that a call needs at a time."""
    tracemalloc.start()
    work(*args)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


def test_memory_for_millions_of_images_is_tens_of_bytes_each():
    """An epoch of 14 million images is shuffled in 0.3 GB; nowhere is there an object for each of them."""
    n = 2_000_000
    for weights in (None, [1, 2], [5, 1]):
        assert peak(Order(np.array([0, n // 4, n]), weights), 3, 100) < 24 * n
    n = 20_000
    names = Names(f"n{i % 100:08d}/n{i % 100:08d}_{i:08d}.JPEG" for i in range(n))
    rows = np.arange(n)
    assert peak(Names, iter(names)) < 60 * n
    for work, args in ((hash_names, (names, "x")), (hold_out, (names,)), (choose, (names, rows, None, 0.3, None, 0))):
        assert peak(work, *args) < 24 * n, work
