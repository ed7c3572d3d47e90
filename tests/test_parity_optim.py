"""Learning rates and parameter groups are those of the official code, read from the folder MIM_GOLDEN."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

from models.encoders.build import build_encoder
from models.mim.recipes import fcmae, mae, mixmim, simmim
from models.transfer.classify import Classify
from util.optim import Schedule, build_optimizer

GOLDEN = Path(os.environ.get("MIM_GOLDEN", Path(__file__).parent / "golden"))


def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


# learning rates


@pytest.mark.parametrize("steps_per_epoch", [1, 1251])
def test_mae_schedule(steps_per_epoch):
    for run in golden("lr_schedules")["mae_adjust_learning_rate"]["runs"]:
        args = run["args"]
        steps, warmup = args["epochs"] * steps_per_epoch, args["warmup_epochs"] * steps_per_epoch
        lr_at = Schedule(args["lr"], steps, warmup, min_lr=args["min_lr"])
        scales = [1.0, 1.0, *(float(base) ** int(power or 1) for base, power in lr_scales(run["columns"]))]
        for epoch, *rates in run["values"]:
            found = [lr_at(epoch * steps_per_epoch) * scale for scale in scales]
            # a step is a rounded multiple of an epoch, which shows where the cosine cancels to nearly nothing
            assert found == pytest.approx(rates, rel=1e-12, abs=0 if steps_per_epoch == 1 else 1e-12 * args["lr"])


def lr_scales(columns):
    return [
        re.search(r"lr_scale ([\d.]+)(?:\*\*(\d+))?", column).groups() for column in columns if "lr_scale" in column
    ]


def test_simmim_schedules():
    runs = golden("lr_schedules")["simmim"]["runs"]
    assert {run["name"] for run in runs} == {"cosine", "multistep"}
    for run in runs:
        config, n = run["config"], run["n_iter_per_epoch"]
        shape = (
            {"origin": 0, "min_lr": config["MIN"]}
            if run["name"] == "cosine"
            else {"milestones": tuple(epoch * n for epoch in config["ms"]), "gamma": config["gamma"]}
        )
        lr_at = Schedule(config["BASE"], config["EPOCHS"] * n, config["WARMUP_EPOCHS"] * n, config["WLR"], **shape)
        for step, rate in run["values_[num_updates, lr]"]:
            step = 0 if step == "before any step_update" else step
            assert lr_at(step) == pytest.approx(rate, rel=1e-12)


def test_beit_schedule():
    for run in golden("lr_schedules")["beit_cosine_scheduler"]["runs"]:
        args = run["args"]
        n, warmup = args["niter_per_ep"], args.get("warmup_steps", -1)
        if warmup <= 0:
            warmup = args.get("warmup_epochs", 0) * n
        start, end = args.get("start_warmup_value", 0.0), args["final_value"]
        lr_at = Schedule(args["base_value"], args["epochs"] * n, max(warmup - 1, 0), start, end, origin=warmup)
        for step, rate in run["values"]:
            assert lr_at(step) == pytest.approx(rate, rel=1e-12)


# parameter groups: widths play no part, so the models are narrow; depths are read off the official names


def count(names, pattern):
    """How many different numbers the pattern's group takes in the names."""
    return len({found[1] for name in names if (found := re.match(pattern, name))})


def narrow_vit(name, names, **args):
    depth = count(names, r"blocks\.(\d+)\.")
    return build_encoder(name, embed_dim=24, num_heads=3, depth=depth, **args)


def narrow_swin(names, prefix="", name="swin_tiny_patch4_window7_224"):
    stages = range(count(names, rf"{prefix}layers\.(\d+)\."))
    depths = tuple(count(names, rf"{prefix}layers\.{stage}\.blocks\.(\d+)\.") for stage in stages)
    heads = tuple(2**stage for stage in stages)
    return build_encoder(name, embed_dim=8, depths=depths, num_heads=heads)


def narrow_convnext(names, group, prefix=""):
    stages = range(count(names, rf"{prefix}stages\.(\d+)\."))
    depths = tuple(count(names, rf"{prefix}stages\.{stage}\.(\d+)\.") for stage in stages)
    dims = tuple(8 * 2**stage for stage in stages)
    return build_encoder("convnextv2_tiny", depths=depths, dims=dims, layer_groups=group)


CLASSIFIER = [(r"^norm\.", "fc_norm."), (r"^encoder\.", "")]
VIT = [*CLASSIFIER, (r"^vit\.", ""), (r"^tables\.(\d+)$", r"blocks.\1.attn.relative_position_bias_table")]
PYRAMID = [(r"^encoder\.", ""), (r"^backbone\.", "")]
SWIN = [
    *PYRAMID,
    (r"^stem\.", "patch_embed."),
    (r"^(.*layers)_(\d)", r"\1.\2"),
    # timm opens a stage with the downsampling that officially closes the one before
    (r"^layers\.(\d)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample"),
]
CONVNEXT = [
    *PYRAMID,
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d)\.downsample", r"downsample_layers.\1"),
    (r"^stages\.(\d)\.blocks", r"stages.\1"),
    (r"conv_dw", "dwconv"),
    (r"mlp\.fc", "pwconv"),
    (r"mlp\.grn\.weight", "grn.gamma"),
    (r"mlp\.grn\.bias", "grn.beta"),
]
MAE = [
    (r"^hide\.encoder\.vit\.", ""),
    (r"^head\.project", "decoder_embed"),
    (r"^head\.blocks", "decoder_blocks"),
    (r"^head\.norm", "decoder_norm"),
    (r"^head\.cells\.linear", "decoder_pred"),
    (r"^head\.fill\.token", "mask_token"),
]
SIMMIM = [
    (r"^hide\.encoder\.", ""),
    (r"^head\.cells\.linear", "decoder.0"),
    *SWIN,
    (r"^hide\.fill\.token", "encoder.mask_token"),
    (r"^(patch_embed|layers|norm)", r"encoder.\1"),
]
MIXMIM = [
    (r"^hide\.encoder\.", ""),
    *((pattern.replace("head", r"head\.head"), name) for pattern, name in MAE[1:]),
    *SWIN,
]

