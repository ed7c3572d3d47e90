"""BEiT gives the numbers of the official code; BEiT v2 those of its formulas, written out here on official names."""

import math

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models.beit import gen_relative_position_index

from models.encoders.build import build_encoder
from models.encoders.weights import load_encoder, load_normalization
from models.mim.beitv2 import PatchAggregation
from models.mim.head import LinearHead
from models.mim.hide import cover
from models.mim.loss import cross_entropy
from models.mim.method import MIM
from models.mim.recipes import beit as beit_method
from models.targets.target import Target
from tests.official import Given, beit, check, check_gradients, enter, golden, losses_with_gradients
from tests.tokenizers import block_shapes, drawn, tiny_tokenizer


class Ids(Target):
    """Gives the same ids, whatever the images."""

    def __init__(self, ids, unit, vocabulary):
        super().__init__()
        self.ids, self.unit, self.dim = ids, unit, vocabulary

    def forward(self, images):
        return self.ids


# what the official class takes where a fixture does not say otherwise; it has no mean pooling
UNSAID = {"use_abs_pos_emb": True, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": False, "init_values": None}
UNSAID |= {"use_mean_pooling": False}


def test_beit():
    facts, state, given, expected = golden("beit")
    args, images = facts["constructor"]["args"], given["imgs"]
    patch = args["patch_size"]
    hidden = given["bool_masked_pos"].bool().unflatten(1, [side // patch for side in images.shape[-2:]])
    ids = torch.zeros(hidden.shape, dtype=torch.long)
    ids[hidden] = given["labels"]
    encoder = beit(UNSAID | args)
    target, masker = Ids(ids, patch, args["vocab_size"]), Given(hidden, patch)
    mim = MIM(masker, cover(encoder), LinearHead(encoder, target), target, cross_entropy).eval()
    enter(mim, state)
    loss = mim({"image": images})["loss"]
    assert "loss" in losses_with_gradients(facts)
    for key in losses_with_gradients(facts).values():
        check_gradients(facts, key, loss, mim, "beit", state)
    logits = mim.head(mim.hide(images, masker(images)), masker(images))
    check(facts, {"loss": loss, "logits_masked": logits[hidden], "logits_all": logits.flatten(1, 2)}, expected)


def test_an_encoder_is_read_off_a_pretrained_beit(tmp_path):
    facts, state, given, _ = golden("beit")
    args = facts["constructor"]["args"]
    torch.save({"model": state}, tmp_path / "beit.pth")
    lines, heads = [], {"num_heads": args["num_heads"]}
    encoder = load_encoder(f"beit:{tmp_path}/beit.pth", log=lines.append, **heads)
    assert "lm_head 2" in lines[0] and "mask_token 1" in lines[0] and encoder.normed
    assert len(encoder.vit.blocks) == args["depth"] and encoder(given["imgs"]).maps[-1].isfinite().all()
    assert load_normalization(f"beit:{tmp_path}/beit.pth")["mean"] == [0.5] * 3  # of ImageNet-22k, where they are from
    assert load_normalization(f"beitv2:{tmp_path}/beit.pth")["mean"][0] == 0.485


def test_a_method_with_its_tokenizer_takes_the_weights(tmp_path):
    facts, state, given, _ = golden("beit")
    args = UNSAID | facts["constructor"]["args"]
    mim = beit_method(beit(args), tiny_tokenizer(tmp_path, vocabulary=args["vocab_size"]))
    enter(mim, state)
    assert mim({"image": given["imgs"]})["loss"].isfinite()
    with pytest.raises(ValueError, match="missing 1: head.cells.linear.bias"):
        enter(mim, {k: v for k, v in state.items() if k != "lm_head.bias"})


# BEiT v2

SIDE, PATCH, WIDTH, HEADS, DEPTH, EARLY, VOCABULARY = 6, 4, 24, 3, 4, 2, 32


def beitv2_state():
    """A pretrained BEiT v2 in official names, two blocks in its second branch."""
    shapes = {"cls_token": [1, 1, WIDTH], "mask_token": [1, 1, WIDTH], "norm.weight": [WIDTH], "norm.bias": [WIDTH]}
    shapes |= {"patch_embed.proj.weight": [WIDTH, 3, PATCH, PATCH], "patch_embed.proj.bias": [WIDTH]}
    shapes |= {"rel_pos_bias.relative_position_bias_table": [(2 * SIDE - 1) ** 2 + 3, HEADS]}
    shapes |= {"lm_head.weight": [VOCABULARY, WIDTH], "lm_head.bias": [VOCABULARY]}
    for name in [*(f"blocks.{i}" for i in range(DEPTH)), *(f"cls_pt_layers.{i}" for i in range(2))]:
        shapes |= block_shapes(name, WIDTH) | {f"{name}.gamma_1": [WIDTH], f"{name}.gamma_2": [WIDTH]}
    index = gen_relative_position_index((SIDE, SIDE))
    return drawn(shapes, std=0.3) | {"rel_pos_bias.relative_position_index": index}


def norm(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)


def attend(state, name, x, bias):
    """A pre-norm block with biases of q and v and layer scale, on (B, N, C)."""
    w = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
    qkv_bias = torch.cat([w["attn.q_bias"], torch.zeros(WIDTH), w["attn.v_bias"]])
    qkv = F.linear(norm(x, w["norm1.weight"], w["norm1.bias"]), w["attn.qkv.weight"], qkv_bias)
    q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=HEADS)
    mixed = (q @ k.mT / math.sqrt(WIDTH / HEADS) + bias).softmax(-1) @ v
    mixed = F.linear(rearrange(mixed, "b h n d -> b n (h d)"), w["attn.proj.weight"], w["attn.proj.bias"])
    x = x + w["gamma_1"] * mixed
    y = F.linear(norm(x, w["norm2.weight"], w["norm2.bias"]), w["mlp.fc1.weight"], w["mlp.fc1.bias"])
    return x + w["gamma_2"] * F.linear(F.gelu(y), w["mlp.fc2.weight"], w["mlp.fc2.bias"])


def beitv2_logits(state, images, hidden):
    """Both guesses (B, N, vocabulary) of the paper."""
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH)
    x = torch.where(hidden.flatten(1)[..., None], state["mask_token"], x.flatten(2).mT)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1)
    bias = state["rel_pos_bias.relative_position_bias_table"][state["rel_pos_bias.relative_position_index"]]
    bias, outputs = bias.movedim(2, 0), []
    for i in range(DEPTH):
        x = attend(state, f"blocks.{i}", x, bias)
        outputs.append(x)
    again = torch.cat([x[:, :1], outputs[EARLY - 1][:, 1:]], 1)
    for i in range(2):
        again = attend(state, f"cls_pt_layers.{i}", again, bias)
    normed = (norm(y[:, 1:], state["norm.weight"], state["norm.bias"]) for y in (x, again))
    return [F.linear(y, state["lm_head.weight"], state["lm_head.bias"]) for y in normed]


