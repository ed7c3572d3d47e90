"""FCMAE gives the numbers of the official code, whose sparse convolutions ours stand in for, and reads its weights."""

import re

import pytest
import torch
from einops import rearrange

from models.encoders import released
from models.encoders.build import build_encoder
from models.encoders.weights import load_encoder
from models.mim.conv_head import ConvDecoder
from models.mim.hide import Skip
from models.mim.loss import l2
from models.mim.masker import hide_top
from models.mim.method import MIM
from models.targets.target import Pixels
from tests.official import Given, check, check_gradients, enter, golden, losses_with_gradients

FACTS, STATE, GIVEN, EXPECTED = golden("convnextv2_fcmae")
ARGS = FACTS["constructor"]["args"]
IMAGES, UNIT = GIVEN["imgs"], ARGS["patch_size"]
SIDES = [side // UNIT for side in IMAGES.shape[-2:]]


def fcmae(which, grn, normalize=True):
    """The official method on some of the fixture's images."""
    sizes = {"depths": tuple(ARGS["depths"]), "dims": tuple(ARGS["dims"])}
    encoder = build_encoder("convnextv2_tiny", ARGS.get("in_chans", 3), grn=grn, **sizes)
    target = Pixels(UNIT, encoder.in_chans, normalize)
    masker = Given(EXPECTED["mask"].unflatten(1, SIDES)[which], UNIT)
    head = ConvDecoder(encoder, target, ARGS["decoder_depth"], ARGS["decoder_embed_dim"])
    mim = MIM(masker, Skip(encoder), head, target, l2).eval()
    enter(mim, STATE)
    return mim


def test_masks():
    """Officially the cells of least noise are kept, so those of most are hidden."""
    cells = hide_top(GIVEN["noise"].unflatten(1, SIDES), FACTS["call"]["mask_ratio"], UNIT).cells
    check(FACTS, {"mask": cells.flatten(1)}, EXPECTED)


def test_a_batch_whose_norms_are_shared():
    """As the official sparse GRN is, over all visible places of the batch."""
    every = slice(None)
    found, losses = {}, losses_with_gradients(FACTS)
    assert losses and set(losses) <= {"loss_norm_pix_false", "loss_norm_pix_true"}
    for normalize in (False, True):
        mim, name = fcmae(every, "batch", normalize), f"loss_norm_pix_{str(normalize).lower()}"
        found[name] = mim({"image": IMAGES})["loss"]
        if name in losses:
            check_gradients(FACTS, losses[name], found[name], mim, "convnextv2", STATE)
    mask = mim.masker(IMAGES)
    features = mim.hide(IMAGES, mask)
    pred = rearrange(mim.head(features, mask), "b h w d -> b d h w")
    found |= {"encoder": features.maps[-1], "pred": pred[:, : EXPECTED["pred"].shape[1]]}
    check(FACTS, found, EXPECTED)


def test_images_by_themselves():
    """Norms of each image, in a batch and alone, are the official ones of an image that is its own batch."""
    mim = fcmae(slice(None), "image")
    check(FACTS, {"single_encoder": mim.hide(IMAGES, mim.masker(IMAGES)).maps[-1]}, EXPECTED)
    for grn in ("image", "batch"):
        losses = [fcmae(slice(i, i + 1), grn)({"image": IMAGES[i : i + 1]})["loss"] for i in range(len(IMAGES))]
        check(FACTS, {"single_loss_norm_pix_true": torch.stack(losses)}, EXPECTED)


def remapped(state):
    """What fine-tuning makes of a sparse state: the encoder alone, its kernels as weights."""
    kept = {}
    for key, value in state.items():
        if key.startswith("encoder."):
            key = re.sub(r"\.(ln|linear)\.", ".", key.removeprefix("encoder."))
            if key.endswith(".kernel"):
                side = round(len(value) ** 0.5)
                places = value.reshape(side, side, *value.shape[1:]).transpose(0, 1)
                value = places.permute(2, 0, 1)[:, None] if value.ndim == 2 else places.permute(3, 2, 0, 1)
            elif key.endswith(".bias"):
                value = value.flatten()
            kept[key.replace(".kernel", ".weight")] = value.clone()
    return kept


@pytest.mark.parametrize("layout", [lambda state: state, remapped], ids=["sparse", "remapped"])
def test_the_encoder_alone_is_dense_with_the_remapped_weights(layout, tmp_path):
    path = tmp_path / "fcmae.pt"
    torch.save({"model": layout(STATE)}, path)
    encoder = load_encoder(f"convnextv2:{path}")
    assert encoder.dims == ARGS["dims"] and encoder.in_chans == ARGS.get("in_chans", 3)
    check(FACTS, {"remapped_dense_features": encoder(IMAGES).maps[-1].mean((2, 3))}, EXPECTED)


def test_no_key_of_the_pretraining_is_the_encoders_by_mistake():
    rename = released.recognise(STATE, "convnextv2")[1].rename
    assert all(key.startswith("encoder.") == (rename(key) is not None) for key in STATE)


def test_a_missing_or_unread_key_fails():
    mim = fcmae(slice(None), "image")
    for key in STATE:
        with pytest.raises(ValueError, match="missing 1: |it has no |is missing"):
            enter(mim, {k: v for k, v in STATE.items() if k != key})
    for key in ("decoder.77.norm.bias", "encoder.stages.0.77.norm.ln.bias"):
        with pytest.raises(ValueError, match=r"unread 1: .*\.77\."):
            enter(mim, STATE | {key: torch.zeros(1)})
