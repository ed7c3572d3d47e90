"""Tiny tokenizers in files of the released layouts, with random weights."""

import torch


def drawn(shapes, seed=0, std=0.2):
    """{key: shape} -> {key: tensor}"""
    generator = torch.Generator().manual_seed(seed)
    return {key: std * torch.randn(*shape, generator=generator) for key, shape in shapes.items()}


def block_shapes(name, width):
    """A block of BEiT's without layer scale."""
    shapes = {"norm1.weight": [width], "norm1.bias": [width], "norm2.weight": [width], "norm2.bias": [width]}
    shapes |= {"attn.q_bias": [width], "attn.v_bias": [width], "attn.qkv.weight": [3 * width, width]}
    shapes |= {"attn.proj.weight": [width, width], "attn.proj.bias": [width]}
    shapes |= {"mlp.fc1.weight": [2 * width, width], "mlp.fc1.bias": [2 * width]}
    shapes |= {"mlp.fc2.weight": [width, 2 * width], "mlp.fc2.bias": [width]}
    return {f"{name}.{key}": shape for key, shape in shapes.items()}


def transformer_shapes(name, in_chans, patch, side, width, depth):
    """A transformer of BEiT v2's repository as VQ-KD has it: absolute positions, mean pooling, no head."""
    shapes = {"cls_token": [1, 1, width], "pos_embed": [1, 1 + side**2, width]}
    shapes |= {"patch_embed.proj.weight": [width, in_chans, patch, patch], "patch_embed.proj.bias": [width]}
    shapes |= {"fc_norm.weight": [width], "fc_norm.bias": [width]}
    for i in range(depth):
        shapes |= block_shapes(f"blocks.{i}", width)
    return {f"{name}.{key}": shape for key, shape in shapes.items()}


def vqkd_state(in_chans=3, patch=8, side=4, width=64, depth=2, vocabulary=48, dim=8):
    """The state of a VQ-KD model as its authors save it, with what training alone needs."""
    shapes = transformer_shapes("encoder", in_chans, patch, side, width, depth)
    shapes |= transformer_shapes("decoder", dim, 1, side, width, 1)
    for name, out in (("encode_task_layer", dim), ("decode_task_layer", 24)):
        shapes |= {f"{name}.0.weight": [width, width], f"{name}.0.bias": [width]}
        shapes |= {f"{name}.2.weight": [out, width], f"{name}.2.bias": [out]}
    shapes |= {f"quantize.{key}": [vocabulary] for key in ("cluster_size", "embedding.cluster_size")}
    shapes |= {"quantize.embedding.weight": [vocabulary, dim], "quantize.embedding.embed_avg": [vocabulary, dim]}
    shapes |= {"quantize.embedding.initted": [1], "scaling_layer.shift": [1, 3, 1, 1]}
    state = drawn(shapes)
    codes = "quantize.embedding.weight"
    return state | {codes: torch.nn.functional.normalize(state[codes], dim=1)}


def dvae_state(in_chans=3, width=8, blocks=1, vocabulary=48):
    """The state of DALL-E's encoder, smaller."""
    shapes = {"input": (in_chans, width, 7)}
    dims = [width, width, 2 * width, 4 * width, 8 * width]
    for k in range(1, 5):
        for i in range(1, blocks + 1):
            inside, outside = dims[k - 1] if i == 1 else dims[k], dims[k]
            name, inner = f"group_{k}.block_{i}", outside // 4
            shapes |= {f"{name}.id_path": (inside, outside, 1)} if inside != outside else {}
            shapes |= {f"{name}.res_path.conv_{j}": (inside if j == 1 else inner, inner, 3) for j in (1, 2, 3)}
            shapes |= {f"{name}.res_path.conv_4": (inner, outside, 1)}
    shapes |= {"output.conv": (dims[-1], vocabulary, 1)}
    state = drawn({f"blocks.{name}.b": (b,) for name, (_, b, _) in shapes.items()}, std=0.1)
    for name, (a, b, side) in shapes.items():  # weights that keep the spread, so that images matter
        state |= drawn({f"blocks.{name}.w": (b, a, side, side)}, len(state), (2 / (a * side**2)) ** 0.5)
    return state


def tiny_tokenizer(folder, kind="dvae", **sizes):
    """Write one into a folder; the source that load_tokenizer takes."""
    state = {"dvae": dvae_state, "vqkd": vqkd_state}[kind](**sizes)
    torch.save(state if kind == "dvae" else {"model": state}, folder / f"{kind}.pt")
    return f"{kind}:{folder / kind}.pt"
