"""What a newcomer runs into is told in a line that helps: newer options, absent files, silent assertions."""

import subprocess
import sys

import pytest
import yaml

import main_pretrain
from tests.test_main import ENVIRONMENT, PRETRAIN, ROOT, SMALL, fill_folder, pretrain
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
        (["--encoder.args.num_heads", "3"], "encoder: dim should be divisible by num_heads (dim 128, num_heads 3)"),
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
