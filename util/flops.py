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
