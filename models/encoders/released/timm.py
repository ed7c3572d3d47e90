"""Checkpoints as timm writes them: which of its architectures they are of, and what its keys are called here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import timm
import torch
from timm.models import model_entrypoint
from torch.overrides import TorchFunctionMode

from models.encoders.released.beit import table_name
from models.encoders.released.common import DERIVED, State, count, is_sincos
from models.encoders.released.convnext import substitute
from models.encoders.released.layout import Dialect, Family, has

CONFIG = "config.json"  # timm's, beside a file
HEAD = ("head", "fc.", "fc_norm.", "classifier.", "attn_pool.")  # what comes after an encoder
TABLE = r"^(?:rel_pos_bias|blocks\.(\d+)\.attn)\.relative_position_bias_table$"
RUNTIME = ("num_classes", "global_pool", "in_chans", "fc_norm", "use_fc_norm", "final_norm")  # told by the tensors


def stages(*words: str) -> Callable[[State], bool]:
    """Whether a state has these, and no Swin's stage ends with its downsampling layer, as in official code."""
    return lambda state: has(*words)(state) and not has("layers.0.downsample.")(state)


SIGNATURES = {  # of timm's modules: keys that only their models have, the special before the general
    "swin_transformer": stages("layers.0.blocks.0.attn.relative_position_bias_table", "layers.1.downsample."),
    "swin_transformer_v2": stages("layers.0.blocks.0.attn.logit_scale", "layers.1.downsample.", "attn.cpb_mlp."),
    "edgenext": has("stages.0.blocks.0.conv_dw.", ".xca."),
    "convnext": has("stages.0.blocks.0.conv_dw."),
    "hiera": has("blocks.0.mlp.fc1.", "head.norm.", "patch_embed.proj."),
    "pvt_v2": has("stages.0.blocks.0.attn.kv.", "patch_embed.proj."),
    "resnet": has("layer1.0.conv1.weight", "bn1.weight"),
    "mvitv2": has("stages.0.blocks.0.attn.norm_q.", "patch_embed.proj."),
    "davit": has("stages.0.blocks.0.", ".cpe1.", "stem.conv."),
    "focalnet": has("layers.0.blocks.0.modulation.f."),
    "maxxvit": has("stages.0.blocks.0.conv", "stem.conv1."),
    "regnet": has("s1.b1."),
    "inception_next": has("stages.0.blocks.0.token_mixer.dwconv_hw."),
}
NARROW: dict[str, Callable[[State, str], bool]] = {  # whether a name may be a state's, where a module has many
    "convnext": lambda state, name: has(".grn.")(state) == name.startswith("convnextv2"),
    "maxxvit": lambda state, name: has(".attn_block.")(state) != name.startswith("coat"),
    "regnet": lambda state, name: has(".se.")(state) != name.startswith("regnetx"),
    "resnet": lambda state, name: all(abs(int(n) - layers(state)) < 4 for n in re.findall(r"^[a-z]+(\d+)", name)),
}
CONVNEXT = (  # timm's, official
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
    (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.mlp\.fc(\d)\.", r".pwconv\1."),
    (r"\.mlp\.grn\.weight$", ".grn.gamma"),
    (r"\.mlp\.grn\.bias$", ".grn.beta"),
    (r"^head\.norm\.", "norm."),
)


class Shapes(TorchFunctionMode):
    """Leaves out what is written into tensors: on the meta device it costs time and changes nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name.endswith("_") and name not in ("requires_grad_", "apply_") and not name.startswith("__"):
            return args[0] if args else (kwargs or {}).get("tensor")
        return func(*args, **(kwargs or {}))


@cache
def shapes(name: str) -> State:
    """The tensors of one of timm's architectures as it is, on the meta device."""
    return outline(name)


def outline(name: str, **args) -> State:
    """The tensors of a model of timm, on the meta device."""
    with torch.device("meta"), Shapes():
        return timm.create_model(name, **args).state_dict()


def read_config(path: Path) -> dict:
    """timm's config.json beside a file, if there is one: {"architecture", "model_args", "pretrained_cfg", ...}."""
    beside = path.with_name(CONFIG)
    try:
        config = json.loads(beside.read_text()) if beside.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{CONFIG} beside it is no JSON: {error}") from error
    if not isinstance(config, dict) or "architecture" not in config:
        return {}  # somebody else's, such as transformers'
    if not timm.is_model(str(config["architecture"]).partition(".")[0]):
        raise ValueError(f'{CONFIG} beside it says "{config["architecture"]}", which this timm does not have')
    return config


def native(state: State, config: dict, path: Path, name: str = "") -> tuple[Family, dict] | None:
    """The family of a state that timm wrote, made for its architecture, and how its images were normalised.

    config: from `read_config`
    path:   of the file, which may bear the name of the architecture: it decides where several fit
    name:   of the architecture, where the user knows it

    None if the state is not timm's, or of none of its architectures.
    """
    remarks, args, norm = [], {}, config.get("pretrained_cfg", config)
    taken = name or config.get("architecture", "").partition(".")[0]
    if config and taken == config["architecture"].partition(".")[0]:
        args = {key: value for key, value in config.get("model_args", {}).items() if key not in RUNTIME}
        if is_plain(taken) and "input_size" in norm:
            args = {"img_size": tuple(norm["input_size"][1:])} | args
    elif taken and module_of(state):
        norm = {}
    else:
        fitting = sorted(architectures(state, str(path)), key=lambda name: (len(name), name))
        if not fitting:
            return None
        taken, *others = fitting
        remarks = [f"taken for {taken}" + (f" ({', '.join(others)} would fit, too)" if others else "")]
    stem = place(taken, state)
    if stem is None:
        return None
    default = timm.get_pretrained_cfg(taken)
    norm = {key: norm.get(key) or getattr(default, key, None) for key in ("mean", "std")}
    describe = partial(describe_timm, name=taken, args=args, remarks=remarks)
    return Family("timm", has(), partial(our_key, stem=stem), describe), norm


def describe_timm(state: State, name: str, args: dict, remarks: list[str]) -> tuple:
    """As `describe_vit`, for a file of which the architecture is known."""
    if is_plain(name):
        args = args | {"final_norm": "norm.weight" in state}
        if "pos_embed" in state and state["pos_embed"].ndim == 3 and is_sincos(state["pos_embed"]):
            args["position"] = "sincos"
    return name, args, *remarks


def is_plain(name: str) -> bool:
    """Whether an architecture is a plain transformer."""
    return model_entrypoint(name).__module__.endswith((".vision_transformer", ".deit", ".beit", ".eva"))


def place(name: str, state: State) -> str | None:
    """Where the stem of an architecture is in a state's keys; "" for plain transformers, None if there is none."""
    from models.encoders.build import encoder_class  # which itself imports what this package has

    stems = getattr(encoder_class(name), "stems", ("patch_embed",))
    found = next((stem for stem in stems if any(key.startswith(f"{stem}.") for key in state)), None)
    return "" if found and encoder_class(name).__name__ == "ViT" else found


def our_key(key: str, stem: str) -> str | None:
    """Our key for one of timm's, given where its stem is; None if it is not the encoder's."""
    if after_encoder(key) or key.endswith(DERIVED):
        return None
    if not stem:
        key = re.sub(TABLE, table_name, key)
        return key if key.startswith("tables.") else f"vit.{key}"
    return f"stem.{key.removeprefix(f'{stem}.')}" if key.startswith(f"{stem}.") else f"backbone.{key}"


def after_encoder(key: str) -> bool:
    """Whether one of timm's keys is of what comes after an encoder."""
    return key.startswith(HEAD)


def module_of(state: State) -> str:
    """The module of timm whose keys a state has, empty if none."""
    return next((module for module, signed in SIGNATURES.items() if signed(state)), "")


def architectures(state: State, path: str = "") -> list[str]:
    """Those of timm's architectures that have a state's tensors, to the last one of the encoder.

    path: of the file; if it bears the name of one of them, it is that one
    """
    module = module_of(state)
    may_be = NARROW.get(module, lambda state, name: True)
    names = [name for name in timm.list_models(module=module) if may_be(state, name)] if module else []
    borne = sorted((name for name in names if name in path), key=len)[-1:]
    return [name for name in borne if fits(state, shapes(name))] or [
        name for name in names if fits(state, shapes(name))
    ]


def layers(state: State) -> int:
    """The layers of a ResNet, about as its name counts them."""
    blocks = sum(count(state, rf"layer{i}\.(\d+)\.") for i in range(1, 5))
    return 2 + blocks * (3 if "layer1.0.conv3.weight" in state else 2)


def fits(state: State, like: State) -> bool:
    """Whether a state has all tensors of a model but its head, in their shapes; channels of an image may differ."""
    wrong = [
        key
        for key in state.keys() | like.keys()
        if not after_encoder(key)
        and not key.endswith(DERIVED)
        and (key not in state or key not in like or state[key].shape != like[key].shape)
    ]
    return len(wrong) < 2 and all(only_channels(state, like, key) for key in wrong)


def only_channels(state: State, like: State, key: str) -> bool:
    """Whether a tensor is a stem's, for other images than of 3 channels."""
    if key not in state or key not in like or not state[key].ndim == like[key].ndim == 4 or like[key].shape[1] != 3:
        return False
    return state[key][:, 0].shape == like[key][:, 0].shape


def speaks(state: State) -> bool:
    """Whether a state is a Swin's or a ConvNeXt's of timm, of whatever size."""
    return module_of(state) in ("swin_transformer", "swin_transformer_v2", "convnext")


def official(state: State) -> State:
    """timm's tensors of a Swin or a ConvNeXt by official keys, from which sizes are read."""
    if module_of(state) == "convnext":
        return {substitute(CONVNEXT, key): value for key, value in state.items()}
    earlier = partial(re.sub, r"^layers\.(\d+)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample")
    return {earlier(key): value for key, value in state.items()}


TIMM = Dialect("timm", speaks, official)
