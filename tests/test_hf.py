"""transformers, both ways: what it writes goes in whole and gives its features; it loads ours and gives our losses."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from timm.models.beit import gen_relative_position_index
from timm.models.swin_transformer import get_relative_position_index
from torch import nn

from models.encoders import released
from models.encoders.build import build_encoder
from models.encoders.grid import Mask
from models.encoders.layers import sincos
from models.encoders.released import hf as hf_keys
from models.encoders.weights import load_encoder, load_normalization
from models.export import hf
from models.export.hf_method import write_method
from models.mim.weights import load_method
from tests.methods import built, small
from tests.official import Given
from tests.test_weights import random

PLAIN = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = PLAIN | {"intermediate_size": 72, "layer_norm_eps": 1e-3}  # an epsilon that is seen
ROUND = {key: value for key, value in WIDE.items() if key != "intermediate_size"}  # DINOv2 has a ratio instead
SWIN = {"image_size": 64, "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "window_size": 4, "encoder_stride": 8}
STAGES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 2, 1, 1]}
HIERA = {"image_size": [64, 64], "embed_dim": 8, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 4, 8]}
DECODER = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
DECODER |= {"decoder_intermediate_size": 64, "norm_pix_loss": True}
FUSED = {"decoder_hidden_size": 16, "decoder_depth": 1, "decoder_num_heads": 2, "num_query_pool": 2}
TOWER = {"vision_config": WIDE | {"hidden_act": "gelu"}}
TOWER["text_config"] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
BEIT = {"use_shared_relative_position_bias": True, "use_mask_token": True, "vocab_size": 9}
THEIRS = {  # what transformers wrote: the class of the model and its config
    "vit": ("ViTModel", WIDE),
    "vit classifier": ("ViTForImageClassification", WIDE),
    "mae": ("ViTMAEForPreTraining", WIDE | DECODER),
    "mae encoder": ("ViTMAEModel", WIDE),
    "beit": ("BeitModel", WIDE | {"use_relative_position_bias": True}),
    "beit to the class": ("BeitModel", WIDE | {"use_shared_relative_position_bias": True, "use_mean_pooling": False}),
    "beit pretrained": ("BeitForMaskedImageModeling", WIDE | BEIT),
    "swin": ("SwinModel", SWIN),
    "swin classifier": ("SwinForImageClassification", SWIN),
    "simmim": ("SwinForMaskedImageModeling", SWIN),
    "swinv2": ("Swinv2Model", SWIN | {"pretrained_window_sizes": [3, 2]}),
    "swinv2 pretrained": ("Swinv2ForMaskedImageModeling", SWIN),
    "convnext": ("ConvNextModel", STAGES),
    "convnextv2": ("ConvNextV2Model", STAGES),
    "convnextv2 classifier": ("ConvNextV2ForImageClassification", STAGES),
    "hiera": ("HieraModel", HIERA),
    "hiera pretrained": ("HieraForPreTraining", HIERA | FUSED),
    "clip": ("CLIPVisionModel", WIDE),
    "clip of quick gelu": ("CLIPVisionModel", WIDE | {"hidden_act": "quick_gelu"}),
    "clip with text": ("CLIPModel", TOWER),
    "dinov2": ("Dinov2Model", ROUND),
    "dinov2 with registers": ("Dinov2WithRegistersModel", ROUND | {"use_swiglu_ffn": True}),
}
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]


def trained(model, std=0.2):
    """A model of transformers as if trained, with its fixed tables as they begin."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=std)
    return model.eval()


def their_model(name):
    architecture, config = THEIRS[name]
    architecture = getattr(transformers, architecture)
    return trained(architecture(architecture.config_class(**config)))


def base_of(model):
    base = getattr(model, "vision_model", None) or getattr(model, model.base_model_prefix, model)
    return base.eval()


