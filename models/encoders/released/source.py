"""A source of weights opened: which file it is, who wrote it, and what it says of its encoder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from models.encoders import released
from models.encoders.build import build_encoder
from models.encoders.released import hf, hf_config
from models.encoders.released.common import DERIVED, State, named
from models.encoders.released.convnext import dense
from models.encoders.released.derived import check_derived
from models.encoders.released.fetch import fetch
from models.encoders.released.layout import Family
from models.encoders.released.magic import one_line
from models.encoders.released.read import RUN, Content, read
from models.encoders.released.releases import RELEASES
from models.encoders.released.timm import module_of, native, read_config
from models.encoders.resize import STEM

# what tensors lead to that do not fit together
DAMAGED = ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError
ELSEWHERE = "pretrained", "checkpoint_path"  # arguments by which timm would load something else
ENCODER = "encoder.safetensors"  # in a run's folder


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
    method:        {"name", "args"} with which a run of ours, or what transformers wrote, builds its method
    remarks:       what was taken for granted, since the file does not tell it
    average:       the wrapper of averaged weights, such as "model_ema", from which the tensors are; None if of none
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
    remarks: list[str] = field(default_factory=list)
    average: str | None = None
    licence: str = "unknown"


def open_weights(source: str, name: str = "") -> Weights:
    """What the file of a source says of its encoder. ValueError in one line if it is no encoder's, or not readable.

    name: of the architecture, if the user knows it; it counts where timm wrote the file
    """
    kind, path = locate(source)
    content = read(path)
    with told(path):
        if "encoder" in content.metadata:
            return ours(path, content.metadata, content.state)
        if content.wrappers == [RUN]:
            return of_run(path, content.state)
        found = translate(path, kind, content, name)
    found.licence = RELEASES[source].licence if source in RELEASES else "unknown"
    return found


@contextmanager
def told(path: Path) -> Iterator[None]:
    """What a damaged file leads to inside becomes one line, a ValueError, that begins with the file."""
    try:
        yield
    except DAMAGED as error:
        why = one_line(error, 1000)
        if not isinstance(error, ValueError):
            why = f"what is in it does not fit together ({type(error).__name__}: {why[:120]})"
        raise ValueError(f"{one_line(path, 1000)}: {why}") from error


def ours(path: Path, metadata: dict[str, str], state: State) -> Weights:
    """What the metadata of an encoder of ours tell."""
    try:
        plan, norm, method = (json.loads(metadata.get(key, "null")) for key in ("encoder", "normalization", "method"))
        name, in_chans, args = plan["name"], plan["in_chans"], dict(plan["args"])
        right = isinstance(name, str) and isinstance(in_chans, int) and isinstance(method or {}, dict)
        if not right or norm is not None and not all(float(n) == n for n in norm["mean"] + norm["std"]):
            raise ValueError
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError("its metadata, which tell how the encoder is built, are damaged") from error
    args = {key: value for key, value in args.items() if not key.startswith(ELSEWHERE)}
    with torch.device("meta"):
        like = build_encoder(name, in_chans, **args).state_dict()
    wrong = [key for key, value in state.items() if key in like and value.shape != like[key].shape]
    if wrong:
        raise ValueError(f"its metadata describe another encoder than its tensors are of{named('misfits', wrong)}")
    told_by = {"method": method, "licence": metadata.get("licence", "unknown")}
    return Weights(path, metadata.get("origin", "ours"), name, in_chans, args, state, norm, **told_by)


def of_run(path: Path, state: State) -> Weights:
    """The encoder in a checkpoint with which a run of ours goes on; how it is built is told by the one beside it."""
    beside = path.with_name(ENCODER)
    if not beside.is_file():
        raise ValueError(f"it is a checkpoint to go on from; how its encoder is built is told by {ENCODER}, which is "
                         "not beside it: give the run's folder, or that file")  # fmt: skip
    told_by = read(beside)
    ends = [key.removesuffix(first) for first in list(told_by.state)[:1] for key in state if key.endswith(first)]
    whole = [start for start in ends if all(start + key in state for key in told_by.state)]
    if not whole:
        raise ValueError(f"it holds no encoder as {beside} describes: they are of different runs")
    start = max(whole, key=lambda start: start.startswith("average."))  # which is the one exported, if there is one
    found = ours(path, told_by.metadata, {key: state[start + key] for key in told_by.state})
    found.ignored = Counter(key.split(".")[0] for key in state if not key.startswith(start))
    return found


def locate(source: str) -> tuple[str, Path]:
    """The origin that a source insists on, empty if it does not, and its file, fetched if it is elsewhere."""
    kind, colon, rest = source.partition(":")
    if not colon or kind not in released.NAMES:
        kind, rest = "", source
    path = fetch(rest)
    if not path.is_file():
        raise ValueError(f"there are no weights at {path}: give a run's folder or a checkpoint")
    return kind, path


def translate(path: Path, kind: str, content: Content, name: str = "") -> Weights:
    """What somebody else's file says, in our keys."""
    origin, family, state, norm, guessed = identify(path, kind, content, name)
    theirs = hf_config.read(path.parent) if hf.speaks(content.state) else hf_config.Told()
    strange = check_derived(state)
    try:
        state = family.prepare(state)
        name, args, *remarks = family.describe(state)
        assumed = [] if theirs.args else family.assumes(state, args)
    except KeyError as error:
        raise ValueError(f"it is no checkpoint of {origin}: it has no {error.args[0]}") from error
    found, ignored = {}, Counter()
    for key, value in state.items():
        new = family.rename(key)
        if new is not None:
            found[new] = dense(key, value)
        else:
            ignored[what(key)] += 1
    stem = next((value for key, value in found.items() if value.ndim == 4 and key.startswith(STEM)), None)
    if stem is None:
        raise ValueError(f"it is no checkpoint of {origin}: its patch embedding is missing")
    norm, guessed = theirs.normalization or norm, [] if theirs.normalization else guessed
    beside = content.beside + [f"{key}, which is not what is computed in its place" for key in strange[:1]]
    remarks += [f"assumed: {', '.join(assumed + guessed)}"] if assumed + guessed else []
    rest = norm, ignored, beside, state, family, theirs.method, remarks, content.average
    return Weights(path, origin, name, stem.shape[1], args | theirs.args, found, *rest)


def identify(path: Path, kind: str, content: Content, name: str) -> tuple[str, Family, State, dict, list[str]]:
    """Who wrote a file, its family, its tensors in the official spelling, mean and std, and what of them is guessed."""
    of_timm = None if kind else native(content.state, read_config(path), path, name)
    if of_timm is not None:
        return "timm", of_timm[0], content.state, of_timm[1], []
    try:
        origin, family, state = released.recognise(content.state, kind)
    except ValueError as error:
        module = module_of(content.state)
        if not module or name:
            raise
        raise ValueError(
            f"it is of timm's {module}, but none of the architectures there has just these tensors: give encoder, the "
            "name of the nearest, or put timm's config.json beside it"
        ) from error
    guessed = [] if kind else released.guessed(origin, state)
    return origin, family, state, released.normalization(origin, content.state), guessed


def what(key: str) -> str:
    """What a key that is not the encoder's belongs to, in a word."""
    first = key.removeprefix("encoder.").split(".")[0]
    return "buffers" if key.endswith(DERIVED) else "decoder" if first.startswith("decoder") else first
