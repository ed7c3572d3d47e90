"""A pretraining checkpoint becomes a method by itself: encoder, decoder and all of its sizes are in the file."""

from inspect import signature

import pytest
import torch

from models.mim.recipes import METHODS
from models.mim.weights import load_method
from models.targets.target import HOG, Pixels
from tests.methods import BUILT, TRANSFORMER, built, rough_images
from tests.official import Given, check, golden, norm_layer, some
from util import checkpoint

NORMALIZATION = {"mean": [0.1], "std": [0.2], "size": [64, 64]}


def least(noise, ratio):
    """The cells of most noise are hidden, all but the first int(n * (1 - ratio)) of n."""
    return noise.argsort(1).argsort(1) >= int(noise.shape[1] * (1 - ratio))


def mae(facts, given, expected):
    args, patch = facts["constructor"]["args"], facts["constructor"]["args"]["patch_size"]
    told = {"heads": args["decoder_num_heads"]}, some(args, "num_heads") | {"norm_layer": norm_layer(args)}
    return *told, expected["mask"].bool(), patch, Pixels(patch, args["in_chans"], True), "loss_norm_pix_true"


def simmim(facts, given, expected):
    args, call = facts["constructor"]["args"], facts["call"]
    every, chans = call["cell_tokens"], args.get("in_chans", 3)
    unit = every * args["patch_size"]
    mask, changes = given["mask"][:, ::every, ::every].flatten(1).bool(), {}
    if "window_size" not in args:
        changes = some(args, "num_heads") | {"norm_layer": norm_layer(args)}
    return {"unit": unit}, changes, mask, unit, Pixels(min(unit, call["encoder_stride"]), chans, False), "loss"


