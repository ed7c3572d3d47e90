"""Batches: the same images with the same augmentation for any start, worker and process; bad images; transforms."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from util.data import crops
from util.data.bad import BadImages
from util.data.crops import crop_resize, draw_boxes
from util.data.dice import Dice
from util.data.images import Images, open_images
from util.data.loader import Loader, Ordered
from util.data.mnist import Pixels
from util.data.transforms import Augment, CentreCrop, RandomCrop
from util.errors import UserError
from util.plan import make_plan
from util.times import Time

PLAIN = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(42):
        Image.fromarray(rng.integers(0, 256, (20 + i % 3, 24, 3), np.uint8)).save(root / f"{i:02d}.png")
    return root


@pytest.fixture
def images(folder):
    return open_images(str(folder), val=str(folder)).train


def load(images, start=0, count=6, batch=8, per_device=4, size=16, transform=None, **options):
    plan = make_plan(len(images), batch, per_device, size, Time(100), options.get("world", 1))
    batches = Loader(images, transform or RandomCrop(), plan, **PLAIN | options).batches(start)
    passes = sum(plan.at(step).accumulate for step in range(start, start + count))
    found = list(itertools.islice(batches, passes))
    batches.close()
    return found


def joined(batches):
    """(index, image) of batches that may be cut differently."""
    return [(int(i), image) for batch in batches for i, image in zip(batch["index"], batch["image"])]


def same(one, other):
    return len(one) == len(other) and all(i == j and torch.equal(a, b) for (i, a), (j, b) in zip(one, other))


def test_any_start_and_any_workers_give_the_same_batches(images):
    whole = joined(load(images, 0, 13))  # 5 steps to an epoch
    assert same(joined(load(images, 7, 6)), whole[7 * 8 :])
    assert same(joined(load(images, 0, 13, workers=2)), whole)
    assert same(joined(load(images, 3, 3, workers=1)), whole[3 * 8 : 6 * 8])
    assert not same(joined(load(images, 0, 1, seed=1)), whole[:8])


def test_epochs_take_each_image_once_in_new_orders(images):
    order = [i for i, _ in joined(load(images, 0, 10))]
    first, second = order[:40], order[40:]
    assert len(set(first)) == len(set(second)) == 40 and first != second


def test_any_number_of_processes_share_the_same_images(images):
    whole = joined(load(images, 2, 4))
    parts = [joined(load(images, 2, 4, world=2, rank=rank, per_device=2)) for rank in (0, 1)]
    for step in range(4):
        both = parts[0][4 * step : 4 * step + 4] + parts[1][4 * step : 4 * step + 4]
        assert same(both, whole[8 * step : 8 * step + 8])


def test_size_by_epoch_and_not_square(images):
    schedule = [(0, 16), (1, (8, 24))]
    for workers in (0, 1):
        shapes = [tuple(batch["image"].shape[-2:]) for batch in load(images, 4, 3, size=schedule, workers=workers)]
        assert shapes == [(16, 16)] * 2 + [(8, 24)] * 4
    with pytest.raises(UserError, match="from epoch 0 on"):
        load(images, size=[(3, 16)])


def test_accumulation_follows_from_the_batch(images):
    assert len(load(images, 0, 1, batch=24, world=2)) == 3


def test_fewer_images_than_a_batch(images):
    few = Images(images.source, images.rows[:3], 3)
    loader = Loader(few, RandomCrop(), make_plan(3, 8, 4, 16, Time(1)), **PLAIN)
    assert loader.plan.steps == 1 and "3 images do not fill a batch of 8" in loader.note
    found = joined(load(few, 0, 1))
    assert sorted(np.bincount([i for i, _ in found])) == [2, 3, 3]
    assert len({image.sum().item() for _, image in found}) == 8  # copies, but augmented differently


def test_ordered_gives_every_image_once_whatever_the_processes(images):
    parts = [
        list(Ordered(images, CentreCrop(), 4, 16, **PLAIN, rank=rank, world=4, workers=rank % 2)) for rank in range(4)
    ]
    found = [i for part in parts for i, _ in joined(part)]
    assert len(found) == 42 and set(found) == set(range(42))


def test_batches_are_normalised(images):
    mean, std = [0.5, 0.4, 0.3], [0.1, 0.2, 0.3]
    plain, normal = load(images, 0, 1)[0]["image"], load(images, 0, 1, mean=mean, std=std)[0]["image"]
    assert plain.dtype == torch.float32 and plain.min() >= 0 and 0.9 < plain.max() <= 1
    assert torch.allclose(
        normal, (plain - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None], atol=1e-5
    )


def test_loading_leaves_the_global_generators_alone(images):
    torch.manual_seed(0)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    load(images, 0, 1, transform=Augment([0.5] * 3, [0.2] * 3))
    load(images, 0, 1, workers=1)
    assert torch.rand(1) == wanted


@pytest.fixture
def spoilt(folder, tmp_path):
    """42 images, of which the first four cannot be read."""
    for i, path in enumerate(sorted(folder.iterdir())):
        (tmp_path / "data" / path.name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / path.name).write_bytes(path.read_bytes()[: 50 if i < 4 else None])
    return open_images(str(tmp_path / "data"), val=str(tmp_path / "data")).train


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_replaced_and_named_once(spoilt, tmp_path, workers):
    path = tmp_path / "run" / "bad_images.txt"
    found = load(spoilt, 0, 15, bad=BadImages(path, 42, 0.1), workers=workers)
    assert sum(len(batch["index"]) for batch in found) == 120
    assert sorted(path.read_text().splitlines()) == [f"{tmp_path}/data/{i:02d}.png" for i in range(4)]
    assert same(joined(found), joined(load(spoilt, 0, 15)))


def test_too_many_bad_images_stop_the_run(spoilt, tmp_path):
    with pytest.raises(UserError, match=r"3 of 42 images cannot be read, data.max_bad allows 0.05.*00.png|0\d.png"):
        load(spoilt, 0, 15, bad=BadImages(tmp_path / "bad.txt", 42, 0.05))
    early = BadImages(tmp_path / "early.txt", 10**6, 0.01)
    with pytest.raises(UserError, match="21 of 1,000,000"):
        for i in range(100):
            early.add(4, [(f"{i}.png", "broken")])  # a quarter of those tried: no need to wait for 10,000


def test_processes_share_the_list_of_bad_images(tmp_path):
    one, two = (BadImages(tmp_path / "bad.txt", 100, 0.03) for _ in range(2))
    for i in range(3):
        (one if i % 2 else two).add(10, [(f"{i}.png", "broken"), ("0.png", "broken")])
    with pytest.raises(UserError, match="4 of 100"):
        one.add(10, [("3.png", "broken")])
    assert (tmp_path / "bad.txt").read_text().splitlines() == ["0.png", "1.png", "2.png", "3.png"]


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_cropping_by_matrices_is_torchvisions(mode, monkeypatch):
    images = torch.rand(8, 2, 30, 40)
    boxes = draw_boxes(Dice(0, 0, np.arange(8)), 30, 40, (0.1, 1), (0.7, 1.4))
    for size in ((12, 12), (50, 20)):
        batched = crop_resize(images, boxes, size, mode)
        monkeypatch.setattr(crops, "BATCHED", 0)
        assert torch.allclose(batched, crop_resize(images, boxes, size, mode), atol=1e-4)
        monkeypatch.undo()
        one = F.resized_crop(images[3], *boxes[3].tolist(), list(size), InterpolationMode(mode), antialias=True)
        assert torch.allclose(batched[3], one, atol=1e-4)


def test_boxes_have_the_areas_and_shapes_asked_for():
    top, left, height, width = draw_boxes(Dice(0, 0, np.arange(4000)), 200, 300, (0.2, 1.0), (3 / 4, 4 / 3)).T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 200).all() and (left + width <= 300).all()
    areas, shapes = height * width / 60000, width / height
    assert areas.min() > 0.19 and areas.max() > 0.85 and shapes.min() > 0.73 and shapes.max() < 1.37
    assert abs(np.log(shapes).mean()) < 0.06 and len(np.unique(left)) > 100


def test_transforms_keep_kind_and_channels():
    for channels, dtype in ((1, torch.uint8), (5, torch.float32), (3, torch.uint8)):
        images = (torch.rand(2, channels, 70, 90) * 200).to(dtype)
        for transform in (RandomCrop(), RandomCrop((1, 1)), CentreCrop()):
            found = transform(images, (32, 48), Dice(0, 0, np.arange(2)))
            assert found.shape == (2, channels, 32, 48) and found.dtype == dtype
    exact = torch.rand(1, 3, 32, 48)
    assert CentreCrop()(exact, (32, 48)) is exact
    assert torch.equal(RandomCrop((1, 1), flip=0)(exact, (32, 48), Dice(0, 0, np.arange(1))), exact)


@pytest.mark.parametrize("channels", [1, 3])
def test_augment(channels):
    images = torch.randint(0, 256, (64, channels, 28, 28), dtype=torch.uint8)
    mean, std = [0.5] * channels, [0.2] * channels
    augment = Augment(mean, std, erase=0.0, scale=(1, 1), flip=0, channels=channels)
    found = augment(images, (28, 28), Dice(0, 0, np.arange(64)))
    alone = torch.cat([augment(images[i : i + 1], (28, 28), Dice(0, 0, np.arange(i, i + 1))) for i in range(64)])
    assert torch.equal(found, alone) and found.shape == images.shape and (found != images).flatten(1).any(1).sum() > 40
    erase = Augment(mean, std, auto=None, erase=0.5, scale=(1, 1), flip=0, channels=channels)
    changed = (erase(images, (28, 28), Dice(0, 0, np.arange(64))) != images).any(1).flatten(1).float().mean(1)
    assert 20 < (changed > 0).sum() < 44 and changed[changed > 0].min() > 0.01 and changed.max() < 0.36
    with pytest.raises(UserError, match="set data.augment to none"):
        Augment(mean, std, channels=channels, bits=16)


def test_images_in_memory_are_fetched_at_once_and_alike():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 1, 28, 28), dtype=np.uint8)
    images = Images(Pixels(pixels, np.arange(30), "train"), np.arange(30), 1, np.arange(30))
    one = {"mean": [0.0], "std": [1.0]}
    for transform in (RandomCrop((0.5, 1)), Augment([0.3], [0.3], channels=1)):
        whole = load(images, 0, 3, transform=transform, **one)
        assert all(torch.equal(batch["label"], batch["index"]) for batch in whole)
        assert same(joined(load(images, 0, 3, transform=transform, per_device=1, **one)), joined(whole))


def test_dice_are_even_and_independent():
    draws = Dice(3, 1, np.arange(2000)).uniform(4)
    assert np.abs(draws.mean(0) - 0.5).max() < 0.03 and np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.08
    assert np.array_equal(Dice(3, 1, np.array([7])).uniform(4)[0], draws[7])
    assert not (Dice(3, 2, np.arange(2000)).uniform(4) == draws).any()
