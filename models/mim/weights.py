"""Pretraining checkpoints into methods: the encoder, and the decoder beside it."""

from __future__ import annotations

from collections.abc import Callable

from einops import rearrange
from torch import Tensor, nn

from models.encoders.released.common import State, count, named
from models.encoders.released.convnext import dense
from models.encoders.released.heads import HEADS, ORDER, method_key
from models.encoders.released.read import read
from models.encoders.released.source import Weights, open_weights, told
from models.encoders.resize import alike
from models.encoders.weights import build_found, load_found, shape
from models.mim.method import MIM
from models.mim.recipes import METHODS
from models.targets.target import HOG, Pixels

CHECKPOINT = "last.pt"  # of a run of ours: its decoder is there
Say = Callable[[str], None]
FCMAE = {"convnextv2": "fcmae"}  # the one origin that is not called as its method


def load_method(source: str, log: Say | None = None, changes: dict | None = None, **args) -> nn.Module:
    """The method of a pretraining checkpoint, encoder and decoder with their weights, in evaluation mode.

    source:  as for `load_encoder`; the file tells which method it is of, and how deep and wide its decoder is
    log:     receives a line on the encoder and one on the decoder
    changes: arguments of the encoder that differ from the file's
    args:    of the method's builder, where the file does not tell them (ratio, target, heads) or others are wanted

    ValueError in one line if the file cannot be read, does not fit or holds no decoder.
    """
    found = open_weights(source)
    name, size = describe_method(found)
    mim = METHODS[name](build_found(found, **changes or {}), **size | args) if name in METHODS else None
    if mim is None or not load_weights(mim, found, log=log):
        raise ValueError(f"{found.path} ({found.origin}) holds an encoder alone, no decoder")
    return mim.eval()


def describe_method(found: Weights) -> tuple[str, dict]:
    """The builder of METHODS for a pretraining checkpoint, and those of its arguments that the file tells."""
    if found.method is not None:
        return found.method["name"], found.method["args"]
    blocks, width, wider = r"decoder_blocks\.(\d+)\.", "decoder_embed.weight", "decoder_blocks.0.mlp.fc1.weight"
    if found.origin in FCMAE:
        blocks, width = r"decoder\.(\d+)\.", "proj.weight"
    size = {"depth": count(found.others, blocks), "width": len(found.others[width])} if width in found.others else {}
    if size and wider in found.others:
        size["mlp_ratio"] = len(found.others[wider]) / size["width"]
    return FCMAE.get(found.origin, found.origin), size


def load_weights(mim: nn.Module, found: Weights, allow_partial: bool = False, log: Say | None = None) -> bool:
    """Load a file's encoder and, where it has one, its decoder into a method; whether it had all of one.

    log: receives a line on each. ValueError in one line, with figures and the first keys, if any tensor of either is
    missing, left over or of another shape, unless allow_partial.
    """
    with told(found.path):
        state = head_state(mim, found)
    own = beside_encoder(mim, mim.state_dict())
    misfits = [k for k in state if k in own and not alike(state[k], own[k])]
    fitted = {k: v.reshape(own[k].shape) for k, v in state.items() if k in own and k not in misfits}
    line = f"decoder {len(fitted)}/{len(own)} tensors"
    wrong = (
        named("missing", [k for k in own if k not in state])
        + named("unread", [k for k in state if k not in own])
        + named("of other shape", [f"{k} ({shape(state[k])} in the file, {shape(own[k])} here)" for k in misfits])
    )
    if state and wrong and not allow_partial:
        raise ValueError(f"{found.path}: the decoder does not fit: {line}{wrong}; allow_partial loads what fits")
    load_found(mim.encoder, found, allow_partial, log)  # when nothing can go wrong with the decoder any more
    mim.load_state_dict(fitted, strict=False)
    if state and log is not None:
        log(f"{found.path} ({found.origin}): {line}{wrong}")
    return bool(state) and not wrong


def beside_encoder(mim: nn.Module, state: State) -> State:
    """Of a method's tensors those that are neither its encoder's nor its target's, which is frozen."""
    encoder = next(name for name, part in mim.named_modules() if part is mim.encoder)
    return {k: v for k, v in state.items() if not k.startswith((f"{encoder}.", "target."))}


def head_state(mim: nn.Module, found: Weights) -> State:
    """What lies beside a file's encoder, by the method's keys and in its order; empty if there is nothing."""
    if found.origin == "ours":
        path = found.path if found.path.suffix == ".pt" else found.path.with_name(CHECKPOINT)
        return beside_encoder(mim, read(path).state) if path.is_file() else {}
    state = {}
    for key, value in found.others.items() if found.origin in HEADS else ():
        new = method_key(found.origin, key, found.family.rename)
        if new is None or new.startswith("hide.encoder."):
            continue
        if ".cells.linear." in new and new in mim.state_dict():
            state[new] = in_our_order(mim, found.origin, new, value)
        else:
            state[new] = dense(key, value)
    return state


def in_our_order(mim: MIM, origin: str, key: str, value: Tensor) -> Tensor:
    """The rows of a decoder's last layer in the order of `Cells`: cells, then what the target says of each."""
    cells = mim.get_submodule(key.partition(".linear.")[0])
    split, target, channels = cells.split, mim.target, mim.encoder.in_chans
    if origin not in ORDER or len(value) != split**2 * target.dim:
        return value
    if isinstance(target, HOG):  # FastMIM: all cells of a number, then the next number
        return rearrange(value, "(d p q) ... -> (p q d) ...", p=split, q=split)
    if not isinstance(target, Pixels):
        return value
    sizes = {"p": split, "q": split, "y": target.unit, "x": target.unit, "c": channels}
    return rearrange(value, f"{ORDER[origin]} ... -> (p q y x c) ...", **sizes)
