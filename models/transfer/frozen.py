"""What frozen features are worth: cached once, then judged by their nearest neighbours or by a linear classifier."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoders.encoder import Encoder
from models.transfer.classify import pooled
from util import dist


@torch.no_grad()
def features(encoder: Encoder, batches: Iterable[dict], pool: str = "mean") -> tuple[Tensor, Tensor]:
    """The pooled features (N, C) in float32 and labels (N,) of this process's images, on the encoder's device.

    May be called in the middle of a training: modes and random numbers are afterwards as they were.
    """
    device = next(encoder.parameters()).device
    vectors, labels = [torch.zeros(0, encoder.dims[-1], device=device)], [torch.zeros(0, dtype=int, device=device)]
    with undisturbed(encoder):
        for batch in batches:
            vectors.append(pooled(encoder(batch["image"]), pool).float())
            labels.append(batch["label"])
    return torch.cat(vectors), torch.cat(labels)


@torch.no_grad()
def nearest_neighbours(
    encoder: Encoder,
    bank: Iterable[dict],
    tests: Iterable[dict],
    pool: str = "mean",
    k: int = 20,
    temperature: float = 0.07,
) -> dict[str, float]:
    """Top-1 of a vote of the nearest images of a bank, by the pooled features of a frozen encoder; see `knn`."""
    return {"top1": knn(*features(encoder, bank, pool), *features(encoder, tests, pool), k, temperature)}


def knn(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 8192,
) -> float:
    """Top-1 of a vote of the `k` nearest training images, weighted exp(cosine / temperature) (Wu et al. 2018).

    train_features (N, C), test_features (M, C): this process's own; all processes' training images vote, all their
    test images count. Memory stays at N + M features and `chunk` x `chunk` / 8 cosines.
    """
    queries = F.normalize(test_features, dim=1).split(max(chunk // 8, 1))
    cosines = [q.new_zeros(len(q), 0) for q in queries]  # of the nearest so far, (m, <= k)
    nearest = [test_labels.new_zeros(len(q), 0) for q in queries]  # their labels
    keys = F.normalize(train_features, dim=1)
    for some_keys, some_labels in zip(everyone(keys, chunk), everyone(train_labels, chunk)):
        for i, q in enumerate(queries):
            near, index = (q @ some_keys.T).topk(min(k, len(some_keys)))
            near, labels = torch.cat([cosines[i], near], 1), torch.cat([nearest[i], some_labels[index]], 1)
            cosines[i], order = near.topk(min(k, near.shape[1]))
            nearest[i] = labels.gather(1, order)
    guesses = [vote(labels, (cosine / temperature).exp()) for labels, cosine in zip(nearest, cosines)]
    return share_right(torch.cat(guesses), test_labels)


def vote(labels: Tensor, weights: Tensor) -> Tensor:
    """The label with the greatest sum of weights in each row: (m, k), (m, k) -> (m,)."""
    if not labels.shape[1]:
        raise ValueError("k-NN: there is no labelled training image")
    votes = ((labels[:, :, None] == labels[:, None, :]) * weights[:, None, :]).sum(2)  # for the label of each neighbour
    return labels.gather(1, votes.argmax(1, keepdim=True)).squeeze(1)


@torch.enable_grad()
def linear(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    epochs: int = 50,
    lr: float = 1e-2,
    weight_decay: float = 1e-4,
    batch: int = 1024,
    seed: int = 0,
) -> float:
    """Top-1 of a linear classifier on standardised features: a linear probe without augmentation, in seconds.

    Each process brings its own features, holds and fits the training features of all (AdamW, cosine) and tests its own.
    """
    inputs, labels = torch.cat(list(everyone(train_features))), torch.cat(list(everyone(train_labels)))
    if not len(labels):
        raise ValueError("linear: there is no labelled training image")
    std, mean = torch.std_mean(inputs, 0, unbiased=False)
    inputs, tests = (inputs - mean) / (std + 1e-6), (test_features - mean) / (std + 1e-6)
    weight = inputs.new_zeros(int(labels.max()) + 1, inputs.shape[1], requires_grad=True)
    bias = inputs.new_zeros(len(weight), requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=lr, weight_decay=weight_decay)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(labels) // batch))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=generator).to(labels.device).split(batch):
            loss = F.cross_entropy(F.linear(inputs[rows], weight, bias), labels[rows])
            weight.grad, bias.grad = torch.autograd.grad(loss, (weight, bias))
            optimizer.step()
            cosine.step()
    return share_right(F.linear(tests, weight, bias).argmax(1), test_labels)


def share_right(guesses: Tensor, labels: Tensor) -> float:
    """The share of right guesses over all processes."""
    counts = torch.stack([(guesses == labels).sum(), torch.full_like(labels.sum(), len(labels))])
    right, count = dist.total(counts).tolist()
    if not count:
        raise ValueError("there is no labelled test image")
    return right / count


def everyone(rows: Tensor, chunk: int = 65536) -> Iterator[Tensor]:
    """All processes' rows, at most `chunk` at a time, in the same order in every process."""
    sizes = torch.zeros(dist.world(), dtype=int, device=rows.device)
    sizes[dist.rank()] = len(rows)
    for owner, size in enumerate(dist.total(sizes).tolist()):
        for start in range(0, size, chunk):
            n = min(chunk, size - start)
            own = owner == dist.rank()
            yield dist.total(rows[start : start + n].clone() if own else rows.new_zeros(n, *rows.shape[1:]))


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each part's mode and all random generators are as they were."""
    modes = {part: part.training for part in module.modules()}
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    module.eval()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode
        random.setstate(states[0]), np.random.set_state(states[1])
