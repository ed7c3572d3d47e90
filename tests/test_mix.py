"""MixMIM: two images in one, kept apart at every stage; every image gets all its cells back, paired or alone."""

import json
import os

import pytest
import torch
import torch.distributed as torch_dist
import torch.multiprocessing as mp
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.nn.parallel import DistributedDataParallel

from models.encoders.build import build_encoder
from models.encoders.grid import Mask
from models.encoders.mixswin import build_walls, walled_block
from models.mim.hide import Mix
from models.mim.loss import over_all
from models.mim.masker import RandomMasker
from models.mim.recipes import mixmim
from models.monitor.health import TRIVIAL, health, mean_fill, trivial_losses
from models.monitor.picture import reconstruct
from tests.test_main import fill_folder, finetune, pretrain
from util import dist
from util.checks import check_pairs
from util.config import Data, Run
from util.errors import UserError
from util.train import seed

SIZES = {
    "img_size": (96, 160),
    "embed_dim": 8,
    "depths": (2, 2, 1, 1),
    "num_heads": (1, 1, 2, 2),
    "window_size": (10, 7, 4, 2),
}
SHAPE = (3, 96, 160)  # cells of 3 x 5; no grid of the first three stages is a whole number of windows


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)


def encoder(**args):
    """In float64, with attention and biases that matter."""
    made = build_encoder("mixmim_base", **SIZES | args).double().eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


def method(**args):
    return mixmim(encoder(), depth=1, width=16, heads=2, **args).double().eval()


def images(count):
    return torch.randn(count, *SHAPE, dtype=torch.float64)


# the two sides of a mask


@torch.no_grad()
def test_the_two_images_of_a_mixture_do_not_see_each_other():
    hide, x = Mix(encoder()), images(2)
    mask = RandomMasker(32, 0.5, shared=True)(x)
    other = torch.stack([x[0], torch.randn_like(x[1])])  # another partner for image 0
    for stride, one, two in zip(hide.encoder.strides, hide(x, mask).maps, hide(other, mask).maps):
        hidden = mask.at(stride)
        first, second = one[0].movedim(0, -1), two[0].movedim(0, -1)
        assert torch.equal(first[~hidden[0]], second[~hidden[0]])  # image 0's own places
        assert not torch.equal(first[hidden[0]], second[hidden[0]])
        first, second = one[1].movedim(0, -1), two[1].movedim(0, -1)  # here image 0 lies where the mask hides
        assert torch.equal(first[hidden[1]], second[hidden[1]])
    tokens = [hide.encoder.embed(y) for y in (x, other)]
    mixed = [torch.where(mask.at(4)[..., None], t.flip(0), t) for t in tokens]
    one, two = (hide.encoder.encode(t).maps[-1][0].movedim(0, -1)[~mask.cells[0]] for t in mixed)
    assert (one - two).abs().max() > 1e-4  # without the mask they do, or the test would say nothing


@torch.no_grad()
def test_places_depend_on_their_own_side_alone_under_any_masks():
    made, x = encoder(), images(3)
    mask = RandomMasker(32, 0.4)(x)  # another mask for each image
    tokens = made.embed(x)
    for side in (mask, ~mask):
        others = torch.where(side.at(4)[..., None], torch.randn_like(tokens), tokens)
        for stride, one, two in zip(made.strides, made.encode(tokens, mask).maps, made.encode(others, mask).maps):
            seen = ~side.at(stride)
            assert torch.equal(one.movedim(1, -1)[seen], two.movedim(1, -1)[seen])


@torch.no_grad()
def test_nothing_attends_to_the_padding_of_a_window():
    block, x = encoder().backbone.layers[1].blocks[0], torch.randn(2, 12, 20, 16, dtype=torch.float64)
    whole = walled_block(block, x, build_walls(x, block.window_size, None))
    assert block.window_size == (7, 7)
    for rows, columns in ((slice(7, 12), slice(14, 20)), (slice(0, 7), slice(14, 20)), (slice(0, 7), slice(0, 7))):
        part = x[:, rows, columns]  # a window, or what the grid holds of it
        torch.testing.assert_close(whole[:, rows, columns], attended_directly(block, part))


