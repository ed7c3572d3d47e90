"""Files of timm's own plain transformers go in whole and compute what timm does, by their shapes or a config.json."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from models.encoders.weights import load_encoder, load_normalization
from tests.plain_files import load, some

TIMM = ("vit_tiny_patch16_224", "vit_base_patch32_clip_quickgelu_224", "deit_tiny_distilled_patch16_224")
TIMM += ("deit3_small_patch16_224", "beit_base_patch16_224", "beitv2_base_patch16_224", "eva02_tiny_patch14_224")
TIMM += ("vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "vit_small_plus_patch16_dinov3_qkvb")
TIMM += ("vit_wee_patch16_reg1_gap_256", "vit_medium_patch16_rope_reg1_gap_256", "vit_small_patch16_rope_224")
TIMM += ("vit_small_patch16_rope_mixed_ape_224", "vit_pe_core_tiny_patch16_384", "vit_pe_spatial_tiny_patch16_512")
TIMM += ("vit_base_patch16_siglip_224", "vit_base_patch16_rpn_224", "eva02_base_patch16_clip_224")
WITH_CONFIG = ("vit_base_patch16_clip_224", "vit_small_patch16_18x2_224", "vit_small_patch16_rope_ape_224")
WITH_CONFIG += (
    "vit_base_patch16_gap_224",
    "vit_dwee_patch16_reg1_gap_256",
    "beitv2_base_patch16_224",
    "vit_base_patch16_xp_224",
)


def theirs(name, **args):
    """A model of timm's with a classifier, of two blocks, its numbers as if trained."""
    torch.manual_seed(0)
    small = {} if "_pe_" in name else {"img_size": 32 if "32" in name else 64 if "16" in name else 56}
    model = timm.create_model(name, num_classes=3, depth=2, **small | args).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def check_same(model, encoder):
    images = torch.randn(1, 3, *model.patch_embed.img_size)
    with torch.no_grad():
        expected, found = model.forward_features(images), encoder(images)
    tokens = found.maps[-1].flatten(2).mT
    tokens = tokens if found.prefix is None else torch.cat([found.prefix, tokens], 1)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", TIMM)
def test_a_state_dict_of_timms_tells_its_shapes(name, tmp_path):
    model = theirs(name)
    encoder, _ = load(model.state_dict(), tmp_path / "model.pth", None)
    check_same(model, encoder)


@pytest.mark.parametrize("name", WITH_CONFIG)
def test_config_json_beside_it_tells_the_rest(name, tmp_path):
    model = theirs(name)
    size = model.patch_embed.img_size
    trained = {"input_size": [3, *size], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    args = {"depth": 2, "num_classes": 3, "global_pool": "avg"}
    config = {"architecture": name, "num_classes": 3, "model_args": args, "pretrained_cfg": trained}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    lines, source = [], str(tmp_path / "model.safetensors")
    encoder = load_encoder(source, log=lines.append)
    check_same(model, encoder)
    assert encoder.plan["name"] == name and "assumed" not in lines[0]
    assert load_normalization(source) == {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    for text, message in [("{", "config.json beside it is no JSON"), ('{"architecture": "moose"}', 'it says "moose"')]:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_encoder(source)


def test_a_config_json_of_another_library_is_not_timms(tmp_path):
    model = theirs("vit_tiny_patch16_224")
    (tmp_path / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTModel"]}')
    encoder, line = load(model.state_dict(), tmp_path / "model.pth", None)
    check_same(model, encoder)
    assert "assumed: 3 heads, ImageNet's mean and std" in line


def test_a_trunk_of_timms_within_open_clip(tmp_path):
    model = theirs("vit_tiny_patch16_224", img_size=64)
    state = {f"visual.trunk.{key}": value for key, value in model.state_dict().items()}
    encoder, line = load(
        state | {"text.positional_embedding": some(7, 8), "logit_scale": some()}, tmp_path / "clip.bin"
    )
    check_same(model, encoder)
    assert "text 2" in line
