"""MILAN (Hou et al., 2022): what a teacher sees is true, where it looks is shown, and what is shown prompts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float
from timm.layers import Mlp
from torch import Tensor, nn

from models.encoders.encoder import Encoder
from models.encoders.grid import Mask
from models.encoders.layers import xavier
from models.mim.head import Decoder, norm_eps
from models.mim.masker import grid, hide_top
from models.mim.method import MIM
from models.targets.frozen import Teacher
from models.targets.limits import at_least, check_mask
from models.targets.target import Target


class AttentionMasker(nn.Module):
    """Draw the cells to show one by one, each with odds in proportion to a teacher's attention; hide the rest.

    unit: side of a cell in pixels; ratio: hidden part of the cells. ValueError if the teacher has no such attention
    """

    def __init__(self, unit: int, ratio: float, teacher: Target):
        super().__init__()
        check_mask(unit, ratio)
        if not isinstance(teacher, Teacher) or not teacher.tower.attends:
            raise ValueError("an attention mask needs a teacher whose class token attends to cells (CLIP, SLIP, DINO): "
                             "give one as mask (clip:FILE), or mask random")  # fmt: skip
        if unit % teacher.unit:
            raise ValueError(f"the mask's cells have {unit} px, the teacher's {teacher.unit} px must divide them")
        self.unit, self.ratio, self.teacher = unit, ratio, teacher

    def forward(self, images: Float[Tensor, "B C H W"], attention: Float[Tensor, "B _ _"] | None = None) -> Mask:
        """`attention`: the teacher's, where it is already known."""
        grid(images, self.unit)
        if attention is None:
            attention = self.teacher.look(images, attention=True).attention
        times = self.unit // self.teacher.unit
        attention = reduce(attention, "b (h p) (w q) -> b h w", "sum", p=times, q=times)
        # whoever waits shortest is drawn next: waiting times whose rates are the attention draw in proportion to it
        waits = torch.empty_like(attention).exponential_() / attention.clamp_min(1e-12)
        return hide_top(waits, self.ratio, self.unit)


class PromptAttention(nn.Module):
    """Attention of x (B, n, C) to a context (B, m, C)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "B n C"], context: Float[Tensor, "B m C"]) -> Float[Tensor, "B n C"]:
        q = rearrange(self.q(x), "b n (a d) -> b a n d", a=self.heads)
        k, v = rearrange(self.kv(context), "b m (t a d) -> t b a m d", t=2, a=self.heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b a n d -> b n (a d)"))


class PromptBlock(nn.Module):
    """A transformer's block of which a part of the tokens, the prompt, is read as it is and never changed."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, eps: float):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps), PromptAttention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps), Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Float[Tensor, "B n C"], prompt: Float[Tensor, "B m C"]) -> Float[Tensor, "B n C"]:
        own = self.norm1(x)
        x = x + self.attn(own, torch.cat([prompt, own], 1))
        return x + self.mlp(self.norm2(x))


class PromptDecoder(Decoder):
    """A decoder that works on hidden cells alone; what the encoder made of the visible ones prompts it."""

    def __init__(self, encoder: Encoder, target: Target, depth: int = 8, width: int = 512, heads: int = 16,
                 mlp_ratio: float = 4):  # fmt: skip
        at_least(1, depth=depth)
        super().__init__(encoder, target, 0, width, heads)
        self.blocks = nn.ModuleList(PromptBlock(width, heads, mlp_ratio, norm_eps(encoder)) for _ in range(depth))
        xavier(self.blocks)

    def decode(self, x: Float[Tensor, "B n C"], mask: Mask) -> Float[Tensor, "B n C"]:
        p = x.shape[1] - mask.at(self.stride)[0].numel()
        shown, hidden = ((m.visible(self.stride) + p)[..., None].expand(-1, -1, x.shape[2]) for m in (mask, ~mask))
        prompt, y = torch.cat([x[:, :p], x.gather(1, shown)], 1), x.gather(1, hidden)
        for block in self.blocks:
            y = block(y, prompt)
        return x.scatter(1, hidden, y.to(x.dtype))


class MILAN(MIM):
    """The one method whose mask depends on its target: the teacher looks once. Its class token is asked for, too."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        images = batch["image"]  # (B, C, H, W)
        both = getattr(self.masker, "teacher", None) is self.target
        truth = self.target.look(images, attention=both)
        mask = self.masker(images, truth.attention) if both else self.masker(images)
        tokens = self.head.tokens(self.hide(images, mask), mask)  # (B, P + h w, C)
        h, w = (side // self.encoder.strides[-1] for side in images.shape[-2:])
        guess = self.head.cells(tokens[:, -h * w :].unflatten(1, (h, w)))  # (B, h, w, D), for every cell
        error = self.distance(guess, truth.cells).flatten(1)
        if tokens.shape[1] > h * w and truth.prefix.shape[1] and self.head.cells.split == 1:
            guess = self.head.cells.linear(tokens[:, None, :1])  # (B, 1, 1, D), for the class token
            error = torch.cat([self.distance(guess, truth.prefix[:, None, :1]).flatten(1), error], 1)
        return {"loss": error.mean()}
