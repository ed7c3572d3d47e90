"""Encoders in ONNX: images in [0, 1] go in, normalisation is inside."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.encoders.encoder import Encoder
from models.encoders.grid import Features

if TYPE_CHECKING:
    from models.export.formats import Facts

FILE, OPSET = "model.onnx", 18
TOLERANCE = 1e-4  # of the largest feature, at other sizes than the one that is compared anyway
LARGE = 1.5e9  # bytes of weights, beyond which they lie in a file of their own: one file holds 2 GB
USE = f"""\
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{FILE}")
images = np.random.rand(1, {{channels}}, {{height}}, {{width}}).astype(np.float32)  # in [0, 1]: normalised inside
outputs = dict(zip([output.name for output in session.get_outputs()], session.run(None, {{{{"images": images}}}})))
features = outputs["map"]  # beside "pooled", its mean over places, and "prefix", the class token, where there is one
"""


class Outside(nn.Module):
    """An encoder as others call it: images in [0, 1] -> the last map, its mean over places, the prefix tokens."""

    def __init__(self, encoder: Encoder, facts: Facts):
        super().__init__()
        self.encoder = encoder
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(facts, name), dtype=torch.float32).view(-1, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, C, H, W) -> (B, C, h, w), (B, C) and, if there are any, (B, P, C)."""
        features = self.encoder((images - self.mean) / self.std)
        outputs = features.maps[-1], features.maps[-1].mean((2, 3))
        return outputs if features.prefix is None else (*outputs, features.prefix)


def write(encoder: Encoder, facts: Facts, folder: Path) -> None:
    """model.onnx for batches of any size and, where that works, images of any size that `multiple` divides.

    Input "images" (B, C, H, W) in [0, 1]; outputs "map" (B, C, h, w), "pooled" (B, C), its mean over places, and
    "prefix" (B, P, C), the class and register tokens, if there are any. What is inside is told in the file's metadata.
    """
    import onnxruntime  # noqa: F401 (before the minutes that the rest may take)
    import onnxscript  # noqa: F401

    with plain(encoder):
        model = Outside(encoder, facts)
        free = facts.any_size and any_size(model, encoder, facts, folder)
        if not free:
            trace(model, encoder, facts, folder / FILE, False)
    height, width = facts.size
    size = f"sides of any multiple of {encoder.mask_unit} px" if free else f"{height} x {width} px alone"
    facts.notes.append(f"Images in [0, 1], normalised inside; batches of any size; {size}.")


@contextlib.contextmanager
def plain(encoder: Encoder) -> Iterator[None]:
    """Without gradients, and with attention in plain products: the exporter knows the fused one in 4 dimensions."""
    fused = [part for part in encoder.modules() if getattr(part, "fused_attn", False)]
    learned = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    for part in fused:
        part.fused_attn = False
    encoder.requires_grad_(False)
    try:
        yield
    finally:
        for part in fused:
            part.fused_attn = True
        for parameter in learned:
            parameter.requires_grad_(True)


def any_size(model: Outside, encoder: Encoder, facts: Facts, folder: Path) -> bool:
    """Whether there now is a graph that agrees with the encoder at sizes that it was not traced at."""
    (height, width), unit = facts.size, encoder.mask_unit
    generator = torch.Generator().manual_seed(0)
    try:
        trace(model, encoder, facts, folder / FILE, True)
        run = Session(folder)
        for sides in ((height, width), (height + 2 * unit, width + unit), (max(height - unit, unit), width + 3 * unit)):
            images = torch.rand(1, encoder.in_chans, *sides, generator=generator)
            for ours, theirs in zip(model(images), run(images).values()):
                if ours.shape != theirs.shape or not (ours - theirs).abs().amax() <= TOLERANCE * ours.abs().amax():
                    return False
    except Exception:  # exporter and runtime raise many kinds, and all mean that this encoder is for one size
        return False
    return True


def trace(model: Outside, encoder: Encoder, facts: Facts, path: Path, free: bool) -> None:
    """Write the graph, for images of any size if `free`: then traced at a size whose positions are interpolated."""
    (height, width), unit = facts.size, encoder.mask_unit
    sides = (height + unit, width + 2 * unit) if free else (height, width)
    images = torch.zeros(2, encoder.in_chans, *sides)
    dynamic = {0: torch.export.Dim.DYNAMIC} | (dict.fromkeys((2, 3), torch.export.Dim.DYNAMIC) if free else {})
    names = ["map", "pooled", "prefix"][: len(model(images))]
    with quiet():
        program = torch.onnx.export(model, (images,), dynamo=True, dynamic_shapes=(dynamic,), opset_version=OPSET,
                                    input_names=["images"], output_names=names, verbose=False)  # fmt: skip
    told = {"mean": facts.mean, "std": facts.std, "size": facts.size, "any_size": free, "multiple": encoder.mask_unit}
    told |= {"normalized_inside": True, "licence": facts.licence, "encoder": encoder.plan}
    program.model.metadata_props.update({key: json.dumps(value) for key, value in told.items()})
    weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    program.save(str(path), external_data=weights > LARGE)


def read(folder: Path, encoder: Encoder) -> Callable[[Tensor], Features]:
    """The file through onnxruntime. It takes images that are normalised, as those of other formats do, and undoes
    that, since the graph normalises by itself."""
    run = Session(folder)
    told = run.session.get_modelmeta().custom_metadata_map
    mean, std = (torch.tensor(json.loads(told[key])).view(-1, 1, 1) for key in ("mean", "std"))

    def features(images: Tensor) -> Features:
        outputs = run(images * std + mean)
        return Features([outputs["map"]], outputs.get("prefix"))

    return features


class Session:
    """The graph in a folder: images in [0, 1] -> its outputs by name."""

    def __init__(self, folder: Path):
        import onnxruntime

        self.session = onnxruntime.InferenceSession(str(folder / FILE), providers=["CPUExecutionProvider"])
        self.names = [output.name for output in self.session.get_outputs()]

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        outputs = self.session.run(None, {"images": images.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(self.names, outputs)}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's remarks on its own insides."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