@torch.no_grad()
def their_map(model, images, grid):
    """The last map of a model of transformers, with its final norm wherever that is."""
    base, told = base_of(model), {}
    if isinstance(base, transformers.ViTMAEModel):  # it would hide and shuffle
        base.config.mask_ratio, told["noise"] = 0.0, torch.arange(float(grid[0] * grid[1])).expand(len(images), -1)
    if isinstance(base, transformers.HieraModel):
        base.embeddings.patch_embeddings.is_mae = False
        return base(images, output_hidden_states=True).reshaped_hidden_states[-1].movedim(-1, 1)
    x = base(images, **told).last_hidden_state
    if x.ndim == 4:
        return x
    outer = [model.layernorm] if isinstance(model, transformers.BeitForMaskedImageModeling) else []
    for norm in [base.post_layernorm] if hasattr(base, "post_layernorm") else outer:
        x = norm(x)
    return x[:, x.shape[1] - grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)


@pytest.mark.parametrize("written", ["as version 4 does", "in memory of version 5"])
@pytest.mark.parametrize("name", THEIRS)
def test_what_transformers_wrote_goes_in_whole_and_gives_its_features(name, written, tmp_path):
    model, lines = their_model(name), []
    model.save_pretrained(tmp_path)
    if written != "as version 4 does":
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    encoder = load_encoder(str(tmp_path), log=lines.append)
    n = len(encoder.state_dict())
    assert f"encoder {n}/{n} tensors" in lines[0] and not {"resized", "fresh", "missing"} & set(lines[0].split())
    side = encoder.plan["args"].get("img_size", 64)
    images = torch.randn(2, 3, *(2 * [side] if isinstance(side, int) else side))
    with torch.no_grad():
        found = encoder(images).maps[-1]
    expected = their_map(model, images, found.shape[-2:])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * expected.abs().max().item())


@pytest.mark.parametrize("decoder", ["decoder_layers.", "decoder_encoder.layer."])  # version 4's name, and 5.24's slip
@torch.no_grad()
def test_a_decoder_of_transformers_goes_into_a_method(decoder, tmp_path):
    model = their_model("mae")
    width = model.config.decoder_hidden_size
    model.decoder.decoder_pos_embed[:, 1:] = sincos(4, 4, width).flatten(0, 1)  # on the hub they are MAE's
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state = {re.sub(r"decoder_(?:layers|encoder\.layer)\.", decoder, key): value for key, value in state.items()}
    assert any(f"decoder.{decoder}0.attention.attention.query." in key for key in state)
    save_file(state, tmp_path / "model.safetensors")
    lines = []
    mim = load_method(str(tmp_path), log=lines.append)
    assert "decoder 19/19 tensors" in lines[1] and mim.masker.ratio == 0.75 and mim.target.normalize
    images, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    mim.masker = Given(hidden_by(noise, 0.75, (4, 4)), 8)
    assert model(images, noise=noise).loss.item() == pytest.approx(mim({"image": images})["loss"].item(), abs=1e-5)


@pytest.mark.parametrize(
    "name, key, side",
    [
        ("swin", "encoder.layers.0.blocks.1.attention.self.relative_position_index", 4),
        ("beit", "encoder.layer.1.attention.attention.relative_position_bias.relative_position_index", 4),
    ],
)
def test_buffers_of_older_files_are_known(name, key, side, tmp_path):
    their_model(name).save_pretrained(tmp_path)
    index = get_relative_position_index(side, side) if name == "swin" else gen_relative_position_index((side, side))
    state, lines = load_file(tmp_path / "model.safetensors"), []
    save_file(state | {key: index}, tmp_path / "model.safetensors")
    load_encoder(str(tmp_path), log=lines.append)
    assert "buffers 1" in lines[0]


