"""Weights from files into encoders: our own `encoder.safetensors`, or the checkpoints of official repositories."""

from __future__ import annotations

import argparse
import json
import pickle
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import Tensor

from models.encoders import released
from models.encoders.build import build_encoder
from models.encoders.encoder import Encoder
from models.encoders.released.archive import read_archive
from models.encoders.released.common import DERIVED, State
from models.encoders.released.convnext import dense
from models.encoders.released.derived import check_derived
from models.encoders.resize import STEM, fit

UNREADABLE = SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
CLIP = {"mean": list(OPENAI_CLIP_MEAN), "std": list(OPENAI_CLIP_STD)}
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
OTHERWISE = {"clip": CLIP, "open_clip": CLIP, "beit": HALF}  # released weights whose images were not ImageNet's way


def load_encoder(
    source: str,
    allow_partial: bool = False,
    log: Callable[[str], None] | None = None,
    whole: bool = False,
    **changes,
) -> Encoder:
    """The encoder of a file, with its weights, in evaluation mode.

    source:        our own encoder.safetensors or the run folder it lies in, or "mae:", "simmim:", "fastmim:",
                   or any other of `released.SOURCES` and the path of a checkpoint of that repository, whose sizes are
                   read off its tensors
    allow_partial: load what fits, instead of refusing a file that does not hold all of the encoder
    log:           receives one line on what was read, resized and ignored
    whole:         build the last blocks, too, that pretraining did without (drop_last); they are fresh, and named
    changes:       arguments that differ from the file's, such as img_size, window_size, in_chans, drop_path_rate;
                   `encoder` is another name to build

    ValueError in one line if the file cannot be read or does not fit.
    """
    kind, path = parse(source)
    state, metadata = read(path)
    ignored: Counter[str] = Counter()
    if kind:
        name, in_chans, args, state, ignored = translate(kind, state, path)
    else:
        name, in_chans, args = own_plan(metadata, path)
    name, in_chans = changes.pop("encoder", name), changes.pop("in_chans", in_chans)
    try:
        if (args | changes).get("num_heads", 1) is None:
            raise ValueError("the file does not tell how many attention heads its encoder has: give num_heads")
        wanted, absent = args | changes, set()
        if whole and args.get("drop_last") and "drop_last" not in changes:
            absent = left_out(name, in_chans, wanted)
            del wanted["drop_last"]
        encoder = build_encoder(name, in_chans, **wanted)
        line = load_state(encoder, state, allow_partial, ignored, args.get("img_size"), absent)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if log is not None:
        log(f"{path}: {line}")
    return encoder.eval()


def left_out(name: str, in_chans: int, args: dict) -> set[str]:
    """The keys that an encoder of these arguments lacks for its drop_last."""
    with torch.device("meta"):
        cut, whole = (build_encoder(name, in_chans, **args | {"drop_last": n}) for n in (args["drop_last"], 0))
    return whole.state_dict().keys() - cut.state_dict().keys()


def load_normalization(source: str) -> dict:
    """The {"mean", "std", ...} by which images were normalised when the encoder of `source` was trained."""
    kind, path = parse(source)
    if kind:
        return dict(OTHERWISE.get(kind, IMAGENET))
    metadata = read(path)[1]
    if "normalization" not in metadata:
        raise ValueError(f"{path} does not say how its images were normalised")
    return json.loads(metadata["normalization"])


def parse(source: str) -> tuple[str, Path]:
    """The repository that a source is from, empty for our own, and its path. ValueError if there is no such file."""
    kind, _, rest = source.partition(":")
    if kind not in released.SOURCES:
        kind, rest = "", source
    path = Path(rest)
    if path.is_dir():
        path = path / "encoder.safetensors"
    if not path.is_file():
        kinds = ", ".join(f"{kind}:PATH" for kind in released.SOURCES)
        raise ValueError(f"there are no weights at {path}: give our encoder.safetensors, or {kinds}")
    return kind, path