FCMAE = [
    (r"^hide\.encoder\.", "encoder."),
    (r"\.backbone\.", "."),
    (r"^encoder\.stem\.", "encoder.downsample_layers.0."),
    (r"^encoder\.stages\.(\d)\.downsample", r"encoder.downsample_layers.\1"),
    (r"^encoder\.stages\.(\d)\.blocks", r"encoder.stages.\1"),
    *CONVNEXT[-4:],
    (r"^head\.fill\.token", "mask_token"),
    (r"^head\.project", "proj"),
    (r"^head\.cells\.linear", "pred"),
    (r"^head\.blocks", "decoder"),
    # the encoder's layers are MinkowskiEngine's
    (r"^(encoder\.(?:downsample_layers\.[1-3]\.0|.*\.norm))\.", r"\1.ln."),
    (r"^(encoder\..*pwconv\d)\.", r"\1.linear."),
    (r"^(encoder\.(?:downsample_layers\.[1-3]\.1|.*\.dwconv))\.weight", r"\1.kernel"),
]

# which entries | the task | names that are not decayed, unless the entry lists them | our names -> official ones
CASES = {
    "mae_vit_.*_global_pool_true": (
        lambda names: Classify(narrow_vit("vit_base_patch16_224", names, final_norm=False), 10),
        (),
        VIT,
    ),
    "mae_vit_.*_global_pool_false": (
        lambda names: Classify(narrow_vit("vit_base_patch16_224", names), 10, "cls"),
        (),
        VIT,
    ),
    "simmim_vit_.*": (
        lambda names: Classify(narrow_vit("beit_base_patch16_224", names, final_norm=False), 10),
        ("cls_token", "pos_embed"),
        VIT,
    ),
    r"simmim_swin_\d.*": (
        lambda names: Classify(narrow_swin(names), 10),
        ("absolute_pos_embed", "relative_position_bias_table"),
        SWIN,
    ),
    "convnextv2_single": (lambda names: Classify(narrow_convnext(names, "single"), 10), (), CONVNEXT),
    "convnextv2_group": (lambda names: Classify(narrow_convnext(names, "group"), 10), (), CONVNEXT),
    "mae_pretrain": (
        lambda names: mae(
            narrow_vit("vit_base_patch16_224", names, position="sincos"),
            depth=count(names, r"decoder_blocks\.(\d+)\."),
            width=16,
            heads=2,
        ),
        (),
        MAE,
    ),
    "fcmae_pretrain": (
        lambda names: fcmae(
            narrow_convnext(names, "single", r"encoder\."), depth=count(names, r"decoder\.(\d+)\."), width=16
        ),
        (),
        FCMAE,
    ),
    "mixmim_pretrain": (
        lambda names: mixmim(
            narrow_swin(names, name="mixmim_base"),
            depth=count(names, r"decoder_blocks\.(\d+)\."),
            width=16,
            heads=2,
        ),
        (),
        MIXMIM,
    ),
    "simmim_swin_pretrain": (lambda names: simmim(narrow_swin(names, r"encoder\.")), ("hide.fill.token",), SIMMIM),
}


@pytest.mark.parametrize("pattern", CASES)
def test_parameter_groups(pattern):
    build, no_decay, renames = CASES[pattern]
    entries = {name: entry for name, entry in golden("param_groups").items() if re.fullmatch(pattern, name)}
    assert entries, f"{GOLDEN / 'param_groups.json'} has no {pattern}"
    for entry in entries.values():
        args, official = entry["args"], entry["params"]
        task = build(official)
        optimizer = build_optimizer(
            task,
            weight_decay=args["weight_decay"],
            layer_decay=args.get("layer_decay", 1.0),
            no_decay=args.get("no_weight_decay_list", no_decay),
        )
        found = groups_by_official_name(task, optimizer, renames)
        assert set(found) == set(official)
        for name, (_, scale, decay) in official.items():
            if pattern == "fcmae_pretrain" and ".grn." in name:  # decayed there: see the README's departures
                assert decay > 0
                decay = 0.0
            assert found[name] == (pytest.approx(scale, rel=1e-12), decay), name
        assert len(optimizer.param_groups) == len(entry["groups_in_order"])


def groups_by_official_name(task: torch.nn.Module, optimizer, renames) -> dict[str, tuple[float, float]]:
    names = {}
    for name, parameter in task.named_parameters():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        names[id(parameter)] = name
    groups = optimizer.param_groups
    return {names[id(p)]: (g.get("lr_scale", 1.0), g["weight_decay"]) for g in groups for p in g["params"]}