def test_dinov2_is_spelled_as_dinov2_does():
    config = transformers.Dinov2WithRegistersConfig(**PLAIN, use_swiglu_ffn=True)
    state = trained(transformers.Dinov2WithRegistersModel(config)).state_dict()
    official = hf_keys.official(state)
    block = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.w12", "mlp.w3")
    expected = {f"blocks.{i}.{part}.{of}" for i in (0, 1) for part in block for of in ("weight", "bias")}
    expected |= {f"blocks.{i}.ls{k}.gamma" for i in (0, 1) for k in (1, 2)}
    expected |= {f"{part}.{of}" for part in ("norm", "patch_embed.proj") for of in ("weight", "bias")}
    assert official.keys() == expected | {"cls_token", "pos_embed", "mask_token", "register_tokens"}
    parts = (state[f"encoder.layer.1.mlp.{part}_proj.weight"] for part in ("gate", "up"))
    assert torch.equal(official["blocks.1.mlp.w12.weight"], torch.cat(list(parts)))


# without config.json, with other configs


def test_without_a_config_shapes_tell(tmp_path):
    model = their_model("vit")
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="give num_heads"):
        load_encoder(str(tmp_path))
    encoder = load_encoder(str(tmp_path), num_heads=2, norm_eps=1e-3)
    images = torch.randn(2, 3, 32, 32)
    expected = their_map(model, images, (4, 4))
    torch.testing.assert_close(encoder(images).maps[-1], expected, rtol=0, atol=2e-6 * expected.abs().max().item())


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("swin", {"use_absolute_embeddings": True}, "use_absolute_embeddings True: with swin, only False is known"),
        ("swin", {"layer_norm_eps": 1e-3}, "layer_norm_eps 0.001: with swin, only 1e-05"),
        ("vit", {"hidden_act": "mish"}, "hidden_act mish: there are gelu, "),
        ("hiera", {"num_heads": [1, 1, 2, 2]}, "must double"),
    ],
)
def test_a_config_that_wants_what_is_not_here_is_refused(name, change, message, tmp_path):
    their_model(name).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        load_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json beside it is no JSON"):
        load_encoder(str(tmp_path))


def test_two_final_norms_are_one_too_many(tmp_path):
    config = transformers.BeitConfig(**WIDE, **BEIT, use_mean_pooling=False)
    trained(transformers.BeitForMaskedImageModeling(config)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="beit.layernorm.bias and layernorm.bias would both be norm.bias"):
        load_encoder(str(tmp_path))


def test_normalisation_is_the_preprocessors(tmp_path):
    their_model("vit").save_pretrained(tmp_path)
    assert load_normalization(str(tmp_path)) == released.IMAGENET
    transformers.ViTImageProcessor(image_mean=MEAN, image_std=STD).save_pretrained(tmp_path)
    assert load_normalization(str(tmp_path)) == {"mean": MEAN, "std": STD}
    transformers.ViTImageProcessor(do_normalize=False).save_pretrained(tmp_path)
    assert load_normalization(str(tmp_path)) == {"mean": [0.0] * 3, "std": [1.0] * 3}


