"""BEiT v2's tokenizer: an encoder whose features are rounded to the nearest vector of a codebook."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.encoders.build import build_encoder
from models.encoders.encoder import Encoder
from models.encoders.released.beit import describe_simmim_vit, simmim_vit
from models.encoders.released.common import State
from models.targets.tokenizer import Tokenizer

UNREAD = ("decoder.", "decode_task_layer.", "quantize.", "loss", "teacher", "scaling")  # what training alone needs


class Quantized(Tokenizer):
    """The tokenizer that VQ-KD trains (Peng et al., 2022): features of `dim` numbers, a codebook of unit vectors.

    A cell's id is that of the code at the smallest angle to its feature.
    """

    def __init__(
        self,
        encoder: Encoder,
        vocabulary: int = 8192,
        dim: int = 32,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        half = [0.5] * encoder.in_chans
        super().__init__(encoder.in_chans, encoder.strides[-1], vocabulary, mean or half, std or half)
        width = encoder.dims[-1]
        self.encoder = encoder
        self.project = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, dim))
        self.register_buffer("codes", F.normalize(torch.randn(vocabulary, dim), dim=1))
        self.plan = {**encoder.plan, "vocabulary": vocabulary, "dim": dim}

    def features(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w D"]:
        """Normalised images -> unit vectors (B, H / stride, W / stride, dim) in float32."""
        x = rearrange(self.encoder(images).maps[-1], "b c h w -> b h w c")
        with torch.autocast(x.device.type, enabled=False):
            return F.normalize(self.project(x.float()), dim=-1)

    def nearest(self, features: Float[Tensor, "*cells D"]) -> Int[Tensor, "*cells"]:
        """The id of the nearest code of each unit vector."""
        with torch.autocast(features.device.type, enabled=False):
            return (features @ self.codes.T).argmax(-1)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Int[Tensor, "B h w"]:
        return self.nearest(self.features(images))


def from_state(state: State) -> tuple[Quantized, State]:
    """The tokenizer that a released state is of, and the state in our keys. KeyError if it is of something else."""
    inner = {
        k.removeprefix("encoder.").replace("fc_norm.", "norm."): v for k, v in state.items() if k[:8] == "encoder."
    }
    vocabulary, dim = state["quantize.embedding.weight"].shape
    name, args = describe_simmim_vit(inner)
    heads = max(len(inner["norm.weight"]) // 64, 1)  # which no tensor tells
    encoder = build_encoder(name, inner["patch_embed.proj.weight"].shape[1], **{"num_heads": heads} | args)
    ours = {f"encoder.{simmim_vit(key)}": value for key, value in inner.items() if simmim_vit(key)}
    rest = {key: value for key, value in state.items() if not key.startswith(("encoder.", *UNREAD))}
    ours |= {key.replace("encode_task_layer.", "project."): value for key, value in rest.items()}
    return Quantized(encoder, vocabulary, dim), ours | {"codes": F.normalize(state["quantize.embedding.weight"], dim=1)}


def from_run(state: State, metadata: dict[str, str]) -> tuple[Quantized, State]:
    """The tokenizer of a file that a run of ours left, and its state. KeyError if the file is of something else."""
    plan, images = json.loads(metadata["encoder"]), json.loads(metadata["normalization"])
    encoder = build_encoder(plan["name"], plan["in_chans"], **plan["args"])
    return Quantized(encoder, plan["vocabulary"], plan["dim"], images["mean"], images["std"]), state
