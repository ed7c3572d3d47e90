"""MixMIM gives the numbers of the official code, read from the folder MIM_GOLDEN."""

import torch
import torch.nn.functional as F
from einops import rearrange

from models.encoders.layers import sincos
from models.encoders.weights import load_encoder
from models.mim.head import Unmix
from models.mim.hide import Mix
from models.mim.loss import l2, over_all
from models.mim.method import MIM
from models.targets.target import Pixels
from tests.official import (
    Given,
    check,
    check_classifier,
    check_gradients,
    classifier,
    decoder,
    enter,
    golden,
    losses_with_gradients,
)


def mixmim_method(facts, state, given, encoder, normalize):
    """MixMIM around an encoder, masked by the fixture's noise, with the official weights."""
    args, images, unit = facts["constructor"]["args"], given["imgs"], encoder.strides[-1]
    h, w = (side // unit for side in images.shape[-2:])
    hidden = given["noise"].flatten().argsort().argsort() < int(h * w * facts["call"]["mask_ratio"])
    masker = Given(hidden.view(1, h, w).expand(len(images), -1, -1), unit)
    target = Pixels(unit, encoder.in_chans, normalize)
    sizes = {
        f"decoder_{ours}": args[f"decoder_{theirs}"] for ours, theirs in (("embed_dim", "dim"), ("depth", "depth"))
    }
    guess = decoder({**args, **sizes}, encoder, target, args["decoder_num_heads"])
    mim = MIM(masker, Mix(encoder), Unmix(guess, target), target, l2, over_all).eval()
    enter(mim, state)
    return mim


def test_mixmim(tmp_path):
    facts, state, given, expected = golden("mixmim")
    images, found = given["imgs"], {}
    torch.save({"model": state}, tmp_path / "official.pth")
    for normalize in (False, True):
        encoder = load_encoder(f"mixmim:{tmp_path / 'official.pth'}")
        mim = mixmim_method(facts, state, given, encoder, normalize)
        name = f"loss_norm_pix_{str(normalize).lower()}"
        found[name] = mim({"image": images})["loss"]
        if name in losses_with_gradients(facts):
            check_gradients(facts, losses_with_gradients(facts)[name], found[name], mim, "mixmim", state)
    mask = mim.masker(images)
    features = mim.hide(images, mask)
    found |= {f"mask_s{i + 1}": mask.at(s)[:1].flatten(1)[..., None] for i, s in enumerate(encoder.strides)}
    found["z"] = rearrange(features.maps[-1], "b c h w -> b (h w) c")
    both = torch.cat([mim.head.head(features, side) for side in (mask, ~mask)])
    found["x_rec"] = rearrange(both, "b h w d -> b (h w) d")[..., : expected["x_rec"].shape[-1]]
    check(facts, found, expected)


def test_mixmim_finetune(tmp_path):
    facts, state, given, expected = golden("mixmim_finetune")
    args = facts["constructor"]["args"]
    task = classifier(facts, state, "mixmim", tmp_path, "mean")
    stages = task.encoder.backbone.layers
    assert [len(stage.blocks) for stage in stages] == args["depths"]
    assert [stage.blocks[0].attn.num_heads for stage in stages] == args["num_heads"]
    check_classifier(facts, task, given["imgs"], expected)


def test_a_checkpoint_of_another_image_size_has_stretched_positions(tmp_path):
    """As fine-tuning at 384 px leaves them: 224 px have a grid of 56 places."""
    facts, state, given, _ = golden("mixmim_finetune")
    images, path, lines = given["imgs"], tmp_path / "official.pth", []
    n, width = state["absolute_pos_embed"].shape[1:]
    table = sincos(56, 56, width).movedim(-1, 0)[None]
    grid = tuple(side // facts["constructor"]["args"]["patch_size"] for side in images.shape[-2:])
    table = F.interpolate(table, grid, mode="bicubic", align_corners=False)
    torch.save({"model": state | {"absolute_pos_embed": table.flatten(2).mT}}, path)
    encoder = load_encoder(f"mixmim:{path}")
    with torch.no_grad():
        moved = encoder.embed(images) + table[0].movedim(0, -1) - sincos(*grid, width)
        plain = load_encoder(f"mixmim:{path}", pos_size=None)
        torch.testing.assert_close(encoder(images).maps[-1], plain.encode(moved).maps[-1])
    torch.save({"model": state | {"absolute_pos_embed": torch.rand(1, n, width)}}, path)
    load_encoder(str(path), log=lines.append)
    assert "absolute_pos_embed, which is not what is computed in its place" in lines[0]
