"""Files of plain transformers, as each repository spells them, go in whole and compute what timm makes of them."""

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_patch_embed
from timm.models import eva as timm_eva
from timm.models import vision_transformer as timm_vit

from models.encoders import released
from models.encoders.build import build_encoder
from models.encoders.released.source import open_weights
from models.encoders.resize import resize_table
from models.encoders.weights import load_encoder, load_normalization, load_state
from models.mim.weights import load_method
from tests import plain_files, towers
from tests.plain_files import (
    SEED,
    beit3,
    decoder,
    deit3,
    dinov2,
    dinov3,
    eva,
    eva02,
    load,
    maskfeat,
    plain,
    some,
    stored,
)
from tests.towers import clip_file


def check_against(module, name, state, encoder, **args):
    """The encoder computes what timm's model does, into which timm's own converter put the same file."""
    model = timm.create_model(name, num_classes=0, global_pool="", **args).eval()
    theirs = module.checkpoint_filter_fn(dict(state), model)
    theirs = {re.sub(r"^(fc|layer)_norm\.", "norm.", key): value for key, value in theirs.items()}
    assert not model.load_state_dict(theirs, strict=False).missing_keys
    if not encoder.normed:
        model.norm = torch.nn.Identity()
    images = torch.randn(2, 3, *model.patch_embed.img_size, generator=SEED)
    with torch.no_grad():
        expected, found = model.forward_features(images), encoder(images)
    tokens = torch.cat([found.prefix, found.maps[-1].flatten(2).mT], 1)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


