"""Our methods, encoders and targets give the numbers of the official code, read from the folder MIM_GOLDEN.

Every size and option is in a fixture's JSON; a fixture that is not there is a failure.
"""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from models.encoders.build import build_encoder
from models.encoders.layers import sincos
from models.encoders.resize import resize_table
from models.encoders.weights import load_state
from models.mim.head import LinearHead
from models.mim.hide import Paint, Replace, Skip
from models.mim.loss import l1, l2
from models.mim.masker import BlockMasker, RandomMasker
from models.mim.method import MIM
from models.monitor.draw import draw
from models.targets.target import HOG, Pixels
from tests.official import (
    GOLDEN,
    Given,
    beit,
    check,
    check_classifier,
    check_gradients,
    classifier,
    decoder,
    enter,
    golden,
    losses_with_gradients,
    norm_layer,
    some,
    vit,
)

WINDOWS = ("img_size", "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "qkv_bias")


def swin(args, **more):
    return build_encoder("swin_base_patch4_window7_224", args.get("in_chans", 3), **(some(args, *WINDOWS) | more))


# methods


def test_mae():
    facts, state, given, expected = golden("mae")
    args, images = facts["constructor"]["args"], given["imgs"]
    patch = args["patch_size"]
    h, w = (side // patch for side in images.shape[-2:])
    found = {}
    for normalize in (False, True):
        encoder = vit(args, position="sincos")
        target = Pixels(patch, encoder.in_chans, normalize)
        masker = Given(expected["mask"].unflatten(1, (h, w)), patch)
        head = decoder(args, encoder, target, args["decoder_num_heads"])
        mim = MIM(masker, Skip(encoder), head, target, l2).eval()
        enter(mim, state)
        loss = mim({"image": images})["loss"]
        name = f"loss_norm_pix_{str(normalize).lower()}"
        found[name] = loss
        if name in losses_with_gradients(facts):
            check_gradients(facts, losses_with_gradients(facts)[name], loss, mim, "mae", state)
    mask = masker(images)
    features = mim.hide(images, mask)
    n = expected["latent"].shape[1] - 1
    kept = expected["ids_restore"].argsort(1)[:, :n]
    seen = rearrange(features.maps[-1], "b c h w -> b (h w) c").gather(1, kept[..., None].expand(-1, -1, encoder.width))
    found["latent"] = torch.cat([features.prefix, seen], 1)
    found["pred"] = rearrange(mim.head(features, mask), "b h w d -> b (h w) d")
    found["patchify"] = rearrange(Pixels(patch, encoder.in_chans, False)(images), "b h w d -> b (h w) d")
    check(facts, found, expected)
    empty = rearrange(features.maps[-1], "b c h w -> b h w c")[mask.cells]
    assert not empty.any()


def simmim_method(facts, state, given, encoder):
    """SimMIM around an encoder, masked as given, with the official weights."""
    args, call, images = facts["constructor"]["args"], facts["call"], given["imgs"]
    every = call["cell_tokens"]
    unit = every * args["patch_size"]
    assert encoder.strides[-1] == call["encoder_stride"]
    target = Pixels(min(unit, call["encoder_stride"]), encoder.in_chans, normalize=False)
    masker = Given(given["mask"][:, ::every, ::every], unit)
    assert torch.equal(masker(images).at(args["patch_size"]), given["mask"].bool())
    mim = MIM(masker, Replace(encoder), LinearHead(encoder, target), target, l1).eval()
    enter(mim, state)
    return mim


def check_simmim(facts, state, given, expected, mim):
    images = given["imgs"]
    loss = mim({"image": images})["loss"]
    for name, key in losses_with_gradients(facts).items():
        assert name == "loss"
        check_gradients(facts, key, loss, mim, "simmim", state)
    features = mim.hide(images, mim.masker(images))
    guess = mim.head(features, mim.masker(images))
    found = {"loss": loss, "z": features.maps[-1], "x_rec": draw(mim.target, guess, images)}
    check(facts, found, expected)


def test_simmim_swin():
    facts, state, given, expected = golden("simmim_swin")
    args = facts["constructor"]["args"]
    mim = simmim_method(facts, state, given, swin(args, patch_size=args["patch_size"]))
    check_simmim(facts, state, given, expected, mim)
    plain = mim.encoder(given["imgs"]).maps[-1].mean((2, 3))
    check(facts, {"plain_features": plain}, expected)


def test_simmim_vit():
    facts, state, given, expected = golden("simmim_vit")
    args = facts["constructor"]["args"]
    mim = simmim_method(facts, state, given, beit(args))
    check_simmim(facts, state, given, expected, mim)
    features = mim.encoder(given["imgs"])
    if args["use_mean_pooling"]:
        norm = norm_layer(args)(args["embed_dim"])
        norm.load_state_dict({key: state[f"encoder.fc_norm.{key}"] for key in ("weight", "bias")})
        found = {"plain_features": norm(features.maps[-1].mean((2, 3)))}
    else:
        found = {"plain_features": features.prefix[:, 0]}
    if "rel_pos_bias_head0" in expected:
        h, w = features.maps[-1].shape[-2:]
        found["rel_pos_bias_head0"] = mim.encoder.hints(h, w, 1, None)[0]["shared_rel_pos_bias"][0, 0]
    check(facts, found, expected)


def check_fastmim(facts, state, given, expected, encoder):
    args, images = facts["constructor"]["args"], given["imgs"]
    unit, sides = args["block_size"], [side // args["block_size"] for side in images.shape[-2:]]
    n = given["noise"].shape[1]
    kept = int(n * (1 - facts["call"]["mask_ratio"]))
    hidden = given["noise"].argsort(1).argsort(1) >= kept
    masker = Given(hidden.unflatten(1, sides), unit)
    if "mask" in expected:
        official = expected["mask"].reshape(len(images), *expected["mask"].shape[-2:]).bool()
        assert torch.equal(masker(images).at(unit * sides[0] // official.shape[1]), official)
    if args.get("mim_loss", "HOG") == "HOG":
        target = HOG(8, encoder.in_chans, normalize=args["norm_pix_loss"])
    else:
        target = Pixels(encoder.strides[-1], encoder.in_chans, normalize=args["norm_pix_loss"])
    head = decoder(args, encoder, target, args["decoder_embed_dim"] // 32, fill=False, positions=False)
    mim = MIM(masker, Paint(encoder), head, target, l2).eval()
    enter(mim, state)
    loss = mim({"image": images})["loss"]
    for key in losses_with_gradients(facts).values():
        check_gradients(facts, key, loss, mim, "fastmim", state)
    guess = mim.head(mim.hide(images, masker(images)), masker(images))
    split = encoder.strides[-1] // target.unit
    pred = rearrange(guess, "b (h p) (w q) d -> b (h w) (d p q)", p=split, q=split)
    check(facts, {"loss": loss, "pred": pred}, expected)


def test_fastmim_vit():
    facts, state, given, expected = golden("fastmim_vit")
    check_fastmim(facts, state, given, expected, vit(facts["constructor"]["args"], position="sincos"))


def test_fastmim_swin():
    facts, state, given, expected = golden("fastmim_swin")
    args = facts["constructor"]["args"]
    stem = state["encoder.patch_embed.proj.weight"].shape[-1]  # its "patch_size" is that of the last stage
    check_fastmim(facts, state, given, expected, swin(args, patch_size=stem, mlp_ratio=4.0))


# encoders and classifiers, by way of load_encoder


@pytest.mark.parametrize("name", ["mae_vit_global_pool", "mae_vit_cls"])
def test_mae_vit(name, tmp_path):
    facts, state, given, expected = golden(name)
    args = facts["constructor"]["args"]
    changes = some(args, "num_heads") | {"norm_layer": norm_layer(args)}
    task = classifier(facts, state, "mae", tmp_path, "mean" if args["global_pool"] else "cls", **changes)
    assert task.encoder.normed != args["global_pool"] and len(task.encoder.vit.blocks) == args["depth"]
    check_classifier(facts, task, given["imgs"], expected)


def test_simmim_vit_finetune(tmp_path):
    facts, state, given, expected = golden("simmim_vit_finetune")
    args = facts["constructor"]["args"]
    changes = some(args, "num_heads") | {"norm_layer": norm_layer(args)}
    task = classifier(facts, state, "simmim", tmp_path, "mean" if args["use_mean_pooling"] else "cls", **changes)
    assert len(task.encoder.tables) == args["depth"] * args["use_rel_pos_bias"] + args["use_shared_rel_pos_bias"]
    check_classifier(facts, task, given["imgs"], expected)


def test_convnextv2(tmp_path):
    facts, state, given, expected = golden("convnextv2")
    args = facts["constructor"]["args"]
    task = classifier(facts, state, "convnextv2", tmp_path, "mean")
    assert task.encoder.dims == args["dims"] and task.encoder.in_chans == args.get("in_chans", 3)
    check_classifier(facts, task, given["imgs"], expected)
    stages = {f"stage{i}": m for i, m in enumerate(task.encoder(given["imgs"]).maps) if f"stage{i}" in expected}
    check(facts, stages, expected)


# targets


def test_hog():
    facts, _, given, expected = golden("hog")
    done = 0
    for name, value in expected.items():
        found = re.fullmatch(r"(fastmim|slowfast)_pool(\d+)(?:_nbins(\d+))?(?:_gauss(\d+))?(_norm|_raw)?_(\d+)", name)
        if found is None:  # a label: see below
            continue
        family, pool, bins, window, kind, size = found.groups()
        bins, unit = int(bins or facts["constructor"][family]["nbins"]), int(pool)
        images = given[f"imgs{size}"]
        hog = HOG(unit, images.shape[1], bins, kind != "_raw", int(window or 0))
        if images.shape[-1] % unit:  # official code drops incomplete cells; ours refuses them, so they are completed
            images = F.pad(images, [0, -images.shape[-1] % unit, 0, -images.shape[-2] % unit], mode="reflect")
        cells = rearrange(hog(images), "b h w (c n) -> b c n h w", n=bins)
        cells = cells[..., : value.shape[-2], : value.shape[-1]].reshape(value.shape)
        torch.testing.assert_close(cells, value, atol=1e-5, rtol=1e-5, msg=name)
        done += 1
    assert done >= 4


def test_labels_of_maskfeat():
    facts, _, given, expected = golden("hog")
    for name, value in expected.items():
        found = re.fullmatch(r"(maskfeat|pixel)_label_patch(\d+)_(\d+)(_norm)?", name)
        if found is None:
            continue
        what, patch, size = found[1], int(found[2]), found[3]
        images, hidden = given[f"imgs{size}"], given[f"mask_patch{patch}_{size}"]
        if what == "maskfeat":
            unit = facts["constructor"]["slowfast"]["pool"]
            cells = HOG(unit, images.shape[1], facts["constructor"]["slowfast"]["nbins"])(images)
            order, k = "b (h p) (w q) d -> b (h w) (d p q)", patch // unit
            labels = rearrange(cells, order, p=k, q=k)[hidden]
        else:
            cells = Pixels(patch, images.shape[1], normalize=found[4] is not None)(images)
            labels = rearrange(cells, "b h w (p q c) -> b (h w) (c p q)", p=patch, q=patch)[0][hidden[0]]
            labels = labels[:, : value.shape[1]]
        torch.testing.assert_close(labels, value, atol=1e-5, rtol=1e-4, msg=name)


# positions


def test_sincos():
    _, _, _, expected = golden("pos_embed")
    tables = [name for name in expected if name.startswith("sincos_")]
    assert tables
    for name in tables:
        dim, side, cls = re.fullmatch(r"sincos_d(\d+)_g(\d+)_cls_(\w+)", name).groups()
        table = sincos(int(side), int(side), int(dim)).flatten(0, 1)
        if cls == "true":
            table = torch.cat([torch.zeros(1, int(dim)), table])
        torch.testing.assert_close(table, expected[name], atol=1e-6, rtol=0)


def test_positions_on_another_grid():
    facts, _, given, expected = golden("pos_embed")
    for old, new in facts["config"]["interp"]:
        table, wanted = given[f"pos_embed_{old}"], expected[f"interp_{old}_to_{new}"]
        size = {"patch_size": 4, "embed_dim": table.shape[2], "depth": 1, "num_heads": 1}
        source, encoder = (build_encoder("vit_base_patch16_224", img_size=4 * side, **size) for side in (old, new))
        load_state(encoder, source.state_dict() | {"vit.pos_embed": table})
        torch.testing.assert_close(encoder.vit.pos_embed.detach(), wanted, atol=1e-6, rtol=0)  # when loading
        load_state(source, encoder.state_dict() | {"vit.pos_embed": table})
        _, places = source.prefix_and_position(new, new)
        torch.testing.assert_close(places.detach(), wanted[:, 1:], atol=1e-6, rtol=0)  # when running


def test_relative_positions_of_another_window():
    facts, _, given, expected = golden("pos_embed")
    for old, new in facts["config"]["rpb"]:
        for kind, extra in (("swin", 0), ("vit", 3)):
            table = resize_table(given[f"rpb_{kind}_w{old}"], (new, new), extra)
            wanted = expected[f"rpb_{kind}_w{old}_to_w{new}"]
            torch.testing.assert_close(table, wanted, atol=1e-5, rtol=0)


# masks


def test_simmim_masks():
    for run in json.loads((GOLDEN / "simmim_masks.json").read_text())["runs"]:
        args, side = run["args"], run["cells_per_side"]
        masker = RandomMasker(args["mask_patch_size"], args["mask_ratio"])
        mask = masker(torch.zeros(3, 3, args["input_size"], args["input_size"]))
        assert mask.count == run["mask_count_cells"] and mask.cells.shape == (3, side, side)
        for official in [*run["masks"], *(["".join(str(int(x)) for x in row) for row in m] for m in mask.cells)]:
            assert sum(row.count("1") for row in official) == run["mask_count_cells"]
        tokens = args["input_size"] // args["model_patch_size"]
        assert mask.at(args["model_patch_size"]).shape == (3, tokens, tokens)


def frequencies(masks):
    """How often corners, middles of edges, and the centre are hidden."""
    often = masks.float().mean(0)
    often = torch.stack([often.rot90(k) for k in range(4)]).mean(0)
    n = len(often)
    low, high = (n - 1) // 2, n // 2 + 1
    return often[0, 0].item(), often[0, low:high].mean().item(), often[low:high, low:high].mean().item()


def borders(masks):
    """How many neighbours in a mask differ: few, where it is of few and large blocks."""
    cells = masks.float()
    return (cells.diff(dim=1).abs().sum((1, 2)) + cells.diff(dim=2).abs().sum((1, 2))).mean().item()


def test_beit_masks():
    facts = json.loads((GOLDEN / "beit_masks.json").read_text())
    runs = [run for run in facts.values() if isinstance(run, dict) and "statistics" in run]
    assert runs
    for run in runs:
        args, statistics = run["args"], run["statistics"]
        side, wanted = args["input_size"], args["num_masking_patches"]
        options = {"least": args.get("min_num_patches", 4), "most": args.get("max_num_patches")}
        options |= {"aspect": args.get("min_aspect", 0.3)}
        torch.manual_seed(0)
        mask = BlockMasker(16, wanted / side**2, **options)(torch.zeros(2000, 1, 16 * side, 16 * side))
        counts = mask.cells.sum((1, 2))
        assert mask.count == wanted and (counts == wanted).all()  # BEiT stops short of it now and then
        assert 0 <= wanted - statistics["masked_patches"]["mean"] < 0.1 * wanted
        # three standard errors of their 1,000 draws, and what the cells that BEiT leaves out may add
        for ours, theirs in zip(frequencies(mask.cells), statistics["mask_frequency_corner_edge_centre"]):
            assert ours == pytest.approx(theirs, abs=0.03 + 3 * (theirs * (1 - theirs) / statistics["draws"]) ** 0.5)
        rows = [[[int(cell) for cell in row] for row in m] for seed in run["masks"] for m in seed["masks"]]
        assert borders(mask.cells) == pytest.approx(borders(torch.tensor(rows)), rel=0.4)  # theirs: a handful of masks
