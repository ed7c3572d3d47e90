"""Several processes as one run: who am I, and sums over all. Everything works unchanged in a single process."""

from __future__ import annotations

import atexit
import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

from util.errors import UserError, first_line

_flags: torch_dist.ProcessGroup | None = None  # a CPU group beside NCCL's, so that agreeing on a flag waits for no GPU


def init(device: str = "auto", timeout_s: float = 60) -> torch.device:
    """Join the run that torchrun or srun describes in the environment, if any; gives this process's device.

    device: "auto" (a GPU where there is one), "cuda" or "cpu". UserError if a process does not come within `timeout_s`.
    """
    global _flags
    for ours, theirs in (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_NTASKS"), ("LOCAL_RANK", "SLURM_LOCALID")):
        if "MASTER_ADDR" in os.environ and ours not in os.environ and theirs in os.environ:
            os.environ[ours] = os.environ[theirs]
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device is cuda, but no GPU is in reach here: set run.device to cpu or auto")
    cuda = device != "cpu" and torch.cuda.is_available()
    place = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(place)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch_dist.is_initialized():
        who, soon = f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}", timedelta(seconds=timeout_s)
        try:  # the first meeting is short: a process that is missing is told at once instead of hanging for minutes
            torch_dist.init_process_group("nccl" if cuda else "gloo", timeout=soon)
            _flags = torch_dist.new_group(backend="gloo", timeout=soon)
            torch_dist.monitored_barrier(_flags, timeout=soon, wait_all_ranks=True)
        except Exception as error:  # torch raises many kinds, and all mean that somebody is not there
            raise UserError(f"{who} did not meet the others within {timeout_s:g} s: {first_line(error)}") from error
        for group in (None, _flags):  # later, one may save or evaluate for a while as the others wait
            _set_pg_timeout(timedelta(minutes=30), group)
        atexit.register(shutdown)
    return place


def shutdown() -> None:
    """Leave the run, as happens by itself at the end of the program."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def world() -> int:
    """Number of processes."""
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return torch_dist.get_rank() if torch_dist.is_initialized() else 0


def total(x: Tensor) -> Tensor:
    """The sum over all processes of a tensor that has the same shape in each."""
    if world() > 1:
        x = x.clone()
        torch_dist.all_reduce(x)
    return x


def any_of(flag: bool) -> bool:
    """True in every process if it is in one; waits for no GPU."""
    if world() == 1:
        return flag
    box = torch.tensor(int(flag))
    torch_dist.all_reduce(box, op=torch_dist.ReduceOp.MAX, group=_flags)
    return bool(box)


@contextmanager
def main_first():
    """The main process does what is inside before the others do, e.g. a download that they then find."""
    if rank() > 0:
        torch_dist.barrier(_flags)
    yield
    if rank() == 0 and world() > 1:
        torch_dist.barrier(_flags)
