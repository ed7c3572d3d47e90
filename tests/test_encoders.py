"""Every encoder keeps the promises of models/encoders/encoder.py, and computes what timm's own model computes."""

import pytest
import timm
import torch
from timm.models import model_entrypoint

from models.encoders.build import OWN, build_encoder
from models.encoders.vit import ViT

PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
WINDOWS = {"img_size": 64, "embed_dim": 8, "depths": (2, 2, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 4}
STAGES = {"depths": (1, 2, 1, 1), "dims": (8, 8, 16, 16)}
UNITS = {"img_size": 64, "embed_dim": 8, "stages": (1, 2, 1, 1)}
RESIDUAL = {"layers": (1, 2, 3, 1), "channels": (8, 8, 16, 16)}
CASES = {  # a name of timm's: arguments that make it small
    "vit_base_patch16_224": PLAIN,
    "vit_base_patch16_clip_224": PLAIN,  # a norm before the blocks
    "vit_base_patch16_siglip_224": PLAIN,  # no class token
    "deit3_small_patch16_224": PLAIN,  # the class token has no position
    "deit_tiny_distilled_patch16_224": PLAIN,  # two prefix tokens
    "beit_base_patch16_224": PLAIN,  # a table of relative positions for each block
    "beitv2_base_patch16_224": PLAIN | {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
    "eva_giant_patch14_224": PLAIN,  # queries and values have biases, keys none
    "eva02_tiny_patch14_224": PLAIN,  # rotary and absolute positions
    "eva02_base_patch14_224": PLAIN,  # norms inside attention and MLP
    "vit_small_patch16_dinov3": PLAIN,  # rotary positions, registers
    "swin_tiny_patch4_window7_224": WINDOWS,
    "swinv2_tiny_window8_256": WINDOWS,
    "pvt_v2_b0": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 32), "num_heads": (1, 1, 2, 2)},
    "davit_tiny": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 32), "num_heads": (1, 1, 1, 1)},
    "mvitv2_tiny": {"img_size": 64},  # timm fixes its sizes
    "mvitv2_small_cls": {"img_size": 64},  # a class token in a pyramid
    "cswin_tiny": {"embed_dim": 8, "depths": (1, 2, 2, 1), "num_heads": (2, 2, 2, 4)},
    "focalnet_tiny_srf": {},  # timm fixes its sizes
    "maxvit_rmlp_pico_rw_256": {"img_size": 64},
    "coatnet_pico_rw_224": {"img_size": 64},
    "regnetx_002": {},
    "convnext_atto": STAGES,
    "convnext_tiny": STAGES,  # layer scale
    "convnextv2_atto": STAGES,
    "convnextv2_tiny": STAGES,
    "hiera_tiny_224": UNITS,
    "hiera_base_plus_224": UNITS | {"q_pool": 2, "embed_dim": 16},
    "hiera_small_abswin_256": UNITS | {"global_pos_size": (4, 4)},  # two tables of positions
    "resnet50": RESIDUAL,
    "resnet18": RESIDUAL,  # basic blocks
    "mixmim_base": WINDOWS,
}
STEMS = {
    "patch_embed": ("swin", "pvt", "hiera"),
    "conv1": ("resnet",),
    "patch_embed.proj": ("mvit",),
}  # what timm calls it, if not stem
FIXED = ("maxvit", "coatnet")  # built for one image size


def small(name, in_chans=3, **args):
    torch.manual_seed(0)
    encoder = build_encoder(name, in_chans, **CASES[name], **args).eval()
    for parameter in encoder.parameters():  # nothing is zero or one by accident
        if parameter.ndim == 1 or not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3, mean=parameter.detach().mean().item())
    return encoder


def sizes(name):
    return [(64, 64)] if name.startswith(FIXED) else [(64, 64), (96, 64), (128, 192)]


every_encoder = pytest.mark.parametrize("name", CASES)


