"""Knowing that pretraining works, while it runs: what its loss means, and whether features have collapsed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoders.grid import Mask
from models.mim.method import MIM
from models.targets.target import Target
from util import dist

TRIVIAL = {"mean_fill": "mean fill", "bilinear_fill": "bilinear", "mean_cell": "mean cell"}
FEW = 8  # images that say nothing about collapse
COLLAPSED = 0.01  # a spread below it; bfloat16 alone makes 0.004 of features that are all the same


@torch.no_grad()
def health(mim: nn.Module, batches: Iterable[dict[str, Tensor]], seed: int = 0) -> dict[str, float]:
    """Figures of a method on held-out images, no labels needed.

    batches: {"image": (B, C, H, W)} as in training, on the device; of several processes, each brings its own

    heldout:       the method's loss, under masks that are the same at every call
    mean_fill:     the same loss if the guess is the image with hidden pixels in the mean colour of the visible ones,
    bilinear_fill: or with hidden pixels interpolated from the visible ones,
    mean_cell:     or if every cell's guess is the mean of the image's visible cells, in the target's own numbers.
                   These three are left out for targets that are class ids, and where nothing is hidden
    heldout_perplexity, heldout_used:
                   where a tokenizer is trained: of the ids of all images together, as if so many were used evenly; and
                   the share of all ids that occur
    rank:          effective rank of the feature vectors: exp of the entropy of their normalised singular values after
                   centring (RankMe, Garrido et al. 2023); at most min(dim, images - 1)
    spread:        mean standard deviation of the features' directions, times sqrt(dim): 0 if collapsed, at most 1
    dim, images:   numbers in a feature vector, and images seen

    A feature vector is the mean over places of the encoder's last map, nothing hidden. Modes and random numbers are
    afterwards as they were; autocast is the caller's. ValueError if there is no image.
    """
    device = next(mim.parameters()).device
    losses = torch.zeros(1 + len(TRIVIAL), dtype=torch.float64, device=device)
    spectrum = Spectrum(mim.encoder.dims[-1], device)
    tokenizer = getattr(mim, "tokenizer", None)
    counts = torch.zeros(tokenizer.vocabulary if tokenizer else 0, dtype=torch.float64, device=device)
    for number, batch in enumerate(batches):
        images, place = batch["image"], number * dist.world() + dist.rank()
        with still(mim, seed, place):
            loss = mim(batch)["loss"]
            spectrum.add(mim.encoder(images).maps[-1].float().mean((2, 3)))
            if tokenizer:
                counts += torch.bincount(tokenizer(images).flatten(), minlength=len(counts))
        with still(mim, seed, place):
            losses += torch.stack([loss, *trivial_losses(mim, images)]).double() * len(images)
    figures = spectrum.figures()
    if tokenizer:
        counts = dist.total(counts)
        figures["heldout_perplexity"] = torch.special.entr(counts / counts.sum()).sum().exp().item()
        figures["heldout_used"] = (counts > 0).double().mean().item()
    means = dict(zip(("heldout", *TRIVIAL), (dist.total(losses) / figures["images"]).tolist()))
    return {name: x for name, x in means.items() if name == "heldout" or not math.isnan(x)} | figures


@contextmanager
def still(module: nn.Module, seed: int, number: int = 0) -> Iterator[None]:
    """Evaluation mode, random numbers from (seed, number) alone; afterwards modes and generators are as they were."""
    modes = {part: part.training for part in module.modules()}
    device = next(module.parameters()).device
    module.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed * 1_000_003 + number)
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


class Spectrum:
    """Sums over feature vectors (B, D), exact over any batches and processes, and what they say about collapse."""

    def __init__(self, dim: int, device: torch.device):
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float64, device=device)
        self.count, self.sum, self.squares = zeros(1), zeros(dim), zeros(dim, dim)
        self.directions, self.direction_squares = zeros(dim), zeros(dim)

    def add(self, vectors: Tensor) -> None:
        z = vectors.double()
        u = F.normalize(z, dim=1)
        self.count += len(z)
        self.sum += z.sum(0)
        self.squares += z.T @ z
        self.directions += u.sum(0)
        self.direction_squares += u.square().sum(0)

    def figures(self) -> dict[str, float]:
        """{"rank", "spread", "dim", "images"}, of all processes together. ValueError if there was no image."""
        n, dim = dist.total(self.count).item(), len(self.sum)
        if not n:
            raise ValueError("there is no held-out image to judge the pretraining by")
        total = dist.total(self.sum)
        scatter = dist.total(self.squares) - torch.outer(total, total) / n
        finite = bool(scatter.isfinite().all())
        singular = torch.linalg.eigvalsh(scatter).clamp_min(0).sqrt() if finite else torch.full_like(total, math.nan)
        rank = torch.special.entr(singular / singular.sum().clamp_min(1e-12)).sum().exp()
        mean, square = dist.total(self.directions) / n, dist.total(self.direction_squares) / n
        spread = (square - mean.square()).clamp_min(0).sqrt().mean() * dim**0.5
        return {"rank": rank.item(), "spread": spread.item(), "dim": float(dim), "images": n}


def trivial_losses(mim: nn.Module, images: Tensor) -> list[Tensor]:
    """The loss of each trivial guess, under the mask drawn next; NaN if there is no mask or the target gives ids.

    Where images are encoded in pairs, visible cells are guessed from the hidden ones too.
    """
    none = [images.new_tensor(math.nan)] * len(TRIVIAL)
    if not isinstance(mim, MIM):
        return none
    mask, truth = mim.masker(images), mim.target(images)
    if not truth.is_floating_point():
        return none
    cells = mask.at(mim.target.unit)
    guesses = trivial_guesses(mim.target, images, truth, mask)
    if mim.pairs:
        rest = trivial_guesses(mim.target, images, truth, ~mask)
        guesses = [torch.where(cells[..., None], own, other) for own, other in zip(guesses, rest)]
    return [mim.average(mim.distance(guess, truth), cells) for guess in guesses]


def trivial_guesses(target: Target, images: Tensor, truth: Tensor, mask: Mask) -> list[Tensor]:
    """What each trivial guess says of every cell, (B, h, w, D), in the order of TRIVIAL."""
    fills = [target(fill(images, mask.at(1))) for fill in (mean_fill, bilinear_fill)]
    return [*fills, visible_mean(truth.movedim(-1, 1), mask.at(target.unit)).movedim(1, -1).expand_as(truth)]


def visible_mean(x: Tensor, hidden: Tensor) -> Tensor:
    """The mean over the visible places of each image: (B, C, h, w), (B, h, w) bool -> (B, C, 1, 1)."""
    seen = ~hidden[:, None]
    return (x * seen).sum((2, 3), keepdim=True) / seen.sum((2, 3), keepdim=True)


def mean_fill(images: Tensor, hidden: Tensor) -> Tensor:
    """Give hidden pixels the mean colour of the visible ones: (B, C, H, W), (B, H, W) bool -> (B, C, H, W)."""
    return torch.where(hidden[:, None], visible_mean(images, hidden), images)


def bilinear_fill(images: Tensor, hidden: Tensor, smooth: int = 4) -> Tensor:
    """Interpolate hidden pixels from the visible ones: (B, C, H, W), (B, H, W) bool -> (B, C, H, W).

    Push-pull: halve the image, averaging what is visible, down to one pixel; then, level by level, fill what is hidden
    with the coarser image, enlarged bilinearly, and blur what is filled `smooth` times into its surroundings.
    """
    if max(hidden.shape[1:]) == 1:
        return images
    hidden = hidden[:, None]
    share = F.avg_pool2d((~hidden).to(images.dtype), 2, ceil_mode=True)  # of visible pixels
    colour = F.avg_pool2d(images * ~hidden, 2, ceil_mode=True) / share.clamp_min(0.1)
    coarse = bilinear_fill(colour, share[:, 0] == 0, smooth)
    filled = torch.where(hidden, F.interpolate(coarse, size=images.shape[-2:], mode="bilinear"), images)
    for _ in range(smooth):
        blurred = F.avg_pool2d(F.pad(filled, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        filled = torch.where(hidden, blurred, images)
    return filled


def verdict(now: dict[str, float], before: dict[str, float] | None = None, epochs_between: float = 1) -> str:
    """One line for people on what `health` found, and found `epochs_between` epochs before; "knn" is told if in."""
    loss = now["heldout"]
    guesses = {words: now[name] for name, words in TRIVIAL.items() if name in now}
    told = ", ".join(f"{words} {value:.3g}" for words, value in guesses.items())
    parts = [f"held-out {loss:.3g} ({told})" if told else f"held-out {loss:.3g}"]
    if not math.isfinite(loss):
        return f"{parts[0]}: NO NUMBER ANY MORE: go back to an earlier checkpoint with a lower learning rate"
    if guesses:
        parts[0] += f": {against(loss, guesses)}"
    if before is not None and math.isfinite(before["heldout"]):
        parts.append(progress(loss, before["heldout"], epochs_between))
    if "heldout_perplexity" in now:
        parts.append(f"codes: perplexity {now['heldout_perplexity']:.3g}, {100 * now['heldout_used']:.3g} % in use")
    if now["images"] < FEW:
        return "; ".join([*parts, f"too few held-out images ({now['images']:.0f}) to judge the features by"])
    if now["spread"] < COLLAPSED or now["rank"] < 2:
        parts.append(f"FEATURES HAVE COLLAPSED: all images look alike to the encoder (spread {now['spread']:.2g})")
    most = min(now["dim"], now["images"] - 1)
    parts.append(f"rank {now['rank']:.0f} of {most:.0f}" + ("" if most == now["dim"] else f" ({most + 1:.0f} images)"))
    if "knn" in now:
        parts.append(f"k-NN {now['knn']:.3f}")
    return "; ".join(parts)


def against(loss: float, guesses: dict[str, float]) -> str:
    """How a loss compares with the best of the trivial guesses."""
    best = min(guesses, key=guesses.get)
    if loss < guesses[best]:
        return f"{1 - loss / guesses[best]:.0%} below the best trivial guess".replace("%", " %")
    return f"NO BETTER THAN A TRIVIAL GUESS ({best}), as is usual only at the very start"


def progress(loss: float, before: float, epochs: float) -> str:
    """How a loss moved since it was `before`, `epochs` epochs ago."""
    rate = (1 - loss / before) / max(epochs, 1e-9) if before else 0.0  # share of the loss, per epoch
    if rate > 1e-4:
        return f"improving {100 * rate:.2g} % per epoch"
    if rate > -1e-3:
        return "no longer improving"
    return f"GETTING WORSE by {-100 * rate:.2g} % per epoch"
