"""Classification and frozen-feature scores, on encoders small enough to check by hand."""

import copy
import random
import socket

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from models.encoders.encoder import Encoder
from models.encoders.grid import Features
from models.transfer.classify import Classify
from models.transfer.frozen import everyone, features, knn, linear


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Tiny(Encoder):
    """One convolution, with dropout and a batch norm so that modes matter."""

    def __init__(self, dim=6, prefix=False, normed=False):
        super().__init__()
        self.conv, self.noise, self.bn = nn.Conv2d(3, dim, 4, 4), nn.Dropout(0.5), nn.BatchNorm2d(dim)
        self.in_chans, self.patch, self.width, self.strides, self.dims = 3, 4, dim, [4], [dim]
        self.prefix, self.normed = prefix, normed

    @property
    def layers(self):
        return [list(self.conv.parameters()), list(self.bn.parameters())]

    def embed(self, images):
        return self.conv(images).movedim(1, -1)

    def encode(self, tokens, mask=None):
        map = self.bn(self.noise(tokens.movedim(-1, 1)))
        return Features([map], map[:, :, :1, 0].movedim(1, 2) * 2 if self.prefix else None)


class Known(Encoder):
    """The image's first row of pixels is its feature: what comes out is what the test put in."""

    dims, normed = [8], True

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return Features([images[:, 0, 0, :, None, None] * self.scale])


def batch(n=8, classes=7):
    return {"image": torch.randn(n, 3, 8, 8), "label": torch.arange(n) % classes}


def known(scores, labels):
    """A batch whose images carry `scores` (N, 8) in their first row."""
    images = torch.zeros(len(scores), 3, 8, 8)
    images[:, 0, 0] = scores
    return {"image": images, "label": labels}


def oracle():
    """A classifier whose logits are the features of Known."""
    task = Classify(Known(), 8)
    nn.init.eye_(task.head.weight)
    return task


def step(task, batch, lr=0.1):
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr)
    task(batch)["loss"].backward()
    optimizer.step()
    task.after_step()


# classify


def test_pooling_norm_and_head_are_as_written():
    for pool, prefix in [("mean", True), ("cls", True)]:
        task = Classify(Tiny(prefix=prefix), 7, pool).eval()
        nn.init.normal_(task.head.weight), nn.init.normal_(task.norm.weight)
        images = torch.randn(2, 3, 8, 8)
        found = task.encoder(images)
        vector = found.maps[0].flatten(2).mean(2) if pool == "mean" else found.prefix[:, 0]
        vector = F.layer_norm(vector, (6,), task.norm.weight, task.norm.bias, 1e-6)
        torch.testing.assert_close(task.logits(images), vector @ task.head.weight.T + task.head.bias)


def test_class_token_is_taken_as_it_is():
    task, images = Classify(Tiny(prefix=True, normed=True), 7, "cls").eval(), torch.randn(2, 3, 8, 8)
    nn.init.normal_(task.head.weight)
    torch.testing.assert_close(task.logits(images), task.encoder(images).prefix[:, 0] @ task.head.weight.T)


def test_norms_and_initial_heads():
    assert isinstance(Classify(Tiny(normed=True), 7).norm, nn.Identity)
    probe = Classify(Tiny(dim=512), 100, frozen=True)
    assert isinstance(probe.norm, nn.BatchNorm1d) and not list(probe.norm.parameters()) and probe.norm.eps == 1e-6
    assert probe.head.weight.std().item() == pytest.approx(0.01, rel=0.02) and not probe.head.bias.any()
    tuned = Classify(Tiny(dim=512), 100)
    assert tuned.head.weight.std().item() == pytest.approx(2e-5, rel=0.02) and tuned.norm.eps == 1e-6


def test_class_token_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="use 'mean'"):
        Classify(Tiny(), 7, "cls")(batch())
    with pytest.raises(ValueError, match="no 'max'"):
        Classify(Tiny(), 7, "max")


def test_frozen_encoder_is_the_same_to_the_bit_after_a_step():
    task = Classify(Tiny(), 7, frozen=True).train()
    before, head = copy.deepcopy(task.encoder.state_dict()), task.head.weight.detach().clone()
    step(task, batch())
    assert not any(part.training for part in task.encoder.modules()) and task.head.training
    assert not any(p.requires_grad for p in task.encoder.parameters())  # so that the optimizer leaves them out
    assert all(torch.equal(before[key], value) for key, value in task.encoder.state_dict().items())
    assert not torch.equal(task.head.weight, head)


