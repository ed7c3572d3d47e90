"""Frozen tokenizers: the ids of their formulas, for the cells of the image, from files that are safe to read."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from models.encoders.build import build_encoder
from models.mim.loss import cross_entropy
from models.mim.recipes import beit
from models.monitor.draw import draw, palette
from models.monitor.health import health
from models.monitor.picture import reconstruct
from models.targets.dvae import DVAE
from models.targets.frozen import Codebook
from models.targets.target import Pixels
from models.targets.tokenizer import Tokenizer
from models.targets.tokenizers import load_tokenizer
from models.targets.vqkd import VQKD
from tests.test_parity_beit import norm
from tests.tokenizers import dvae_state, tiny_tokenizer, vqkd_state
from util import checkpoint
from util.optim import build_optimizer

PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}


class Corners(Tokenizer):
    """Each 4 px cell's id tells how bright its first pixel is, 0 to 255: easy to know by heart."""

    def __init__(self, in_chans=3, vocabulary=256):
        super().__init__(in_chans, 4, vocabulary, [0.0] * in_chans, [1 / 255] * in_chans)
        self.codes, self.seen = torch.randn(vocabulary, 8), None

    def forward(self, images):
        self.seen = images
        return images[:, 0, ::4, ::4].round().long()


# their formulas


def dvae_logits(state, images, blocks):
    """DALL-E's encoder on images in [0, 1], by the released names."""
    conv = lambda x, name: F.conv2d(
        x, state[f"{name}.w"], state[f"{name}.b"], padding=state[f"{name}.w"].shape[-1] // 2
    )
    x = conv(0.8 * images + 0.1, "blocks.input")
    for group in range(1, 5):
        for block in range(1, blocks + 1):
            name = f"blocks.group_{group}.block_{block}"
            y = x
            for i in range(1, 5):
                y = conv(y.clamp_min(0), f"{name}.res_path.conv_{i}")
            x = (conv(x, f"{name}.id_path") if f"{name}.id_path.w" in state else x) + y / (4 * blocks) ** 2
        x = F.max_pool2d(x, 2) if group < 4 else x
    return conv(x.clamp_min(0), "blocks.output.conv")


@pytest.mark.parametrize(("blocks", "width"), [(2, 8), (1, 16)])
def test_dvae(tmp_path, blocks, width):
    sizes = {"blocks": blocks, "width": width, "vocabulary": 64}
    tokenizer = load_tokenizer(tiny_tokenizer(tmp_path, **sizes))
    images = torch.rand(2, 3, 32, 48)
    expected = dvae_logits(dvae_state(**sizes), images, blocks)
    found = tokenizer.logits((images - tokenizer.mean) / tokenizer.std)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    ids = tokenizer.tokenize(images, 8)
    assert ids.shape == (2, 4, 6) and torch.equal(ids, found.argmax(1)) and len(ids.unique()) > 1
    assert (tokenizer.stride, tokenizer.vocabulary, tokenizer.in_chans) == (8, 64, 3)


def vqkd_ids(state, images, heads):
    """VQ-KD's encoder and codebook on images in [0, 1], by the released names."""
    w = {key.removeprefix("encoder."): value for key, value in state.items() if key.startswith("encoder.")}
    x = F.conv2d(2 * images - 1, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=8).flatten(2).mT
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], 1) + w["pos_embed"]
    for i in range(sum(key.endswith("norm1.bias") for key in w)):
        b = {key.removeprefix(f"blocks.{i}."): value for key, value in w.items() if key.startswith(f"blocks.{i}.")}
        bias = torch.cat([b["attn.q_bias"], 0 * b["attn.q_bias"], b["attn.v_bias"]])
        qkv = F.linear(norm(x, b["norm1.weight"], b["norm1.bias"]), b["attn.qkv.weight"], bias)
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=heads)
        mixed = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        x = x + F.linear(rearrange(mixed, "b h n d -> b n (h d)"), b["attn.proj.weight"], b["attn.proj.bias"])
        y = F.gelu(F.linear(norm(x, b["norm2.weight"], b["norm2.bias"]), b["mlp.fc1.weight"], b["mlp.fc1.bias"]))
        x = x + F.linear(y, b["mlp.fc2.weight"], b["mlp.fc2.bias"])
    x = norm(x[:, 1:], w["fc_norm.weight"], w["fc_norm.bias"])
    x = F.linear(x, state["encode_task_layer.0.weight"], state["encode_task_layer.0.bias"]).tanh()
    x = F.normalize(F.linear(x, state["encode_task_layer.2.weight"], state["encode_task_layer.2.bias"]), dim=-1)
    return torch.cdist(x, state["quantize.embedding.weight"].expand(len(x), -1, -1)).argmin(-1)


