"""The state dicts of plain transformers as each repository writes them: random numbers by official names and shapes."""

import math
import re
import time

import torch

from models.encoders.weights import load_encoder

SEED = torch.Generator()


def some(*shape):
    return torch.randn(shape, generator=SEED) * 0.2


def norm(name, width):
    return {f"{name}.weight": some(width), f"{name}.bias": some(width)}


def linear(name, out, into, bias=True):
    return {f"{name}.weight": some(out, into)} | ({f"{name}.bias": some(out)} if bias else {})


def stem(width, patch, places=None):
    state = {"cls_token": some(1, 1, width), "patch_embed.proj.weight": some(width, 3, patch, patch)}
    state |= {"patch_embed.proj.bias": some(width)}
    return state | ({} if places is None else {"pos_embed": some(1, places, width)})


def block(i, width, hidden, attn=None, mlp=None):
    """A block of a ViT, of which a repository may write attention and MLP otherwise."""
    name = f"blocks.{i}"
    state = norm(f"{name}.norm1", width) | norm(f"{name}.norm2", width)
    state |= linear(f"{name}.attn.proj", width, width)
    state |= attn(f"{name}.attn") if attn else linear(f"{name}.attn.qkv", 3 * width, width)
    if mlp:
        return state | mlp(f"{name}.mlp")
    return state | linear(f"{name}.mlp.fc1", hidden, width) | linear(f"{name}.mlp.fc2", width, hidden)


def gates(width, hidden, packed=False, normed=False):
    """The parts of a SwiGLU, as EVA-02, DINOv2 and DINOv3 write it."""

    def mlp(name):
        if packed:
            state = linear(f"{name}.w12", 2 * hidden, width)
        else:
            state = linear(f"{name}.w1", hidden, width) | linear(f"{name}.w2", hidden, width)
        state |= linear(f"{name}.w3", width, hidden)
        return state | (norm(f"{name}.ffn_ln", hidden) if normed else {})

    return mlp


