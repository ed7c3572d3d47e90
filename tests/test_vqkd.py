"""VQ-KD learns, moves its codebook as it should, resumes to the bit, and serves BEiT, by the same main."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.distributed.elastic.utils.distributed import get_free_port

import main_pretrain
from models.encoders.build import build_encoder
from models.mim.recipes import beit
from models.monitor.health import health
from models.targets.target import Target
from models.targets.tokenizers import load_tokenizer
from models.targets.vqkd import DECAY, IDLE, VQKD
from tests.test_main import PRETRAIN, fill_folder
from tests.test_train import Stop, Waits, equal, stop_at
from tests.tokenizers import tiny_tokenizer
from util import dist
from util.config import Run
from util.errors import UserError
from util.log import Log
from util.optim import build_optimizer
from util.plan import make_plan
from util.times import Time
from util.train import train

PLAIN = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
WORDS = torch.randn(12, 3, 4, 4, generator=torch.Generator().manual_seed(0))  # patches that images are made of


class Linear(Target):
    """A teacher that sees a fixed linear map of each cell."""

    unit, dim = 4, 10

    def __init__(self):
        super().__init__()
        weight = torch.randn(10, 3, 4, 4, generator=torch.Generator().manual_seed(1))
        self.register_buffer("weight", weight)

    @torch.no_grad()
    def forward(self, images):
        return F.conv2d(images.float(), self.weight, stride=4).movedim(1, -1)


def tiny(vocabulary=32):
    torch.manual_seed(0)
    return VQKD(build_encoder("vit_base_patch16_224", **PLAIN), Linear(), vocabulary, 8, 1, 32, 2)


def images(number, count=8):
    generator = torch.Generator().manual_seed(number)
    patches = WORDS[torch.randint(12, (count, 4, 4), generator=generator)]  # (B, 4, 4, 3, 4, 4)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(count, 3, 16, 16)


class Images:
    """Micro-batches of images made of twelve patches."""

    waited = 0.0

    def __init__(self, batch=8, accumulate=1, steps=10):
        self.batch, self.accumulate = batch, accumulate
        self.plan = make_plan(
            4 * batch, batch, batch // accumulate // dist.world(), 16, Time(steps, "steps"), dist.world()
        )

    def batches(self, start):
        number = start
        while True:
            for part in images(number, self.batch).chunk(self.accumulate):
                yield {"image": part.chunk(dist.world())[dist.rank()]}
            number += 1


def go(folder, loader=None, steps=10, evaluate=None, lr=3e-3, **run):
    folder.mkdir(exist_ok=True)
    task, log = tiny(), Log(folder)
    settings = {"steps": steps, "dtype": "float32", "log_every": 3, "save_every": 3, "evaluate_every": 0} | run
    optimizer = build_optimizer(task)
    train(
        task,
        loader or Images(steps=steps),
        optimizer,
        lambda step: lr,
        1.0,
        Run(str(folder), **settings),
        log,
        evaluate,
    )
    log.close()
    return task


def figures(folder, key):
    objects = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [o[key] for o in objects if key in o]


def test_it_learns_and_uses_its_codes(tmp_path):
    task = go(tmp_path / "run", Images(32, steps=120), steps=120, log_every=20)
    distance, used = figures(tmp_path / "run", "distance"), figures(tmp_path / "run", "perplexity")
    assert distance[-1] < 0.3 * distance[0] and used[-1] > 8
    assert all(x == pytest.approx(d + c) for x, d, c in zip(*(
        figures(tmp_path / "run", key) for key in ("loss", "distance", "commitment"))))  # fmt: skip
    assert all(0 < share <= 1 for share in figures(tmp_path / "run", "used"))
    # images of the same patches get the same words
    words = WORDS[:, :, None, :, None, :].expand(-1, -1, 4, -1, 4, -1).reshape(12, 3, 16, 16)
    ids = task.tokenizer.eval()(words)
    assert len(ids.unique()) >= 8


def test_gradients_pass_straight_through():
    task = tiny()
    reached = []
    task.decoder.register_forward_pre_hook(lambda module, given: reached.append(given[0]) or given[0].retain_grad())
    features = task.tokenizer.features(images(0))
    task.tokenizer.features = lambda _: features
    features.retain_grad()
    losses = task({"image": images(0)})
    losses["distance"].backward(retain_graph=True)
    torch.testing.assert_close(features.grad, reached[0].grad.movedim(1, -1))
    codes = task.tokenizer.codes[task.tokenizer.nearest(features.detach())]
    torch.testing.assert_close(reached[0].movedim(1, -1), codes)
    torch.testing.assert_close(losses["commitment"], (features - codes).square().mean())
    assert not task.tokenizer.codes.requires_grad


def test_codes_move_towards_what_they_stood_for():
    """The paper's moving average, where every code is in use; nothing moves before a step has ended."""
    task = tiny(vocabulary=3)
    task.usage.fill_(1.0)
    before = task.tokenizer.codes.clone()
    parts = images(0).chunk(2)
    features = task.tokenizer.features(images(0)).detach().flatten(0, 2)
    ids = task.tokenizer.nearest(features)
    for part in parts:  # accumulated
        task({"image": part})
        assert torch.equal(task.tokenizer.codes, before)
    task.after_step()
    for code in range(3):
        mine = features[ids == code]
        mean = F.normalize(mine.sum(0), dim=0) if len(mine) else before[code]
        moved = F.normalize(DECAY * before[code] + (1 - DECAY) * mean, dim=0)
        torch.testing.assert_close(task.tokenizer.codes[code], moved if len(mine) else before[code])
        assert task.usage[code].item() == pytest.approx(DECAY + (1 - DECAY) * len(mine))


