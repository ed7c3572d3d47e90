"""What checks the shapes and types that signatures state, in tests only; an int is a float, as Python has it."""

import functools

import torch
from beartype import BeartypeConf, beartype

strict = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(checked):
    """beartype, which lets tracing pass: there, sizes are tensors."""
    strictly = strict(checked)
    if isinstance(checked, type):
        return strictly

    @functools.wraps(checked)
    def either(*args, **kwargs):
        return (checked if torch.jit.is_tracing() else strictly)(*args, **kwargs)

    return either