def attended_directly(block, x):
    """A block of one window without any padding, written out."""
    (_, h, w, c), attn, (p, q) = x.shape, block.attn, block.window_size
    y = block.norm1(x).flatten(1, 2)
    heads = attn.num_heads
    query, key, value = attn.qkv(y).unflatten(-1, (3, heads, c // heads)).permute(2, 0, 3, 1, 4)
    row, column = (z.flatten() for z in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    offset = (row[:, None] - row + p - 1) * (2 * q - 1) + column[:, None] - column + q - 1
    scores = query @ key.mT / (c // heads) ** 0.5 + attn.relative_position_bias_table[offset].movedim(-1, 0)
    y = attn.proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2)).view_as(x)
    return x + y + block.mlp(block.norm2(x + y))


@torch.no_grad()
def test_images_of_any_size_go_in():
    made = build_encoder("mixmim_base", **SIZES | {"img_size": 224, "window_size": (14, 14, 14, 7)}).eval()
    for h, w in ((32, 32), (64, 96), (224, 224), (256, 96)):
        mask = RandomMasker(32, 0.5, shared=True)(torch.zeros(2, 3, h, w)) if h > 32 else None
        maps = made.encode(made.embed(torch.randn(2, 3, h, w)), mask).maps
        assert [m.shape[-2:] for m in maps] == [(h // s, w // s) for s in (4, 8, 16, 32)]
        assert all(m.isfinite().all() for m in maps)
    with pytest.raises(ValueError, match="16 px cells has no grid of 32 px"):
        made.encode(made.embed(torch.randn(2, 3, 64, 64)), RandomMasker(16, 0.5)(torch.zeros(2, 3, 64, 64)))


def test_layers_are_the_official_ones():
    """The stem, then each block; a merging layer learns with the block that follows it."""
    made = build_encoder("mixmim_base", **SIZES)
    stages = made.backbone.layers
    owner = {id(p): k for k, layer in enumerate(made.layers) for p in layer}
    assert [owner[id(p)] for p in made.stem.parameters()] == [0] * 4 and len(made.layers) == 1 + sum(SIZES["depths"])
    blocks = [block for stage in stages for block in stage.blocks]
    assert [{owner[id(p)] for p in block.parameters()} for block in blocks] == [{k + 1} for k in range(len(blocks))]
    for stage in stages[1:]:
        assert {owner[id(p)] for p in stage.downsample.parameters()} == {owner[id(stage.blocks[0].norm1.weight)]}


# pairs


@torch.no_grad()
def test_who_is_paired_with_whom_changes_no_guess():
    """So the last batch of an evaluation may be odd, or one image: nothing is lost, and nothing leaks."""
    x, mim = images(4), method()
    mask = RandomMasker(32, 0.5, shared=True)(x)
    guesses = []
    for parts in ([0, 1, 2, 3], [3, 1, 2, 0]), ([0, 1, 2], [3]), ([0], [1], [2], [3]), ([2, 0], [3, 1]):
        by_image = {}
        for part in parts:
            masks = Mask(mask.cells[: len(part)], mask.unit, mask.count)
            by_image |= dict(zip(part, mim.head(mim.hide(x[part], masks), masks)))
        guesses.append(torch.stack([by_image[i] for i in range(4)]))
    for other in guesses[1:]:
        torch.testing.assert_close(other, guesses[0])


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 3, 4])
def test_every_cell_is_guessed_from_the_other_side_of_its_own_image(count):
    x, mim = images(count), method()
    mask = RandomMasker(32, 0.5, shared=True)(x)
    guess = mim.head(mim.hide(x, mask), mask)
    for side in (mask, ~mask):
        others = torch.where(side.at(1)[:, None], torch.randn_like(x), x)  # other pixels where these are guessed
        again = mim.head(mim.hide(others, mask), mask)
        assert torch.equal(again[side.cells], guess[side.cells])
        if count > 1:  # and other images
            others = torch.cat([x[:1], torch.randn_like(x[1:])])
            assert torch.equal(mim.head(mim.hide(others, mask), mask)[0], guess[0])


def test_an_odd_batch_is_refused_in_training_alone():
    mim = method().train()
    with pytest.raises(ValueError, match="an even batch per device is needed, not 3") as error:
        mim({"image": images(3)})
    assert "\n" not in str(error.value)
    assert mim.eval()({"image": images(3)})["loss"].isfinite()


def test_masks_are_shared_and_their_inverse_is_official():
    mim = mixmim(build_encoder("mixmim_base", **SIZES | {"img_size": 224}), depth=1, width=16, heads=2)
    mask = mim.masker(torch.zeros(5, 3, 224, 224))
    assert (mask.count, (~mask).count) == (25, 24) and torch.equal(mask.cells, mask.cells[:1].expand(5, -1, -1))
    assert mim.average is over_all and mim.pairs


# health and pictures


def test_odd_held_out_batches_are_judged():
    mim, x = method(), images(5)
    mask = RandomMasker(32, 0.5, shared=True)(x)
    mim.masker = lambda y: Mask(mask.cells[: len(y)], mask.unit, mask.count)
    split = [health(mim, [{"image": part} for part in x.split(size)]) for size in (5, 2, 1)]
    assert {"heldout", *TRIVIAL} <= split[0].keys() and split[0]["images"] == 5
    assert split[1] == pytest.approx(split[0], rel=1e-6) and split[2] == pytest.approx(split[0], rel=1e-6)


@torch.no_grad()
def test_trivial_guesses_are_asked_for_every_cell_too():
    mim, x = method(target="pixels"), images(2)
    mask = RandomMasker(32, 0.5, shared=True)(x)
    mim.masker = lambda y: mask
    filled = torch.where(mask.at(1)[:, None], mean_fill(x, mask.at(1)), mean_fill(x, (~mask).at(1)))
    expected = (mim.target(filled) - mim.target(x)).square().mean()
    torch.testing.assert_close(trivial_losses(mim, x)[0], expected)
    assert all(0.8 < loss < 1.6 for loss in trivial_losses(mim, x))  # noise cannot be guessed, in no cell


@pytest.mark.parametrize("count", [1, 4])
def test_panels_say_that_every_cell_was_guessed(count):
    pictures = reconstruct(method(target="pixels").float(), images(count).float(), (0, 0, 0), (1, 1, 1))
    masked, guess, pasted, original = pictures.columns.values()
    hidden = masked.isnan()
    assert "Only hidden cells" not in pictures.caption and "Each cell was hidden once" in pictures.caption
    assert hidden.float().mean() == pytest.approx(8 / 15) and torch.equal(pasted[~hidden], original[~hidden])
    assert torch.equal(pasted[hidden], guess[hidden]) and not torch.equal(guess[~hidden], original[~hidden])


# runs


SMALL = [
    "--encoder.name",
    "mixmim_base",
    "--encoder.args",
    "{embed_dim: 8, depths: [1, 1, 1, 1], num_heads: [1, 1, 2, 2]}",
]
SMALL += ["--method.name", "mixmim", "--method.args", "{depth: 1, width: 16, heads: 2}", "--data.size", "64"]


def test_a_run_and_what_it_is_for(tmp_path):
    root = fill_folder(tmp_path / "images", "L")
    figures = pretrain(root, tmp_path / "run", *SMALL)  # 39 images, and one to evaluate by
    assert {"heldout", "mean_fill"} <= figures.keys() and list((tmp_path / "run/reconstructions").glob("*.png"))
    more = ["--data.size", "96", "--changes", "{window_size: [7, 6, 4, 2]}", "--encoder.args", "{}"]
    assert 0 <= finetune("finetune", tmp_path / "run", root, tmp_path / "finetune", *more)["top1"] <= 1


def test_odd_batches_are_told_before_anything_is_read(tmp_path):
    for given, named in (
        (["--run.per_device", "5", "--data.batch", "15"], "run.per_device 5"),
        (["--data.batch", "5"], "data.batch 5"),
        (["--data.batch", "[[0, 4], [1, 7]]"], "data.batch 7"),
    ):
        with pytest.raises(UserError, match=f"mixmim pairs .*: {named} has to be even") as error:
            pretrain("/no/such/folder", tmp_path / "run", *SMALL, *given)
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_odd_shares_of_a_batch_are_told_by_the_batch(monkeypatch):
    monkeypatch.setattr(dist, "world", lambda: 2)
    check_pairs("mixmim", Data("", batch=8), Run(""))
    check_pairs("mixmim", Data("", batch=10), Run("", per_device=2))
    with pytest.raises(UserError, match="data.batch 10 has to be a multiple of 4, for 2 processes"):
        check_pairs("mixmim", Data("", batch=10), Run(""))


def process(rank, world, folder, port):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch_dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    mim = mixmim(build_encoder("mixmim_base", **SIZES), depth=1, width=16, heads=2)
    masks, draw = [], mim.masker
    mim.masker = lambda x: masks.append(draw(x)) or masks[-1]
    model = DistributedDataParallel(mim)
    for step in range(2):  # the second would fail if a parameter had no gradient
        seed(0, step, rank)  # as the loop does
        model({"image": torch.randn(4, *SHAPE)})["loss"].backward()
    cells = torch.stack([mask.cells for mask in masks])
    assert torch.equal(cells, cells[:, :1].expand_as(cells))  # one for the batch of a process
    gradients = [p.grad.norm().item() for p in mim.parameters()]
    torch.save(cells, f"{folder}/cells_{rank}.pt")
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(gradients, file)
    torch_dist.destroy_process_group()


def test_each_process_draws_its_own_mask(tmp_path):
    mp.spawn(process, (2, str(tmp_path), get_free_port()), nprocs=2)
    assert json.loads((tmp_path / "0.json").read_text()) == json.loads((tmp_path / "1.json").read_text())
    a, b = (torch.load(tmp_path / f"cells_{rank}.pt") for rank in (0, 1))
    assert not any(torch.equal(x, y) for x, y in zip(a, b))