def test_fine_tuning_moves_the_encoder():
    task = Classify(Tiny(), 7)
    nn.init.normal_(task.head.weight)
    before = task.encoder.conv.weight.detach().clone()
    step(task, batch())
    assert task.encoder.training and not torch.equal(task.encoder.conv.weight, before)


def test_label_smoothing_is_in_the_loss():
    task = Classify(Known(), 8, smoothing=0.2)
    nn.init.eye_(task.head.weight)
    data = known(torch.randn(4, 8), torch.arange(4))
    target = F.one_hot(data["label"], 8) * 0.8 + 0.2 / 8
    expected = -(target * data["image"][:, 0, 0].log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(task(data)["loss"], expected)


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixed_targets_tell_the_share_of_pixels(mixup, cutmix):
    np.random.seed(0)
    task = Classify(Tiny(), 4, mixup=mixup, cutmix=cutmix)
    labels = torch.tensor([0, 1, 2, 3])
    images = F.one_hot(labels, 4).float()[:, :, None, None].expand(-1, -1, 8, 8)  # channel c of class c is 1
    original = images.clone()
    for _ in range(5):
        mixed, target = task.mix(images, labels)
        torch.testing.assert_close(mixed.mean((2, 3)), target)  # so the shares of pixels are the shares of classes
        assert torch.equal(images, original) and (target.max(1).values < 1).any()


def test_mixing_only_in_training_and_the_same_for_the_same_seed():
    task, data, losses = Classify(Known(), 8, mixup=0.8, cutmix=1.0), known(torch.randn(4, 8), torch.arange(4)), []
    nn.init.eye_(task.head.weight)
    for seed in (1, 1, 2):
        np.random.seed(seed)
        losses.append(task(data)["loss"].item())
    assert losses[0] == losses[1] != losses[2]
    plain = F.cross_entropy(data["image"][:, 0, 0], data["label"])
    torch.testing.assert_close(task.eval()(data)["loss"], plain)


def test_mixing_an_odd_batch_is_an_error():
    with pytest.raises(ValueError, match="even batch per device is needed, not 3"):
        Classify(Tiny(), 7, mixup=0.8)(batch(3))


def test_evaluate_counts_exactly():
    scores = torch.arange(8.0).flip(0).expand(5, 8)  # class 0 is best, class 7 worst
    data = known(scores, torch.tensor([0, 1, 4, 5, 7]))
    task = oracle()
    found = task.evaluate([{k: v[:3] for k, v in data.items()}, {k: v[3:] for k, v in data.items()}])
    assert found["top1"] == 1 / 5 and found["top5"] == 3 / 5 and task.training
    assert found["loss"] == pytest.approx(F.cross_entropy(scores, data["label"]).item())


def test_evaluate_gives_no_credit_for_ties_and_no_top5_of_five():
    task = Classify(Tiny(), 5)
    nn.init.zeros_(task.head.weight)
    found = task.evaluate([batch(10, classes=5)])
    assert found["top1"] == 0.2 and set(found) == {"top1", "loss"}


def test_evaluate_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="nothing to evaluate"):
        Classify(Tiny(), 7).evaluate([])


def test_moving_average_follows_is_saved_and_is_what_is_evaluated():
    task, data = Classify(Tiny(), 7, ema=0.9), batch()
    nn.init.normal_(task.head.weight), nn.init.normal_(task.average.head.weight)
    expected = {name: p.detach().clone() for name, p in task.average.named_parameters()}
    for _ in range(3):
        step(task, data)
        for name, p in task.named_parameters():
            if name in expected:
                expected[name] = 0.9 * expected[name] + 0.1 * p.detach()
    torch.testing.assert_close(dict(task.average.named_parameters()), expected)
    assert torch.equal(task.average.encoder.bn.running_mean, task.encoder.bn.running_mean)
    assert not any(p.requires_grad for p in task.average.parameters())
    again = Classify(Tiny(), 7, ema=0.9)
    again.load_state_dict(task.state_dict())
    average = Classify(Tiny(), 7)
    average.load_state_dict(task.average.state_dict())
    assert again.evaluate([data]) == task.evaluate([data]) == average.evaluate([data])
    plain = Classify(Tiny(), 7)
    plain.load_state_dict({k: v for k, v in task.state_dict().items() if not k.startswith("average.")})
    assert plain.evaluate([data])["loss"] != task.evaluate([data])["loss"]


