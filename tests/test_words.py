"""What is said to a user whose input is wrong: one line, with the name and the number that were given, at once."""

import re
from inspect import signature

import pytest
import torch

from models.encoders.build import build_encoder
from models.mim.head import Decoder
from models.mim.recipes import METHODS, fastmim, mae
from models.targets.load import load_teacher
from models.targets.target import Pixels
from models.targets.tokenizers import find, load_tokenizer
from tests.methods import PLAIN, TRANSFORMER, VIT, built
from tests.test_main import fill_folder, finetune, pretrain
from tests.towers import bare, clip_file, random_tower, write
from util.checkpoint import export
from util.errors import UserError

NUMBERS = {  # of the builders, and what is said of numbers that cannot be meant
    "ratio": [(x, "ratio is {}: it has to lie between 0 and 1") for x in (1.5, 1.0, 0.0, -0.2, float("nan"))],
    "unit": [(x, "unit is {}: it has to be at least 1") for x in (0, -8)],
    "cell": [(x, "cell is {}: it has to be at least 1") for x in (0, -8)],
    "least": [(x, "least is {}: it has to be at least 1") for x in (0, -1)],
    "depth": [(-1, "depth is {}: it has to be at least ")],
    "width": [(x, "width is {}: it has to be at least ") for x in (0, -16)],
    "heads": [(0, "heads is {}: it has to be at least 1"), (3, "heads is {}, which does not divide width 32: 2 would")],
    "vocabulary": [(0, "vocabulary is {}: it has to be at least 1")],
    "dim": [(0, "dim is {}: it has to be at least 1")],
}


