"""Encoders in safetensors: the file that a run of this code leaves, whatever the weights were before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file
from torch import Tensor

from models.encoders.encoder import Encoder
from models.encoders.grid import Features
from models.encoders.weights import load_encoder

if TYPE_CHECKING:
    from models.export.formats import Facts

FILE = "encoder.safetensors"
USE = f"""\
import torch

from models.encoders.weights import load_encoder  # of this code; the tensors alone: safetensors.torch.load_file

encoder = load_encoder("{FILE}")
mean, std = (torch.tensor(values).view(-1, 1, 1) for values in ({{mean}}, {{std}}))
images = torch.rand(1, {{channels}}, {{height}}, {{width}})  # in [0, 1]
features = encoder((images - mean) / std).maps[-1]
"""


def write(encoder: Encoder, facts: Facts, folder: Path) -> None:
    """Weights by our keys; how to build the encoder, its normalisation, licence and origin as JSON in the metadata."""
    normalization = {"mean": list(facts.mean), "std": list(facts.std), "size": list(facts.size), "crop": facts.crop}
    told = {"encoder": encoder.plan, "normalization": normalization, "method": facts.method}
    metadata = {key: json.dumps(value) for key, value in told.items() if value is not None}
    metadata |= {"format": "pt", "licence": facts.licence, "origin": facts.origin}
    tensors = {key: value.detach().cpu().contiguous() for key, value in encoder.state_dict().items()}
    save_file(tensors, folder / FILE, metadata)


def read(folder: Path, encoder: Encoder) -> Callable[[Tensor], Features]:
    """The encoder that the file alone describes."""
    return load_encoder(str(folder / FILE))
