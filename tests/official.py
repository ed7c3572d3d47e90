"""What the tests against official code share: fixtures from the folder MIM_GOLDEN, and comparisons with them.

Every size and option is in a fixture's JSON; a fixture that is not there is a failure.
"""

import json
import os
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from models.encoders import released
from models.encoders.build import build_encoder
from models.encoders.grid import Mask
from models.encoders.released.heads import method_key
from models.encoders.released.source import open_weights
from models.encoders.weights import load_encoder
from models.mim.head import Decoder
from models.mim.weights import load_weights
from models.transfer.classify import Classify

GOLDEN = Path(os.environ.get("MIM_GOLDEN", Path(__file__).parent / "golden"))


class Given:
    """A masker that gives the fixture's mask."""

    def __init__(self, cells, unit):
        self.unit, self.ratio = unit, cells.float().mean().item()
        self.mask = Mask(cells.bool(), unit, int(cells[0].sum()))

    def __call__(self, images):
        return self.mask


def golden(name):
    facts, tensors = json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors")
    return facts, *(part(tensors, kind) for kind in ("state", "input", "output"))


def part(tensors, kind):
    return {key.removeprefix(f"{kind}."): value for key, value in tensors.items() if key.startswith(f"{kind}.")}


def check(facts, found, expected):
    """Each found output is the expected one, to the tolerance that the fixture recommends."""
    assert found
    for name, value in found.items():
        atol = facts["recommended_atol"][name]
        torch.testing.assert_close(value.detach().float(), expected[name].float(), atol=atol, rtol=0, msg=name)


def check_gradients(facts, key, loss, mim, kind, state):
    """The norm of each parameter's gradient is the official one's, through the renaming of weights."""
    mim.zero_grad()
    loss.backward()
    rename = released.recognise(state, kind)[1].rename
    ours = dict(mim.named_parameters())
    for name, expected in facts[key].items():
        parameter = ours.get(method_key(kind, name, rename))
        gradient = None if parameter is None else parameter.grad
        if expected is None:
            assert gradient is None, name
        else:
            assert gradient is not None and gradient.norm().item() == pytest.approx(expected, rel=1e-3), name
    named = {method_key(kind, name, rename) for name in facts[key]}
    assert {name for name, parameter in ours.items() if parameter.requires_grad} <= named


def enter(mim, state):
    """The official weights go into a method as a file does that somebody brings: nobody says whose it is."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"model": state, "epoch": 1}, Path(folder) / "official.pth")
        assert load_weights(mim, open_weights(f"{folder}/official.pth"), log=lines.append)
    assert len(lines) == 2 and "epoch" in lines[0]


def losses_with_gradients(facts):
    return {key.removeprefix("grad_l2_of_"): key for key in facts if key.startswith("grad_l2_of_")}


def norm_layer(args):
    return partial(nn.LayerNorm, eps=1e-6 if args.get("norm_layer") == "LN6" else 1e-5)


def some(args, *names):
    return {name: args[name] for name in names if name in args}


PLAIN = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias")


def vit(args, **more):
    size = some(args, *PLAIN)
    return build_encoder("vit_base_patch16_224", args.get("in_chans", 3), norm_layer=norm_layer(args), **size, **more)


def decoder(args, encoder, target, heads, **more):
    size = {"depth": args["decoder_depth"], "width": args["decoder_embed_dim"], "mlp_ratio": args.get("mlp_ratio", 4.0)}
    return Decoder(encoder, target, heads=heads, **size, **more)


TABLES = ("init_values", "use_abs_pos_emb", "use_rel_pos_bias", "use_shared_rel_pos_bias")


def beit(args):
    size = some(args, *PLAIN, *TABLES)
    pools = args.get("use_mean_pooling", True)
    return build_encoder(
        "beit_base_patch16_224", args.get("in_chans", 3), norm_layer=norm_layer(args), final_norm=not pools, **size
    )


def classifier(facts, state, kind, folder, pool, **changes):
    path = folder / "official.pth"
    torch.save({"model": state}, path)
    encoder = load_encoder(f"{kind}:{path}", **changes)
    task = Classify(encoder, facts["constructor"]["args"]["num_classes"], pool).eval()
    rest = {key.replace("fc_norm.", "norm."): value for key, value in state.items()}
    rest = {key: rest[key] for key in task.state_dict() if not key.startswith("encoder.")}
    task.load_state_dict(rest, strict=False)
    if isinstance(task.norm, nn.LayerNorm):
        task.norm.eps = norm_layer(facts["constructor"]["args"])(1).eps if "norm_layer" in changes else 1e-6
    return task


def check_classifier(facts, task, images, expected):
    features = task.encoder(images)
    vector = features.maps[-1].mean((2, 3)) if task.pool == "mean" else features.prefix[:, 0]
    check(facts, {"features": task.norm(vector), "logits": task.logits(images)}, expected)