def read(path: Path) -> tuple[State, dict[str, str]]:
    """The tensors of a file by key, and its metadata if it has any. ValueError if it is cut short."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        with torch.serialization.safe_globals([argparse.Namespace]):  # MAE stores its options beside the weights
            mapped = zipfile.is_zipfile(path)  # then only what is used is read
            content = read_archive(path) or torch.load(path, "cpu", weights_only=True, mmap=mapped)
    except UNREADABLE as error:
        why = str(error).strip().split("\n")[0][:120]
        raise ValueError(f"{path} cannot be read, it may be cut short: {why}") from error
    for key in ("model", "model_state", "state_dict", "module", "teacher"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    state = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not state:
        raise ValueError(f"{path} holds no tensors by name")
    return {key.removeprefix("module."): value for key, value in state.items()}, {}


def own_plan(metadata: dict[str, str], path: Path) -> tuple[str, int, dict]:
    """How to build the encoder of our own file: name, in_chans, arguments."""
    if "encoder" not in metadata:
        kinds = ", ".join(f"{kind}:{path}" for kind in released.SOURCES)
        raise ValueError(f"{path} does not say which encoder it holds; if it is another repository's, write {kinds}")
    plan = json.loads(metadata["encoder"])
    return plan["name"], plan["in_chans"], plan["args"]


def translate(kind: str, state: State, path: Path) -> tuple[str, int, dict, State, Counter[str]]:
    """An official state in our keys, with how to build its encoder and what of it is not the encoder's."""
    rename, describe = released.source(kind, state)
    check_derived(state)
    try:
        state = released.prepare(kind, state)
        name, args = describe(state)
    except KeyError as error:
        raise ValueError(f"{path} is no checkpoint of {kind}: it has no {error.args[0]}") from error
    ours, ignored = {}, Counter()
    for key, value in state.items():
        new = rename(key)
        if new is not None:
            ours[new] = dense(key, value)
        else:
            ignored[what(key)] += 1
    stem = next(value for key, value in ours.items() if value.ndim == 4 and key.startswith(STEM))
    return name, stem.shape[1], args, ours, ignored


def what(key: str) -> str:
    """What a key that is not the encoder's belongs to, in a word."""
    first = key.removeprefix("encoder.").split(".")[0]
    return "buffers" if key.endswith(DERIVED) else "decoder" if first.startswith("decoder") else first


def load_state(
    encoder: Encoder,
    state: State,
    allow_partial: bool = False,
    ignored: Counter[str] | None = None,
    img_size: int | Sequence[int] | None = None,
    absent: Collection[str] = (),
) -> str:
    """Load tensors of our keys into an encoder, resized where its grid, windows or channels differ; one line on it.

    img_size is what the file's encoder was built for, if known; absent are the keys that it did without. ValueError,
    with figures and the first keys, if any other of the encoder is missing or any of the file is left over, unless
    allow_partial.
    """
    ignored, resized, misfits = Counter(ignored), Counter(), []
    own, fitted = encoder.state_dict(), {}
    state = share_table(encoder, state)
    for key, value in state.items():
        if not encoder.normed and key.startswith("vit.norm."):
            ignored["norm"] += 1
        elif key in own:
            fits, how = fit(encoder, key, value, own[key], img_size)
            resized.update([how] if how else [])
            if fits is None:
                misfits.append(f"{key} ({shape(value)} in the file, {shape(own[key])} here)")
            else:
                fitted[key] = fits
    missing = [key for key in own if key not in fitted and key not in state and key not in absent]
    unread = [key for key in state if key not in own and not (key.startswith("vit.norm.") and not encoder.normed)]
    line = (
        f"encoder {len(fitted)}/{len(own)} tensors, {count(fitted)}/{count(own)} parameters"
        + listed("resized", [how if n == 1 else f"{how} ({n})" for how, n in resized.items()])
        + listed("ignored", [f"{what} {n}" for what, n in ignored.items()])
        + listed("left out in pretraining, now fresh", owners(encoder, [key for key in absent if key not in fitted]))
    )
    wrong = named("missing", missing) + named("unread", unread) + named("of other shape", misfits)
    if wrong and not allow_partial:
        raise ValueError(f"the weights do not fit: {line}{wrong}; allow_partial loads what fits")
    encoder.load_state_dict(fitted, strict=False)
    fresh = [key for key in own if key not in fitted and key not in absent]
    return line + named("fresh", fresh) + named("unread", unread)


def owners(encoder: Encoder, keys: Collection[str]) -> list[str]:
    """The largest parts of an encoder that hold nothing but these keys, with the number of their tensors."""
    found, rest = [], set(keys)
    for name, part in encoder.named_modules():  # the larger come first
        inner = {f"{name}.{key}" for key in part.state_dict()}
        if inner and inner <= rest:
            found.append(f"{name} ({len(inner)} tensors)")
            rest -= inner
    return found + sorted(rest)


def share_table(encoder: Encoder, state: State) -> State:
    """A relative position table that was shared by all blocks goes to each, where each has its own (SimMIM, BEiT)."""
    tables = [key for key in encoder.state_dict() if key.startswith("tables.")]
    if len(tables) > 1 and [key for key in state if key.startswith("tables.")] == ["tables.0"]:
        return state | {key: state["tables.0"].clone() for key in tables}
    return state


def shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def count(state: State) -> str:
    """The numbers in a state, in three digits: "86.6 M", "12.3 k"."""
    number = sum(value.numel() for value in state.values())
    return f"{number / 1e6:.3g} M" if number >= 999_500 else f"{number / 1e3:.3g} k"


def listed(title: str, parts: list[str]) -> str:
    return f"; {title}: {', '.join(parts)}" if parts else ""


def named(title: str, keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"; {title} {len(keys)}: {', '.join(keys[:3])}{more}" if keys else ""