def test_idle_codes_become_features():
    task = tiny()
    features = task.tokenizer.features(images(0)).detach().flatten(0, 2)
    hit = torch.zeros(32, dtype=torch.bool).index_fill(0, task.tokenizer.nearest(features), True)
    task({"image": images(0)})
    task.after_step()
    nearest = torch.cdist(task.tokenizer.codes, features).amin(1)
    assert 0 < hit.sum() < 32 and (nearest[~hit] < 1e-3).all() and (nearest[hit] > 1e-2).any()
    assert (task.usage[~hit] == task.usage[~hit][0]).all() and task.usage.min() > IDLE * task.usage.mean()


def test_nothing_is_noted_outside_of_training_and_nothing_not_finite_is_learned():
    task = tiny()
    state = {key: value.clone() for key, value in task.state_dict().items()}
    task.eval()({"image": images(0)})
    assert not task.counts.any()
    task.train()({"image": images(0) * float("nan")})
    task.after_step()
    assert all(torch.equal(value, state[key]) for key, value in task.state_dict().items())
    task({"image": images(0)})
    task.after_step()
    assert not torch.equal(task.tokenizer.codes, state["tokenizer.codes"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stopped_run_continues_to_the_bit(tmp_path, dtype):
    whole = go(tmp_path / "whole", Images(8, 2), dtype=dtype)
    with pytest.raises(Stop):
        go(tmp_path / "parts", Images(8, 2), dtype=dtype, evaluate=stop_at(7), evaluate_every=0.25)
    assert equal(whole, go(tmp_path / "parts", Images(8, 2), dtype=dtype))
    assert not torch.equal(whole.tokenizer.codes, tiny().tokenizer.codes)
    saved = torch.load(tmp_path / "parts" / "last.pt", weights_only=True)["task"]
    assert {"tokenizer.codes", "usage"} <= saved.keys() and not any(key.startswith("target") for key in saved)


def test_codes_are_counted_over_all_held_out_images():
    """Not in each batch: few images cannot use many codes."""
    task = tiny()
    parts = [{"image": part} for part in images(0, 12).split(5)]
    figures, whole = health(task, parts), health(task, [{"image": images(0, 12)}])
    ids = task.tokenizer.eval()(images(0, 12))
    shares = ids.unique(return_counts=True)[1] / ids.numel()
    assert figures["heldout_used"] == len(shares) / 32 and whole["heldout_used"] == figures["heldout_used"]
    assert figures["heldout_perplexity"] == pytest.approx((-shares * shares.log()).sum().exp().item(), rel=1e-5)
    assert all(health(task, [part])["heldout_perplexity"] < figures["heldout_perplexity"] - 0.01 for part in parts)


def test_no_step_waits_for_the_device(tmp_path):
    encoder = build_encoder("vit_base_patch16_224", **PLAIN)
    for task in (tiny(), beit(encoder, tiny_tokenizer(tmp_path))):
        with Waits() as waits:
            task.train()({"image": images(0)})["loss"].backward()
            getattr(task, "after_step", lambda: None)()
        assert waits.count == 0


def process(rank, world, folder, port):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init("cpu")
    task = go(Path(folder), Images(8, 2, 4), steps=4)
    torch.save(task.state_dict(), f"{folder}/weights_{rank}.pt")
    tiny_step = tiny()
    tiny_step.usage.fill_(1.0)  # none is idle
    tiny_step({"image": images(0).chunk(world)[rank]})
    tiny_step.after_step()
    torch.save(tiny_step.tokenizer.codes, f"{folder}/codes_{rank}.pt")
    dist.shutdown()


def test_two_processes_have_one_codebook(tmp_path):
    mp.spawn(process, (2, str(tmp_path / "run"), get_free_port()), nprocs=2)
    a, b = (torch.load(tmp_path / "run" / f"weights_{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(a[key], b[key]) for key in a)
    alone = tiny()
    alone.usage.fill_(1.0)
    alone({"image": images(0)})
    alone.after_step()
    for rank in (0, 1):  # the codes of the whole batch, in each process
        torch.testing.assert_close(torch.load(tmp_path / "run" / f"codes_{rank}.pt"), alone.tokenizer.codes)


# by way of the main


SMALL = ["--encoder.name", "vit_tiny_patch16_224", "--data.size", "32", "--run.evaluate_every", "0"]
SMALL += ["--encoder.args", "{patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}", "--data.jitter", "0.4"]


def pretrain(root, folder, method, args, *more):
    argv = [*PRETRAIN, *SMALL, "--method.name", method, "--method.args", args]
    main_pretrain.main([*argv, "--data.root", root, "--run.folder", str(folder), *more])
    return json.loads((folder / "report.json").read_text())


VQ = "{target: normalized, vocabulary: 24, dim: 8, depth: 1, width: 32, heads: 2}"


@pytest.mark.parametrize(("kind", "channels"), [("RGB", 3), ("L", 1)])
def test_a_tokenizer_is_trained_and_then_used(tmp_path, capsys, kind, channels):
    root = fill_folder(tmp_path / "images", kind, 20)
    run = tmp_path / "tokenizer"
    first = pretrain(root, run, "vqkd", VQ, "--run.epochs", "4")
    assert {"heldout", "rank", "spread"} <= first.keys() and "mean_fill" not in first
    assert 1 <= first["heldout_perplexity"] <= 24 and 0 < first["heldout_used"] <= 1
    said = capsys.readouterr().out
    assert f"codes: perplexity {first['heldout_perplexity']:.3g}, {100 * first['heldout_used']:.3g} % in use" in said
    assert "reconstructions" not in said and f"tokenizer in {run / 'tokenizer.safetensors'}" in said
    assert (run / "encoder.safetensors").exists() and not (run / "reconstructions").exists()
    tokenizer = load_tokenizer(str(run))
    assert (tokenizer.vocabulary, tokenizer.stride, tokenizer.in_chans) == (24, 8, channels)
    saved = torch.load(run / "last.pt", weights_only=True)["task"]
    assert torch.equal(tokenizer.codes, saved["tokenizer.codes"])
    assert tokenizer.mean.flatten().tolist() != [0.5] * channels  # as its images were
    second = pretrain(root, tmp_path / "beit", "beit", f"{{tokenizer: {run}, ratio: 0.4}}")
    assert {"heldout", "rank", "spread"} <= second.keys() and "mean_fill" not in second
    assert list((tmp_path / "beit" / "reconstructions").glob("*.png"))
    said = capsys.readouterr().out
    assert f"panels in {tmp_path / 'beit' / 'reconstructions'}" in said and "tokenizer in" not in said
    assert "perplexity" not in said
    assert not any("tokenizer" in key for key in load_file(tmp_path / "beit" / "encoder.safetensors"))


def test_a_trained_tokenizer_sees_its_images_as_in_training(tmp_path):
    """Whatever normalisation BEiT's data have."""
    root = fill_folder(tmp_path / "images", "RGB", 20)
    pretrain(root, tmp_path / "run", "vqkd", VQ, "--data.mean", "[0.4,0.5,0.6]", "--data.std", "[0.2,0.2,0.3]")
    tokenizer, pixels = load_tokenizer(str(tmp_path / "run")), torch.rand(2, 3, 32, 32)
    normalised = (pixels - torch.tensor([0.4, 0.5, 0.6]).view(-1, 1, 1)) / torch.tensor([0.2, 0.2, 0.3]).view(-1, 1, 1)
    torch.testing.assert_close(tokenizer.tokenize(pixels, 8), tokenizer(normalised))


def test_beitv2_by_main(tmp_path):
    root = fill_folder(tmp_path / "images", "RGB", 20)
    source = tiny_tokenizer(tmp_path, "vqkd")
    args = "{patch_size: 8, embed_dim: 32, depth: 3, num_heads: 2, taps: [0, -1], final_norm: false}"
    more = ["--encoder.name", "beitv2_base_patch16_224", "--encoder.args", args]
    assert pretrain(root, tmp_path / "run", "beitv2", f"{{tokenizer: '{source}'}}", *more)["heldout"] > 0


def test_a_missing_tokenizer_is_told_before_any_image_is_looked_for(tmp_path):
    with pytest.raises(UserError, match="tokenizer: there is no tokenizer at .*nowhere.pt") as error:
        pretrain("/no/such/folder", tmp_path / "run", "beit", "{tokenizer: 'dvae:/nowhere.pt'}")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="tokenizer"):
        pretrain("/no/such/folder", tmp_path / "run", "beit", "{}")