SMALL = {"embed_dim": 192, "num_heads": 3, "img_size": 56}
PLUS = {"embed_dim": 64, "num_heads": 2, "img_size": 64, "mlp_ratio": 4}
CASES = {  # name: (its file, timm's converter, model and arguments, origin, what the line says)
    "eva": (
        lambda: eva(depth=1, side=4), timm_eva, "eva_giant_patch14_224",
        {"depth": 1, "img_size": 56}, "eva", "16 heads",
    ),
    "eva tuned": (
        lambda: eva(192, side=6, hidden=768, tuned=True), timm_eva, "eva_giant_patch14_336",
        SMALL | {"mlp_ratio": 4, "img_size": 84}, "eva", "fc_norm 2",
    ),
    "eva02": (eva02, timm_eva, "eva02_base_patch14_224", {}, "eva", "buffers 6"),
    "eva02 small": (
        lambda: eva02(192, side=4, heads=3, packed=True), timm_eva, "eva02_tiny_patch14_224", SMALL, "eva", "lm_head 2",
    ),
    "eva02 tuned": (
        lambda: eva02(192, heads=3, packed=True, side=6, tuned=True), timm_eva, "eva02_tiny_patch14_336",
        SMALL | {"img_size": 84}, "eva", "fc_norm 2",
    ),
    "eva02 clip": (
        lambda: eva02(192, patch=16, side=14, heads=3, clip=True), timm_eva, "eva02_base_patch16_clip_224",
        SMALL | {"img_size": 224}, "eva", "text 2",
    ),
    "dinov2": (
        lambda: dinov2(192, side=4), timm_vit, "vit_base_patch14_dinov2", SMALL, "dinov2", "mask_token 1",
    ),
    "dinov2 registers": (
        lambda: dinov2(192, side=4, registers=4), timm_vit, "vit_small_patch14_reg4_dinov2", SMALL, "dinov2", "3 heads",
    ),
    "dinov2 giant": (
        lambda: dinov2(1536, 1, side=4, giant=True), timm_vit, "vit_giant_patch14_dinov2",
        {"depth": 1, "img_size": 56}, "dinov2", "24 heads",
    ),
    "dinov3": (dinov3, timm_eva, "vit_small_patch16_dinov3_qkvb", {"img_size": 224}, "dinov3", "buffers 3"),
    "dinov3 plus": (
        lambda: dinov3(64, heads=2, plus=True), timm_eva, "vit_small_plus_patch16_dinov3_qkvb", PLUS,
        "dinov3", "mask_token 1",
    ),
    "dinov3 satellite": (
        lambda: dinov3(1024, 1, heads=16, local=True, biases=False), timm_eva, "vit_large_patch16_dinov3",
        {"depth": 1, "img_size": 64}, "dinov3_sat493m", "local_cls_norm 2",
    ),
    "beit3": (lambda: beit3(side=4), timm_vit, "beit3_base_patch16_224", {"img_size": 64}, "beit3", "text"),
    "beit3 tuned": (
        lambda: beit3(192, side=4, tuned=True), timm_vit, "beit3_large_patch16_224",
        SMALL | {"img_size": 64}, "beit3", "fc_norm 2",
    ),
    "deit3": (deit3, timm_vit, "deit3_small_patch16_224", {"init_values": 1e-5}, "deit3", "DeiT III"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_official_file_computes_what_timm_makes_of_it(case, tmp_path):
    SEED.manual_seed(0)
    build, module, name, args, origin, told = CASES[case]
    state = build()
    encoder, line = load(state, tmp_path / "official.pth", None if origin.startswith("dino") else "model")
    assert f"({origin})" in line and told in line
    if origin == "deit3":
        module = Renamed
    check_against(module, name, state, encoder, **{"depth": 2} | args)


class Renamed:
    """timm's converter of DeiT III, which is one of ViTs with an option."""

    @staticmethod
    def checkpoint_filter_fn(state, model):
        return timm_vit.checkpoint_filter_fn(state, model, adapt_layer_scale=True)


PUBLISHED = {  # file, timm's name of what it holds, without a classifier
    "eva g": (lambda: eva(depth=40), "eva_giant_patch14_224"),
    "eva-02 Ti": (lambda: eva02(192, 12, heads=3, packed=True), "eva02_tiny_patch14_224"),
    "eva-02 S": (lambda: eva02(384, 12, heads=6, packed=True), "eva02_small_patch14_224"),
    "eva-02 B": (lambda: eva02(768, 12), "eva02_base_patch14_224"),
    "eva-02 L": (lambda: eva02(1024, 24, heads=16), "eva02_large_patch14_224"),
    "eva-02-clip B": (lambda: eva02(768, 12, 16, 14, clip=True), "eva02_base_patch16_clip_224"),
    "dinov2 S": (lambda: dinov2(384, 12), "vit_small_patch14_dinov2"),
    "dinov2 B": (lambda: dinov2(768, 12, registers=4), "vit_base_patch14_reg4_dinov2"),
    "dinov2 L": (lambda: dinov2(1024, 24), "vit_large_patch14_dinov2"),
    "dinov2 g": (lambda: dinov2(1536, 40, registers=4, giant=True), "vit_giant_patch14_reg4_dinov2"),
    "dinov3 B": (lambda: dinov3(768, 12, heads=12), "vit_base_patch16_dinov3_qkvb"),
    "dinov3 H+": (lambda: dinov3(1280, 32, heads=20, plus=True), "vit_huge_plus_patch16_dinov3_qkvb"),
    "beit3 B": (lambda: beit3(768, 12), "beit3_base_patch16_224"),
    "beit3 L": (lambda: beit3(1024, 24), "beit3_large_patch16_224"),
    "maskfeat B": (lambda: maskfeat(768, 12), "vit_base_patch16_224"),
    "maskfeat L": (lambda: maskfeat(1024, 24), "vit_large_patch16_224"),
    "mae L": (lambda: plain(1024, 24), "vit_large_patch16_224"),
    "mae H": (lambda: plain(1280, 32, 14, 16), "vit_huge_patch14_224"),
    "deit3 L": (lambda: deit3(1024, 24), "deit3_large_patch16_224"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_size_is_built_as_timm_has_it(name, tmp_path, monkeypatch):
    """Its tensors are all that timm's model of that size has, its heads as many; numbers take no memory here."""
    build, theirs = PUBLISHED[name]
    monkeypatch.setattr(plain_files, "some", lambda *shape: torch.zeros(()).expand(shape))
    found = open_weights(stored(build(), tmp_path / "official.pth"))
    with torch.device("meta"):
        ours = build_encoder(found.name, found.in_chans, **found.args)
        model = timm.create_model(theirs, num_classes=0, global_pool="")
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert found.name == theirs and shapes == {key: value.shape for key, value in found.state.items()}
    assert shapes == {f"vit.{key}": value.shape for key, value in model.state_dict().items()}
    heads = {part.num_heads for part in ours.modules() if hasattr(part, "num_heads")}
    assert heads == {part.num_heads for part in model.modules() if hasattr(part, "num_heads")}


def test_a_base_file_goes_in_whole_in_seconds(tmp_path):
    load(eva02(depth=12), tmp_path / "official.pth")


# what only some have


def test_the_norm_of_maskfeats_head_is_the_encoders(tmp_path):
    SEED.manual_seed(0)
    state, lines = maskfeat(128, patch=16, side=4), []
    path = stored(state, tmp_path / "official.pyth", "model_state")
    encoder, line = load(state, path, "model_state")
    assert "(maskfeat)" in line and "pred_head 2" in line and "hogs 1" in line
    model = timm.create_model("vit_base_patch16_224", img_size=64, embed_dim=128, depth=2, num_heads=2, num_classes=0)
    named = {key.replace("pred_head.transforms.0.0.", "norm."): value for key, value in state.items()}
    model.load_state_dict({key: named[key] for key in model.state_dict()})
    images = torch.randn(2, 3, 64, 64)
    tokens = model.eval().forward_features(images)[:, 1:]
    torch.testing.assert_close(encoder(images).maps[-1].flatten(2).mT, tokens, rtol=0, atol=1e-4)
    mim = load_method(path, log=lines.append, least=1)
    assert "decoder 3/3 tensors" in lines[1]
    guess = mim.head.cells(tokens.unflatten(1, (4, 4)))  # (B, 8, 8, 27)
    theirs = F.linear(tokens, state["pred_head.projections.0.weight"], state["pred_head.projections.0.bias"])
    expected = theirs.unflatten(2, (27, 2, 2)).unflatten(1, (4, 4)).permute(0, 1, 4, 2, 5, 3).reshape(2, 8, 8, 27)
    torch.testing.assert_close(guess, expected)


def test_eva_goes_into_its_method(tmp_path):
    state, lines = eva(64, patch=8, side=4, hidden=128, dim=16), []
    mim = load_method(
        stored(state, tmp_path / "eva.pt", "module"), log=lines.append, target=f"clip:{clip_file()}", least=1
    )
    assert "decoder 3/3 tensors" in lines[1] and torch.equal(mim.head.cells.linear.weight, state["lm_head.weight"])


def test_a_training_of_dinov2_holds_its_backbone_in_chunks(tmp_path):
    SEED.manual_seed(1)
    chunks = dinov2(64, 3, 14, 4, chunks=2)
    SEED.manual_seed(1)
    whole = dinov2(64, 3, 14, 4)
    encoder, line = load(chunks, tmp_path / "training.pth", "teacher")
    again, _ = load(whole, tmp_path / "backbone.pth", None)
    assert "dino_head 1" in line
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in encoder.state_dict().items())


def test_keys_of_dinov3_have_biases_only_where_they_are_masked(tmp_path):
    state = {key: value for key, value in dinov3(64, heads=2).items() if "bias_mask" not in key}
    with pytest.raises(ValueError, match="biases of keys"):
        load_encoder(stored(state, tmp_path / "official.pth"))


def test_rotary_angles_are_read_off_checked_or_said_to_be_placeholders(tmp_path):
    path, small = tmp_path / "eva02.pt", {"width": 64, "depth": 1, "side": 4, "heads": 2}
    for places in (4, 14, 16):
        found = open_weights(stored(eva02(**small, places=places), path))
        assert found.args["ref_feat_shape"] == (places, places) and found.args["num_heads"] == 2 and not found.remarks
    state = eva02(**small)
    turned = {"rope.freqs_cos": state["rope.freqs_cos"].flip(0), "rope.freqs_sin": state["rope.freqs_sin"].flip(0)}
    with pytest.raises(ValueError, match="rotary angles are not what this encoder computes"):
        load_encoder(stored(state | turned, path))
    for number in (0, 1):
        blank = {key: torch.full_like(value, number) for key, value in state.items() if "freqs" in key}
        encoder, line = load(state | blank, path)
        assert "assumed: the published rotary angles" in line
    assert encoder.plan["args"]["ref_feat_shape"] == (16, 16)
    state = dinov3(64, heads=2)
    with pytest.raises(ValueError, match="rotary angles"):
        load_encoder(stored(state | {"rope_embed.periods": state["rope_embed.periods"] * 3}, path))
    _, line = load(state | {"rope_embed.periods": torch.ones(8)}, path)
    assert "assumed: the published rotary angles" in line


def test_capi_is_refused_with_what_is_missing(tmp_path):
    key = "backbone.encoder.blocks.0.residual1.fn.q_proj.weight"
    with pytest.raises(ValueError, match="CAPI's: its norms are root mean squares.*registers") as error:
        load_encoder(stored({key: some(8, 8), "backbone.patch_embed.weight": some(8, 3, 2, 2)}, tmp_path / "capi.pth"))
    assert "\n" not in str(error.value)


# towers


@pytest.mark.parametrize("width, name, gelu", [(64, "clip", "quick"), (1280, "open_clip", "exact")])
@pytest.mark.parametrize("write", [towers.openai, towers.hugging, towers.timms, towers.bare])
def test_a_clip_tells_which_gelu_is_assumed(width, name, gelu, write, tmp_path):
    state = write(towers.random_tower(width=width, depth=1))
    encoder, line = load(state, tmp_path / "tower.pt")
    assert (
        f"({name})" in line
        and f"{gelu} GELU" in line
        and type(encoder.vit.blocks[0].mlp.act).__name__ == ("QuickGELU" if gelu == "quick" else "GELU")
    )
    assert load_normalization(str(tmp_path / "tower.pt")) == released.CLIP


@pytest.mark.parametrize("write, name", [(towers.slip, "slip"), (towers.dino, "dino")])
def test_slip_and_dino_tell_themselves(write, name, tmp_path):
    content = write(towers.random_tower(clip=False))
    torch.save(content, tmp_path / "tower.pth")
    lines = []
    encoder = load_encoder(str(tmp_path / "tower.pth"), log=lines.append)
    n = len(encoder.state_dict())
    assert f"({name}" in lines[0] and f"): encoder {n}/{n} tensors" in lines[0]
    assert load_normalization(str(tmp_path / "tower.pth")) == released.IMAGENET


# the images that it learned from


def test_normalization_is_the_origins_or_said_to_be_assumed(tmp_path):
    path = tmp_path / "weights.pth"
    beit = timm.create_model("beit_base_patch16_224", img_size=32, depth=1).state_dict()
    cases = [
        (eva(64, patch=8, side=2, hidden=128), released.CLIP, ""),
        (eva02(64, 1, side=2, heads=2), released.CLIP, ""),
        (dinov2(64, 1, side=2), released.IMAGENET, ""),
        (dinov3(64, 1, heads=2), released.IMAGENET, ""),
        (dinov3(1024, 1, heads=16, local=True), released.SATELLITE, ""),
        (beit3(64, 1, side=2), released.HALF, ""),
        (maskfeat(64, 1, side=2), released.IMAGENET, ""),
        (plain(64, 1, 14, side=2) | decoder(64, dim=32), released.CLIP, ""),  # EVA's ViT-L
        (beit, released.HALF, "mean and std of 0.5, as BEiT has"),
        (plain(64, 1, side=2), released.IMAGENET, "ImageNet's mean and std"),
    ]
    for state, expected, said in cases:
        stored(state, path)
        assert load_normalization(str(path)) == expected and said in ", ".join(open_weights(str(path)).remarks)
    stored(beit, path)
    assert load_normalization(f"beitv2:{path}") == released.IMAGENET and not open_weights(f"beitv2:{path}").remarks


# other shapes


@pytest.mark.parametrize("size", [224, (224, 320)])
def test_patches_and_positions_of_another_size(size, tmp_path):
    state = eva(64, side=16, hidden=128)
    encoder, line = load(state, tmp_path / "eva.pt", patch_size=16, img_size=size)
    grid = [side // 16 for side in ((size, size) if isinstance(size, int) else size)]
    assert f"resized: patches of 14 to 16 px, positions 16x16 to {grid[0]}x{grid[1]};" in line
    assert encoder.patch == 16 and encoder.vit.pos_embed.shape == (1, 1 + grid[0] * grid[1], 64)
    kernel = encoder.vit.patch_embed.proj.weight
    torch.testing.assert_close(kernel, resample_patch_embed(state["patch_embed.proj.weight"], [16, 16]))


def test_a_larger_patch_sees_in_a_larger_image_what_the_smaller_saw(tmp_path):
    state = plain(64, 1, 8, 4)
    small, _ = load(state, tmp_path / "vit.pth")
    large, line = load(state, tmp_path / "vit.pth", patch_size=16, img_size=64, in_chans=6)
    assert "patches of 8 to 16 px, 3 to 6 channels" in line and "positions" not in line
    images = torch.randn(2, 3, 32, 32)
    cells = images.unfold(2, 8, 8).unfold(3, 8, 8).flatten(0, 3)[:, None]  # FlexiViT stretches each patch by itself
    cells = F.interpolate(cells, 16, mode="bicubic", antialias=True)[:, 0].unflatten(0, (2, 3, 4, 4))
    images16 = cells.permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 64, 64)
    with torch.no_grad():
        expected, found = small.embed(images), large.embed(torch.cat([images16] * 2, 1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_bias_tables_of_a_grid_that_is_not_square():
    args = {"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
    wide, square = (build_encoder("beit_base_patch16_224", img_size=s, **args) for s in ((8, 32), (16, 16)))
    with torch.no_grad():
        rows = torch.arange(3.0).repeat_interleave(15)  # 2 x 8 places have 3 x 15 offsets: this tells the rows apart
        wide.tables[0][:45] = rows[:, None]
    line = load_state(square, wide.state_dict(), img_size=(8, 32))
    assert "bias tables 2x8 to 4x4" in line
    table = square.tables[0][:-3].unflatten(0, (7, 7))
    torch.testing.assert_close(table, table[:, :1].expand(-1, 7, -1))
    torch.testing.assert_close(table[3], torch.ones(7, 2))  # no offset stays no offset
    assert resize_table(torch.randn(45 + 3, 2), (2, 8), 3, (2, 8)).shape == (48, 2)


def test_an_overlapping_stem_is_not_resized():
    pair = [build_encoder("pvt_v2_b0", depths=(1,) * 4, embed_dims=(8,) * 4, num_heads=(1,) * 4) for _ in range(2)]
    pair[1].stem.proj.weight.data = pair[1].stem.proj.weight.data[..., :5, :5]
    with pytest.raises(ValueError, match="of other shape 1: stem.proj.weight"):
        load_state(pair[0], pair[1].state_dict())
