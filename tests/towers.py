"""A random image tower as each repository would have written it to a file."""

import functools
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from models.encoders.released.common import renamed

FOLDER = tempfile.TemporaryDirectory()


def random_tower(clip=True, seed=0, width=64, depth=2, patch=8, side=4, dim=16):
    """The tensors of a tower by timm's names: CLIP's, or one that has no norm before its blocks."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape, std=0.1, mean=0.0):  # numbers that float16 holds, as OpenAI's files are
        return (torch.randn(shape, generator=generator) * std + mean).half().float()

    state = {"cls_token": some(1, 1, width), "pos_embed": some(1, 1 + side**2, width)}
    state["patch_embed.proj.weight"] = some(width, 3, patch, patch)
    norms = ["norm", *(f"blocks.{i}.norm{k}" for i in range(depth) for k in (1, 2))]
    if clip:
        norms.append("norm_pre")
    else:
        state["patch_embed.proj.bias"] = some(width)
    for name in norms:
        state |= {f"{name}.weight": some(width, mean=1.0), f"{name}.bias": some(width)}
    layers = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    layers |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    for i in range(depth):
        for name, shape in layers.items():
            key = f"blocks.{i}.{name}"
            state |= {f"{key}.weight": some(*shape, std=0.2), f"{key}.bias": some(shape[0])}
    return state | {"head.weight": some(dim, width)}


OPENAI = (
    (r"^cls_token$", "class_embedding"),
    (r"^pos_embed$", "positional_embedding"),
    (r"^patch_embed\.proj\.", "conv1."),
    (r"^norm_pre", "ln_pre"),
    (r"^norm\.", "ln_post."),
    (r"^blocks\.", "transformer.resblocks."),
    (r"\.norm(\d)", r".ln_\1"),
    (r"attn\.qkv\.", "attn.in_proj_"),
    (r"attn\.proj", "attn.out_proj"),
    (r"fc1", "c_fc"),
    (r"fc2", "c_proj"),
    (r"^head\.weight$", "proj"),
)
HUGGING = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding.weight"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm_pre", "pre_layrnorm"),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm(\d)", r".layer_norm\1"),
    (r"attn\.proj", "self_attn.out_proj"),
    (r"attn\.qkv", "self_attn.qkv"),
)


def bare(state):
    """CLIP's image tower alone, as in MILAN's file."""
    new = renamed(state, OPENAI)
    flat = {"class_embedding": new["class_embedding"].flatten(), "positional_embedding": new["positional_embedding"][0]}
    return new | flat | {"proj": new["proj"].T.contiguous()}


def openai(state):
    """CLIP with its text tower, in half precision."""
    text = {"positional_embedding": torch.randn(7, 8), "transformer.resblocks.0.ln_1.weight": torch.randn(8)}
    text |= {"token_embedding.weight": torch.randn(9, 8), "text_projection": torch.randn(8, 16)}
    return {k: v.half() for k, v in prefixed("visual.", bare(state)).items()} | text | {"logit_scale": torch.ones(())}


def hugging(state):
    """transformers' CLIPModel."""
    new = renamed({k: v for k, v in state.items() if k != "head.weight"}, HUGGING)
    for key in [key for key in new if ".qkv." in key]:
        for part, value in zip("qkv", new.pop(key).chunk(3)):
            new[key.replace(".qkv.", f".{part}_proj.")] = value.clone()
    new["embeddings.class_embedding"] = new["embeddings.class_embedding"].flatten()
    new["embeddings.position_embedding.weight"] = new["embeddings.position_embedding.weight"][0].clone()
    new["embeddings.position_ids"] = torch.arange(17)[None]
    more = {"visual_projection.weight": state["head.weight"], "logit_scale": torch.ones(())}
    more |= {"text_projection.weight": torch.randn(16, 8), "text_model.final_layer_norm.bias": torch.randn(8)}
    return prefixed("vision_model.", new) | more


def timms(state):
    """timm's own, whose projection is a classifier with a bias."""
    return state | {"head.bias": torch.zeros(len(state["head.weight"]))}


def slip(state):
    """SLIP: timm's names, a projection beside the tower, a head for the other loss."""
    tower = {key: value for key, value in state.items() if key != "head.weight"}
    more = {"image_projection": state["head.weight"].T.contiguous(), "image_mlp.layer1.bias": torch.zeros(3)}
    more |= {"positional_embedding": torch.randn(7, 8), "transformer.resblocks.0.ln_1.weight": torch.randn(8)}
    return {"state_dict": prefixed("module.", prefixed("visual.", tower) | more), "epoch": 3}


def dino(state):
    """DINO's full checkpoint: the teacher is the tower."""
    tower = {key: value for key, value in state.items() if key != "head.weight"}
    head = {"head.mlp.0.weight": torch.randn(3, 3), "head.last_layer.weight_g": torch.randn(3, 1)}
    student = {key: torch.zeros_like(value) for key, value in tower.items()}
    return {"student": prefixed("module.backbone.", student), "teacher": prefixed("backbone.", tower) | head}


def prefixed(prefix, state):
    return {f"{prefix}{key}": value for key, value in state.items()}


class Node(nn.Module):
    """A module of whatever parameters, for TorchScript; some plain values are with them."""

    def __init__(self):
        super().__init__()
        self.sizes, self.rates, self.names, self.heads = [1, 2], [0.5], {"a": 1}, 8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.sizes[0] + self.rates[0] * self.names["a"] + self.heads


def scripted(state, path):
    """A TorchScript archive of the tensors, as OpenAI's are."""
    root = Node()
    for key, value in state.items():
        *owners, name = key.split(".")
        place = root
        for owner in owners:
            if owner not in place._modules:
                place.add_module(owner, Node())
            place = place._modules[owner]
        place.register_parameter(name, nn.Parameter(value, requires_grad=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of PyTorch advise against the format
        torch.jit.save(torch.jit.script(root), path)


def write(content, path):
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


@functools.cache
def clip_file():
    """A tiny CLIP on disk, for all tests of a process."""
    return write(openai(random_tower()), Path(FOLDER.name) / "clip.pt")
