"""MaskFeat's loss is the official one on the official labels, and its blocks are as many as published."""

import re

import pytest
import torch
from einops import rearrange

from models.encoders.build import build_encoder
from models.mim.head import LinearHead
from models.mim.hide import Replace, cover
from models.mim.loss import l2
from models.mim.masker import BlockMasker
from models.mim.method import MIM
from models.mim.recipes import maskfeat
from models.targets.target import HOG
from tests.official import Given, golden


def test_loss_on_official_labels():
    """The mean over all numbers of hidden patches, guessed from a token that stands in before positions are added."""
    facts, _, given, expected = golden("hog")
    unit, bins = facts["constructor"]["slowfast"]["pool"], facts["constructor"]["slowfast"]["nbins"]
    done = 0
    for name, labels in expected.items():
        found = re.fullmatch(r"maskfeat_label_patch(\d+)_(\d+)", name)
        if found is None:
            continue
        patch, size = (int(number) for number in found.groups())
        images, hidden = given[f"imgs{size}"], given[f"mask_patch{patch}_{size}"].bool()
        torch.manual_seed(0)
        args = {"img_size": images.shape[-2:], "patch_size": patch, "embed_dim": 24, "depth": 1, "num_heads": 2}
        encoder = build_encoder("vit_base_patch16_224", images.shape[1], **args).eval()
        h, w = (side // patch for side in images.shape[-2:])
        truth = HOG(unit, images.shape[1], bins)
        masker = Given(hidden.unflatten(1, (h, w)), patch)
        mim = MIM(masker, cover(encoder), LinearHead(encoder, truth), truth, l2).eval()
        torch.nn.init.normal_(mim.hide.fill.token)
        tokens = torch.where(hidden[..., None], mim.hide.fill.token, encoder.embed(images).flatten(1, 2))
        features = encoder.encode(tokens.unflatten(1, (h, w))).maps[-1]
        guess = mim.head.cells(rearrange(features, "b c h w -> b h w c"))
        k = patch // unit
        guess = rearrange(guess, "b (h p) (w q) d -> b (h w) (d p q)", p=k, q=k)[hidden]
        loss = mim({"image": images})["loss"]
        torch.testing.assert_close(loss, (guess - labels).square().mean(), atol=1e-5, rtol=1e-5)
        done += 1
    assert done


def test_the_published_parts():
    """78 of 196 patches in blocks of at least 15; 2 x 2 cells of 27 numbers for each patch."""
    args = {"img_size": 224, "embed_dim": 24, "depth": 1, "num_heads": 2}
    mim = maskfeat(build_encoder("vit_base_patch16_224", **args), ratio=0.3979)
    assert mim.masker(torch.zeros(2, 3, 224, 224)).count == 78 and mim.masker.least == 15 == 78 // 5
    kinds = [type(part) for part in (mim.masker, mim.hide, mim.head, mim.target)]
    assert kinds == [BlockMasker, Replace, LinearHead, HOG] and mim.distance is l2
    assert mim.head.cells.linear.out_features == 108
    assert {module.eps for module in mim.modules() if isinstance(module, torch.nn.LayerNorm)} == {1e-6}


def test_a_stage_of_larger_cells():
    """A pyramid hides cells of its last stride, and guesses 4 x 4 HOG cells in each."""
    args = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 32), "num_heads": (1, 1, 2, 2)}
    mim = maskfeat(build_encoder("pvt_v2_b0", **args), least=2)
    assert mim.masker.unit == 32 and mim({"image": torch.randn(2, 3, 96, 64)})["loss"].isfinite()
    with pytest.raises(ValueError, match="12 px"):
        maskfeat(mim.encoder, cell=12)
