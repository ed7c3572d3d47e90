"""The published methods, each as its five parts. The signature of a builder is the schema of its arguments."""

from __future__ import annotations

import torch

from models.encoders.encoder import Encoder
from models.mim.beitv2 import PatchAggregation
from models.mim.conv_head import ConvDecoder, UNetDecoder
from models.mim.head import Decoder, FuseDecoder, LinearHead, Unmix
from models.mim.hide import Mix, Paint, Skip, cover
from models.mim.loss import cosine, cross_entropy, l1, l2, over_all
from models.mim.masker import BlockMasker, RandomMasker
from models.mim.method import MIM
from models.mim.milan import MILAN, AttentionMasker, PromptDecoder
from models.targets.frozen import Codebook, Teacher
from models.targets.limits import at_least
from models.targets.load import load_teacher
from models.targets.target import HOG, LocalPixels, Pixels, Target
from models.targets.tokenizers import load_tokenizer
from models.targets.vqkd import VQKD

CLIP = "timm:vit_{}_clip_quickgelu_224.openai"

# fmt: off


def mae(encoder: Encoder, ratio: float = 0.75, unit: int | None = None, target: str = "normalized",
        cell: int | None = None, depth: int = 8, width: int = 512, heads: int = 16, mlp_ratio: float = 4) -> MIM:
    """MAE (He et al., 2022): encode the visible patches alone, a transformer guesses the pixels of the rest."""
    unit = encoder.strides[-1] if unit is None else unit
    truth = build_target(target, cell, encoder, unit)
    head = Decoder(encoder, truth, depth, width, heads, mlp_ratio)
    return MIM(RandomMasker(unit, ratio), Skip(encoder), head, truth, l2)


def simmim(encoder: Encoder, ratio: float = 0.6, unit: int = 32, target: str = "pixels",
           cell: int | None = None) -> MIM:
    """SimMIM (Xie et al., 2022): a token stands in for each hidden patch, one linear layer guesses its pixels."""
    truth = build_target(target, cell, encoder, unit)
    return MIM(RandomMasker(unit, ratio), cover(encoder), LinearHead(encoder, truth), truth, l1)


def maskfeat(encoder: Encoder, ratio: float = 0.4, unit: int | None = None, least: int = 15, target: str = "hog",
             cell: int | None = None) -> MIM:
    """MaskFeat (Wei et al., 2022): a token stands in for blocks of patches, one linear layer guesses their HOG."""
    truth = build_target(target, 8 if cell is None and target == "hog" else cell, encoder, unit)
    masker = BlockMasker(encoder.strides[-1] if unit is None else unit, ratio, least)
    return MIM(masker, cover(encoder), LinearHead(encoder, truth), truth, l2)


def fastmim(encoder: Encoder, ratio: float = 0.75, unit: int = 32, target: str = "hog", cell: int | None = None,
            depth: int = 4, width: int = 256, heads: int = 8, mlp_ratio: float = 4) -> MIM:
    """FastMIM (Guo et al., 2022): hidden pixels are painted over, a light transformer guesses HOG at low resolution."""
    truth = build_target(target, 8 if cell is None and target == "hog" else cell, encoder, unit)
    head = Decoder(encoder, truth, depth, width, heads, mlp_ratio, fill=False, positions=False)
    return MIM(RandomMasker(unit, ratio), Paint(encoder), head, truth, l2)


def mixmim(encoder: Encoder, ratio: float = 0.5, unit: int = 32, target: str = "normalized", cell: int | None = None,
           depth: int = 8, width: int = 512, heads: int = 16, mlp_ratio: float = 4) -> MIM:
    """MixMIM (Liu et al., 2023): hidden patches are another image's, and both images of a mixture are guessed."""
    truth = build_target(target, cell, encoder, unit)
    head = Unmix(Decoder(encoder, truth, depth, width, heads, mlp_ratio), truth)
    return MIM(RandomMasker(unit, ratio, shared=True), Mix(encoder), head, truth, l2, over_all)


def hiera(encoder: Encoder, ratio: float = 0.6, unit: int = 32, target: str = "normalized", cell: int = 16,
          depth: int = 8, width: int = 512, heads: int = 16, mlp_ratio: float = 4) -> MIM:
    """Hiera (Ryali et al., 2023): MAE of whole mask units, guessed from the maps of all scales."""
    truth = build_target(target, cell, encoder, unit)
    head = FuseDecoder(encoder, truth, depth, width, heads, mlp_ratio)
    return MIM(RandomMasker(unit, ratio), Skip(encoder), head, truth, l2)


def fcmae(encoder: Encoder, ratio: float = 0.6, unit: int = 32, target: str = "normalized", cell: int | None = None,
          depth: int = 1, width: int = 512) -> MIM:
    """FCMAE (Woo et al., 2023): convolutions encode the visible cells alone, one more block guesses the rest."""
    truth = build_target(target, cell, encoder, unit)
    return MIM(RandomMasker(unit, ratio), Skip(encoder), ConvDecoder(encoder, truth, depth, width), truth, l2)


def spark(encoder: Encoder, ratio: float = 0.59, unit: int = 32, target: str = "normalized", cell: int | None = None,
          width: int = 768) -> MIM:
    """SparK (Tian et al., 2023): as FCMAE, with a U-Net over all scales; its rounding of 0.6 is 0.59 here, 29 of 49."""
    truth = build_target(target, cell, encoder, unit)
    return MIM(RandomMasker(unit, ratio), Skip(encoder), UNetDecoder(encoder, truth, width), truth, l2)


