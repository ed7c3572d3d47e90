"""SparK's encoders do what sparse convolution does, place by place; its decoder and its files are as published."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from models.encoders.build import build_encoder
from models.encoders.grid import Mask
from models.encoders.weights import load_encoder
from models.mim.hide import Skip
from models.mim.masker import RandomMasker
from models.mim.recipes import spark
from models.transfer.classify import Classify
from util.optim import parameter_groups

RESIDUAL = {"layers": (1, 2, 1, 1), "channels": (8, 8, 8, 8)}
BASIC = RESIDUAL | {"channels": (64, 8, 8, 8)}
STAGES = {"depths": (1, 2, 1, 1), "dims": (8, 8, 16, 16)}


def lively(name, **args):
    """A small encoder in float64 in which nothing is zero or one by accident."""
    torch.manual_seed(0)
    encoder = build_encoder(name, **args).double()
    for tensor in (*encoder.parameters(), *encoder.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5) if tensor.ndim == 1 else nn.init.normal_(tensor, std=0.2)
    return encoder


def drawn(encoder, batch=2, ratio=0.5):
    images = torch.randn(batch, encoder.in_chans, 96, 64, dtype=torch.float64)
    return images, RandomMasker(32, ratio)(images)


# sparse convolution, the naive way: a dict of what is visible, {(image, row, column): vector}


class Sparse:
    """Features at visible places alone; there is nothing anywhere else."""

    def __init__(self, mask, images):
        self.mask, self.x = mask, {}
        for b, row, column in (~mask.at(1)).nonzero().tolist():
            self.x[b, row, column] = images[b, :, row, column]
        self.stride = 1

    def window(self, place, kernel, padding, stride):
        b, row, column = place
        for i in range(kernel):
            for j in range(kernel):
                there = (b, row * stride + i - padding, column * stride + j - padding)
                if there in self.x:
                    yield i, j, self.x[there]

    def places(self, stride):
        self.stride *= stride
        return [tuple(place) for place in (~self.mask.at(self.stride)).nonzero().tolist()]

    def convolve(self, conv):
        """A submanifold convolution: at visible places, over visible places."""
        new, stride = {}, conv.stride[0]
        for place in self.places(stride):
            y = torch.zeros(conv.out_channels, dtype=torch.float64) if conv.bias is None else conv.bias.clone()
            for i, j, vector in self.window(place, conv.kernel_size[0], conv.padding[0], stride):
                weight = conv.weight[:, :, i, j]
                y = y + (weight[:, 0] * vector if conv.groups > 1 else weight @ vector)
            new[place] = y
        self.x = new

    def pool(self, layer):
        self.x = {
            place: torch.stack([v for *_, v in self.window(place, layer.kernel_size, layer.padding, 2)]).amax(0)
            for place in self.places(layer.stride)
        }

    def each(self, function):
        self.x = {place: function(vector) for place, vector in self.x.items()}

    def normalize(self, norm):
        """A batch norm by the statistics of all that is visible, or by the running ones."""
        rows = torch.stack(list(self.x.values()))
        mean, var = (
            (rows.mean(0), rows.var(0, unbiased=False)) if norm.training else (norm.running_mean, norm.running_var)
        )
        self.each(lambda v: (v - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias)

    def copy(self):
        other = Sparse.__new__(Sparse)
        other.mask, other.x, other.stride = self.mask, dict(self.x), self.stride
        return other

    def add(self, other):
        self.x = {place: vector + other.x[place] for place, vector in self.x.items()}


def residual_stages(encoder, mask, images):
    net, sparse = encoder.backbone, Sparse(mask, images)
    sparse.convolve(encoder.stem)
    sparse.normalize(net.bn1)
    sparse.each(torch.relu)
    sparse.pool(net.maxpool)
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        for block in stage:
            shortcut = sparse.copy()
            numbers = [i for i in (1, 2, 3) if hasattr(block, f"conv{i}")]
            for i in numbers:
                sparse.convolve(getattr(block, f"conv{i}"))
                sparse.normalize(getattr(block, f"bn{i}"))
                if i != numbers[-1]:
                    sparse.each(torch.relu)
            if block.downsample is not None:
                shortcut.convolve(block.downsample[0])
                shortcut.normalize(block.downsample[1])
            sparse.add(shortcut)
            sparse.each(torch.relu)
        yield sparse.x


def convnext_stages(encoder, mask, images):
    sparse = Sparse(mask, images)
    sparse.convolve(encoder.stem[0])
    sparse.each(layer_norm(encoder.stem[1]))
    for stage in encoder.backbone.stages:
        if isinstance(stage.downsample, nn.Sequential):
            sparse.each(layer_norm(stage.downsample[0]))
            sparse.convolve(stage.downsample[1])
        for block in stage.blocks:
            sparse.add(convnext_branch(block, sparse.copy()))
        yield sparse.x


def convnext_branch(block, sparse):
    mlp = block.mlp
    sparse.convolve(block.conv_dw)
    sparse.each(layer_norm(block.norm))
    sparse.each(lambda v: F.gelu(F.linear(v, mlp.fc1.weight, mlp.fc1.bias)))
    if hasattr(mlp, "grn"):
        respond(sparse, mlp.grn)
    sparse.each(lambda v: F.linear(v, mlp.fc2.weight, mlp.fc2.bias))
    if block.gamma is not None:
        sparse.each(lambda v: v * block.gamma)
    return sparse


def layer_norm(layer):
    return lambda v: F.layer_norm(v, v.shape, layer.weight, layer.bias, layer.eps)


def respond(sparse, grn):
    """GRN in each image."""
    for b in {b for b, *_ in sparse.x}:
        mine = {place: v for place, v in sparse.x.items() if place[0] == b}
        size = torch.stack(list(mine.values())).square().sum(0).sqrt()
        share = size / (size.mean() + grn.eps)
        sparse.x |= {place: v + grn.weight * v * share + grn.bias for place, v in mine.items()}


NAIVE = {"resnet50": (RESIDUAL, residual_stages), "resnet18": (BASIC, residual_stages)}
NAIVE |= {"convnext_tiny": (STAGES, convnext_stages), "convnextv2_tiny": (STAGES, convnext_stages)}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NAIVE)
@torch.no_grad()
def test_a_masked_map_is_that_of_a_sparse_convolution(name, training):
    args, stages = NAIVE[name]
    encoder = lively(name, **args).train(training)
    images, mask = drawn(encoder)
    maps = Skip(encoder)(images, mask).maps
    for features, found in zip(maps, stages(encoder, mask, images)):
        dense = torch.zeros_like(features)
        for (b, row, column), vector in found.items():
            dense[b, :, row, column] = vector
        torch.testing.assert_close(features, dense, atol=1e-9, rtol=1e-9)


# batch norms


@torch.no_grad()
def test_hidden_pixels_do_not_show_in_statistics():
    """Other pixels in the hidden cells of an image move neither its visible features nor those of its batch."""
    for seed in range(3):
        torch.manual_seed(seed)
        runs = []
        for change in (False, True):
            encoder = lively("resnet50", **RESIDUAL).train()
            images, mask = drawn(encoder, batch=3)
            if change:
                images = torch.where(mask.at(1)[:, None], 100 * torch.randn_like(images), images)
            maps = Skip(encoder)(images, mask).maps
            runs.append([*maps, *encoder.buffers()])
        assert all(torch.equal(one, two) for one, two in zip(*runs))


@torch.no_grad()
def test_running_statistics_are_those_of_the_visible_places():
    encoder = lively("resnet50", **RESIDUAL).train()
    norm = encoder.backbone.bn1
    images, mask = drawn(encoder)
    before = norm.running_mean.clone(), norm.running_var.clone(), int(norm.num_batches_tracked)
    Skip(encoder)(images, mask)
    tokens = encoder.embed(images * ~mask.at(1)[:, None])[~mask.at(2)]
    assert norm.num_batches_tracked == before[2] + 1
    for running, old, new in zip((norm.running_mean, norm.running_var), before, (tokens.mean(0), tokens.var(0))):
        torch.testing.assert_close(running, 0.9 * old + 0.1 * new)


@torch.no_grad()
def test_a_batch_norm_over_all_places_would_have_shown_them():
    """The same network without the mask, to show that the tests above can fail."""
    encoder = lively("resnet50", **RESIDUAL).train()
    images, mask = drawn(encoder)
    others = torch.where(mask.at(1)[:, None], torch.randn_like(images), images)
    one, two = (encoder(x).maps[0].movedim(1, -1)[~mask.at(4)] for x in (images, others))
    assert (one - two).abs().max() > 1e-3


def test_checkpointed_blocks_give_the_same_gradients():
    images, gradients = torch.randn(2, 3, 64, 64), []
    for enable in (False, True):
        torch.manual_seed(0)
        encoder = build_encoder("resnet50", **RESIDUAL)
        encoder.set_grad_checkpointing(enable)
        mask = RandomMasker(32, 0.5)(images)
        sum(m.square().mean() for m in Skip(encoder)(images, mask).maps).backward()
        gradients.append([p.grad for p in encoder.parameters()])
    torch.testing.assert_close(*gradients)


# the decoder


def test_decoder_of_the_paper():
    """Its scales, widths and layers at full size, for both families of encoders, without memory for them."""
    for name, dims, norm in (
        ("resnet50", (256, 512, 1024, 2048), nn.BatchNorm2d),
        ("convnext_small", (96, 192, 384, 768), nn.Module),
    ):
        with torch.device("meta"):
            head = spark(build_encoder(name)).head
        for stride, dim, width in zip((4, 8, 16, 32), dims, (96, 192, 384, 768)):
            scale = head.dense[str(stride)]
            assert scale.fill.token.shape[1] == dim and isinstance(scale.norm, norm)
            if name == "convnext_small" and stride == 32:
                assert isinstance(scale.project, nn.Identity)  # it has the decoder's width by itself
            else:
                assert scale.project.weight.shape == (width, dim, *[1 if stride == 32 else 3] * 2)
        assert list(head.doublings) == ["16", "8", "4", "2", "1"] and head.predict.weight.shape == (3, 24, 1, 1)
        shapes = [[tuple(p.shape) for p in block.parameters() if p.ndim == 4] for block in head.doublings.values()]
        widths = (768, 384, 192, 96, 48, 24)
        assert shapes == [[(w, w, 4, 4), (w, w, 3, 3), (v, w, 3, 3)] for w, v in zip(widths, widths[1:])]


def test_29_of_49_cells_are_hidden():
    mask = spark(build_encoder("resnet50", **RESIDUAL), width=32).masker(torch.zeros(1, 3, 224, 224))
    assert mask.count == 49 - round(49 * (1 - 0.6)) == 29


@torch.no_grad()
def test_the_decoder_writes_pixels_where_they_belong():
    """A guess that depends on one place alone shows in that place's pixels."""
    mim = spark(lively("convnext_tiny", **STAGES).float(), width=32).eval()
    mask = Mask(torch.tensor([[[False, True], [True, False]]]), 32, 2)
    features = mim.hide(torch.randn(1, 3, 64, 64), mask)
    head = mim.head
    drawn = []
    head.predict.register_forward_hook(lambda _module, _args, output: drawn.append(output))
    cells = head(features, mask)
    assert torch.equal(cells[0, 1, 0].view(32, 32, 3), drawn[0][0, :, 32:, :32].movedim(0, -1))


