"""Weights from files into encoders: our own, or whatever others trained; the file itself tells what it is."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from models.encoders.build import build_encoder
from models.encoders.encoder import Encoder
from models.encoders.released.common import State, named
from models.encoders.released.source import Weights, open_weights, told
from models.encoders.resize import fit


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
    absent, left = set(), found.args.get("drop_last", 0)
    without = changes.pop("drop_last", 0 if whole else left)
    if without < left:
        with told(found.path):
            absent = left_out(found.name, found.in_chans, found.args | changes, left, without)
    found.args = {key: value for key, value in found.args.items() if key != "drop_last"}
    found.args |= {"drop_last": without} if without else {}  # not every family has one
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


def left_out(name: str, in_chans: int, args: dict, more: int, less: int) -> set[str]:
    """The keys that an encoder without its last `more` blocks lacks of one without its last `less`."""
    with torch.device("meta"):
        short, long = (build_encoder(name, in_chans, **args | {"drop_last": n}) for n in (more, less))
    return long.state_dict().keys() - short.state_dict().keys()


def load_normalization(source: str) -> dict:
    """The {"mean", "std", ...} by which images were normalised when the encoder of `source` was trained."""
    found = open_weights(source)
    if found.normalization is None:
        raise ValueError(f"{found.path} does not say how its images were normalised")
    return found.normalization


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
        elif key in own and own[key].is_floating_point() and not value.is_floating_point():
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
