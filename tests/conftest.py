"""Tests share a machine, so one thread each; and every shape that a signature states is checked."""

import torch
from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401 (the hook finds it by name)

torch.set_num_threads(1)
install_import_hook(["models.encoders", "models.targets", "models.mim", "models.monitor"], "tests.typecheck.check")