def rotary(side, head, places=16):
    """EVA-02's stored cosines and sines, written out by loops."""
    cos, sin = torch.zeros(side**2, head), torch.zeros(side**2, head)
    for row in range(side):
        for column in range(side):
            for channel in range(head):
                along = row if channel < head // 2 else column
                k = channel % (head // 2) // 2
                angle = along / side * places / 10000 ** (2 * k / (head // 2))
                cos[row * side + column, channel], sin[row * side + column, channel] = math.cos(angle), math.sin(angle)
    return {"freqs_cos": cos, "freqs_sin": sin}


def eva(width=1408, depth=2, patch=14, side=16, hidden=6144, dim=1024, tuned=False):
    """baaivision/EVA's ViT-g, pretrained or fine-tuned."""

    def attn(name):
        state = {f"{name}.q_bias": some(width), f"{name}.v_bias": some(width)}
        return state | {f"{name}.qkv.weight": some(3 * width, width)}

    state = stem(width, patch, side**2 + 1)
    for i in range(depth):
        state |= block(i, width, hidden, attn)
    if tuned:
        return state | norm("fc_norm", width) | linear("head", 7, width)
    return state | {"mask_token": some(1, 1, width)} | norm("norm", width) | linear("lm_head", dim, width)


def eva02(width=768, depth=2, patch=14, side=16, heads=12, packed=False, clip=False, tuned=False, places=16):
    """EVA-02, whose small sizes pack queries and gates, and its CLIP's tower within a CLIP."""
    hidden, angles = int(width * 4 * 2 / 3), rotary(side, width // heads, places)

    def attn(name):
        state = {f"{name}.q_bias": some(width), f"{name}.v_bias": some(width)}
        if packed:
            state |= {f"{name}.qkv.weight": some(3 * width, width)}
        else:
            state |= {f"{name}.{part}_proj.weight": some(width, width) for part in "qkv"}
        state |= norm(f"{name}.inner_attn_ln", width) if clip else {}
        return state | {f"{name}.rope.{key}": value for key, value in angles.items()}

    state = stem(width, patch, side**2 + 1)
    for i in range(depth):
        state |= block(i, width, hidden, attn, gates(width, hidden, packed, not packed))
    state |= {f"rope.{key}": value for key, value in angles.items()}
    if clip:
        state = {f"visual.{k}": v for k, v in (state | norm("norm", width)).items()}
        return state | {"logit_scale": some(), "text.positional_embedding": some(77, 512)}
    if tuned:
        return state | norm("fc_norm", width) | linear("head", 7, width)
    return state | {"mask_token": some(1, 1, width)} | norm("norm", width) | linear("lm_head", 1024, width)


def dinov2(width=768, depth=2, patch=14, side=37, registers=0, giant=False, chunks=0):
    """facebookresearch/dinov2's backbones; in chunks and beside heads as its training saves them."""
    hidden = (int(width * 4 * 2 / 3) + 7) // 8 * 8
    state = stem(width, patch, side**2 + 1) | {"mask_token": some(1, width)} | norm("norm", width)
    for i in range(depth):
        state |= block(i, width, 4 * width, mlp=gates(width, hidden, packed=True) if giant else None)
        state |= {f"blocks.{i}.ls{k}.gamma": some(width) for k in (1, 2)}
    if registers:
        state["register_tokens"] = some(1, registers, width)
    if chunks:
        names = {key: re.sub(r"^blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) // chunks}.{m[1]}", key) for key in state}
        state = {f"backbone.{names[key]}": value for key, value in state.items()}
        state["dino_head.last_layer.weight_g"] = some(9, 1)
    return state


def dinov3(width=384, depth=2, patch=16, heads=6, plus=False, biases=True, local=False):
    """facebookresearch/dinov3's ViTs: storage tokens, rotary periods, and biases whose part for keys is masked."""

    def attn(name):
        state = {f"{name}.qkv.weight": some(3 * width, width)}
        if biases:
            mask = torch.ones(3 * width)
            mask[width : 2 * width] = 0
            state |= {f"{name}.qkv.bias": some(3 * width), f"{name}.qkv.bias_mask": mask}
        return state

    state = stem(width, patch) | {"mask_token": some(1, width), "storage_tokens": some(1, 4, width)}
    state |= norm("norm", width) | (norm("local_cls_norm", width) if local else {})
    for i in range(depth):
        state |= block(i, width, 4 * width, attn, gates(width, 4 * width) if plus else None)
        state |= {f"blocks.{i}.ls{k}.gamma": some(width) for k in (1, 2)}
    quarter = width // heads // 4
    return state | {"rope_embed.periods": 100.0 ** (torch.arange(quarter) / quarter)}


def beit3(width=768, depth=2, patch=16, side=14, tuned=False):
    """unilm's BEiT-3: experts A for images, B for text."""
    state = {
        "text_embed.weight": some(64, width),
        "vision_embed.proj.weight": some(width, 3, patch, patch),
        "vision_embed.proj.bias": some(width),
        "vision_embed.cls_token": some(1, 1, width),
        "vision_embed.mask_token": some(1, 1, width),
        "encoder.embed_positions.A.weight": some(side**2 + 3, width),
        "encoder.embed_positions.B.weight": some(33, width),
    }
    for i in range(depth):
        name = f"encoder.layers.{i}"
        for expert in "AB":
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                state |= linear(f"{name}.self_attn.{part}.{expert}", width, width)
            state |= norm(f"{name}.self_attn.inner_attn_ln.{expert}", width)
            state |= norm(f"{name}.self_attn_layer_norm.{expert}", width)
            state |= norm(f"{name}.final_layer_norm.{expert}", width)
            state |= linear(f"{name}.ffn.{expert}.fc1", 4 * width, width)
            state |= linear(f"{name}.ffn.{expert}.fc2", width, 4 * width)
            state |= norm(f"{name}.ffn.{expert}.ffn_layernorm", 4 * width)
    if not tuned:
        state |= norm("encoder.layer_norm.A", width) | norm("encoder.layer_norm.B", width)
    state = {f"beit3.{key}": value for key, value in state.items()}
    return state | (norm("fc_norm", width) | linear("head", 7, width) if tuned else {})


def plain(width=768, depth=2, patch=16, side=14, hidden=None):
    state = stem(width, patch, side**2 + 1)
    for i in range(depth):
        state |= block(i, width, hidden or 4 * width)
    return state | norm("norm", width)


def maskfeat(width=768, depth=2, patch=16, side=14):
    """SlowFast's MaskFeat for images: the norm after the blocks is its head's."""
    state = plain(width, depth, patch, side)
    state = {key.replace("norm.", "pred_head.transforms.0.0.", key[:5] == "norm."): v for key, v in state.items()}
    state |= {"mask_token": some(1, 1, width), "hogs.0.weight_x": some(3, 1, 3, 3)}
    return state | linear("pred_head.projections.0", (patch // 8) ** 2 * 27, width)


def deit3(width=384, depth=2, patch=16, side=14):
    """facebookresearch/deit's DeiT III: layer scales, no position of the class token."""
    state = plain(width, depth, patch, side) | linear("head", 7, width)
    state["pos_embed"] = some(1, side**2, width)
    return state | {f"blocks.{i}.gamma_{k}": some(width) for i in range(depth) for k in (1, 2)}


def decoder(width, dim):
    """MAE's, of one block, that guesses `dim` numbers."""
    state = {"mask_token": some(1, 1, 32), "decoder_pos_embed": some(1, 5, 32)}
    state |= {f"decoder_{key}": value for key, value in block(0, 32, 128).items()} | norm("decoder_norm", 32)
    return state | linear("decoder_embed", 32, width) | linear("decoder_pred", dim, 32)


def stored(state, path, wrapper="model"):
    torch.save({wrapper: state, "epoch": 1} if wrapper else state, path)
    return str(path)


def load(state, path, wrapper="model", **changes):
    """The encoder of a file that holds this state, all of it, and the line on it; nobody says whose it is."""
    lines, start = [], time.monotonic()
    encoder = load_encoder(stored(state, path, wrapper), log=lines.append, **changes)
    assert time.monotonic() - start < 10
    n = len(encoder.state_dict())
    assert f"encoder {n}/{n} tensors" in lines[0] and "fresh" not in lines[0] and "unread" not in lines[0]
    return encoder, lines[0]
