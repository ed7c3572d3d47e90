"""Pretrain an encoder by masked image modeling, from scratch or from weights.

python main_pretrain.py --config configs/pretrain/mae_vit_base.yaml --data.root /path/to/images
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from util.config import Part, Pretrain
from util.errors import UserError, command, told
from util.options import build, named, read

if TYPE_CHECKING:  # heavy imports come once the config is known to be right
    from torch import nn

    from models.encoders.released.source import Weights
    from util.data.images import Dataset
    from util.log import Log
    from util.start import Batches

ENCODER = "encoder.safetensors"


def main(argv: list[str] | None = None) -> None:
    pretrain(*read(Pretrain, argv, builders))


def builders(part: str, name: str) -> list[Callable]:
    """What takes the arguments of an encoder or a method of some name."""
    from models.encoders.build import families
    from models.mim.recipes import METHODS

    with told(part):
        return families(name) if part == "encoder" else [named(part, name, METHODS)]


def pretrain(config: Pretrain, plain: dict) -> dict[str, float]:
    """One run of a config, from its beginning or from where its folder left it; gives the final figures."""
    from models.encoders.weights import checksum, untouched
    from util import checkpoint, start
    from util.data.transforms import Augment
    from util.train import judge, seed, train

    data, optim, run, folder = config.data, config.optim, config.run, Path(config.run.folder)
    start.settle(config, plain)
    check(config)
    device, log = start.begin(config, plain)
    weights, begun = read_weights(config), checkpoint.there(folder)
    found = find_data(config, log)
    batches = start.Batches(data, run, found, weights and weights.normalization, device, log)

    seed(run.seed)
    channels, method = found.train.channels, method_of(config, weights)
    task = build_task(config, method, weights, channels).to(device)
    task.set_normalization(batches.mean, batches.std)
    if weights is not None and begun:
        log(f"weights   {config.weights} is where this run began; it goes on from its own checkpoint")
    whole = None if weights is None else begun or load(task, config, method, weights, log)
    loaded = None if weights is None or begun else checksum(task.encoder)
    task.encoder.set_grad_checkpointing(run.checkpointing)
    start.try_sizes(task, data, channels, device)
    start.describe(task.encoder.plan["name"], task.encoder, channels, first_size(config), log)

    crop = {"scale": data.scale, "flip": data.flip, "interpolation": data.interpolation}
    depth = {"channels": channels, "bits": found.survey.bits}
    loader = batches.train(Augment(batches.mean, batches.std, None, data.jitter, 0, **crop, **depth))
    lr_at, decay_at = start.schedule(optim, loader, run, log), start.decay(optim, loader.plan.steps)
    optimizer = start.optimizer(task, optim, start.encoder_pace(optim, loader.plan, whole, log))
    evaluate = watch(task, method, config, found, batches, loader.plan.epoch, log)
    if loaded is not None:
        with told("weights"):
            log(f"weights   {untouched(task.encoder, loaded, task.encoder)}")
        judge(task, evaluate, 0, run, log)  # what the run starts from, before it moves

    figures = train(task, loader, optimizer, lr_at, optim.clip, run, log, evaluate, decay_at)
    start.report(folder, figures)
    left = {"encoder": ENCODER, "tokenizer": "tokenizer.safetensors", "panels": "reconstructions"}
    there = [f"{what} in {folder / name}" for what, name in left.items() if (folder / name).exists()]
    curves = f"curves: tensorboard --logdir {folder / 'tensorboard'}"
    log(f"{', '.join(there)}, figures in {folder / 'report.json'}; {curves}")
    log.close()
    return figures


def check(config: Pretrain) -> None:
    """UserError for what cannot be meant, before a folder is claimed and all images are looked at."""
    import torch

    from models.targets.tokenizers import find
    from util import checkpoint, checks, dist

    data, run, folder = config.data, config.run, Path(config.run.folder)
    checks.check(data, config.optim, run)
    if data.augment != "none" or data.erase:
        raise UserError("pretraining crops, flips and jitters, no more: leave out data.augment and data.erase")
    if config.weights == "none" and config.encoder is None:
        raise UserError("weights is none, so encoder.name has to say what to build")
    checks.check_start(folder, config.weights)
    if checkpoint.there(folder):
        return  # all this was right when the run began, and whether it is this one is seen when its folder is claimed
    if config.weights != "none":
        dist.init(run.device)
    weights = read_weights(config)
    method = method_of(config, weights)
    with torch.device("meta"):
        task = build_task(config, method, weights, data.in_chans or 3)
    if weights is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of each tensor, that nothing is copied to the meta device
            load(task, config, method, weights, lambda line: None)
    if getattr(task, "pairs", False):
        dist.init(run.device)
        checks.check_pairs(method.name, data, run)
    if "tokenizer" in method.args:
        with told("tokenizer"):
            find(method.args["tokenizer"])  # on the meta device nothing was read


def first_size(config: Pretrain) -> tuple[int, int]:
    from util.data.loader import read_schedule

    return read_schedule(config.data.size)[0][1]


def find_data(config: Pretrain, log: Log) -> Dataset:
    from util import start

    try:
        return start.find_data(config.data, config.run.seed, True, None, log)
    except UserError:  # without labels there is no k-NN to watch; all else is the same
        return start.find_data(config.data, config.run.seed, False, None, log)


def read_weights(config: Pretrain) -> Weights | None:
    """What the run starts from; once it is begun, its own folder tells the same, wherever the source may be by then."""
    from models.encoders.released.source import open_weights
    from util import checkpoint, dist

    if config.weights == "none":
        return None
    own = Path(config.run.folder) / ENCODER
    with told("weights"), dist.main_first():
        return open_weights(str(own) if checkpoint.there(own.parent) and own.exists() else config.weights)


def method_of(config: Pretrain, weights: Weights | None) -> Part:
    """The config's method; what of its arguments is not given is as in the weights, if they are of the same method."""
    from models.mim.weights import describe_method

    name, args = describe_method(weights) if weights is not None else ("", {})
    return Part(name, args | config.method.args) if name == config.method.name else config.method