def fastmim(facts, given, expected):
    args, unit, chans = facts["constructor"]["args"], facts["constructor"]["args"]["block_size"], 3
    options, changes = {"unit": unit, "heads": args["decoder_embed_dim"] // 32}, {}
    if "window_size" not in args:
        changes = some(args, "num_heads") | {"norm_layer": norm_layer(args)}
    target = HOG(8, chans, normalize=args["norm_pix_loss"])
    if args.get("mim_loss", "HOG") != "HOG":
        options["target"], target = "normalized", Pixels(args["patch_size"], chans, args["norm_pix_loss"])
    return options, changes, least(given["noise"], facts["call"]["mask_ratio"]), unit, target, "loss"


def fcmae(facts, given, expected):
    args = facts["constructor"]["args"]
    unit, target = args["patch_size"], Pixels(args["patch_size"], args.get("in_chans", 3), True)
    return {}, {"grn": "batch"}, expected["mask"].bool(), unit, target, "loss_norm_pix_true"


def hiera(facts, given, expected):
    args = facts["constructor"]["args"]
    changes = some(args, "num_heads", "q_pool", "mask_unit_size", "mask_unit_attn") | {"img_size": args["input_size"]}
    side = given["imgs"].shape[-2] * given["imgs"].shape[-1] / given["mask"].shape[1]
    unit = round(side**0.5)
    cell = round((unit**2 * given["mask"].shape[1] / expected["pred_mask"].shape[1]) ** 0.5)
    options = {"heads": args["decoder_num_heads"], "unit": unit, "cell": cell}
    return options, changes, ~given["mask"], unit, Pixels(cell, given["imgs"].shape[1], True), "loss"


def mixmim(facts, given, expected):
    args, n = facts["constructor"]["args"], given["noise"].numel()
    images = given["imgs"]
    unit = round((images.shape[-2] * images.shape[-1] / n) ** 0.5)
    hidden = given["noise"].flatten().argsort().argsort() < int(n * facts["call"]["mask_ratio"])
    target = Pixels(unit, images.shape[1], True)
    options = {"heads": args["decoder_num_heads"], "unit": unit}
    return options, {}, hidden.expand(len(images), -1), unit, target, "loss_norm_pix_true"


FIXTURES = {"mae": mae, "simmim_swin": simmim, "simmim_vit": simmim, "fastmim_vit": fastmim, "fastmim_swin": fastmim,
            "convnextv2_fcmae": fcmae, "hiera_mae": hiera, "mixmim": mixmim}  # fmt: skip


@pytest.mark.parametrize("name", FIXTURES)
def test_an_official_checkpoint_gives_the_official_loss(name, tmp_path):
    """Given is what only the constructor's arguments tell, heads and how pixels count; nobody names a layout."""
    facts, state, given, expected = golden(name)
    options, changes, mask, unit, target, loss = FIXTURES[name](facts, given, expected)
    torch.save({"model": state, "epoch": 7, "optimizer": {}}, tmp_path / "official.pth")
    lines = []
    mim = load_method(str(tmp_path / "official.pth"), lines.append, changes, **options)
    assert not any(part.training for part in mim.modules()) and len(lines) == 2
    for what, line in zip(("encoder", "decoder"), lines):
        part = line.partition(f"{what} ")[2].split()[0]  # such as 28/28
        assert len(set(part.split("/"))) == 1 and "missing" not in line and "unread" not in line
    sides = [side // unit for side in given["imgs"].shape[-2:]]
    assert type(target) is type(mim.target) and target.unit == mim.target.unit
    mim.masker, mim.target = Given(mask.unflatten(1, sides), unit), target
    check(facts, {loss: mim({"image": given["imgs"]})["loss"]}, expected)


@pytest.mark.parametrize("name", [name for name in BUILT if name not in ("eva", "milan", "beit", "beitv2")])
def test_a_run_of_ours_gives_its_loss(name, tmp_path):
    """The file tells the method and its arguments, the checkpoint beside it has the decoder."""
    mim = built(name, 1)
    with torch.no_grad():  # as if trained
        for parameter in mim.parameters():
            if parameter.requires_grad:  # fixed positions are no weights
                parameter.add_(0.01 * torch.randn_like(parameter))
    leave(tmp_path, mim, {"name": name, "args": small_decoder(name) | BUILT[name][2]})
    again = load_method(str(tmp_path))
    images = rough_images(4, 1)
    losses = []
    for method in (mim.eval(), again):
        torch.manual_seed(0)
        losses.append(method({"image": images})["loss"])
    assert torch.equal(*losses)


def small_decoder(name):
    return {key: value for key, value in TRANSFORMER.items() if key in signature(METHODS[name]).parameters}


def leave(folder, mim, method):
    """What a run leaves in its folder."""
    optimizer, scaler = torch.optim.SGD(mim.parameters(), 0.1), torch.amp.GradScaler("cpu", enabled=False)
    checkpoint.export(folder / "encoder.safetensors", mim.encoder, NORMALIZATION, method)
    checkpoint.save(folder, mim, optimizer, scaler, {"step": 1})


def test_a_file_without_a_decoder_is_refused(tmp_path):
    mim = built("mae")
    leave(tmp_path, mim, {"name": "mae", "args": {"depth": 1, "width": 32, "heads": 2, "unit": 16}})
    assert load_method(str(tmp_path)).head.project.out_features == 32
    (tmp_path / "last.pt").unlink()
    with pytest.raises(ValueError, match="holds an encoder alone, no decoder"):
        load_method(str(tmp_path))
    checkpoint.export(tmp_path / "encoder.safetensors", mim.encoder, NORMALIZATION)  # as fine-tuning does
    with pytest.raises(ValueError, match="holds an encoder alone, no decoder"):
        load_method(str(tmp_path))


def test_another_decoder_is_refused(tmp_path):
    leave(tmp_path, built("mae"), {"name": "mae", "args": {"depth": 1, "width": 32, "heads": 2}})
    with pytest.raises(ValueError, match=r"decoder does not fit: .*missing \d+: head.blocks.1.*allow_partial"):
        load_method(str(tmp_path), depth=2)
