"""VQ-KD: train a tokenizer whose ids tell what a teacher sees in an image (BEiT v2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.encoders.build import build_encoder
from models.encoders.encoder import Encoder
from models.encoders.layers import Cells
from models.targets.limits import at_least, check_heads
from models.targets.quantized import Quantized
from util import dist

DECAY = 0.99  # of the moving averages that the codes are
IDLE = 0.01  # a code that stands for less than this share of the mean is given up


class VQKD(nn.Module):
    """Round an encoder's features to a codebook and guess a teacher's features from that (Peng et al., 2022).

    A task of the training loop, but no masked image modeling: nothing is hidden.

    target:     what the teacher sees, of models/targets/target.py
    vocabulary: codes; dim: numbers of a code
    depth, width, heads: of the transformer that guesses

    The codebook has no gradient: after each step a code moves towards the mean of the features that it stood for, in
    all processes together. Codes that stand for hardly any, as all do at first, become features of the last batch.
    """

    def __init__(
        self, encoder: Encoder, target: nn.Module, vocabulary: int, dim: int, depth: int, width: int, heads: int
    ):
        super().__init__()
        at_least(1, vocabulary=vocabulary, dim=dim, depth=depth)
        check_heads(width, heads)
        self.tokenizer, self.target = Quantized(encoder, vocabulary, dim), target
        size = {"patch_size": 1, "img_size": 14, "embed_dim": width, "depth": depth, "num_heads": heads}
        self.decoder = build_encoder("vit_base_patch16_224", dim, **size)
        cells = Cells(width, encoder.strides[-1], target.unit, target.dim)
        self.predict = nn.Sequential(nn.Linear(width, width), nn.Tanh(), cells)
        self.register_buffer("usage", torch.zeros(vocabulary))  # moving averages of what each code stands for in a step
        self.register_buffer("counts", torch.zeros(vocabulary), persistent=False)  # and of the step under way,
        self.register_buffer("sums", torch.zeros(vocabulary, dim), persistent=False)  # with the features' sums
        self.register_buffer("spare", torch.zeros(vocabulary, dim), persistent=False)  # and some features

    @property
    def encoder(self) -> Encoder:
        return self.tokenizer.encoder

    def set_normalization(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Tell the target with which mean and std of each channel the images are normalised."""
        self.target.set_normalization(mean, std)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """{"image": (B, C, H, W)} -> {"loss", its parts "distance" and "commitment", "perplexity", "used"}.

        perplexity: of this batch's ids, as if so many were used evenly; used: the share of all ids that occur in it
        """
        images = batch["image"]  # (B, C, H, W)
        features = self.tokenizer.features(images)  # (B, h, w, dim)
        ids = self.tokenizer.nearest(features.detach())  # (B, h, w)
        codes = self.tokenizer.codes[ids]  # (B, h, w, dim)
        straight = features + (codes - features).detach()  # the codes, with the features' gradient
        decoded = self.decoder(rearrange(straight, "b h w d -> b d h w")).maps[-1]
        guess = self.predict(rearrange(decoded, "b c h w -> b h w c"))  # (B, h, w, D)
        distance = 1 - F.cosine_similarity(guess.float(), self.target(images), dim=-1).mean()
        commitment = F.mse_loss(features, codes)
        counts = self.note(features.detach(), ids)
        figures = {
            "distance": distance,
            "commitment": commitment,
            "perplexity": torch.special.entr(counts / counts.sum()).sum().exp(),
            "used": (counts > 0).float().mean(),
        }
        return {"loss": distance + commitment, **figures}

    @torch.no_grad()
    def note(self, features: Float[Tensor, "B h w D"], ids: Int[Tensor, "B h w"]) -> Float[Tensor, " V"]:
        """How often each id occurs; in training, what `after_step` needs is noted over all passes of a step."""
        flat, vocabulary = features.flatten(0, 2), len(self.usage)
        which = torch.zeros(len(flat), vocabulary, device=flat.device).scatter_(1, ids.flatten()[:, None], 1.0)
        if self.training:
            self.counts += which.sum(0)
            with torch.autocast(flat.device.type, enabled=False):
                self.sums += which.T @ flat  # a product of matrices has the same bits each time
            self.spare.copy_(flat[torch.randint(len(flat), (vocabulary,), device=flat.device)])
        return which.sum(0)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the codes by what all processes have noted, unless it is not finite; nothing waits for the device."""
        codes, counts, sums = self.tokenizer.codes, dist.total(self.counts), dist.total(self.sums)
        spare = dist.total(self.spare * (dist.rank() == 0))
        usage = torch.lerp(counts, self.usage, DECAY)
        idle = usage < IDLE * usage.mean()
        moved = F.normalize(torch.lerp(F.normalize(sums, dim=1), codes, DECAY), dim=1)
        moved = torch.where(idle[:, None], spare, torch.where(counts[:, None] > 0, moved, codes))
        fine = moved.isfinite().all()
        codes.copy_(torch.where(fine, moved, codes))
        self.usage.copy_(torch.where(fine, torch.where(idle, usage.mean(), usage), self.usage))
        for noted in (self.counts, self.sums, self.spare):
            noted.zero_()