def beitv2_encoder(**more):
    size = {"img_size": SIDE * PATCH, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    shared = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "mlp_ratio": 2.0}
    return build_encoder(
        "beit_base_patch16_224", **size | shared | {"taps": (EARLY - 1, -1), "final_norm": False} | more
    )


def test_beitv2():
    state, encoder = beitv2_state(), beitv2_encoder()
    images, ids = torch.randn(2, 3, SIDE * PATCH, SIDE * PATCH), torch.randint(VOCABULARY, (2, SIDE, SIDE))
    hidden = torch.rand(2, SIDE * SIDE).argsort(1).unflatten(1, (SIDE, SIDE)) < 14
    target, masker = Ids(ids, PATCH, VOCABULARY), Given(hidden, PATCH)
    mim = MIM(masker, cover(encoder), PatchAggregation(encoder, target), target, cross_entropy).eval()
    enter(mim, state)
    guesses = mim.head(mim.hide(images, masker(images)), masker(images))
    expected = beitv2_logits(state, images, hidden)
    for k, logits in enumerate(expected):
        torch.testing.assert_close(guesses[..., k, :].flatten(1, 2), logits, atol=2e-5, rtol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 0.1
    loss = sum(F.cross_entropy(logits[hidden.flatten(1)], ids[hidden]) for logits in expected)
    torch.testing.assert_close(mim({"image": images})["loss"], loss, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="missing 1: head.blocks.1.norm1.bias"):
        enter(mim, {k: v for k, v in state.items() if k != "cls_pt_layers.1.norm1.bias"})


def test_an_encoder_is_read_off_a_pretrained_beitv2(tmp_path):
    torch.save({"model": beitv2_state()}, tmp_path / "beitv2.pth")
    encoder = load_encoder(f"beitv2:{tmp_path}/beitv2.pth")
    assert encoder.normed and len(encoder.tables) == 1
    plain = load_encoder(f"beitv2:{tmp_path}/beitv2.pth", final_norm=False, taps=[EARLY - 1, -1])
    assert plain.dims == [WIDTH] * 2 and not plain.normed


def test_the_second_guess_knows_the_last_layer_by_the_class_token_alone():
    encoder, images = beitv2_encoder().double(), torch.randn(1, 3, SIDE * PATCH, SIDE * PATCH).double()
    target, mask = Ids(None, PATCH, VOCABULARY), Given(torch.eye(SIDE)[None], PATCH)(images)
    head, features = PatchAggregation(encoder, target).double(), encoder(images)
    features.maps = [m.detach().requires_grad_() for m in features.maps]
    features.prefix = features.prefix.detach().requires_grad_()
    one, two = head(features, mask).unbind(3)
    for guess, reached in ((one, [False, True, False]), (two, [True, False, True])):
        given = [*features.maps, features.prefix]
        assert [bool(g.any()) for g in torch.autograd.grad(guess.square().sum(), given, retain_graph=True)] == reached


@pytest.mark.parametrize("more", [{"taps": (-1,)}, {"final_norm": True}, {"taps": (0, 1, -1)}])
def test_beitv2_says_what_encoder_it_needs(more):
    words = r"one of 0 to 1, which 2 .depth. follow.*taps: \[0, -1\], final_norm: false"
    with pytest.raises(ValueError, match=words) as error:
        PatchAggregation(beitv2_encoder(**more), Ids(None, PATCH, VOCABULARY))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="one of 0 to 0, which 3 .depth. follow"):
        PatchAggregation(beitv2_encoder(), Ids(None, PATCH, VOCABULARY), depth=3)
    with pytest.raises(ValueError, match="at least 5 blocks"):
        PatchAggregation(beitv2_encoder(), Ids(None, PATCH, VOCABULARY), depth=4)
    for depth, early in ((12, 8), (24, 20)):  # as published
        with pytest.raises(ValueError, match=rf"taps: \[{early}, -1\]"):
            PatchAggregation(beitv2_encoder(depth=depth, taps=(-1,)), Ids(None, PATCH, VOCABULARY))
    with pytest.raises(ValueError, match="a plain transformer with a class token"):
        PatchAggregation(build_encoder("convnextv2_atto"), Ids(None, 32, VOCABULARY))