@pytest.mark.parametrize("width", [64, 128])  # one head, and two
def test_vqkd_as_released(tmp_path, width):
    state = vqkd_state(width=width)
    tokenizer = load_tokenizer(tiny_tokenizer(tmp_path, "vqkd", width=width))
    images = torch.rand(2, 3, 32, 32)
    ids = tokenizer.tokenize(images, 8)
    assert ids.shape == (2, 4, 4) and len(ids.unique()) > 3
    assert torch.equal(ids.flatten(1), vqkd_ids(state, images, width // 64))
    assert (tokenizer.stride, tokenizer.vocabulary, tokenizer.in_chans) == (8, 48, 3)
    assert tokenizer.tokenize(torch.rand(1, 3, 48, 64), 8).shape == (1, 6, 8)  # other grids


# the target


def test_ids_are_those_of_the_cells_of_the_image():
    """Whatever the unit, the normalisation, and whether in grey or in colour."""
    levels = torch.randint(256, (2, 1, 3, 5))
    for unit, in_chans in ((8, 3), (4, 3), (16, 1)):
        pixels = (levels / 255).repeat_interleave(unit, 2).repeat_interleave(unit, 3).expand(-1, in_chans, -1, -1)
        mean, std = [0.4, 0.5, 0.6][:in_chans], [0.2, 0.25, 0.3][:in_chans]
        target = Codebook(Corners(), unit, in_chans)
        target.set_normalization(mean, std)
        images = (pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
        ids = target(images)
        assert ids.dtype == torch.int64 and ids.shape == (2, 3, 5) and target.dim == 256
        # resizing carries an edge of the image a little into the cells beside it
        assert (ids - levels[:, 0]).abs().float().mean() < (1 if unit == 4 else 30)
        assert target.tokenizer.seen.shape == (2, 3, 12, 20)
        flat = Codebook(Corners(), unit, in_chans)(torch.full((1, in_chans, 2 * unit, unit), 77 / 255))
        assert (flat == 77).all()  # images in [0, 1] as they are, as long as nothing else is said


def test_a_tokenizer_sees_colours_between_black_and_white():
    target = Codebook(Corners(), 8)
    target(10 * torch.randn(2, 3, 16, 16))
    seen = target.tokenizer.seen
    assert seen.min().item() == 0 and seen.max().item() == pytest.approx(255) and 0 < seen.mean() < 255


def test_other_channels_are_refused(tmp_path):
    with pytest.raises(ValueError, match="reads images of 3 channels or 1, these have 5") as error:
        beit(build_encoder("vit_base_patch16_224", 5, **PLAIN), tiny_tokenizer(tmp_path))
    assert "\n" not in str(error.value)
    five = load_tokenizer(tiny_tokenizer(tmp_path, in_chans=5))
    assert Codebook(five, 8, 5)(torch.randn(1, 5, 16, 16)).shape == (1, 2, 2)


def test_ids_beyond_the_vocabulary_are_told_before_training_begins():
    target = Codebook(Corners(), 4)
    target.dim = 100
    bright = torch.full((1, 3, 8, 8), 0.902)
    with pytest.raises(ValueError, match="gave the id 230, its vocabulary is 100"):
        target.eval()(bright)  # as the trial before the first step does, and each evaluation
    assert (target.train()(bright) == 230).all()  # a step does not wait to look


def test_a_tokenizer_is_frozen_and_not_saved(tmp_path):
    mim = beit(build_encoder("vit_base_patch16_224", **PLAIN), tiny_tokenizer(tmp_path)).train()
    assert mim.training and not any(part.training for part in mim.target.tokenizer.modules())
    assert not any(p.requires_grad for p in mim.target.parameters())
    before = [p.clone() for p in mim.target.parameters()]
    optimizer = build_optimizer(mim)
    mim({"image": torch.randn(2, 3, 32, 32)})["loss"].backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, mim.target.parameters()))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    checkpoint.save(tmp_path, mim, optimizer, scaler, {"step": 1})
    saved = torch.load(tmp_path / "last.pt", weights_only=True)["task"]
    assert saved and not any("target" in key or "tokenizer" in key for key in saved)
    assert checkpoint.load(tmp_path, mim, optimizer, scaler) == {"step": 1}


def test_cross_entropy_of_several_guesses_adds_up():
    guess, ids = torch.randn(2, 3, 4, 2, 7), torch.randint(7, (2, 3, 4))
    one, two = guess.unbind(3)
    torch.testing.assert_close(cross_entropy(guess, ids), cross_entropy(one, ids) + cross_entropy(two, ids))
    expected = -one.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(cross_entropy(one, ids), expected)
    assert cross_entropy(one.bfloat16(), ids).dtype == torch.float32


# files


def test_files_that_are_no_tokenizers_are_refused_in_one_line(tmp_path):
    tiny_tokenizer(tmp_path, "vqkd")
    tiny_tokenizer(tmp_path)
    whole = (tmp_path / "dvae.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    torch.save(DVAE(3, 8, 1, 48), tmp_path / "module.pkl")
    torch.save({k: v for k, v in dvae_state().items() if "conv_3" not in k}, tmp_path / "less.pt")
    torch.save(vqkd_state() | {"encoder.blocks.0.norm3.bias": torch.zeros(64)}, tmp_path / "more.pt")
    checkpoint.export(tmp_path / "encoder.safetensors", build_encoder("vit_base_patch16_224", **PLAIN),
                      {"mean": [0.5], "std": [0.5], "size": 32})  # fmt: skip
    for source, message in [
        ("dvae:nowhere.pt", "there is no tokenizer at .*nowhere.pt: give dvae:FILE .*vqkd:FILE .*folder"),
        ("dalle:dvae.pt", "there is no tokenizer at dalle:"),
        ("dvae:cut.pt", "cannot be read, it may be cut short"),
        (
            "dvae:module.pkl",
            r"holds a whole module.*pip install DALL-E.*module.pkl.pt.*weights_only=False\).state_dict",
        ),
        ("dvae:vqkd.pt", "is no tokenizer of dvae: it has no blocks.input.w"),
        ("vqkd:dvae.pt", "is no tokenizer of vqkd: it has no quantize.embedding.weight"),
        ("dvae:less.pt", "is no tokenizer of dvae; tensors that do not fit 8: .*conv_3.weight"),
        ("vqkd:more.pt", "is no tokenizer of vqkd; tensors that do not fit 1: encoder.vit.blocks.0.norm3.bias"),
        ("dvae.pt", "is no tokenizer of ours: it has no encoder"),
        ("encoder.safetensors", "is no tokenizer of ours: it has no vocabulary"),
    ]:
        kind, _, name = source.rpartition(":")
        with pytest.raises(ValueError, match=message) as error:
            load_tokenizer(f"{kind}{':' * bool(kind)}{tmp_path}/{name}")
        assert "\n" not in str(error.value)


def test_a_released_module_can_be_converted(tmp_path):
    """By the very command that the refusal gives, here without the old package's own class."""
    torch.save(DVAE(3, 8, 1, 48), tmp_path / "module.pkl")
    with pytest.raises(ValueError) as error:
        load_tokenizer(f"dvae:{tmp_path}/module.pkl")
    exec(str(error.value).partition('python -c "')[2].removesuffix('"'))
    assert torch.load(f"{tmp_path}/module.pkl.pt", weights_only=True).keys() == DVAE(3, 8, 1, 48).state_dict().keys()


def test_nothing_of_a_pickle_is_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("code of the file was run",))

    (tmp_path / "trap.pkl").write_bytes(pickle.dumps(Trap(), protocol=2))
    torch.save({"model": Trap()}, tmp_path / "trap.pt")
    for name in ("trap.pkl", "trap.pt"):
        with pytest.raises(ValueError, match=f"{name} (cannot be read|holds a whole module)"):
            load_tokenizer(f"dvae:{tmp_path}/{name}")


def test_on_the_meta_device_no_file_is_needed(tmp_path):
    with torch.device("meta"):
        dvae, vqkd = (load_tokenizer(f"{kind}:{tmp_path}/nowhere.pt") for kind in ("dvae", "vqkd"))
        encoder = build_encoder("vit_base_patch16_224")
        assert beit(encoder, f"{tmp_path}/output/run").head.cells.linear.out_features == 8192
    assert (dvae.stride, dvae.vocabulary, vqkd.stride, vqkd.vocabulary) == (8, 8192, 16, 8192)
    assert sum(p.numel() for p in dvae.parameters()) == 53_786_240  # as DALL-E's has
    assert all(p.is_meta for p in [*dvae.parameters(), *vqkd.parameters()])


# what is shown of them


def test_ids_are_drawn_in_colours(tmp_path):
    mim = beit(build_encoder("vit_base_patch16_224", **PLAIN), tiny_tokenizer(tmp_path))
    images, vocabulary = torch.rand(2, 3, 32, 32), mim.target.dim
    ids = mim.target(images)
    colours = palette(mim.target.tokenizer.codes)
    assert colours.shape == (vocabulary, 3) and colours.min() == 0 and colours.max() == 1
    truth = draw(mim.target, ids, images)
    assert truth.shape == (2, 3, 32, 32) and torch.equal(truth[:, :, ::8, ::8].movedim(1, -1), colours[ids])
    sure = draw(mim.target, 100.0 * F.one_hot(ids, vocabulary), images)
    torch.testing.assert_close(sure, truth)
    torch.testing.assert_close(
        draw(mim.target, torch.stack([100.0 * F.one_hot(ids, vocabulary)] * 2, 3), images), truth
    )
    unsure = draw(mim.target, torch.zeros(2, 4, 4, vocabulary), images)
    torch.testing.assert_close(unsure, torch.full_like(unsure, 0.5))
    random = torch.get_rng_state()
    pictures = reconstruct(mim, images, (0.5,) * 3, (0.2,) * 3)
    assert torch.equal(random, torch.get_rng_state())
    assert list(pictures.columns) == ["masked input", "prediction", "prediction + visible", "truth", "original"]
    assert "Ids have colours" in pictures.caption and pictures.columns["truth"].dtype == torch.float32
    seen = ~pictures.columns["masked input"].isnan()
    assert torch.equal(pictures.columns["prediction + visible"][seen], pictures.columns["truth"][seen])


def test_ids_that_are_alike_have_colours_that_are_alike():
    place = torch.linspace(0, 1, 50)[:, None]
    codes = torch.cat([place, place**2, torch.zeros(50, 6)], 1) @ torch.linalg.qr(torch.randn(8, 8)).Q
    colours = palette(codes)
    assert (colours[1:, 0].diff().sign() == colours[1:, 0].diff().sign()[0]).all()
    assert palette(torch.randn(9, 2)).shape == (9, 3)  # codes of fewer numbers than there are colours


def test_health_of_ids_and_of_a_tokenizer_in_training(tmp_path):
    encoder = build_encoder("vit_base_patch16_224", **PLAIN)
    batches = [{"image": torch.randn(6, 3, 32, 32)} for _ in range(2)]
    for task in (beit(encoder, tiny_tokenizer(tmp_path)), VQKD(encoder, Pixels(8, 3, False), 16, 4, 1, 32, 2)):
        before = {key: value.clone() for key, value in task.state_dict().items()}
        figures = health(task, batches)
        codes = {"heldout_perplexity", "heldout_used"} if isinstance(task, VQKD) else set()
        assert set(figures) == {"heldout", "rank", "spread", "dim", "images"} | codes and figures["heldout"] > 0
        assert all(torch.equal(before[key], value) for key, value in task.state_dict().items())
    assert reconstruct(task, batches[0]["image"], (0,) * 3, (1,) * 3) is None
