"""Every option of a run, with its unit and meaning; read from one yaml, any of them overridden on the command line."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace

from util.errors import UserError


@dataclass
class Part:
    """Something built by name.

    Args:
        name: what to build; an unknown name is answered with the nearest
        args: its arguments, those of the builder of that name
    """

    name: str
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class Data:
    """Images, how they are cut, and how many make a step.

    Args:
        root: folder of images at any nesting or ImageNet-style, text list, tar shards, fashion_mnist; or several
        val: held-out images of the same forms; by default a val part of root, or 1 % of it (at most 5,000)
        size: side of an image in pixels, or [height, width], or a schedule [[from epoch, size], ...]
        batch: images of one optimizer step, over all processes
        scale: smallest and largest part of an image's area that a random crop takes; [1, 1] takes the whole image
        flip: probability of a horizontal flip
        interpolation: bicubic or bilinear
        augment: policy of timm such as rand-m9-mstd0.5-inc1, or none
        jitter: strength of colour jitter, where augment is none
        erase: probability of random erasing
        crop: part of the image's side that a test crop takes
        labels: number of labelled training images to use, spread evenly over the classes; by default all
        fraction: part of the training images to use, the smaller always within the larger
        in_chans: channels of an image; by default as in the data
        mean: per channel, in [0, 1]; by default measured, or as stored with the weights
        std: per channel, in [0, 1]; by default measured, or as stored with the weights
        workers: loader processes on each device; 0 loads in the main process
        max_bad: part of the images that may be unreadable before the run stops
    """

    root: str | list[str]
    val: str | None = None
    size: int | tuple[int, int] | list[tuple[float, int | tuple[int, int]]] = 224
    batch: int = 256
    scale: tuple[float, float] = (0.2, 1.0)
    flip: float = 0.5
    interpolation: str = "bicubic"
    augment: str = "none"
    jitter: float = 0.0
    erase: float = 0.0
    crop: float = 0.875
    labels: int | None = None
    fraction: float = 1.0
    in_chans: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    workers: int = 8
    max_bad: float = 0.01


@dataclass
class Optim:
    """The optimizer and its learning rate. Rates are per 256 images: the rate itself is lr * batch / 256.

    Args:
        name: adamw, lars or sgd
        lr: learning rate after the warm-up, per 256 images
        min_lr: where the cosine ends, per 256 images
        warmup_lr: where the warm-up starts, per 256 images
        warmup: epochs of linear warm-up
        milestones: epochs after each of which lr is multiplied by gamma, instead of the cosine
        gamma: see milestones
        cosine_from: epoch at which the cosine is at its top; by default the end of the warm-up (SimMIM 0)
        weight_decay: of weight matrices; biases, norms and other vectors have none
        no_decay: parameters whose name contains one of these words have none either
        betas: of adamw
        momentum: of lars and sgd
        layer_decay: factor of the learning rate from each layer to the one before it; 1 for none
        clip: largest norm of the gradient; 0 for none
    """

    name: str = "adamw"
    lr: float = 1.5e-4
    min_lr: float = 0.0
    warmup_lr: float = 0.0
    warmup: float = 0.0
    milestones: list[float] = field(default_factory=list)
    gamma: float = 0.1
    cosine_from: float | None = None
    weight_decay: float = 0.05
    no_decay: list[str] = field(default_factory=list)
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = 0.9
    layer_decay: float = 1.0
    clip: float = 0.0


@dataclass
class Run:
    """How long, on what, and what is written when.

    Args:
        folder: of everything the run writes; a folder that holds this run is continued
        epochs: passes over the training images; a fraction is fine
        per_device: images of one forward pass on one device, by default batch / processes; the rest is accumulated
        device: auto, cuda or cpu
        dtype: bfloat16, float16 or float32
        compile: compile the model (minutes at the start, faster steps on GPUs)
        checkpointing: recompute activations in the backward pass, for a fraction of the memory
        seed: of weights, order, crops and masks
        log_every: steps between lines of the log
        save_every: steps between checkpoints
        evaluate_every: epochs between evaluations; there is one at the end in any case
        probe: held-out images, and training images for k-NN, of an evaluation while pretraining
        panel: images of a reconstruction panel
    """

    folder: str
    epochs: float = 100
    per_device: int | None = None
    device: str = "auto"
    dtype: str = "bfloat16"
    compile: bool = False
    checkpointing: bool = False
    seed: int = 0
    log_every: int = 50
    save_every: int = 1000
    evaluate_every: float = 1
    probe: int = 5000
    panel: int = 8


@dataclass
class Pretrain:
    """Masked image modeling.

    Args:
        encoder: any plain or hierarchical backbone of timm, and its arguments
        method: mae, simmim or fastmim, and its arguments
    """

    encoder: Part
    method: Part
    data: Data
    optim: Optim
    run: Run


@dataclass
class Finetune:
    """What a pretrained encoder is for.

    Args:
        weights: encoder.safetensors of a run, a released checkpoint as SOURCE:FILE, or none to start from scratch
        task: finetune, linear or knn, and its arguments
        encoder: what to build where weights is none
        changes: arguments of the encoder that differ in this run, such as drop_path_rate, or final_norm of a ViT
        allow_partial: go on where the weights do not cover the whole encoder
    """

    weights: str
    task: Part
    data: Data
    optim: Optim
    run: Run
    encoder: Part | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    allow_partial: bool = False


# what may differ when a run is continued: it changes where and how fast a run goes, not what it computes
FREE = (
    "run.folder",
    "run.device",
    "run.log_every",
    "run.save_every",
    "run.evaluate_every",
    "run.panel",
    "run.probe",
    "data.workers",
)


class Parser(ArgumentParser):
    """jsonargparse's parser, whose errors are one line, with the nearest valid key, and exit code 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(explain(message, self.options()))

    def options(self) -> list[str]:
        names = {option.lstrip("-") for action in self._actions for option in action.option_strings}
        return sorted(name for name in names if name not in ("h", "help", "config", "print_config"))


