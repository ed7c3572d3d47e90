"""What a pretrained encoder is for: fine-tune it, probe it, ask its nearest neighbours, or take it elsewhere.

python main_finetune.py --config configs/finetune/mae_vit_base.yaml --weights output/mae/encoder.safetensors
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from util.config import Finetune
from util.errors import UserError, command, told
from util.options import build, named, read

if TYPE_CHECKING:  # heavy imports come once the config is known to be right
    import torch

    from models.encoders.encoder import Encoder
    from models.encoders.released.source import Weights
    from models.export.formats import Facts
    from util.data.images import Dataset
    from util.log import Log
    from util.start import Batches


def main(argv: list[str] | None = None) -> None:
    finetune(*read(Finetune, argv, builders))


def builders(part: str, name: str) -> list[Callable]:
    """What takes the arguments of an encoder or a task of some name."""
    from models.encoders.build import families

    with told(part):
        return families(name) if part == "encoder" else [named(part, name, tasks())]


def tasks() -> dict[str, Callable]:
    """What takes the arguments of each task: of those that train, and of those that only look."""
    from models.export.formats import Export
    from models.transfer.embed import Embed
    from models.transfer.frozen import nearest_neighbours
    from models.transfer.recipes import TASKS

    return {**TASKS, "knn": nearest_neighbours, "embed": Embed, "export": Export}


@dataclass
class Begun:
    """A run that has claimed its folder: its options, the weights it is of (None: none), where it runs and logs."""

    config: Finetune
    weights: Weights | None
    device: torch.device
    log: Log

    @property
    def folder(self) -> Path:
        return Path(self.config.run.folder)

    @property
    def stored(self) -> dict | None:
        """{"mean", "std", ...} of the images that the weights learned from, if anybody says."""
        return self.weights and self.weights.normalization


def finetune(config: Finetune, plain: dict) -> dict:
    """One task of a config, from its beginning or from where its folder left it; gives the final figures."""
    from util import checks, dist, start

    named("task", config.task.name, tasks())
    work = WORK.get(config.task.name, learn)
    whole = work in (embed, export)  # they are of weights alone, and no labels are looked for
    look = build("task", config.task, tasks()) if whole else None  # a wrong argument is told before all else
    checks.check(config.data, config.optim, config.run, work is not export)
    dist.init(config.run.device)
    weights = open_source(config, whole)
    start.settle(config, plain, stored_with(weights), "float32" if whole else "bfloat16")
    device, log = start.begin(config, plain)
    run = Begun(config, weights, device, log)
    figures = work(run, look) if whole else work(run)
    start.report(run.folder, figures)
    said = ", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())
    log(f"{config.task.name} of {config.weights}: {said}, in {run.folder / 'report.json'}")
    log.close()
    return figures


def open_source(config: Finetune, needed: bool) -> Weights | None:
    """What the weights' file says of its encoder; None for none. UserError if it cannot be read, or if it is needed."""
    from models.encoders.released.source import open_weights

    if config.weights != "none":
        with told("weights"):
            return open_weights(config.weights)
    if needed:
        raise UserError(f"weights is none, but {config.task.name} needs some: give a run's folder or a checkpoint")
    if config.encoder is None:
        raise UserError("weights is none, so encoder.name has to say what to build")
    return None


def stored_with(weights: Weights | None) -> dict:
    """The size, crop and normalisation of images that weights tell of."""
    built_for = weights and weights.args.get("img_size")
    return ({"size": built_for} if built_for else {}) | (weights and weights.normalization or {})


def load(run: Begun) -> Encoder:
    """The encoder of the weights, for images of the size that the run ends with."""
    from models.encoders.weights import load_encoder
    from util.times import last_size

    config = run.config
    changes = {"img_size": last_size(config.data, config.run)} | config.changes
    if config.data.in_chans is not None:
        changes["in_chans"] = config.data.in_chans
    with told("weights"):
        learns = config.task.name == "finetune"  # then blocks that pretraining left out come back, fresh
        return load_encoder(config.weights, config.allow_partial, run.log, learns, **changes)


def labelled(run: Begun) -> tuple[Encoder, Dataset, Batches]:
    """An encoder, loaded or from scratch, and labelled images for it."""
    from models.encoders.build import build_encoder
    from util import start
    from util.times import last_size
    from util.train import seed

    config, data, log = run.config, run.config.data, run.log
    size = last_size(data, config.run)
    seed(config.run.seed)
    if run.weights is None:
        found = start.find_data(data, config.run.seed, True, None, log)
        with told("encoder"):
            args = {"img_size": size} | config.encoder.args | config.changes
            encoder = build_encoder(config.encoder.name, found.train.channels, **args)
    else:
        encoder = load(run)
        found = start.find_data(data, config.run.seed, True, encoder.in_chans, log)
    if len(found.classes) < 2:
        raise UserError(f"there is one class alone in {data.root}, {found.classes[0]}: nothing to tell apart")
    batches = start.Batches(data, config.run, found, run.stored, run.device, log)
    encoder.to(run.device).set_grad_checkpointing(config.run.checkpointing)
    start.describe(encoder.plan["name"], encoder, encoder.in_chans, size, log)
    return encoder, found, batches


