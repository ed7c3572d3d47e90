"""Weights from files into encoders: our own, or whatever others trained; the file itself tells what it is."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from models.encoders import released
from models.encoders.build import build_encoder
from models.encoders.encoder import Encoder
from models.encoders.released.common import DERIVED, State
from models.encoders.released.convnext import dense
from models.encoders.released.derived import check_derived
from models.encoders.released.fetch import fetch
from models.encoders.released.layout import Family
from models.encoders.released.read import Content, read
from models.encoders.resize import STEM, fit


@dataclass
class Weights:
    """What a file says of an encoder.

    path:          of the file
    origin:        who wrote it, one of `released.NAMES`; "ours" for a run of this code
    name, in_chans, args: with which `build_encoder` makes the encoder
    state:         its tensors by our keys
    normalization: {"mean", "std", ...} of the images that it learned from; None if nobody says
    ignored:       how many tensors of the file are what else
    beside:        what lies in the file beside tensors
    others:        all tensors of somebody else's file, in the official spelling, and the family of their keys
    method:        {"name", "args"} with which a run of ours built its method
    licence:       of the weights; "unknown" if nobody says
    """

    path: Path
    origin: str
    name: str
    in_chans: int
    args: dict
    state: State
    normalization: dict | None
    ignored: Counter[str] = field(default_factory=Counter)
    beside: list[str] = field(default_factory=list)
    others: State = field(default_factory=dict)
    family: Family | None = None
    method: dict | None = None
    licence: str = "unknown"


def load_encoder(
    source: str,
    allow_partial: bool = False,
    log: Callable[[str], None] | None = None,
    whole: bool = False,
    **changes,
) -> Encoder:
    """The encoder of a file, with its weights, in evaluation mode.

    source:        a file or run folder of ours, or anybody's checkpoint: a path, a URL, "hf:owner/name", "timm:name"
                   or a short name of `released.RELEASES`. The file tells what it is and how large; "mae:PATH", or
                   another of `released.NAMES` before the path, insists on it
    allow_partial: load what fits, instead of refusing a file that does not hold all of the encoder
    log:           receives one line on what was read, resized and ignored
    whole:         build the last blocks, too, that pretraining did without (drop_last); they are fresh, and named
    changes:       arguments that differ from the file's, such as img_size, window_size, in_chans, drop_path_rate;
                   `encoder` is another name to build

    ValueError in one line if the file cannot be read or does not fit.
    """
    found = open_weights(source)
    absent = set()
    if whole and found.args.get("drop_last") and "drop_last" not in changes:
        absent = left_out(found.name, found.in_chans, found.args | changes)
        del found.args["drop_last"]
    encoder = build_found(found, **changes)
    load_found(encoder, found, allow_partial, log, absent)
    return encoder.eval()


def build_found(found: Weights, **changes) -> Encoder:
    """The encoder that a file describes, with `changes`, not yet with its weights. ValueError names the file."""
    name, in_chans = changes.pop("encoder", found.name), changes.pop("in_chans", found.in_chans)
    args = found.args | changes
    if args.get("num_heads", 1) is None:
        raise ValueError(f"{found.path} does not tell how many attention heads its encoder has: give num_heads")
    try:
        return build_encoder(name, in_chans, **args)
    except ValueError as error:
        raise ValueError(f"{found.path}: {error}") from error


def load_found(
    encoder: Encoder,
    found: Weights,
    allow_partial: bool = False,
    log: Callable[[str], None] | None = None,
    absent: Collection[str] = (),
) -> None:
    """Load what a file says into an encoder, as `load_state` does; `log` receives its line, errors name the file."""
    told = found.ignored, found.args.get("img_size"), absent, found.beside
    try:
        line = load_state(encoder, found.state, allow_partial, *told)
    except ValueError as error:
        raise ValueError(f"{found.path}: {error}") from error
    if log is not None:
        log(f"{found.path} ({found.origin}): {line}")


def left_out(name: str, in_chans: int, args: dict) -> set[str]:
    """The keys that an encoder of these arguments lacks for its drop_last."""
    with torch.device("meta"):
        cut, whole = (build_encoder(name, in_chans, **args | {"drop_last": n}) for n in (args["drop_last"], 0))
    return whole.state_dict().keys() - cut.state_dict().keys()


def load_normalization(source: str) -> dict:
    """The {"mean", "std", ...} by which images were normalised when the encoder of `source` was trained."""
    found = open_weights(source)
    if found.normalization is None:
        raise ValueError(f"{found.path} does not say how its images were normalised")
    return found.normalization


def open_weights(source: str) -> Weights:
    """What the file of a source says of its encoder. ValueError in one line if it is no encoder's, or not readable."""
    kind, path = locate(source)
    content = read(path)
    if "encoder" in content.metadata:
        plan, norm, method = (
            json.loads(content.metadata.get(key, "null")) for key in ("encoder", "normalization", "method")
        )
        own = plan["name"], plan["in_chans"], plan["args"], content.state, norm
        told = content.metadata  # an export of weights of others tells who wrote them
        return Weights(path, told.get("origin", "ours"), *own, method=method, licence=told.get("licence", "unknown"))
    try:
        return translate(path, kind, content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def locate(source: str) -> tuple[str, Path]:
    """The origin that a source insists on, empty if it does not, and its file, fetched if it is elsewhere."""
    kind, colon, rest = source.partition(":")
    if not colon or kind not in released.NAMES:
        kind, rest = "", source
    path = fetch(rest)
    if path.is_dir():
        path = path / "encoder.safetensors"
    if not path.is_file():
        raise ValueError(f"there are no weights at {path}: give a run's folder or a checkpoint")
    return kind, path


def translate(path: Path, kind: str, content: Content) -> Weights:
    """What somebody else's file says, in our keys."""
    origin, family, state = released.recognise(content.state, kind)
    strange = check_derived(state)
    try:
        state = family.prepare(state)
        name, args = family.describe(state)
    except KeyError as error:
        raise ValueError(f"it is no checkpoint of {origin}: it has no {error.args[0]}") from error
    ours, ignored = {}, Counter()
    for key, value in state.items():
        new = family.rename(key)
        if new is not None:
            ours[new] = dense(key, value)
        else:
            ignored[what(key)] += 1
    stem = next((value for key, value in ours.items() if value.ndim == 4 and key.startswith(STEM)), None)
    if stem is None:
        raise ValueError(f"it is no checkpoint of {origin}: its patch embedding is missing")
    norm = dict(released.NORMALIZATION.get(origin, released.IMAGENET))
    beside = content.beside + [f"{key}, which is not what is computed in its place" for key in strange[:1]]
    return Weights(path, origin, name, stem.shape[1], args, ours, norm, ignored, beside, state, family)


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
    beside: Sequence[str] = (),
) -> str:
    """Load tensors of our keys into an encoder, resized where its grid, windows or channels differ; one line on it.

    img_size is what the file's encoder was built for, if known; absent are the keys that it did without; ignored and
    beside are told. ValueError, with figures and the first keys, if any other of the encoder is missing or any of the
    file is left over, unless allow_partial.
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
    decoder = ignored.pop("decoder", 0)
    line = (
        f"encoder {len(fitted)}/{len(own)} tensors, {count(fitted)}/{count(own)} parameters"
        + (f"; decoder {decoder}" if decoder else "")
        + listed("resized", [how if n == 1 else f"{how} ({n})" for how, n in resized.items()])
        + listed("ignored", [*(f"{what} {n}" for what, n in ignored.items()), *beside])
        + listed("left out in pretraining, now fresh", owners(encoder, [key for key in absent if key not in fitted]))
    )
    wrong = named("missing", missing) + named("unread", unread) + named("of other shape", misfits)
    if wrong and not allow_partial:
        raise ValueError(f"the weights do not fit: {line}{wrong}; allow_partial loads what fits")
    encoder.load_state_dict(fitted, strict=False)
    fresh = [key for key in own if key not in fitted and key not in absent]
    return line + named("fresh", fresh) + named("unread", unread)


def checksum(encoder: Encoder) -> int:
    """A number that changes with any bit of an encoder's weights: equal numbers prove that nothing was touched."""
    number = 0
    for value in encoder.state_dict().values():
        number = zlib.crc32(value.detach().cpu().contiguous().view(torch.uint8).numpy(), number)
    return number


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