def test_targets_that_are_no_pixels_and_other_encoders():
    images = torch.randn(2, 3, 64, 64)
    hog = spark(build_encoder("convnext_tiny", **STAGES), target="hog", cell=8, width=32)
    assert list(hog.head.doublings) == ["16", "8"] and set(hog.head.dense) == {"8", "16", "32"}
    vit = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
    plain = spark(build_encoder("vit_base_patch16_224", **vit), width=32)
    for mim in (hog, plain):
        mim({"image": images})["loss"].backward()
        assert all(p.grad is not None for p in mim.parameters() if p.requires_grad)
    for changes, width, message in (
        ({"patch_size": 12, "img_size": 48}, 32, "cells of 12 px cannot be halved down to the target's of 1 px"),
        ({}, 8, "width is 8: it has to be at least 16"),
    ):
        with pytest.raises(ValueError, match=message):
            spark(build_encoder("vit_base_patch16_224", **vit | changes), unit=48, width=width)


# transfers


@pytest.mark.parametrize("name", ["resnet50", "resnet101", "resnet152", "resnet200"])
def test_layers_are_sparks_groups(name):
    """Blocks that share a learning rate: as in SparK's fine-tuning."""
    per = {"resnet50": (2, 3), "resnet101": (2, 3), "resnet152": (4, 4), "resnet200": (4, 4)}[name]
    with torch.device("meta"):
        task = Classify(build_encoder(name), 10)
    net, n = task.encoder.backbone, len(task.encoder.layers)
    second, third = -(-len(net.layer2) // per[0]), -(-len(net.layer3) // per[1])
    assert n == 3 + second + third
    scales = {id(p): group["lr_scale"] for group in parameter_groups(task, 0.05, 0.7) for p in group["params"]}
    layer = {"stem.weight": 0, "backbone.bn1.weight": 0, "backbone.layer1.2.conv1.weight": 1}
    layer |= {f"backbone.layer2.{i}.conv1.weight": 2 + i // per[0] for i in range(len(net.layer2))}
    layer |= {f"backbone.layer3.{i}.conv1.weight": 2 + second + i // per[1] for i in range(len(net.layer3))}
    layer |= {"backbone.layer4.0.downsample.0.weight": n - 1}
    for key, number in layer.items():
        assert scales[id(task.encoder.get_parameter(key))] == pytest.approx(0.7 ** (n - number)), key
    assert scales[id(task.head.weight)] == 1 and isinstance(task.norm, nn.Identity)


# released files


def as_released(name, state, beside):
    """A state of timm's keys as SparK names it: alone, or beside a decoder."""
    if name.startswith("convnext"):
        for new, old in (("downsample_layers.0.", "stem."), (".dwconv.", ".conv_dw."), (".pwconv", ".mlp.fc")):
            state = {key.replace(old, new): value for key, value in state.items()}
        for i in range(4):
            parts = ((f"downsample_layers.{i}.", f"stages.{i}.downsample."), (f"stages.{i}.", f"stages.{i}.blocks."))
            for new, old in parts:
                state = {key.replace(old, new): value for key, value in state.items()}
    if beside:
        state = {f"sparse_encoder.sp_cnn.{key}": value for key, value in state.items()}
        state |= {"dense_decoder.dec.0.up_sample.weight": torch.ones(2), "mask_tokens.0": torch.ones(1, 4, 1, 1)}
        state |= {"densify_norms.0.weight": torch.ones(4), "imn_m": torch.ones(1, 3, 1, 1)}
    return state


@pytest.mark.parametrize("beside", [False, True], ids=["encoder", "with decoder"])
@pytest.mark.parametrize(("name", "args"), [("resnet50", RESIDUAL), ("convnext_tiny", STAGES)])
def test_released_files(name, args, beside, tmp_path):
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=0, **args).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, mean=0.1, std=0.2)
    state = {key: value for key, value in theirs.state_dict().items() if not key.startswith(("head.", "norm_pre."))}
    torch.save({"module": as_released(name, state, beside), "epoch": 1}, tmp_path / "spark.pth")
    lines = []
    encoder = load_encoder(f"spark:{tmp_path / 'spark.pth'}", log=lines.append)
    n = len(encoder.state_dict())
    assert f"encoder {n}/{n} tensors" in lines[0] and ("dense_decoder 1" in lines[0]) == beside
    images = torch.randn(2, 3, 64, 64)
    found = theirs.forward_intermediates(images, norm=False, intermediates_only=True)
    torch.testing.assert_close(encoder(images).maps, found[-4:])


def test_released_names_and_sizes():
    from models.encoders import released

    for name in ("resnet50", "resnet101", "resnet152", "resnet200"):
        with torch.device("meta"):
            state = timm.create_model(name, num_classes=0).state_dict()
        describe = released.recognise(state, "spark")[1].describe
        found, args = describe(state)
        with torch.device("meta"):
            assert found == name and len(build_encoder(found, **args).state_dict()) == len(state)
