"""SparK's encoders: timm's ResNet and the official ConvNeXt, alone or beside their decoder."""

from __future__ import annotations

import timm

from models.encoders.released.common import State, count
from models.encoders.released.convnext import convnext, describe_convnext

WRAPPER = "sparse_encoder.sp_cnn."
BESIDE = ("dense_decoder.", "densify_", "mask_tokens.", "imn_", "norm_black", "fc.")


def spark_convnext(key: str) -> str | None:
    return None if key.startswith(BESIDE) else convnext(key.removeprefix(WRAPPER))


def spark_resnet(key: str) -> str | None:
    key = key.removeprefix(WRAPPER)
    if key.startswith(BESIDE):
        return None
    return f"stem.{key.removeprefix('conv1.')}" if key.startswith("conv1.") else f"backbone.{key}"


def describe_spark_convnext(state: State) -> tuple[str, dict]:
    """As `describe_vit`, for SparK's ConvNeXt."""
    return describe_convnext({key.removeprefix(WRAPPER): value for key, value in state.items()})


def describe_spark_resnet(state: State) -> tuple[str, dict]:
    """As `describe_vit`, for SparK's ResNet."""
    state = {key.removeprefix(WRAPPER): value for key, value in state.items()}
    layers = tuple(count(state, rf"layer{i}\.(\d+)\.") for i in range(1, 5))
    name = f"resnet{2 + 3 * sum(layers)}"
    channels = tuple(state[f"layer{i}.0.conv1.weight"].shape[0] for i in range(1, 5))
    return name if timm.is_model(name) else "resnet50", {"layers": layers, "channels": channels}
