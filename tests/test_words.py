"""What is said to a user whose input is wrong: one line, with the name and the number that were given, at once."""

from inspect import signature

import pytest

from models.encoders.build import build_encoder
from models.mim.head import Decoder
from models.mim.recipes import METHODS, fastmim, mae
from models.targets.target import Pixels
from tests.methods import PLAIN, TRANSFORMER, VIT, built

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
