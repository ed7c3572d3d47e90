"""Weights from files into encoders: our own, or whatever others trained; the file itself tells what it is."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from models.encoders import released
from models.encoders.build import build_encoder
from models.encoders.encoder import Encoder
from models.encoders.released import hf, hf_config
from models.encoders.released.common import DERIVED, State
from models.encoders.released.convnext import dense
from models.encoders.released.derived import check_derived
from models.encoders.released.fetch import fetch
from models.encoders.released.layout import Family
from models.encoders.released.magic import one_line
from models.encoders.released.read import RUN, Content, read
from models.encoders.released.releases import RELEASES
from models.encoders.released.timm import module_of, native, read_config
from models.encoders.resize import STEM, fit

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


def load_encoder(
    source: str,
    allow_partial: bool = False,
    log: Callable[[str], None] | None = None,
    whole: bool = False,
    **changes,
) -> Encoder:
    """The encoder of a file, with its weights, in evaluation mode.

    source:        a file or run folder of ours, or anybody's checkpoint: a path, a URL, "hf:owner/name", "timm:name"
                   or a short name of docs/weights.md. The file tells what it is and how large; "mae:PATH", or
                   another of `released.NAMES` before the path, insists on it
    allow_partial: load what fits, instead of refusing a file that does not hold all of the encoder
    log:           receives one line on what was read, resized and ignored
    whole:         build the last blocks, too, that pretraining did without (drop_last); they are fresh, and named
    changes:       arguments that differ from the file's, such as img_size, window_size, in_chans, drop_path_rate;
                   `encoder` is another name to build

    ValueError in one line if the file cannot be read or does not fit.
    """
    found = open_weights(source, changes.get("encoder", ""))
    absent = set()
    if whole and found.args.get("drop_last") and "drop_last" not in changes:
        with told(found.path):
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
    with told(found.path):
        return build_encoder(name, in_chans, **args)


def load_found(
    encoder: Encoder,
    found: Weights,
    allow_partial: bool = False,
    log: Callable[[str], None] | None = None,
    absent: Collection[str] = (),
) -> None:
    """Load what a file says into an encoder, as `load_state` does; `log` receives its line, errors name the file."""
    known = found.ignored, found.args.get("img_size"), absent, found.beside
    with told(found.path):
        line = load_state(encoder, found.state, allow_partial, *known)
    if log is not None:
        which = f", the average in {found.average}" if found.average else ""
        log(f"{found.path} ({found.origin}{which}): {'; '.join([line, *found.remarks])}")


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
    beside are told. Numbers of other floating types are converted. ValueError, with figures and the first keys, if any
    other of the encoder is missing or any of the file is left over, unless allow_partial; the encoder is as before.
    """
    ignored, resized, converted, misfits = Counter(ignored), Counter(), Counter(), []
    own, fitted = encoder.state_dict(), {}
    state, grid = share_table(encoder, state), grid_of(encoder, state, img_size)
    for key, value in state.items():
        if not encoder.normed and key.startswith("vit.norm."):
            ignored["norm"] += 1
        elif key in own and value.is_floating_point() != own[key].is_floating_point():
            misfits.append(f"{key} ({value.dtype} in the file, {own[key].dtype} here)")
        elif key in own:
            fits, how = fit(encoder, key, value.to(own[key].dtype), own[key], grid)
            if fits is None or fits.shape != own[key].shape:
                misfits.append(f"{key} ({shape(value)} in the file, {shape(own[key])} here)")
            else:
                fitted[key] = fits
                resized.update([how] if how else [])
                converted.update([f"{value.dtype}".removeprefix("torch.")] if value.dtype != own[key].dtype else [])
    missing = [key for key in own if key not in fitted and key not in state and key not in absent]
    unread = [key for key in state if key not in own and not (key.startswith("vit.norm.") and not encoder.normed)]
    decoder = ignored.pop("decoder", 0)
    line = (
        f"encoder {len(fitted)}/{len(own)} tensors, {count(fitted)}/{count(own)} parameters"
        + (f"; decoder {decoder}" if decoder else "")
        + listed("resized", [how if n == 1 else f"{how} ({n})" for how, n in resized.items()])
        + listed("to float32", [f"{kind} ({n})" for kind, n in converted.items()])
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
        number = zlib.crc32(value.detach().cpu().flatten().view(torch.uint8).numpy(), number)
    return number


def untouched(encoder: Encoder, loaded: int, whole: nn.Module) -> str:
    """A line that proves that an encoder is as it was loaded, and tells what else of `whole`, its task, is fresh.

    loaded: its `checksum` right after loading. ValueError if it is another now.
    """
    now = checksum(encoder)
    if now != loaded:
        raise ValueError(f"the encoder was loaded as {loaded:08x} and is {now:08x} now: something has set it up again")
    own = {id(value) for value in [*encoder.parameters(), *encoder.buffers()]}
    fresh = Counter(
        name.split(".")[0] for name, value in whole.named_parameters() if value.requires_grad and id(value) not in own
    )
    return f"{now:08x}, untouched since loading" + listed("fresh", [f"{name} {n}" for name, n in fresh.items()])


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


def grid_of(encoder: Encoder, state: State, img_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """The places, down and across, of the encoder that a file is of, as far as its image size is known."""
    if img_size is None:
        return None
    patch = len(state["vit.patch_embed.proj.weight"][0, 0]) if "vit.patch_embed.proj.weight" in state else encoder.patch
    down, across = (img_size, img_size) if isinstance(img_size, int) else img_size
    return down // patch, across // patch


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
