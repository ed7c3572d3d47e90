"""Classify images: fine-tune an encoder, or train a linear probe on a frozen one."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from models.encoders.encoder import Encoder
from models.encoders.grid import Features
from util import dist


def pooled(features: Features, pool: str) -> Tensor:
    """One vector for each image, (B, C): the "mean" over the places of the last map, or the class token, "cls".

    ValueError if there is no class token.
    """
    if pool == "mean":
        return features.maps[-1].mean((2, 3))
    if features.prefix is None:
        raise ValueError("pool: this encoder has no class token for 'cls'; use 'mean'")
    return features.prefix[:, 0]


class Classify(nn.Module):
    """Pool what an encoder makes of an image, norm it, and score each class with a linear head.

    pool:      "mean" or "cls", see `pooled`
    frozen:    a linear probe: the encoder is neither trained nor put into training mode, and the norm is a batch norm
               without parameters (MAE, MoCo v3)
    dropout:   of the pooled features
    smoothing: of the labels, in the training loss
    mixup, cutmix: their Beta distributions' alpha, 0 for none; they make one of a batch's pairs in `mix_prob` of the
               batches, and where both are on, `mix_switch` of these are cutmix
    ema:       decay per step of a moving average of the weights, which is then what is evaluated; 0 for none
    """

    def __init__(
        self,
        encoder: Encoder,
        classes: int,
        pool: str = "mean",
        frozen: bool = False,
        dropout: float = 0.0,
        smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_prob: float = 1.0,
        mix_switch: float = 0.5,
        ema: float = 0.0,
    ):
        super().__init__()
        if pool not in ("mean", "cls"):
            raise ValueError(f"pool: there is no {pool!r}, only 'mean' and 'cls'")
        self.encoder, self.classes, self.pool, self.frozen = encoder, classes, pool, frozen
        self.smoothing, self.ema, dim = smoothing, ema, encoder.dims[-1]
        if frozen:
            encoder.requires_grad_(False)
            self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        else:
            self.norm = nn.Identity() if encoder.normed else nn.LayerNorm(dim, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01 if frozen else 2e-5)
        nn.init.zeros_(self.head.bias)
        mixes = mixup > 0 or cutmix > 0
        how = {"prob": mix_prob, "switch_prob": mix_switch, "label_smoothing": 0.0, "num_classes": classes}
        self.mixer = Mixup(mixup, cutmix, **how) if mixes else None
        self.average = None
        if ema:
            self.average = copy.deepcopy(self).requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Classify:
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        if self.average is not None:
            self.average.eval()
        return self

    def logits(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> a score for each class, (B, classes)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            vector = pooled(self.encoder(images), self.pool)
        return self.head(self.dropout(self.norm(vector)))

    def forward(self, batch: dict) -> dict[str, Tensor]:
        images, labels = batch["image"], batch["label"]
        if self.training and self.mixer is not None:
            images, labels = self.mix(images, labels)
        return {"loss": F.cross_entropy(self.logits(images).float(), labels, label_smoothing=self.smoothing)}

    @torch.compiler.disable  # the draws are numpy's
    def mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mix each image with its mirror in the batch: images, and labels as shares of the classes, (B, classes)."""
        if len(images) % 2:
            raise ValueError(f"mixup and cutmix pair images: an even batch per device is needed, not {len(images)}")
        return self.mixer(images.clone(), labels)

    @torch.no_grad()
    def after_step(self) -> None:
        """Follow the weights with their moving average; call it after each optimizer step."""
        if self.average is None:
            return
        now = dict(self.named_parameters())
        means, current = zip(*((mean, now[name]) for name, mean in self.average.named_parameters()))
        get_ema_multi_avg_fn(self.ema)(list(means), list(current), None)
        now = dict(self.named_buffers())
        for name, buffer in self.average.named_buffers():
            buffer.copy_(now[name])

    @property
    def judged(self) -> Classify:
        """The weights that count: the moving average if there is one."""
        return self if self.average is None else self.average

    @torch.no_grad()
    def evaluate(self, batches: Iterable[dict]) -> dict[str, float]:
        """Shares of images whose class has the best score, "top1", is among the best five, "top5"; and mean "loss".

        Exact over the batches of all processes, each of which brings its own. There is a top5 only beyond 5 classes.
        """
        training = self.training
        self.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=self.head.weight.device)
        for batch in batches:
            logits, labels = self.judged.logits(batch["image"]).float(), batch["label"]
            hits = logits.topk(min(5, self.classes)).indices == labels[:, None]  # (B, 5), best first
            sums[0] += hits[:, 0].sum()
            sums[1] += hits.sum()
            sums[2] += F.cross_entropy(logits, labels, reduction="sum")
            sums[3] += len(labels)
        self.train(training)
        top1, top5, loss, count = dist.total(sums).tolist()
        if not count:
            raise ValueError("nothing to evaluate: there is no labelled image")
        scores = {"top1": top1 / count, "top5": top5 / count, "loss": loss / count}
        return scores if self.classes > 5 else {"top1": scores["top1"], "loss": scores["loss"]}
