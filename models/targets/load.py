"""Teachers by name: a file on disk, whoever wrote it, or a model of timm's hub."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from torch import nn

from models.encoders import released
from models.encoders.build import build_encoder
from models.encoders.released.common import State
from models.encoders.released.fetch import fetch, pretrained
from models.encoders.released.read import read
from models.encoders.released.tower import is_clip
from models.encoders.weights import load_encoder, load_normalization, load_state
from models.targets.tower import Tower


def load_teacher(source: str, dtype: torch.dtype = torch.bfloat16, heads: int | None = None) -> Tower:
    """The tower of a file or of timm's hub, on the default device; on the meta device, its shapes alone.

    source: "clip:FILE", of OpenAI (state dict or TorchScript), open_clip, MILAN, transformers or timm, with CLIP's
            quick GELU; "open_clip:FILE", the same with exact GELU (LAION, DataComp); "slip:FILE", "dino:FILE";
            "timm:NAME", a plain transformer of timm's with its weights; or "run:FOLDER", one that a run of ours
            trained. FILE is any source of `fetch`, such as clip_vit_b16
    dtype:  of the weight matrices, see Tower
    heads:  of attention; by default as published for the tower's width

    ValueError in one line if there is no such source, or it cannot be read or is no teacher.
    """
    kind, _, rest = source.partition(":")
    if kind == "timm":
        return from_hub(rest, dtype)
    if kind == "run":
        return from_run(rest, dtype)
    if kind not in released.TOWERS:
        kinds = ", ".join(f"{kind}:FILE" for kind in released.TOWERS)
        raise ValueError(f'no teacher is called "{source}"; there are {kinds}, timm:NAME and run:FOLDER')
    path = fetch(rest)
    if (Path(rest) / "encoder.safetensors").is_file():
        raise ValueError(f"{rest} is the folder of a run of ours: write run:{rest}")
    if not path.is_file():
        raise ValueError(f"there is no teacher at {path}: {kind}:FILE takes a checkpoint, timm:NAME fetches one")
    return from_file(kind, path, dtype, heads)


def from_file(kind: str, path: Path, dtype: torch.dtype, heads: int | None) -> Tower:
    content = read(path)
    if "encoder" in content.metadata:
        raise ValueError(f"{path} is of a run of ours: write run:{path}")
    try:
        _, family, state = released.recognise(content.state, kind)
        state = family.prepare(state)
        name, args = family.describe(state)
    except KeyError as error:
        raise ValueError(f"{path} is no teacher: it has no {error.args[0]}") from error
    args["num_heads"] = heads or args["num_heads"]
    if args["num_heads"] is None:
        raise ValueError(
            f"{path} does not tell how many attention heads it has, and no teacher of its width, {args['embed_dim']}, "
            "is known: take another, or one that a run of yours trained, as run:FOLDER"
        )
    device, in_chans = torch.get_default_device(), state["patch_embed.proj.weight"].shape[1]
    state = {key: value.to(device) for key, value in state.items()}
    encoder = build_encoder(name, in_chans, **args)
    try:
        load_state(encoder, {family.rename(key): value for key, value in state.items() if family.rename(key)})
    except ValueError as error:
        why = str(error).removesuffix("; allow_partial loads what fits")
        raise ValueError(f"{path} is no whole teacher: {why}") from error
    norm = released.CLIP if is_clip(state) else released.IMAGENET
    head = {key.removeprefix("head."): value for key, value in state.items() if key.startswith("head.")}
    return Tower(encoder, projection(head, encoder.width, path), norm["mean"], norm["std"], dtype)


def from_run(folder: str, dtype: torch.dtype) -> Tower:
    with torch.device("cpu"):
        encoder, norm = load_encoder(folder), load_normalization(folder)
    if not hasattr(encoder, "vit"):
        raise ValueError(
            f"{folder} holds {encoder.plan['name']}, which is no plain transformer, as a teacher has to be"
        )
    return Tower(encoder.to(torch.get_default_device()), nn.Identity(), norm["mean"], norm["std"], dtype)


def projection(head: State, width: int, path: Path) -> nn.Module:
    """The linear layer of a "weight" (dim, width) and "bias"; nothing if there are none."""
    if not head:
        return nn.Identity()
    dim, into = head["weight"].shape
    if into != width:
        raise ValueError(f"{path} is no teacher: its tower gives {width} channels, its projection takes {into}")
    linear = nn.Linear(width, dim, "bias" in head)
    linear.load_state_dict(head)
    return linear


def from_hub(name: str, dtype: torch.dtype) -> Tower:
    facts = pretrained(name)
    with torch.device("meta"):  # what cannot teach is told before it is fetched
        whole = timm.create_model(name)
    if not hasattr(whole, "blocks") or not hasattr(whole, "cls_token"):
        raise ValueError(f"{name} is no plain transformer, as a teacher has to be")
    if isinstance(whole.norm, nn.Identity):
        raise ValueError(f"{name} was trained for classes, on the mean of its tokens: take one that was not fine-tuned")
    dim = facts.num_classes if "clip" in facts.architecture and "_ft_" not in facts.tag else 0
    file = None if torch.get_default_device().type == "meta" else fetch(f"timm:{name}")
    args = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(file)}} if file else {}
    try:
        encoder = build_encoder(name, num_classes=dim, **args)
    except Exception as error:  # of many kinds, where the file is not whole
        why = " ".join(str(error).split())[:120]
        raise ValueError(f"timm:{name} cannot be loaded from {file}: {why}") from error
    project, encoder.vit.head = encoder.vit.head, nn.Identity()
    return Tower(encoder, project, facts.mean, facts.std, dtype)