def said(build, *args, **options):
    with pytest.raises(ValueError) as error:
        build(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", METHODS)
def test_numbers_that_cannot_be_are_refused_by_name_as_a_method_is_built(name):
    wrong = [(key, *pair) for key in signature(METHODS[name]).parameters for pair in NUMBERS.get(key, [])]
    assert len(wrong) > 3
    for key, number, words in wrong:
        assert words.format(number) in said(built, name, **{key: number})


def test_positions_need_a_width_that_four_divides():
    encoder = build_encoder(VIT[0], **VIT[1])
    assert "4 divides, not 18: use 16 or 20" in said(mae, encoder, **TRANSFORMER | {"width": 18})
    fastmim(encoder, unit=16, **TRANSFORMER | {"width": 18})  # which adds none
    assert built("hiera", width=18).head.table.shape[2] == 18  # and which learns them
    Decoder(encoder, Pixels(8, 3, True), depth=0, width=32, heads=2)


def test_cells_are_those_of_the_map_or_of_the_mask_where_none_are_given():
    for unit, cell in ((32, 16), (8, 8)):
        encoder = build_encoder(VIT[0], **PLAIN | {"patch_size": 16 if unit > 8 else 8})
        assert fastmim(encoder, unit=unit, target="pixels", **TRANSFORMER).target.unit == cell
    assert fastmim(encoder, unit=16, **TRANSFORMER).target.unit == 8  # of HOG's own


# files and names of targets


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of method vqkd, which holds an encoder and a tokenizer."""
    folder, norm = tmp_path_factory.mktemp("run"), {"mean": [0.5] * 3, "std": [0.5] * 3, "size": [32, 32]}
    task = built("vqkd")
    export(folder / "encoder.safetensors", task.encoder, norm)
    export(folder / "tokenizer.safetensors", task.tokenizer, norm)
    return folder


def test_a_run_of_ours_with_anothers_prefix_is_told_its_own(run):
    assert load_teacher(f"run:{run}").dim == PLAIN["embed_dim"]
    for kind in ("clip", "dino"):
        assert f"write run:{run}" in said(load_teacher, f"{kind}:{run}")
        assert f"write run:{run}/encoder.safetensors" in said(load_teacher, f"{kind}:{run}/encoder.safetensors")
    file = run / "tokenizer.safetensors"
    for kind in ("vqkd", "dvae"):
        assert f"write {run} without {kind}:" in said(find, f"{kind}:{run}")  # before any image is looked at
        assert f"write {file} without {kind}:" in said(load_tokenizer, f"{kind}:{file}")
    assert load_tokenizer(str(run)).vocabulary == load_tokenizer(str(file)).vocabulary == 48
    assert "give the folder of a run of method vqkd" in said(load_tokenizer, str(run / "encoder.safetensors"))
    assert f"write dvae:{clip_file()} or vqkd:" in said(load_tokenizer, str(clip_file()))


def test_heads_that_no_tensor_tells(tmp_path):
    path = write(bare(random_tower(width=24)), tmp_path / "narrow.pth")
    words = said(load_teacher, f"clip:{path}")
    assert "no teacher of its width, 24, is known" in words and "run:FOLDER" in words


def test_names_of_the_hub_are_answered_with_the_nearest():
    assert "the nearest are eva02_base_patch14_224" in said(load_teacher, "timm:eva02")
    assert re.search("the nearest are .+, .+, .+", said(load_teacher, "timm:zzzqqq"))


# encoders

TINY = {"patch_size": 8, "embed_dim": 32, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        (
            "hiera_tiny_224",
            {"drop_last": 1},
            "drop_last: hiera_tiny_224 keeps all its blocks: leave it out, or take",
        ),
        ("resnet50", {"drop_last": 1}, "drop_last: not made of stages of blocks: leave it out, or take a ViT"),
        ("nfnet_f0", {"drop_last": 1}, "drop_last: not made of stages of blocks"),
        (
            "vit_tiny_patch16_224",
            {**TINY, "depth": 3, "drop_last": 5},
            "drop_last is 5 of 3 blocks: it must be from 0 to 2",
        ),
        ("vit_tiny_patch16_224", {**TINY, "depth": 0}, "of 0 blocks"),
        ("vit_tiny_patch16_224", {**TINY, "depth": "two"}, "'depth': 'two'}: unsupported operand"),
        ("vit_tiny_patch16_224", {"patch_size": [8]}, "'patch_size': [8]}: tuple index out of range"),
        ("vit_tiny_patch16_224", {**TINY, "num_heads": 3}, "'num_heads': 3}: dim should be divisible by num_heads"),
        ("vit_tiny_patch16_224", {"position": "sincoss"}, 'position "sincoss" is not learned or sincos'),
        ("vit_tiny_patch16_224", {"init": "xavierr"}, 'init "xavierr" not timm or xavier'),
        ("hiera_tiny_224", {"init": "xavierr"}, 'init "xavierr" is not timm or xavier'),
        ("convnext_atto", {"layer_groups": "singel"}, 'layer_groups "singel" is not single or group'),
        ("xcit_nano_12_p8_224", {}, "xcit_nano_12_p8_224 cannot be built with {}: "),
        ("vit_tiny_r_s16_p8_224", {}, "its stem gives no map of patches: choose a swin"),
    ],
)
def test_encoders_that_cannot_be_built_say_why(name, args, words):
    with torch.device("meta"):
        assert words in said(build_encoder, name, **args)


# the mains


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--method", "mae2"], "--method takes a yaml, and there is no mae2; what to build goes to --method.name"),
        (["--method.args", "{unit: [16]}"], "method.args of mae: unit is [16], but has to be int or null"),
        (["--method.args", "{ratio: half}"], "method.args of mae: ratio is half, but has to be float"),
        (["--method.args", "{unit: 0}"], "method mae: unit is 0: it has to be at least 1"),
        (["--method.args", "{unit: 10}"], "10 px, Skip hides whole units of 7 px of this encoder: 7 or 14 px would do"),
        (["--encoder.args", "{depth: two}"], "'depth': 'two'}: unsupported operand"),
        (["--data.jitter", "-1"], "data.jitter is -1.0, but has to be at least 0"),
        (["--data.in_chans", "0"], "data.in_chans is 0, but has to be at least 1"),
        (["--optim.lr", "-1"], "optim.lr is -1.0, but has to be at least 0"),
        (["--optim.weight_decay", "-1"], "optim.weight_decay is -1.0, but has to be at least 0"),
        (["--optim.betas", "[0.9, 2]"], "optim.betas is (0.9, 2.0), but each has to be at least 0 and below 1"),
        (["--run.seed", "-1"], "run.seed is -1, but has to be at least 0"),
        (["--run.folder", ""], "run.folder is empty"),
    ],
)
def test_options_that_cannot_be_meant_are_told_before_anything_is_looked_for(tmp_path, wrong, words):
    with pytest.raises(UserError) as error:
        pretrain("/no/such/folder", tmp_path / "run", *wrong)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_an_odd_batch_of_pairs_is_told_by_the_option_that_was_given(tmp_path):
    root = fill_folder(tmp_path / "images", "RGB", 12)
    for given, name in ((["--data.batch", "5"], "data.batch 5"), (["--run.per_device", "1"], "run.per_device 1")):
        with pytest.raises(UserError, match=f"mixup or cutmix pairs .*: {name} has to be even"):
            finetune("finetune", "none", root, tmp_path / name, "--task.args", "{mixup: 0.8}", *given)