def learn(run: Begun) -> dict[str, float]:
    """Train what a task of TASKS makes of an encoder."""
    from models.encoders.weights import checksum, untouched
    from models.transfer.recipes import TASKS
    from util import checkpoint, checks, start
    from util.data.transforms import Augment
    from util.times import last_size
    from util.train import train

    data, optim, options, log = run.config.data, run.config.optim, run.config.run, run.log
    encoder, found, batches = labelled(run)
    loaded = None if run.weights is None else checksum(encoder)
    task = build("task", run.config.task, TASKS, encoder, len(found.classes)).to(run.device)
    if loaded is not None:
        with told("weights"):
            log(f"weights   {untouched(encoder, loaded, task)}")
    if task.mixer is not None:
        checks.check_pairs("mixup or cutmix", data, options)
    start.try_sizes(task, data, encoder.in_chans, run.device)
    auto = None if data.augment == "none" else data.augment
    crop = {"scale": data.scale, "flip": data.flip, "interpolation": data.interpolation}
    depth = {"channels": found.train.channels, "bits": found.survey.bits}
    loader = batches.train(Augment(batches.mean, batches.std, auto, data.jitter, data.erase, **crop, **depth))
    lr_at, decay_at = start.schedule(optim, loader, options, log), start.decay(optim, loader.plan.steps)
    optimizer = start.optimizer(task, optim, start.encoder_pace(optim, loader.plan))
    tests = batches.once(found.val)
    normalization = {"mean": batches.mean, "std": batches.std, "size": last_size(data, options), "crop": data.crop}

    def evaluate(step: int) -> dict[str, float]:
        figures = task.evaluate(tests)
        log("          " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))
        checkpoint.export(run.folder / "encoder.safetensors", task.judged.encoder, normalization)
        return figures

    return train(task, loader, optimizer, lr_at, optim.clip, options, log, evaluate, decay_at)


def knn(run: Begun) -> dict[str, float]:
    """Ask the nearest neighbours of an encoder's frozen features."""
    from util.train import precision

    encoder, found, batches = labelled(run)
    bank, tests = batches.once(found.train), batches.once(found.val)
    with precision(run.device, run.config.run.dtype):
        figures = build("task", run.config.task, tasks(), encoder, bank, tests)
    run.log.figures(0, figures)
    return figures


def embed(run: Begun, look) -> dict[str, float]:
    """Write the features of all images of data.root, in the order of their paths, from wherever the folder left off."""
    from models.encoders.weights import checksum
    from util import dist, start
    from util.features import Table
    from util.progress import Count
    from util.train import precision

    config = run.config
    encoder = load(run)
    found = start.find_all(config.data, config.run.seed, encoder.in_chans, run.log)
    batches = start.Batches(config.data, config.run, found, run.stored, run.device, run.log)
    last, paths = batches.plan(1).stages[-1], [found.train.path(i) for i in range(len(found.train))]
    with told("task embed"):
        shape = look.shape(encoder, last.size)
    table = Table(run.folder, look.to, paths, shape, last.per_device, checksum(encoder))
    todo, mine = table.todo(), len(paths[dist.rank() :: dist.world()])
    left = sum(map(len, todo))
    count = Count(max(mine, left), max(mine - left, 0), run.log)
    with precision(run.device, config.run.dtype):
        for places, rows in look.rows(encoder.to(run.device), batches.once(found.train, parts=todo)):
            table.put(places, rows)
            count(len(places))
    run.log(f"features  {len(paths):,} x {' x '.join(map(str, shape))} in {table.finish()}")
    return {"images": len(paths), "unreadable": len(batches.where["bad"].names), "images_per_s": count.rate}


def export(run: Begun, look) -> dict[str, str]:
    """Write an encoder for other libraries, a folder each; the figures are how far each library is from it."""
    from util import start
    from util.times import last_size

    config, data = run.config, run.config.data
    encoder, images = load(run), None
    facts = facts_of(run, last_size(data, config.run))
    if data.root != "none":
        found = start.find_all(data, config.run.seed, encoder.in_chans, run.log)
        stored = {"mean": facts.mean, "std": facts.std}
        batches = start.Batches(data, config.run, found, stored, run.device, run.log)
        images = look.some(batches.once(found.train, look.images)).cpu()
    with told("task export"):
        return look(encoder, facts, run.folder, images, run.log)


def facts_of(run: Begun, size: tuple[int, int]) -> Facts:
    """What is known of the weights: from their file, and from the folder of the run that made them."""
    from models.export.formats import Facts

    weights, data = run.weights, run.config.data
    given = {"mean": data.mean, "std": data.std} if data.mean else run.stored
    if given is None:
        raise UserError(f"{weights.path} does not say how its images were normalised: give data.mean and data.std")
    beside, options, report = weights.path.parent, None, None
    if weights.origin == "ours" and (beside / "config.yaml").exists():
        options = yaml.safe_load((beside / "config.yaml").read_text())
        report = json.loads((beside / "report.json").read_text()) if (beside / "report.json").exists() else None
    method = weights.method or (options or {}).get("method")
    told_by = {"method": method, "report": report, "config": options, "licence": weights.licence}
    return Facts(given["mean"], given["std"], size, **told_by, origin=weights.origin, source=run.config.weights,
                 crop=data.crop)  # fmt: skip


WORK = {"knn": knn, "embed": embed, "export": export}  # those that only look; the others learn

if __name__ == "__main__":
    command(main)
