"""What a newcomer runs into is told in a line that helps: newer options, absent files, silent assertions."""

import subprocess
import sys

import pytest
import torch
import yaml

import main_pretrain
from models.encoders import weights
from tests.test_main import ENVIRONMENT, PRETRAIN, ROOT, SMALL, fill_folder, finetune, pretrain
from util import flops, visualize
from util.errors import UserError, first_line, told


def test_a_run_of_before_an_option_was_there_goes_on_and_has_its_default(tmp_path):
    root, path = fill_folder(tmp_path / "images", "RGB", 20), tmp_path / "run" / "config.yaml"
    pretrain(root, tmp_path / "run")
    whole = yaml.safe_load(path.read_text())

    def forget():
        older = yaml.safe_load(path.read_text())
        del older["optim"]["eps"], older["data"]["weights"], older["data"]["scale"]
        path.write_text(yaml.safe_dump(older))

    forget()  # data.scale is not at its default
    with pytest.raises(UserError, match=r"data.scale \(\[0.2, 1.0\] there, \[1.0, 1.0\] here\) differ"):
        pretrain(root, tmp_path / "run")
    with pytest.raises(UserError, match=r"run: optim.eps \(1e-08 there, 1e-06 here\) differ"):
        pretrain(root, tmp_path / "run", "--optim.eps", "1e-6", "--data.scale", "[0.2, 1.0]")
    older = yaml.safe_load(path.read_text())
    older["data"]["scale"] = [1.0, 1.0]
    path.write_text(yaml.safe_dump(older))
    pretrain(root, tmp_path / "run")
    assert yaml.safe_load(path.read_text()) == whole


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--data.size", "-64"], "data.size is -64, but has to be at least 1 px, as in 224"),
        (["--data.size", "0"], "data.size is 0, but has to be"),
        (["--data.size", "[[0, 28], [1, [28, 0]]]"], "data.size is [28, 0], but has to be"),
        (["--config", "configs/pretrain/mae_vit_bse.yaml"], "not exist; the nearest there are mae_vit_base.yaml"),
        (["--config", "nope.yaml"], "nope.yaml does not exist; the recipes are in configs/"),
        (["--config", "configs/quickstart"], "configs/quickstart is a folder; the nearest there are "),
        (["--encoder.args.num_heads", "3"], "'num_heads': 3"),
    ],
)
def test_what_is_wrong_is_said_in_the_numbers_of_the_user(tmp_path, monkeypatch, wrong, said):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as error:
        main_pretrain.main([*PRETRAIN, "--data.root", str(tmp_path), "--run.folder", str(tmp_path / "run"), *wrong])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_config_that_is_not_there_exits_with_2(tmp_path):
    argv = [sys.executable, ROOT / "main_pretrain.py", "--config", "nope.yaml"]
    found = subprocess.run(argv, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert found.returncode == 2 and found.stderr.startswith("main_pretrain.py: --config ")
    assert len(found.stderr.splitlines()) == 1


def test_an_assertion_without_words_is_told_by_its_code(tmp_path):
    argv = [*PRETRAIN, *SMALL, "--encoder.name", "hiera_tiny_224", "--encoder.args", "{q_pool: 9}", "--data.root"]
    with pytest.raises(UserError) as error:
        main_pretrain.main([*argv, str(tmp_path), "--run.folder", str(tmp_path / "run"), "--data.size", "224"])
    line = str(error.value)
    assert line.startswith("encoder: AssertionError in timm/models/hiera.py, line ") and "assert q_pool < " in line
    assert "q_pool 9" in line


def test_no_error_is_told_by_its_bare_name():
    def refuse(width, heads):
        raise ValueError

    with (
        pytest.raises(UserError, match=r"^it: ValueError in .*tests/test_told.py, line \d+: raise ValueError$"),
        told("it"),
    ):
        refuse(5, 3)
    assert first_line(RuntimeError("one\ntwo")) == "one" and first_line(KeyError()) == "KeyError"  # never raised


def test_parameters_have_a_unit_that_suits_them(tmp_path, capsys):
    for number, said in {12_345: "12.3 k", 999_499: "999 k", 999_600: "1 M", 86_567_656: "86.6 M", 5e9: "5 G"}.items():
        assert flops.short(number) == said
        if number < 1e8:
            assert weights.count({"a": torch.empty(int(number), device="meta")}) == said
    root = fill_folder(tmp_path / "images", "RGB", 8)
    pretrain(root, tmp_path / "run")
    finetune("knn", tmp_path / "run", root, tmp_path / "knn")
    said = capsys.readouterr().out
    count = sum(p.numel() for p in weights.load_encoder(str(tmp_path / "run")).parameters())
    assert (
        f"vit_tiny_patch16_224, {count / 1000:.3g} k parameters, " in said and " k multiply-adds at 28 x 28 px" in said
    )
    assert f"{count / 1000:.3g} k/{count / 1000:.3g} k parameters" in said


def test_a_panel_says_which_channels_it_shows(monkeypatch):
    captions = []
    monkeypatch.setattr(visualize, "wrap", lambda text, font, width: captions.append(text) or text.split("|"))

    def caption(channels, bands=None):
        visualize.panel({"masked": torch.rand(2, channels, 8, 8), "strokes": torch.rand(2, 1, 8, 8)}, "Here.", bands)
        return captions[-1]

    assert caption(1) == caption(3) == "Here."
    assert caption(2) == "Here. Shown is channel 1 of 2."
    assert caption(5) == "Here. Shown as red, green and blue are channels 1, 2 and 3 of 5."
    assert caption(5, (4, 2, 0)) == "Here. Shown as red, green and blue are channels 5, 3 and 1 of 5."
    assert caption(5, (3,)) == "Here. Shown is channel 4 of 5."