def test_an_epsilon_is_kept_by_a_run_and_told_again(tmp_path):
    encoder = build_encoder("vit_base_patch16_224", norm_eps=1e-3, **OURS["vit"][1])
    assert {part.eps for part in encoder.modules() if isinstance(part, nn.LayerNorm)} == {1e-3}
    hf.write(encoder, facts(encoder), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["layer_norm_eps"] == 1e-3
    assert load_encoder(str(tmp_path)).plan["args"]["norm_eps"] == 1e-3


# base sizes, by key and shape alone


BASES = {  # as on the hub: what it is, its config, and the architecture that it is here
    "facebook/vit-mae-base": ("ViTMAEForPreTraining", {}, "vit_base_patch16_224"),
    "facebook/vit-mae-large": (
        "ViTMAEForPreTraining",
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        "vit_large_patch16_224",
    ),
    "microsoft/beit-base-patch16-224-pt22k": (
        "BeitForMaskedImageModeling",
        {"use_mask_token": True, "use_shared_relative_position_bias": True},
        "beit_base_patch16_224",
    ),
    "microsoft/swin-base-simmim-window6-192": (
        "SwinForMaskedImageModeling",
        {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 6, "image_size": 192},
        "swin_base_patch4_window7_224",
    ),
    "microsoft/swinv2-tiny-patch4-window8-256": (
        "Swinv2Model",
        {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 8, "image_size": 256},
        "swinv2_tiny_window8_256",
    ),
    "facebook/convnextv2-tiny-1k-224": ("ConvNextV2ForImageClassification", {}, "convnextv2_tiny"),
    "facebook/convnext-base-224": (
        "ConvNextModel",
        {"hidden_sizes": [128, 256, 512, 1024], "depths": [3, 3, 27, 3]},
        "convnext_base",
    ),
    "facebook/hiera-base-224-mae-hf": (
        "HieraForPreTraining",
        {"num_query_pool": 2, "decoder_hidden_size": 512, "decoder_depth": 8, "decoder_num_heads": 16},
        "hiera_base_224",
    ),
}


@pytest.mark.parametrize("hub", BASES)
def test_every_tensor_of_a_base_size_has_its_place(hub):
    name, config, expected = BASES[hub]
    model = getattr(transformers, name)
    with torch.device("meta"):
        state = model(model.config_class(**config)).state_dict()
        state = {key: torch.zeros(value.shape) for key, value in state.items()}
    state = {key: torch.zeros(()).expand(value.shape) for key, value in state.items()}
    _, family, state = released.recognise(state)
    architecture, args = family.describe(family.prepare(state))[:2]
    assert architecture == expected
    with torch.device("meta"):
        encoder = build_encoder(architecture, **args)
    own = {key: value.numel() for key, value in encoder.state_dict().items()}
    assert {family.rename(key): value.numel() for key, value in state.items() if family.rename(key)} == own


# ours -> transformers -> ours


SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
WINDOWS = {"img_size": 64, "patch_size": 4, "embed_dim": 8, "depths": (2, 1), "num_heads": (1, 2), "window_size": 4}
DIMS = {"depths": (1, 2, 1, 1), "dims": (8, 8, 16, 16)}
UNITS = {"img_size": 64, "embed_dim": 8, "stages": (1, 2, 1, 1), "num_heads": 1}
OURS = {
    "vit": ("vit_base_patch16_224", SIZE),
    "vit of fixed positions": ("vit_base_patch16_224", SIZE | {"position": "sincos"}),
    "vit, wide": ("vit_base_patch16_224", SIZE | {"img_size": (32, 48), "qkv_bias": False}),
    "beit": ("beit_base_patch16_224", SIZE),
    "beit without norm": ("beit_base_patch16_224", SIZE | {"final_norm": False, "init_values": 0.0}),
    "beit of one table": ("beit_base_patch16_224", SIZE | {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
    "swin": ("swin_tiny_patch4_window7_224", WINDOWS),
    "swin, wide": ("swin_tiny_patch4_window7_224", WINDOWS | {"img_size": (64, 96), "mlp_ratio": 2.5}),
    "swinv2": ("swinv2_tiny_window8_256", WINDOWS),
    "swinv2 of few cells": ("swinv2_tiny_window8_256", WINDOWS | {"img_size": 16, "pretrained_window_sizes": (3, 3)}),
    "convnext": ("convnext_tiny", DIMS),
    "convnextv2": ("convnextv2_tiny", DIMS),
    "hiera": ("hiera_tiny_224", UNITS),
    "hiera that pools less": ("hiera_tiny_224", UNITS | {"q_pool": 2}),
}


def facts(encoder, method=None):
    size = encoder.plan["args"].get("img_size", 64)
    size = (size, size) if isinstance(size, int) else size
    return SimpleNamespace(mean=MEAN, std=STD, size=size, method=method, notes=[])


@pytest.mark.parametrize("in_chans", [3, 2])
@pytest.mark.parametrize("name", OURS)
@torch.no_grad()
def test_round_trip_is_exact_and_transformers_agrees(name, in_chans, tmp_path):
    encoder = random(build_encoder(OURS[name][0], in_chans, **OURS[name][1]))
    told = facts(encoder)
    told.mean, told.std = MEAN[:in_chans], STD[:in_chans]
    hf.write(encoder, told, tmp_path)
    images = torch.randn(2, in_chans, *told.size)
    ours, theirs = encoder(images), hf.read(tmp_path, encoder)(images)
    most = ours.maps[-1].abs().max().item()
    torch.testing.assert_close(theirs.maps[-1], ours.maps[-1], rtol=0, atol=2e-6 * most)
    if ours.prefix is not None:
        torch.testing.assert_close(theirs.prefix, ours.prefix, rtol=0, atol=2e-6 * most)
    again = load_encoder(str(tmp_path))
    state = again.state_dict()
    assert state.keys() == encoder.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())
    assert torch.equal(again(images).maps[-1], ours.maps[-1])
    assert load_normalization(str(tmp_path)) == {"mean": told.mean, "std": told.std}


def test_another_size_than_the_positions_is_told(tmp_path):
    encoder = build_encoder(OURS["vit"][0], **OURS["vit"][1])
    told = facts(encoder)
    told.size = (48, 32)
    with pytest.raises(ValueError, match=r"for 32 x 32 px, not 48 x 32: load it with img_size \(48, 32\)"):
        hf.write(encoder, told, tmp_path)


def test_how_to_use_it_is_true(tmp_path, monkeypatch):
    encoder = build_encoder(OURS["vit"][0], **OURS["vit"][1])
    hf.write(encoder, facts(encoder), tmp_path)
    monkeypatch.chdir(tmp_path)
    left = {}
    exec(hf.USE.format(mean=MEAN, std=STD, channels=3, height=32, width=32), left)
    assert left["features"].shape == (1, 17, 24)


def test_images_are_made_as_ours(tmp_path):
    encoder = build_encoder(OURS["vit"][0], **OURS["vit"][1])
    hf.write(encoder, facts(encoder), tmp_path)
    process = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    image = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    expected = (image / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(process(image, return_tensors="pt")["pixel_values"][0], expected)


@pytest.mark.parametrize(
    "name, args, message",
    [
        ("regnety_002", {}, "has no regnety_002; it has VisionTransformer, Beit, "),
        ("vit_base_patch16_224", SIZE | {"init_values": 0.1}, "its ViTModel has no place for vit.blocks.0.ls1.gamma"),
        ("vit_base_patch16_224", SIZE | {"final_norm": False}, "its ViTModel has a vit.norm.bias"),
        ("vit_base_patch16_224", SIZE | {"no_embed_class": True}, "vit.pos_embed is 1x16x24 here, 1x17x24 in ViTModel"),
        ("swin_tiny_patch4_window7_224", WINDOWS | {"img_size": 16}, "bias_table is 9x2 here, 49x2 in SwinModel"),
    ],
)
def test_what_transformers_has_not_is_told_in_one_line(name, args, message, tmp_path):
    encoder = build_encoder(name, **args)
    with pytest.raises(ValueError, match=message) as error:
        hf.write(encoder, facts(encoder), tmp_path / "new")
    assert "\n" not in str(error.value) and not (tmp_path / "new").exists()


# whole methods


def method(name, encoder=None, **args):
    """A method as if trained, and what is told of it."""
    mim = built(name, **args) if encoder is None else small(name, build_encoder(encoder[0], **encoder[1]), **args)
    torch.manual_seed(2)
    for key, parameter in mim.named_parameters():
        if parameter.requires_grad and not key.startswith("target."):
            nn.init.normal_(parameter, std=0.05)
    return mim.eval(), facts(mim.encoder, {"name": name, "args": args})


def hidden_by(noise, ratio, grid):
    """The cells that noise hides in transformers: the highest ones."""
    kept = int(noise.shape[1] * (1 - ratio))
    return (noise.argsort(1).argsort(1) >= kept).unflatten(1, grid)


def written(mim, told, folder, name):
    write_method(mim, told, folder)
    return getattr(transformers, name).from_pretrained(folder).eval()


@pytest.mark.parametrize("target", ["normalized", "pixels"])
@torch.no_grad()
def test_transformers_gives_our_loss_of_mae(target, tmp_path):
    mim, told = method("mae", unit=8, target=target, ratio=0.6)
    model = written(mim, told, tmp_path, "ViTMAEForPreTraining")
    images, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    mim.masker = Given(hidden_by(noise, 0.6, (4, 4)), 8)
    assert model(images, noise=noise).loss.item() == pytest.approx(mim({"image": images})["loss"].item(), abs=1e-5)
    came_back(mim, tmp_path, images)


@torch.no_grad()
def test_transformers_gives_our_loss_of_hiera(tmp_path):
    mim, told = method("hiera")
    model = written(mim, told, tmp_path, "HieraForPreTraining")
    images, noise = torch.randn(3, 3, 64, 64), torch.rand(3, 4)
    mim.masker = Given(hidden_by(noise, 0.6, (2, 2)), 32)
    assert model(images, noise=noise).loss.item() == pytest.approx(mim({"image": images})["loss"].item(), abs=1e-5)
    came_back(mim, tmp_path, images)


@pytest.mark.parametrize("unit", [4, 8, 16])  # the last map's cells have 8 px
@pytest.mark.parametrize("which, name", [("swin", "Swin"), ("swinv2", "Swinv2")])
@torch.no_grad()
def test_transformers_gives_our_loss_of_simmim(which, name, unit, tmp_path):
    mim, told = method("simmim", OURS[which], unit=unit)
    model = written(mim, told, tmp_path, f"{name}ForMaskedImageModeling")
    images, cells = torch.randn(3, 3, 64, 64), torch.rand(3, 64 // unit, 64 // unit)
    cells = cells >= cells.flatten(1).median(1).values[:, None, None]
    mim.masker = Given(cells, unit)
    mask = Mask(cells, unit, 0).at(4).flatten(1)
    loss = model(images, bool_masked_pos=mask).loss.item()
    assert loss == pytest.approx(mim({"image": images})["loss"].item(), abs=1e-5)
    came_back(mim, tmp_path, images, unit=unit)


@torch.no_grad()
def test_transformers_guesses_as_our_beit(tmp_path):
    mim, told = method("beit", unit=8)
    model = written(mim, told, tmp_path, "BeitForMaskedImageModeling")
    images, cells = torch.randn(3, 3, 32, 32), torch.rand(3, 4, 4) > 0.5
    mask = Mask(cells, 8, 0)
    ours, theirs = mim.head(mim.hide(images, mask), mask), model(images, bool_masked_pos=cells.flatten(1)).logits
    torch.testing.assert_close(theirs.unflatten(1, (4, 4)), ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name, args, message",
    [
        ("mae", {"unit": 16}, "hides other than single patches of 8 px"),
        ("mae", {"unit": 8, "target": "hog"}, "a decoder that guesses HOG of 8 px"),
        ("simmim", {"target": "normalized"}, "SimMIM of normalised pixels"),
        ("fcmae", {}, "no method fcmae; it has mae, hiera, simmim, beit"),
    ],
)
def test_a_method_that_transformers_has_not_is_told_in_one_line(name, args, message, tmp_path):
    mim, told = method(name, **args)
    with pytest.raises(ValueError, match=message):
        write_method(mim, told, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def came_back(mim, folder, images, **args):
    """What was written is the same method again, with `args` that its folder does not tell."""
    lines = []
    again = load_method(str(folder), log=lines.append, **args)
    again.masker = mim.masker
    ours, theirs = mim.state_dict(), again.state_dict()
    assert len(lines) == 2 and ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert torch.equal(again({"image": images})["loss"], mim({"image": images})["loss"])