def eva(encoder: Encoder, ratio: float = 0.4, unit: int | None = None, target: str = CLIP.format("large_patch14"),
        cell: int | None = None, least: int = 16) -> MIM:
    """EVA (Fang et al., 2023): a token stands in for blocks of patches, one linear layer guesses what CLIP sees."""
    truth = build_target(target, cell, encoder, unit)
    masker = BlockMasker(encoder.strides[-1] if unit is None else unit, ratio, least)
    return MIM(masker, cover(encoder), LinearHead(encoder, truth), truth, cosine)


def milan(encoder: Encoder, ratio: float = 0.75, unit: int | None = None, target: str = CLIP.format("base_patch16"),
          cell: int | None = None, mask: str = "attention", decoder: str = "prompt",
          depth: int = 8, width: int = 512, heads: int = 16, mlp_ratio: float = 4) -> MIM:
    """MILAN (Hou et al., 2022): CLIP says what is true and, by where it looks, what to show; see milan.py.

    mask:    by the "attention" of the target or, as clip:FILE, of another teacher; or "random"
    decoder: "prompt" or, as MAE's, "plain"
    """
    if (":" not in mask and mask not in ("attention", "random")) or decoder not in ("prompt", "plain"):
        raise ValueError(f'mask "{mask}" is not attention, clip:FILE or random, or decoder "{decoder}" not prompt or '
                         "plain")
    truth, unit = build_target(target, cell, encoder, unit), encoder.strides[-1] if unit is None else unit
    teacher = build_target(mask, truth.unit, encoder) if ":" in mask else truth
    masker = RandomMasker(unit, ratio) if mask == "random" else AttentionMasker(unit, ratio, teacher)
    head = (PromptDecoder if decoder == "prompt" else Decoder)(encoder, truth, depth, width, heads, mlp_ratio)
    if isinstance(truth, Teacher):
        return MILAN(masker, Skip(encoder), head, truth, cosine, over_all)
    return MIM(masker, Skip(encoder), head, truth, l2)


def beit(encoder: Encoder, tokenizer: str, ratio: float = 75 / 196, unit: int | None = None) -> MIM:
    """BEiT (Bao et al., 2022): blocks are hidden, one linear layer guesses the id that a tokenizer gives each cell."""
    masker = BlockMasker(encoder.strides[-1] if unit is None else unit, ratio)
    truth = build_codebook(tokenizer, encoder)
    return MIM(masker, cover(encoder), LinearHead(encoder, truth), truth, cross_entropy)


def beitv2(encoder: Encoder, tokenizer: str, ratio: float = 75 / 196, unit: int | None = None, depth: int = 2) -> MIM:
    """BEiT v2 (Peng et al., 2022): as BEiT, with ids of VQ-KD and a second guess that needs the class token."""
    masker = BlockMasker(encoder.strides[-1] if unit is None else unit, ratio)
    truth = build_codebook(tokenizer, encoder)
    return MIM(masker, cover(encoder), PatchAggregation(encoder, truth, depth), truth, cross_entropy)


def vqkd(encoder: Encoder, target: str = CLIP.format("base_patch16"), vocabulary: int = 8192, dim: int = 32,
         depth: int = 3, width: int = 768, heads: int = 12) -> VQKD:
    """VQ-KD (Peng et al., 2022): not masked, it trains BEiT v2's tokenizer to tell what a teacher, its target, sees."""
    return VQKD(encoder, build_target(target, encoder.strides[-1], encoder), vocabulary, dim, depth, width, heads)


# fmt: on

TARGETS = ("pixels", "normalized", "local", "hog")
ALL = (mae, simmim, maskfeat, fastmim, mixmim, hiera, fcmae, spark, eva, milan, beit, beitv2, vqkd)
METHODS = {method.__name__: method for method in ALL}


def build_target(name: str, cell: int | None, encoder: Encoder, unit: int | None = None) -> Target:
    """A target of `cell` px: "pixels", "normalized" (in each cell), "local" (around each pixel) or "hog".

    Any name with a colon is a teacher, see `load_teacher`; it is built where the encoder is. By default its cells are
    those of the encoder's last map, or of the mask, which have `unit` px, if they are smaller.
    """
    stride = encoder.strides[-1]
    unit = stride if unit is None else unit
    cell = min(unit, stride) if cell is None else cell
    at_least(1, unit=unit, cell=cell)
    if ":" in name:
        with torch.device(next(encoder.parameters()).device):
            return Teacher(load_teacher(name), cell, encoder)
    if name not in TARGETS:
        known = f"{', '.join(TARGETS)}, clip:FILE, timm:NAME and run:FOLDER"
        raise ValueError(f'no target is called "{name}"; there are {known}')
    if name == "hog":
        return HOG(cell, encoder.in_chans)
    if name == "local":
        return LocalPixels(cell, encoder.in_chans)
    return Pixels(cell, encoder.in_chans, normalize=name == "normalized")


def build_codebook(tokenizer: str, encoder: Encoder) -> Codebook:
    """The ids that the tokenizer of a source gives to the encoder's cells; it is built where the encoder is."""
    with torch.device(next(encoder.parameters()).device):
        return Codebook(load_tokenizer(tokenizer, encoder.in_chans), encoder.strides[-1], encoder.in_chans)
