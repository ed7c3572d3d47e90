"""Hiera and its pretraining give the numbers of the official code, read from the folder MIM_GOLDEN."""

import torch
from einops import rearrange

from models.encoders.build import build_encoder
from models.mim.head import FuseDecoder
from models.mim.hide import Skip
from models.mim.loss import l2
from models.mim.method import MIM
from models.targets.target import Pixels
from tests.official import Given, check, check_classifier, check_gradients, classifier, enter, golden, some

UNTOLD = ("num_heads", "q_pool", "mask_unit_size", "mask_unit_attn")  # by the tensors of a checkpoint
SIZE = ("embed_dim", "stages", "mlp_ratio", *UNTOLD)


def test_hiera_mae():
    facts, state, given, expected = golden("hiera_mae")
    args, images = facts["constructor"]["args"], given["imgs"]
    encoder = build_encoder("hiera_base_224", images.shape[1], args["input_size"], **some(args, *SIZE))
    b, _, height, width = images.shape
    unit, stride = encoder.mask_unit, encoder.strides[-1]
    rows, columns = height // unit, width // unit
    target = Pixels(stride, encoder.in_chans, normalize=True)
    size = {
        name: args[f"decoder_{key}"]
        for name, key in [("depth", "depth"), ("width", "embed_dim"), ("heads", "num_heads")]
    }
    head = FuseDecoder(encoder, target, mlp_ratio=args.get("mlp_ratio", 4.0), **size)
    mim = MIM(Given(~given["mask"].unflatten(1, (rows, columns)), unit), Skip(encoder), head, target, l2).eval()
    enter(mim, state)
    loss, mask = mim({"image": images})["loss"], mim.masker(images)
    check_gradients(facts, "grad_l2_of_loss", loss, mim, "hiera", state)

    features = mim.hide(images, mask)
    fused = rearrange(head.read(features), "b (h p) (w q) c -> b (h w) p q c", h=rows, w=columns)
    hidden = mask.at(stride)
    assert torch.equal(hidden.flatten(1), ~expected["pred_mask"])
    found = {"loss": loss, "latent": fused[given["mask"]].view_as(expected["latent"])}
    for name, cells in [("pred", head(features, mask)), ("label", target(images))]:
        rows_of_hidden = rearrange(cells, "b h w (y x c) -> b h w (c y x)", y=stride, x=stride)[hidden]
        found[name] = rows_of_hidden[:, : expected[name].shape[1]]
    check(facts, found, expected)


def test_hiera(tmp_path):
    facts, state, given, expected = golden("hiera")
    args, images = facts["constructor"]["args"], given["imgs"]
    rename = {"head.projection.weight": "head.weight", "head.projection.bias": "head.bias"}
    state = {rename.get(key, key): value for key, value in state.items()}
    changes = some(args, *UNTOLD) | {"img_size": args["input_size"]}
    task = classifier(facts, state, "hiera", tmp_path, "mean", **changes)
    check_classifier(facts, task, images, expected)
    stages = {f"stage{i}": rearrange(m, "b c h w -> b h w c") for i, m in enumerate(task.encoder(images).maps)}
    check(facts, stages | {"probs": task.logits(images).softmax(1)}, expected)
