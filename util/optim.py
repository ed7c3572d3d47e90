"""What is learned, how fast, and with how much weight decay: parameter groups, optimizers and their schedules."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer


@dataclass(frozen=True)
class Schedule:
    """The learning rate at a step: a straight warm-up, then half a cosine, or a staircase where there are milestones.

    lr:         after the warm-up; absolute, as are all rates here
    steps:      optimizer steps of the whole run; times are in steps, fractions of one are fine (or all in epochs)
    warmup:     steps from `warmup_lr` to `lr`
    min_lr:     where the cosine ends
    origin:     step at which the cosine is at its top, the end of the warm-up unless given. SimMIM's cosine runs from
                step 0, beneath the warm-up; BEiT's tops at `warmup` = W - 1 and again at `origin` = W
    milestones: steps after each of which `lr` is multiplied by `gamma`, instead of the cosine
    """

    lr: float
    steps: float
    warmup: float = 0
    warmup_lr: float = 0.0
    min_lr: float = 0.0
    origin: float | None = None
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1

    def __call__(self, step: float) -> float:
        if step < self.warmup:
            return self.warmup_lr + (self.lr - self.warmup_lr) * step / self.warmup
        if self.milestones:
            return self.lr * self.gamma ** bisect_right(self.milestones, step)
        if step >= self.steps:
            return self.min_lr
        origin = self.warmup if self.origin is None else self.origin
        if step <= origin:
            return self.lr
        cosine = math.cos(math.pi * (step - origin) / (self.steps - origin))
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + cosine)


@dataclass(frozen=True)
class Pace:
    """How an encoder learns beside the rest of its task.

    frozen: steps at the start in which it stays as it is, to the bit
    scale:  factor of its learning rate after them
    """

    frozen: int = 0
    scale: float = 1.0


def parameter_groups(
    task: nn.Module,
    weight_decay: float,
    layer_decay: float = 1.0,
    no_decay: Sequence[str] = (),
    pace: Pace | None = None,
) -> list[dict]:
    """The trainable parameters, grouped by learning rate and weight decay; frozen ones are left out.

    Biases, norms and all else of at most one dimension are not decayed, nor is a parameter whose name contains any of
    the words of `no_decay`. Each group has an "lr_scale": layer_decay ** (n - k) for list k, from 0, of the n of
    `task.encoder.layers`, and 1 for the head and all else (BEiT, MAE). With a `pace` the encoder has groups of its own,
    with its factor in "lr_scale" and its steps as "frozen". ValueError if there is nothing to train.
    """
    layers = task.encoder.layers if layer_decay != 1 else []
    scales = {id(p): layer_decay ** (len(layers) - k) for k, layer in enumerate(layers) for p in layer}
    paced = set() if pace is None else {id(p) for p in task.encoder.parameters()}
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, p in task.named_parameters():
        if p.requires_grad:
            spared = p.ndim <= 1 or name.endswith(".bias") or any(word in name for word in no_decay)
            key = id(p) in paced, scales.get(id(p), 1.0), 0.0 if spared else weight_decay
            groups.setdefault(key, []).append(p)
    if not groups:
        raise ValueError(f"nothing to train: every parameter of {type(task).__name__} is frozen")
    own, rest = pace or Pace(), Pace()
    return [
        {
            "params": ps,
            "lr_scale": scale * (own if inner else rest).scale,
            "frozen": (own if inner else rest).frozen,
            "weight_decay": decay,
        }
        for (inner, scale, decay), ps in groups.items()
    ]


def build_optimizer(
    task: nn.Module,
    name: str = "adamw",
    weight_decay: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.999),
    momentum: float = 0.9,
    layer_decay: float = 1.0,
    no_decay: Sequence[str] = (),
    eps: float = 1e-8,
    pace: Pace | None = None,
) -> Optimizer:
    """AdamW ("adamw"), LAMB ("lamb"), LARS ("lars") or SGD ("sgd") over the groups of `parameter_groups`.

    Its learning rate is 0: the loop sets each group's before every step, to the schedule's times "lr_scale", and leaves
    it at 0 in the first "frozen" steps.
    All of them are fused or act like it: where the tensor `optimizer.found_inf` is 1, a step changes nothing.
    ValueError if the name is another or nothing is trainable.
    """
    groups = parameter_groups(task, weight_decay, layer_decay, no_decay, pace)
    if name == "adamw":
        return AdamW(groups, lr=0.0, betas=tuple(betas), eps=eps, fused=True)  # on a CPU too it is several times faster
    if name == "lamb":
        return LAMB(groups, lr=0.0, betas=tuple(betas))
    if name == "lars":
        return LARS(groups, lr=0.0, momentum=momentum)
    if name == "sgd":
        return SGD(groups, lr=0.0, momentum=momentum, fused=True)
    raise ValueError(f"no optimizer {name!r}: there are adamw, lamb, lars and sgd")


class Scaled(Optimizer):
    """An optimizer of one tensor at a time that skips a step where `found_inf` is 1, without waiting for the GPU."""

    def __init__(self, params, defaults: dict):
        super().__init__(params, defaults)
        self.found_inf = torch.zeros((), device=self.param_groups[0]["params"][0].device)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group)
        return loss


class LARS(Scaled):
    """SGD with momentum whose step for a weight matrix is in proportion to that matrix's norm (You et al. 2017).

    As for linear probes in MoCo v3 and MAE: what has at most one dimension gets neither `trust` nor weight decay.
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.0, momentum: float = 0.9, trust: float = 0.001):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})

    def update(self, p: nn.Parameter, group: dict) -> None:
        change = p.grad
        if p.ndim > 1:
            change = change.add(p, alpha=group["weight_decay"])
            change = change * trust_ratio(p, change, group["trust"])
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        momentum = state["momentum"] * group["momentum"] + change
        keep = self.found_inf.bool()
        state["momentum"].copy_(torch.where(keep, state["momentum"], momentum))
        p.sub_(torch.where(keep, 0.0, momentum), alpha=group["lr"])


class LAMB(Scaled):
    """Adam whose step for a decayed tensor is in proportion to that tensor's norm (You et al. 2020).

    What is not decayed takes Adam's step, and the gradient is clipped by the loop, if at all, as in SparK's code.
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.0, betas=(0.9, 0.999), eps: float = 1e-6):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})

    def update(self, p: nn.Parameter, group: dict) -> None:
        state, skip = self.state[p], self.found_inf.bool()
        if not state:
            state.update(steps=p.new_zeros(()), mean=torch.zeros_like(p), square=torch.zeros_like(p))
        gradient, keep = torch.where(skip, 0.0, p.grad), (~skip).to(p.dtype)
        state["steps"].add_(keep)
        found = []
        for key, x, beta in zip(("mean", "square"), (gradient, gradient.square()), group["betas"]):
            state[key].lerp_(x, keep * (1 - beta))
            found.append(state[key] / (1 - beta ** state["steps"].double()))
        change = found[0] / (found[1].sqrt() + group["eps"])
        if group["weight_decay"]:
            change = change.add(p, alpha=group["weight_decay"])
            change = change * trust_ratio(p, change)
        p.sub_(torch.where(skip, 0.0, change), alpha=group["lr"])


def trust_ratio(p: Tensor, change: Tensor, trust: float = 1.0) -> Tensor:
    """The factor that makes a change `trust` times as long as its parameter; 1 if either has no length."""
    size, pull = p.norm(), change.norm()
    return torch.where((size > 0) & (pull > 0), trust * size / pull, 1.0)
