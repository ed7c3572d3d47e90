"""How large a model is: parameters, and multiply-adds of one image."""

from __future__ import annotations

import logging
import warnings

import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # fvcore scripts functions as it is imported
    from fvcore.nn import FlopCountAnalysis


def parameters(module: nn.Module) -> int:
    """Trainable and frozen parameters."""
    return sum(p.numel() for p in module.parameters())


def short(number: float) -> str:
    """In three digits, with a unit: 86_567_656 -> "86.6 M", 12_345 -> "12.3 k"."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size * 0.9995:  # what rounds to 1,000 is one of the next unit
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


@torch.no_grad()
def flops(encoder: nn.Module, image: torch.Tensor) -> float:
    """Multiply-adds of an encoder's forward pass, attention included; the papers of ViT and Swin call these FLOPs."""
    training = encoder.training
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    count = FlopCountAnalysis(Traced(encoder).eval(), image)
    count.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    count.set_op_handle("aten::scaled_dot_product_attention", attention_flops)
    total = count.total()
    encoder.train(training)
    return float(total)


class Traced(nn.Module):
    """An encoder whose output is a tensor, as tracers want it."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.encoder(image).maps[-1]


def attention_flops(inputs: list, outputs: list) -> int:
    """Multiply-adds of queries (..., n, d), keys (..., m, d) and values (..., m, e): two products."""
    *batch, n, d = inputs[0].type().sizes()
    m, e = inputs[2].type().sizes()[-2:]
    together = 1
    for size in batch:
        together *= size
    return together * n * m * (d + e)
