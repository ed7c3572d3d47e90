"""What formats share that rename an encoder's tensors."""

from __future__ import annotations

import re
from collections.abc import Callable

import timm
from timm.models import model_entrypoint
from torch import nn

from models.encoders.released.common import State

Names = tuple[tuple[str, str | Callable[[re.Match], str]], ...]  # regexes of our keys, and what stands for them
MLP = ((r"\.mlp\.fc1\.", ".mlp.0."), (r"\.mlp\.fc2\.", ".mlp.3."))  # torchvision's


def module_of(name: str) -> str:
    """timm's module of an encoder; empty for those that timm lacks."""
    return model_entrypoint(name).__module__.rpartition(".")[2] if timm.is_model(name) else ""


def renamed(state: State, names: Names) -> State:
    """A state by other keys, each tensor with memory of its own on the CPU."""
    return {rename(key, names): value.detach().cpu().contiguous().clone() for key, value in state.items()}


def rename(key: str, names: Names) -> str:
    for old, new in names:
        key = re.sub(old, new, key)
    return key


def fill(model: nn.Module, state: State, head: tuple[str, ...], library: str, name: str) -> State:
    """The tensors of a model of another library: `state`, and the buffers that the library computes.

    head: how the keys begin of what the model has beyond an encoder; they are left out

    ValueError if the two do not have the same tensors.
    """
    like = {key: value for key, value in model.state_dict().items() if not key.startswith(head)}
    buffers = {key for key, _ in model.named_buffers()}
    lacks = [key for key in like if key not in state and key not in buffers]
    unknown = [key for key in state if key not in like]
    other = [key for key in like if key in state and state[key].numel() != like[key].numel()]
    for why, keys in (("wants", lacks), ("does not know", unknown), ("has another shape of", other)):
        if keys:
            raise ValueError(f"{library} has no model that equals this {name}: its nearest {why} {keys[0]}")
    return {key: state.get(key, value).reshape(value.shape) for key, value in like.items()}