def build_task(config: Pretrain, method: Part, weights: Weights | None, channels: int) -> nn.Module:
    """The method around the config's encoder or, without one, that of the weights, which are not loaded yet."""
    from models.encoders.build import build_encoder
    from models.encoders.weights import build_found
    from models.mim.recipes import METHODS

    size = first_size(config)
    with told("encoder"):
        if config.encoder is None:
            encoder = build_found(weights, in_chans=channels, img_size=size)
        else:
            encoder = build_encoder(config.encoder.name, channels, **{"img_size": size} | config.encoder.args)
    return build("method", method, METHODS, encoder)


def load(task: nn.Module, config: Pretrain, method: Part, weights: Weights, log: Callable[[str], None]) -> bool:
    """Load what a run starts from: all of the encoder, and what fits of a decoder; whether the decoder is whole."""
    from models.encoders.weights import load_found
    from models.mim.weights import describe_method, load_weights

    same = describe_method(weights)[0] == method.name
    as_there = [f"{key} {value}" for key, value in method.args.items() if key not in config.method.args]
    if as_there:
        log(f"method    {method.name}, as in the weights: {', '.join(as_there)}")
    with told("weights"):
        load_found(task.encoder, weights, config.allow_partial, None if same else log)
        return same and load_weights(task, weights, True, log)  # whose first line is the encoder's


def watch(
    task: nn.Module,
    method: Part,
    config: Pretrain,
    found: Dataset,
    batches: Batches,
    epoch_at: Callable[[float], float],
    log: Log,
) -> Callable[[int], dict[str, float]]:
    """What judges the task at a step: figures on held-out images, a panel of reconstructions, the encoder's file."""
    from models.monitor.health import FEW, health, verdict
    from models.monitor.picture import reconstruct
    from models.transfer.frozen import features, knn
    from util import checkpoint, dist
    from util.visualize import panel, save_panel

    run, folder = config.run, Path(config.run.folder)
    held_out = batches.once(found.val, run.probe)
    bank = batches.once(found.pool, run.probe)  # the same for every data.fraction
    normalization = {"mean": batches.mean, "std": batches.std, "size": first_size(config), "crop": config.data.crop}
    last: dict[str, float] = {}

    def evaluate(step: int) -> dict[str, float]:
        figures, epoch = health(task, held_out, run.seed), epoch_at(step)
        if found.classes is not None and len(found.classes) > 1 and figures["images"] >= FEW:
            figures["knn"] = knn(*features(task.encoder, bank), *features(task.encoder, held_out))
        log("          " + verdict(figures, last.get("figures"), epoch - last.get("epoch", 0)))
        last.update(figures=figures, epoch=epoch)
        if run.panel and dist.rank() == 0:  # of many processes, others may hold no image out
            images = next(iter(held_out))["image"][: run.panel]
            pictures = reconstruct(task, images, batches.mean, batches.std, run.seed)
            if pictures is not None:
                sheet = panel(pictures.columns, pictures.caption)
                log.picture(step, "reconstruction", sheet)
                save_panel(folder / "reconstructions" / f"step_{step:07}.png", sheet)
        checkpoint.export(folder / ENCODER, task.encoder, normalization, vars(method))
        if hasattr(task, "tokenizer"):
            checkpoint.export(folder / "tokenizer.safetensors", task.tokenizer, normalization)
        return figures

    return evaluate


if __name__ == "__main__":
    command(main)
