"""Pretrain an encoder by masked image modeling.

python main_pretrain.py --config configs/pretrain/mae_vit_base.yaml --data.root /path/to/images
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from util.config import Pretrain
from util.errors import UserError, command, told
from util.options import build, named, read


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
    import torch  # heavy imports come once the config is known to be right
    from torch import nn

    from models.encoders.build import build_encoder
    from models.mim.recipes import METHODS
    from models.monitor.health import FEW, health, verdict
    from models.monitor.picture import reconstruct
    from models.targets.tokenizers import find
    from models.transfer.frozen import features, knn
    from util import checkpoint, dist, start
    from util.data.loader import read_schedule
    from util.data.transforms import Augment
    from util.train import seed, train
    from util.visualize import panel, save_panel

    data, optim, run, folder = config.data, config.optim, config.run, Path(config.run.folder)
    start.check(data, optim, run)
    start.settle(config, plain)
    if data.augment != "none" or data.erase:
        raise UserError("pretraining crops, flips and jitters, no more: leave out data.augment and data.erase")
    size = read_schedule(data.size)[0][1]

    def method(channels: int) -> nn.Module:
        with told("encoder"):
            encoder = build_encoder(config.encoder.name, channels, **{"img_size": size} | config.encoder.args)
        return build("method", config.method, METHODS, encoder)

    with torch.device("meta"):
        mim = method(data.in_chans or 3)  # so that a wrong name or argument is told before all images are looked at
    if getattr(mim, "pairs", False):
        dist.init(run.device)
        start.check_pairs(config.method.name, data, run)
    if "tokenizer" in config.method.args:
        with told("tokenizer"):
            find(config.method.args["tokenizer"])  # on the meta device nothing was read
    device, log = start.begin(config, plain)
    try:
        found = start.find_data(data, run.seed, True, None, log)
    except UserError:  # without labels there is no k-NN to watch; all else is the same
        found = start.find_data(data, run.seed, False, None, log)
    batches = start.Batches(data, run, found, None, device, log)

    seed(run.seed)
    channels = found.train.channels
    task = method(channels).to(device)
    task.set_normalization(batches.mean, batches.std)
    encoder = task.encoder
    encoder.set_grad_checkpointing(run.checkpointing)
    start.try_sizes(task, data, channels, device)
    start.describe(config.encoder.name, encoder, channels, size, log)

    crop = {"scale": data.scale, "flip": data.flip, "interpolation": data.interpolation}
    depth = {"channels": channels, "bits": found.survey.bits}
    loader = batches.train(Augment(batches.mean, batches.std, None, data.jitter, 0, **crop, **depth))
    lr_at, decay_at = start.schedule(optim, loader, run, log), start.decay(optim, loader.plan.steps)
    optimizer = start.optimizer(task, optim)
    held_out = batches.once(found.val, run.probe)
    bank = batches.once(found.pool, run.probe)  # the same for every data.fraction
    last: dict[str, float] = {}

    def evaluate(step: int) -> dict[str, float]:
        figures = health(task, held_out, run.seed)
        if found.classes is not None and len(found.classes) > 1 and figures["images"] >= FEW:
            figures["knn"] = knn(*features(encoder, bank), *features(encoder, held_out))
        epoch = loader.plan.epoch(step)
        log("          " + verdict(figures, last.get("figures"), epoch - last.get("epoch", 0)))
        last.update(figures=figures, epoch=epoch)
        if run.panel and dist.rank() == 0:  # of many processes, others may hold no image out
            images = next(iter(held_out))["image"][: run.panel]
            pictures = reconstruct(task, images, batches.mean, batches.std, run.seed)
            if pictures is not None:
                sheet = panel(pictures.columns, pictures.caption)
                log.picture(step, "reconstruction", sheet)
                save_panel(folder / "reconstructions" / f"step_{step:07}.png", sheet)
        normalization = {"mean": batches.mean, "std": batches.std, "size": size, "crop": data.crop}
        checkpoint.export(folder / "encoder.safetensors", encoder, normalization)
        if hasattr(task, "tokenizer"):
            checkpoint.export(folder / "tokenizer.safetensors", task.tokenizer, normalization)
        return figures

    figures = train(task, loader, optimizer, lr_at, optim.clip, run, log, evaluate, decay_at)
    start.report(folder, figures)
    log(f"encoder in {folder / 'encoder.safetensors'}, panels in {folder / 'reconstructions'}, "
        f"figures in {folder / 'report.json'}; curves: tensorboard --logdir {folder / 'tensorboard'}")  # fmt: skip
    log.close()
    return figures


if __name__ == "__main__":
    command(main)
