"""The published methods, each as its five parts. The signature of a builder is the schema of its arguments."""

from __future__ import annotations

import torch

from models.encoders.encoder import Encoder
from models.mim.beitv2 import PatchAggregation
from models.mim.head import Decoder, LinearHead
from models.mim.hide import Paint, Replace, Skip, cover
from models.mim.loss import cross_entropy, l1, l2
from models.mim.masker import BlockMasker, RandomMasker
from models.mim.method import MIM
from models.mim.target import HOG, Codebook, LocalPixels, Pixels, Target
from models.teachers.tokenizers import load_tokenizer
from models.teachers.vqkd import VQKD


def mae(
    encoder: Encoder,
    ratio: float = 0.75,
    unit: int | None = None,
    target: str = "normalized",
    cell: int | None = None,
    depth: int = 8,
    width: int = 512,
    heads: int = 16,
) -> MIM:
    """MAE (He et al., 2022): encode the visible patches alone, a transformer guesses the pixels of the rest."""
    unit = unit or encoder.strides[-1]
    truth = build_target(target, cell or encoder.strides[-1], encoder)
    return MIM(RandomMasker(unit, ratio), Skip(encoder), Decoder(encoder, truth, depth, width, heads), truth, l2)


def simmim(
    encoder: Encoder,
    ratio: float = 0.6,
    unit: int = 32,
    target: str = "pixels",
    cell: int | None = None,
) -> MIM:
    """SimMIM (Xie et al., 2022): a token stands in for each hidden patch, one linear layer guesses its pixels."""
    truth = build_target(target, cell or min(unit, encoder.strides[-1]), encoder)
    return MIM(RandomMasker(unit, ratio), Replace(encoder), LinearHead(encoder, truth), truth, l1)


def fastmim(
    encoder: Encoder,
    ratio: float = 0.75,
    unit: int = 32,
    target: str = "hog",
    cell: int | None = None,
    depth: int = 4,
    width: int = 256,
    heads: int = 8,
) -> MIM:
    """FastMIM (Guo et al., 2022): hidden pixels are painted over, a light transformer guesses HOG at low resolution."""
    truth = build_target(target, cell or (8 if target == "hog" else encoder.strides[-1]), encoder)
    head = Decoder(encoder, truth, depth, width, heads, fill=False, positions=False)
    return MIM(RandomMasker(unit, ratio), Paint(encoder), head, truth, l2)


def beit(encoder: Encoder, tokenizer: str, ratio: float = 75 / 196, unit: int | None = None) -> MIM:
    """BEiT (Bao et al., 2022): blocks are hidden, one linear layer guesses the id that a tokenizer gives each cell."""
    truth, masker = build_codebook(tokenizer, encoder), BlockMasker(unit or encoder.strides[-1], ratio)
    return MIM(masker, cover(encoder), LinearHead(encoder, truth), truth, cross_entropy)


def beitv2(encoder: Encoder, tokenizer: str, ratio: float = 75 / 196, unit: int | None = None, depth: int = 2) -> MIM:
    """BEiT v2 (Peng et al., 2022): as BEiT, with ids of VQ-KD and a second guess that needs the class token."""
    truth, masker = build_codebook(tokenizer, encoder), BlockMasker(unit or encoder.strides[-1], ratio)
    return MIM(masker, cover(encoder), PatchAggregation(encoder, truth, depth), truth, cross_entropy)


def vqkd(
    encoder: Encoder,
    target: str = "pixels",
    vocabulary: int = 8192,
    dim: int = 32,
    depth: int = 3,
    width: int = 768,
    heads: int = 12,
) -> VQKD:
    """VQ-KD (Peng et al., 2022): not masked, it trains BEiT v2's tokenizer to tell what a teacher, its target, sees."""
    truth = build_target(target, encoder.strides[-1], encoder)
    return VQKD(encoder, truth, vocabulary, dim, depth, width, heads)


TARGETS = ("pixels", "normalized", "local", "hog")
METHODS = {method.__name__: method for method in (mae, simmim, fastmim, beit, beitv2, vqkd)}


def build_target(name: str, unit: int, encoder: Encoder) -> Target:
    """A target of `unit` px cells: "pixels", "normalized" (in each cell), "local" (around each pixel) or "hog"."""
    if name not in TARGETS:
        raise ValueError(f'no target is called "{name}"; there are {", ".join(TARGETS)}')
    if name == "hog":
        return HOG(unit, encoder.in_chans)
    if name == "local":
        return LocalPixels(unit, encoder.in_chans)
    return Pixels(unit, encoder.in_chans, normalize=name == "normalized")


def build_codebook(tokenizer: str, encoder: Encoder) -> Codebook:
    """The ids that the tokenizer of a source gives to the encoder's cells; it is built where the encoder is."""
    with torch.device(next(encoder.parameters()).device):
        return Codebook(load_tokenizer(tokenizer, encoder.in_chans), encoder.strides[-1], encoder.in_chans)
