"""Whole methods for transformers, decoder included: MAE, SimMIM of a Swin, Hiera, BEiT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn

from models.encoders import released
from models.encoders.layers import sincos
from models.encoders.released.heads import ORDER, method_key
from models.export.hf import describe, fill, quiet, save

if TYPE_CHECKING:
    from models.export.formats import Facts


def write_method(mim: Any, facts: Facts, folder: Path) -> None:
    """A method's weights, encoder and decoder, as transformers' model for pretraining; `facts.method` names it.

    ValueError in one line if transformers has no such method, or not with these options.
    """
    name = (facts.method or {}).get("name", "without a name")
    if name not in METHODS:
        raise ValueError(f"transformers has no method {name}; it has {', '.join(METHODS)}")
    with quiet() as transformers:
        model = METHODS[name](transformers, *describe(mim.encoder, facts), mim)
        origin, family, _ = released.recognise(model.state_dict())
        ours = {key: value for key, value in mim.state_dict().items() if not key.startswith("target.")}
        rename = lambda key: method_key(origin, key, family.rename)
        fill(model, ours, rename, lambda key, value: in_their_order(mim, origin, key, value))
        save(model, facts, folder)


def in_their_order(mim: Any, origin: str, key: str, value: Tensor) -> Tensor:
    """The rows of a decoder's last layer, from the order of `Cells` to that of an origin."""
    if not key.startswith("head.cells.linear.") or origin not in ORDER:
        return value
    sizes = dict.fromkeys("pq", mim.head.cells.split) | dict.fromkeys("yx", mim.target.unit)
    return rearrange(value, f"(p q y x c) ... -> {ORDER[origin]} ...", **sizes)


def mae(transformers: Any, name: str, args: dict, mim: Any) -> nn.Module:
    refuse(name != "ViT", f"MAE of a {name}")
    refuse(not isinstance(args["image_size"], int), "MAE of images that are not square")
    refuse(mim.masker.unit != mim.encoder.patch, f"MAE that hides other than single patches of {mim.encoder.patch} px")
    refuse_other_targets(mim, mim.encoder.patch)
    args |= decoder(mim, "decoder_num_hidden_layers", "decoder_num_attention_heads")
    args |= {"decoder_intermediate_size": mim.head.blocks[0].mlp.fc1.out_features}
    model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**args, norm_pix_loss=mim.target.normalize))
    with torch.no_grad():
        table = sincos(*mim.encoder.grid, args["decoder_hidden_size"]).flatten(0, 1)
        model.decoder.decoder_pos_embed.zero_()[:, 1:].copy_(table)
    return model


def hiera(transformers: Any, name: str, args: dict, mim: Any) -> nn.Module:
    refuse(name != "Hiera", f"Hiera's decoder over a {name}")
    refuse(mim.masker.unit != mim.encoder.mask_unit, f"Hiera that hides other than {mim.encoder.mask_unit} px at once")
    refuse_other_targets(mim, mim.encoder.strides[-1])
    args |= decoder(mim, "decoder_depth", "decoder_num_heads")
    config = transformers.HieraConfig(**args, normalize_pixel_loss=mim.target.normalize)
    return transformers.HieraForPreTraining(config)


def simmim(transformers: Any, name: str, args: dict, mim: Any) -> nn.Module:
    refuse(name not in ("Swin", "Swinv2"), f"SimMIM of a {name}")
    refuse(not isinstance(args["image_size"], int), "SimMIM of images that are not square")
    refuse_other_targets(mim, mim.target.unit)
    refuse(mim.target.normalize, "SimMIM of normalised pixels")
    config = getattr(transformers, f"{name}Config")(**args)
    return getattr(transformers, f"{name}ForMaskedImageModeling")(config)


def beit(transformers: Any, name: str, args: dict, mim: Any) -> nn.Module:
    refuse(name != "Beit", f"BEiT of a {name}")
    refuse(not mim.encoder.normed, "BEiT without a final norm")
    args |= {"use_mean_pooling": True}  # the norm is the head's there
    config = transformers.BeitConfig(**args, use_mask_token=True, vocab_size=mim.target.dim)
    return transformers.BeitForMaskedImageModeling(config)


METHODS: dict[str, Callable[..., nn.Module]] = {method.__name__: method for method in (mae, hiera, simmim, beit)}


def decoder(mim: Any, depth: str, heads: str) -> dict:
    """The sizes of a transformer that guesses, by what a config calls them."""
    blocks = mim.head.blocks
    return {
        depth: len(blocks),
        heads: blocks[0].attn.num_heads,
        "decoder_hidden_size": mim.head.project.out_features,
        "mask_ratio": mim.masker.ratio,
    }


def refuse_other_targets(mim: Any, unit: int) -> None:
    """ValueError unless a method guesses pixels in cells of `unit` px."""
    target = type(mim.target).__name__
    refuse(target != "Pixels" or mim.target.unit != unit, f"a decoder that guesses {target} of {mim.target.unit} px")


def refuse(wrong: bool, what: str) -> None:
    if wrong:
        raise ValueError(f"transformers has no {what}")