def explain(message: str, keys: list[str]) -> str:
    """The parser's complaint in one line, naming the nearest key to one that does not exist."""
    message = " ".join(message.split())
    unknown = re.search(r"unrecognized arguments: --?([\w.]+)|Option '([\w.]+)' is not accepted", message)
    inside = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    if unknown or inside:
        key = ".".join(inside.groups()) if inside else unknown[1] or unknown[2]
        near = nearest(key, keys)
        return f"there is no option {key}" + (f"; the nearest is {near}" if near else "")
    typed = re.search(r'Parser key "([\w.]+)":.*(?:Got value|Given value): (.*)', message)
    if typed:
        wanted = re.findall(r"Expected an? (?:<class '([\w.]+)'>|([^.]*))", message)
        kinds = " or ".join(dict.fromkeys(a or b for a, b in wanted)) or "of another kind"
        return f"{typed[1]} is {typed[2]}, but has to be {kinds}"
    return message


def nearest(key: str, keys: list[str]) -> str | None:
    """The option most like a misspelt one, by its whole name or else by its last word."""
    leaves = [k for k in keys if not any(other.startswith(k + ".") for other in keys)]
    by_end = {k.rpartition(".")[2]: k for k in leaves}
    whole = difflib.get_close_matches(key, leaves, n=1, cutoff=0.6)
    ends = difflib.get_close_matches(key.rpartition(".")[2], by_end, n=1, cutoff=0.0)
    return whole[0] if whole else by_end[ends[0]] if ends else None


def read(schema: type, argv: list[str] | None = None) -> tuple[Any, dict]:
    """The options in a yaml and on the command line: as dataclasses, and as the plain dict that describes the run.

    UserError, in one line, for an unknown or ill-typed key or an unreadable file.
    """
    parser = Parser(description=schema.__doc__.splitlines()[0], prog=Path(sys.argv[0]).name)
    parser.add_argument("--config", action="config", help="a yaml with any of the options below")
    parser.add_class_arguments(schema)
    found = parser.parse_args(argv)
    plain = yaml.safe_load(parser.dump(found, skip_none=False))
    return schema(**{k: v for k, v in vars(parser.instantiate(found)).items() if k != "config"}), plain


def build(what: str, part: Part, table: dict[str, Callable], *given, **options) -> Any:
    """Call the builder of a part's name with `given` and the part's arguments, checked against its signature.

    UserError for an unknown name or argument, naming the nearest.
    """
    if part.name not in table:
        near = difflib.get_close_matches(part.name, table, n=1, cutoff=0.0)
        raise UserError(f'no {what} is called "{part.name}"; the nearest is "{near[0]}" of {", ".join(table)}')
    builder = table[part.name]
    parser = Parser()
    taken = {"self", *list(builder.__annotations__ or {})[: len(given)], *options}
    add = parser.add_class_arguments if isinstance(builder, type) else parser.add_function_arguments
    add(builder, skip=taken)
    try:
        found = parser.parse_object(Namespace(**part.args))
    except UserError as error:
        raise UserError(f"{what}.args of {part.name}: {error}") from None
    try:
        return builder(*given, **options, **vars(found))
    except ValueError as error:
        raise UserError(f"{what} {part.name}: {error}") from error


def claim_folder(folder: Path, plain: dict) -> None:
    """Write the run's config into its folder, or check that the run that the folder holds is this one.

    UserError naming the keys that differ.
    """
    path, text = folder / "config.yaml", yaml.safe_dump(plain, sort_keys=False)
    if path.exists():
        theirs = flat(yaml.safe_load(path.read_text()))
        ours = flat(yaml.safe_load(text))
        differing = [k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k) and k not in FREE]
        if differing:
            pairs = ", ".join(f"{k} ({theirs.get(k)} there, {ours.get(k)} here)" for k in differing[:5])
            more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
            raise UserError(f"{folder} holds another run: {pairs}{more} differ; choose another run.folder or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    leaves = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves
