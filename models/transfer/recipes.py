"""The transfers that are trained, each as a task. The signature of a builder is the schema of its arguments."""

from __future__ import annotations

from models.encoders.encoder import Encoder
from models.transfer.classify import Classify


def finetune(
    encoder: Encoder,
    classes: int,
    pool: str = "mean",
    dropout: float = 0.0,
    smoothing: float = 0.1,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    mix_prob: float = 1.0,
    ema: float = 0.0,
) -> Classify:
    """All of the encoder learns to classify; the arguments are those of Classify."""
    return Classify(encoder, classes, pool, False, dropout, smoothing, mixup, cutmix, mix_prob=mix_prob, ema=ema)


def linear(encoder: Encoder, classes: int, pool: str = "mean") -> Classify:
    """A linear classifier learns on the frozen encoder, after a batch norm without parameters (MAE, MoCo v3)."""
    return Classify(encoder, classes, pool, frozen=True)


TASKS = {task.__name__: task for task in (finetune, linear)}