# frozen


def blobs(n, spread=0.3):
    labels = torch.arange(n) % 4
    return F.one_hot(labels, 4).float().repeat(1, 2) + spread * torch.randn(n, 8), labels


def brute_force(train, train_labels, test, test_labels, k, temperature):
    right = 0
    for vector, label in zip(test, test_labels):
        cosines = F.cosine_similarity(vector[None], train)
        votes = torch.zeros(10)
        for i in cosines.argsort(descending=True)[:k]:
            votes[train_labels[i]] += (cosines[i] / temperature).exp()
        right += int(votes.argmax() == label)
    return right / len(test)


@pytest.mark.parametrize("k, chunk", [(1, 8), (5, 16), (20, 8192), (500, 64)])
def test_knn_is_the_weighted_vote_whatever_the_chunk(k, chunk):
    train, test = blobs(101, spread=1.5), blobs(60, spread=1.5)
    found = knn(*train, *test, k=k, chunk=chunk)
    assert found == brute_force(*train, *test, k, 0.07) and 0.3 < found < 1


def test_knn_and_linear_solve_what_is_separable_and_only_that():
    train, test = blobs(200), blobs(80)
    assert knn(*train, *test) == 1.0 and linear(*train, *test) == 1.0
    shuffled = train[0], train[1][torch.randperm(200)]
    assert knn(*shuffled, *test) < 0.6 and linear(*shuffled, *test, epochs=5) < 0.6


def test_linear_does_not_depend_on_scale_and_is_repeatable():
    (x, y), (u, v) = blobs(300, spread=1.0), blobs(100, spread=1.0)
    state = torch.get_rng_state()
    assert linear(x, y, u, v, epochs=5) == linear(1e3 * x + 7, y, 1e3 * u + 7, v, epochs=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_features_leave_modes_and_random_numbers_alone():
    encoder = Tiny().train()
    encoder.bn.eval()
    data = [batch(4), batch(3)]
    statistics = encoder.bn.running_mean.clone()

    def states():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    def batches():  # a loader may draw
        for item in data:
            torch.rand(3), random.random(), np.random.rand()
            yield item

    before = states()
    vectors, labels = features(encoder, batches())
    assert states() == before
    assert encoder.training and encoder.noise.training and not encoder.bn.training
    assert torch.equal(encoder.bn.running_mean, statistics)
    expected = torch.cat([encoder.eval()(item["image"]).maps[0].mean((2, 3)) for item in data])
    torch.testing.assert_close(vectors, expected)
    assert torch.equal(labels, torch.cat([item["label"] for item in data])) and not vectors.requires_grad


# several processes


def in_two_processes(rank, port, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    scores, labels = torch.randn(11, 8), torch.arange(11) % 8
    train, test = blobs(101, spread=1.5), blobs(61, spread=1.5)
    cut = slice(0, 3) if rank == 0 else slice(3, None)  # unequal shares
    mine = [x[cut] for x in (*train, *test)]
    results[rank] = {
        **oracle().evaluate([known(scores[cut], labels[cut])]),
        "knn": knn(*mine, chunk=16),
        "linear": linear(*mine, epochs=3),
        "rows": torch.cat(list(everyone(mine[0], 10))).tolist(),
    }
    torch.distributed.destroy_process_group()


def test_two_processes_count_as_one():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(in_two_processes, (port, results), nprocs=2)
        first, second = results[0], results[1]
    torch.manual_seed(0)
    scores, labels = torch.randn(11, 8), torch.arange(11) % 8
    train, test = blobs(101, spread=1.5), blobs(61, spread=1.5)
    alone = oracle().evaluate([known(scores, labels)])
    assert first == second
    assert first["top1"] == alone["top1"] and first["top5"] == alone["top5"]
    assert first["loss"] == pytest.approx(alone["loss"])
    assert first["knn"] == knn(*train, *test) and first["linear"] == linear(*train, *test, epochs=3)
    assert first["rows"] == train[0].tolist()
