"""Every option of a run, with its unit and meaning; read from one yaml, any of them overridden on the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

When = float | str  # a time in a run: epochs, or steps as in "500 steps"


@dataclass
class Part:
    """Something built by name.

    Args:
        name: what to build; an unknown name is answered with the nearest
        args: its arguments, those of the builder of that name: --help lists them after the name
    """

    name: str
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class Data:
    """Images, how they are cut, and how many make a step.

    A schedule changes a value at epochs, or at steps where it says so, as in [[0, 128], [5000 steps, 160]]; changes
    after the end of a shortened run are told and ignored.

    Args:
        root: folder of images at any nesting or ImageNet-style, text list, tar shards, fashion_mnist; or several, and
            a file that several name counts once, for the first of them; none, where no images are needed
        weights: of each of several roots, in proportion to which images are drawn; by default each image once an epoch
        val: held-out images of the same forms; by default a val part of root, or 1 % of it (at most 5,000)
        size: side of an image in pixels, or [height, width], or a schedule [[from epoch, size], ...]; by default as
            stored with the weights, or else 224
        batch: images of one optimizer step, over all processes, or a schedule such as [[0, 2048], [200, 1024]]
        scale: smallest and largest part of an image's area that a random crop takes; [1, 1] takes the whole image
        flip: probability of a horizontal flip
        interpolation: bicubic or bilinear
        augment: policy of timm such as rand-m9-mstd0.5-inc1, or none
        jitter: strength of colour jitter, where augment is none
        erase: probability of random erasing
        crop: part of the image's side that a test crop takes; by default as stored with the weights, or else 0.875
        labels: number of labelled training images to use, spread evenly over the classes; by default all
        fraction: part of the training images to use, the smaller always within the larger; what is held out, measured
            or a neighbour in k-NN is the same for all
        in_chans: channels of an image; by default as in the data
        mean: per channel, in [0, 1]; by default measured, or as stored with the weights
        std: per channel, in [0, 1]; by default measured, or as stored with the weights
        workers: loader processes on each device; 0 loads in the main process
        max_bad: part of the images that may be unreadable before the run stops
    """

    root: str | list[str] = "none"
    weights: list[float] | None = None
    val: str | None = None
    size: int | tuple[int, int] | list[tuple[When, int | tuple[int, int]]] | None = None
    batch: int | list[tuple[When, int]] = 256
    scale: tuple[float, float] = (0.2, 1.0)
    flip: float = 0.5
    interpolation: str = "bicubic"
    augment: str = "none"
    jitter: float = 0.0
    erase: float = 0.0
    crop: float | None = None
    labels: int | None = None
    fraction: float = 1.0
    in_chans: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    workers: int = 8
    max_bad: float = 0.01


@dataclass
class Optim:
    """The optimizer and its learning rate. Rates are per 256 images: the rate of a step is lr * its batch / 256.

    Times are in epochs, or in steps where they say so, as in "500 steps". In a run of run.steps all have to say so.

    Args:
        name: adamw, lamb, lars or sgd
        lr: learning rate after the warm-up, per 256 images
        min_lr: where the cosine ends, per 256 images
        warmup_lr: where the warm-up starts, per 256 images
        warmup: time of the linear warm-up; one that does not end within the run is told
        milestones: times after each of which lr is multiplied by gamma, instead of the cosine
        gamma: see milestones
        cosine_from: time at which the cosine is at its top; by default the end of the warm-up (SimMIM 0)
        weight_decay: of weight matrices; biases, norms and other vectors have none
        weight_decay_end: where a cosine over the whole run takes weight_decay; by default it stays
        no_decay: parameters whose name contains one of these words have none either
        betas: of adamw and lamb
        eps: of adamw, added to the root of the second moment
        momentum: of lars and sgd
        layer_decay: factor of the learning rate from each layer to the one before it; 1 for none
        freeze_encoder: time at the start in which the encoder stays as it is and the rest learns to read it; by default
            none, but 500 steps where weights to start from bring no decoder
        encoder_lr_scale: factor of the encoder's learning rate after that; by default 1, but 0.1 where weights to start
            from bring no decoder
        clip: largest norm of the gradient; 0 for none
    """

    name: str = "adamw"
    lr: float = 1.5e-4
    min_lr: float = 0.0
    warmup_lr: float = 0.0
    warmup: When = 0.0
    milestones: list[When] = field(default_factory=list)
    gamma: float = 0.1
    cosine_from: When | None = None
    weight_decay: float = 0.05
    weight_decay_end: float | None = None
    no_decay: list[str] = field(default_factory=list)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.9
    layer_decay: float = 1.0
    freeze_encoder: When | None = None
    encoder_lr_scale: float | None = None
    clip: float = 0.0


@dataclass
class Run:
    """How long, on what, and what is written when.

    Args:
        folder: of everything the run writes; a folder that holds this run is continued
        epochs: passes over the training images; a fraction is fine. 100 unless steps are given
        steps: optimizer steps of the run, however many the images, instead of epochs
        per_device: images of one forward pass on one device, by default batch / processes; the rest is accumulated; or
            a schedule such as [[0, 256], [200, 128]]
        device: auto, cuda or cpu
        dtype: bfloat16, float16 or float32; by default bfloat16, and float32 for task embed
        compile: compile the model (minutes at the start, faster steps on GPUs)
        checkpointing: recompute activations in the backward pass, for a fraction of the memory
        seed: of weights, order, crops and masks
        log_every: steps between lines of the log
        save_every: steps between checkpoints
        evaluate_every: time between evaluations, by default an epoch or a twentieth of steps; the end has one anyway
        probe: held-out images, and training images for k-NN, of an evaluation while pretraining
        panel: images of a reconstruction panel
    """

    folder: str
    epochs: float | None = None
    steps: int | None = None
    per_device: int | list[tuple[When, int]] | None = None
    device: str = "auto"
    dtype: str | None = None
    compile: bool = False
    checkpointing: bool = False
    seed: int = 0
    log_every: int = 50
    save_every: int = 1000
    evaluate_every: When | None = None
    probe: int = 5000
    panel: int = 8


@dataclass
class Pretrain:
    """Masked image modeling.

    Args:
        method: a method of the README's table, such as mae, or vqkd to train a tokenizer, and its arguments; those not
            given are as in the weights, if they are of the same method
        encoder: any plain or hierarchical backbone of timm, and its arguments; by default that of the weights
        weights: what to start from, encoder and, if it is there and of the method, decoder: a run's folder, anybody's
            checkpoint, or none to start from scratch. A run that was begun already goes on from its own checkpoint
        allow_partial: go on where the weights do not cover the whole encoder
    """

    method: Part
    data: Data
    optim: Optim
    run: Run
    encoder: Part | None = None
    weights: str = "none"
    allow_partial: bool = False


@dataclass
class Finetune:
    """What a pretrained encoder is for.

    Args:
        weights: a run's folder, a file of whoever wrote it, a URL, hf:owner/name, timm:name, a release such as
            mae_vit_base (docs/weights.md), or none to start from scratch
        task: finetune, linear, knn, embed or export, and its arguments
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