@every_encoder
def test_maps_have_the_promised_shapes_at_any_size(name):
    encoder = small(name)
    assert len(encoder.strides) == len(encoder.dims) and encoder.strides == sorted(encoder.strides)
    for h, w in sizes(name):
        images = torch.randn(2, 3, h, w)
        with torch.no_grad():
            tokens = encoder.embed(images)
            features = encoder(images)
            alone = encoder(images[1:])
        assert tokens.shape == (2, h // encoder.patch, w // encoder.patch, encoder.width)
        shapes = [(2, c, h // s, w // s) for c, s in zip(encoder.dims, encoder.strides)]
        assert [m.shape for m in features.maps] == shapes
        for whole, single in zip(features.maps, alone.maps):  # images of a batch do not see each other
            torch.testing.assert_close(whole[1:], single, atol=1e-4, rtol=1e-4)
        if features.prefix is not None:
            assert features.prefix.shape[::2] == (2, encoder.dims[-1])


@every_encoder
@pytest.mark.parametrize("in_chans", [1, 5])
def test_channels_are_free(name, in_chans):
    encoder = small(name, in_chans)
    with torch.no_grad():
        assert encoder(torch.randn(1, in_chans, 64, 64)).maps[-1].isfinite().all()
    assert encoder.in_chans == in_chans


@pytest.mark.parametrize("name", [name for name in CASES if name not in OWN])
def test_outputs_are_timms(name):
    encoder = small(name)
    plain = isinstance(encoder, ViT)
    args = dict(CASES[name])
    if plain and not model_entrypoint(name).__module__.endswith("beit"):
        args["dynamic_img_size"] = True
    if plain and "distilled" not in name:
        args["global_pool"] = ""  # or the norm would come after the pooling
    theirs = timm.create_model(name, num_classes=0, **args).eval()
    theirs.load_state_dict({their_key(name, key): value for key, value in encoder.state_dict().items()}, strict=False)
    held = {key for key, _ in theirs.named_parameters() if not key.startswith(("head.", "fc_norm."))}
    if encoder.normed or plain:  # every weight of theirs is one of ours
        assert held <= {their_key(name, key) for key in encoder.state_dict()}
    size = args.get("img_size", 64)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        ours = encoder(images)
        found = theirs.forward_intermediates(images, norm=encoder.normed, intermediates_only=True)
    for mine, other in zip(ours.maps[::-1], found[::-1]):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
    if ours.prefix is not None:
        with torch.no_grad():
            tokens = theirs.forward_features(images)
        torch.testing.assert_close(ours.prefix, tokens[:, : ours.prefix.shape[1]], atol=1e-5, rtol=1e-5)


def their_key(name, key):
    """timm's name of one of our parameters."""
    if key.startswith("tables."):
        owner = "rel_pos_bias" if CASES[name].get("use_shared_rel_pos_bias") else f"blocks.{key[7:]}.attn"
        return f"{owner}.relative_position_bias_table"
    if key.startswith("stem."):
        return next((f"{stem}.{key[5:]}" for stem, names in STEMS.items() if name.startswith(names)), key)
    return key.removeprefix("vit.").removeprefix("backbone.")


@every_encoder
def test_every_parameter_is_in_one_layer_or_the_final_norm(name):
    encoder = small(name)
    layered = [id(p) for layer in encoder.layers for p in layer]
    assert all(encoder.layers) and len(layered) == len(set(layered))
    rest = {key for key, p in encoder.named_parameters() if id(p) not in layered}
    shared = {"tables.0"} if len(getattr(encoder, "tables", ())) == 1 else set()
    norms = {f"{part}norm.{kind}" for part in ("vit.", "backbone.", "") for kind in ("weight", "bias")}
    assert rest <= norms | shared
    stem = encoder.vit.patch_embed if isinstance(encoder, ViT) else encoder.stem
    first = {id(p) for p in encoder.layers[0]}
    assert {id(p) for p in stem.parameters()} <= first


@every_encoder
def test_checkpointing_gives_the_same_gradients(name):
    encoder, images, gradients = small(name).train(), torch.randn(2, 3, 64, 64), []
    for module in encoder.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0
    for enable in (False, True):
        encoder.set_grad_checkpointing(enable)
        encoder.zero_grad()
        torch.manual_seed(0)
        sum(m.square().mean() for m in encoder(images).maps).backward()
        gradients.append({key: p.grad for key, p in encoder.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, atol=1e-5, rtol=1e-4, msg=key)


@every_encoder
def test_every_parameter_is_used(name):
    encoder = small(name).train()
    features = encoder(torch.randn(2, 3, 64, 64))
    (features.maps[-1] * torch.randn_like(features.maps[-1])).sum().backward()
    unused = {key for key, p in encoder.named_parameters() if p.requires_grad and p.grad is None}
    assert not unused, unused


def test_unknown_names_and_arguments_name_the_nearest():
    for wrong, right in (("vit_bas_patch16_224", "vit_base_patch16_224"), ("mixmim_bse", "mixmim_base")):
        with pytest.raises(ValueError, match=f'no encoder is called "{wrong}".*{right}'):
            build_encoder(wrong)
    for name, wrong, right in [
        ("vit_base_patch16_224", "depht", "depth"),
        ("vit_base_patch16_224", "positon", "position"),
        ("swin_tiny_patch4_window7_224", "window_sise", "window_size"),
        ("convnextv2_atto", "layer_group", "layer_groups"),
        ("mixmim_base", "window_sise", "window_size"),
    ]:
        with pytest.raises(ValueError, match=f'no argument "{wrong}"; the nearest is "{right}"'):
            build_encoder(name, **CASES[name] | {wrong: 1})


def test_backbones_that_cannot_be_cut_say_so():
    with pytest.raises(ValueError, match="cannot be cut"):
        build_encoder("mobilenetv3_small_050")


def test_sizes_that_patches_do_not_divide_name_the_nearest():
    with pytest.raises(ValueError, match="30 px does not divide into patches of 8 px: use 24 or 32 px"):
        small("vit_base_patch16_224")(torch.randn(1, 3, 30, 32))


def test_taps_choose_the_maps():
    encoder = small("vit_base_patch16_224", taps=(0, -1))
    assert encoder.strides == [8, 8] and len(encoder(torch.randn(1, 3, 32, 32)).maps) == 2


def test_sincos_positions_are_fixed_and_exact_at_every_size():
    encoder, other = (
        build_encoder("vit_base_patch16_224", position="sincos", **PLAIN | {"img_size": side}).eval()
        for side in (32, 64)
    )
    assert not encoder.vit.pos_embed.requires_grad
    _, places = encoder.prefix_and_position(8, 8)
    assert torch.equal(places, other.vit.pos_embed[:, 1:])
