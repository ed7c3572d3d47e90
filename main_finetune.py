"""See what a pretrained encoder is for: fine-tune it, probe it linearly, or ask its nearest neighbours.

python main_finetune.py --config configs/finetune/mae_vit_base.yaml --weights output/mae/encoder.safetensors
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from util.config import Finetune
from util.errors import UserError, command, told
from util.options import build, named, read


def main(argv: list[str] | None = None) -> None:
    finetune(*read(Finetune, argv, builders))


def builders(part: str, name: str) -> list[Callable]:
    """What takes the arguments of an encoder or a task of some name."""
    from models.encoders.build import families
    from models.transfer.frozen import nearest_neighbours
    from models.transfer.recipes import TASKS

    with told(part):
        return families(name) if part == "encoder" else [named(part, name, {**TASKS, "knn": nearest_neighbours})]


def finetune(config: Finetune, plain: dict) -> dict[str, float]:
    """One transfer of a config, from its beginning or from where its folder left it; gives the final figures."""
    from models.encoders.build import build_encoder  # heavy imports come once the config is known to be right
    from models.encoders.weights import checksum, load_encoder, load_normalization, untouched
    from models.transfer.frozen import nearest_neighbours
    from models.transfer.recipes import TASKS
    from util import checkpoint, start
    from util.data.transforms import Augment
    from util.times import last_size
    from util.train import precision, seed, train

    data, optim, run, folder = config.data, config.optim, config.run, Path(config.run.folder)
    start.check(data, optim, run)
    device, log = start.begin(config, plain)
    size = last_size(data, run)
    changes = {"img_size": size} | config.changes
    seed(run.seed)
    if config.weights == "none":
        if config.encoder is None:
            raise UserError("weights is none, so encoder.name has to say what to build")
        found, stored = start.find_data(data, run.seed, True, None, log), None
        with told("encoder"):
            encoder = build_encoder(config.encoder.name, found.train.channels, **config.encoder.args | changes)
    else:
        if data.in_chans is not None:
            changes["in_chans"] = data.in_chans
        with told("weights"):
            learns = config.task.name == "finetune"  # then blocks that pretraining left out come back, fresh
            encoder = load_encoder(config.weights, config.allow_partial, log, learns, **changes)
            stored = load_normalization(config.weights)
        found = start.find_data(data, run.seed, True, encoder.in_chans, log)
    if len(found.classes) < 2:
        raise UserError(f"there is one class alone in {data.root}, {found.classes[0]}: nothing to tell apart")
    batches = start.Batches(data, run, found, stored, device, log)
    loaded = checksum(encoder)
    encoder.to(device).set_grad_checkpointing(run.checkpointing)
    start.describe(encoder.plan["name"], encoder, encoder.in_chans, size, log)
    tests = batches.once(found.val)

    if config.task.name == "knn":
        table, bank = {**TASKS, "knn": nearest_neighbours}, batches.once(found.train)
        with precision(device, run.dtype):
            figures = build("task", config.task, table, encoder, bank, tests)
        log.figures(0, figures)
    else:
        task = build("task", config.task, {**TASKS, "knn": None}, encoder, len(found.classes)).to(device)
        if config.weights != "none":
            with told("weights"):
                log(f"weights   {untouched(encoder, loaded, task)}")
        if task.mixer is not None:
            start.check_pairs("mixup or cutmix", data, run)
        start.try_sizes(task, data, encoder.in_chans, device)
        auto = None if data.augment == "none" else data.augment
        crop = {"scale": data.scale, "flip": data.flip, "interpolation": data.interpolation}
        depth = {"channels": found.train.channels, "bits": found.survey.bits}
        augment = Augment(batches.mean, batches.std, auto, data.jitter, data.erase, **crop, **depth)
        loader = batches.train(augment)
        lr_at, decay_at = start.schedule(optim, loader, run, log), start.decay(optim, loader.plan.steps)
        optimizer = start.optimizer(task, optim, start.encoder_pace(optim, loader.plan))

        def evaluate(step: int) -> dict[str, float]:
            figures = task.evaluate(tests)
            log("          " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))
            normalization = {"mean": batches.mean, "std": batches.std, "size": size}
            checkpoint.export(folder / "encoder.safetensors", task.judged.encoder, normalization)
            return figures

        figures = train(task, loader, optimizer, lr_at, optim.clip, run, log, evaluate, decay_at)
    start.report(folder, figures)
    log(f"{config.task.name} of {config.weights}: top-1 {figures['top1']:.4f}, in {folder / 'report.json'}")
    log.close()
    return figures


if __name__ == "__main__":
    command(main)
