"""--help tells the arguments of the parts that are named: what their builders take."""

import inspect
import subprocess
import sys

import pytest

import main_finetune
import main_pretrain
from models.encoders.build import OWN, build_encoder, families
from models.encoders.vit import ViT
from models.mim.recipes import METHODS
from models.transfer.recipes import TASKS
from tests.test_main import ROOT
from util.errors import UserError


def said(main, capsys, *argv):
    with pytest.raises(SystemExit) as left:
        main([*argv, "--help"])
    assert left.value.code == 0
    return capsys.readouterr().out


def test_it_tells_where_the_arguments_are(capsys):
    found = said(main_pretrain.main, capsys)
    assert "--optim.lr LR" in found and "listed by --method.name NAME --help" in found
    assert "listed by --encoder.name NAME --help" in found and "method.args of" not in found
    assert "listed by --task.name NAME --help" in said(main_finetune.main, capsys)


@pytest.mark.parametrize("name", METHODS)
def test_the_arguments_of_every_method_with_their_defaults(capsys, name):
    found = said(main_pretrain.main, capsys, "--method.name", name)
    assert METHODS[name].__doc__.splitlines()[0] in found and "--method.args.encoder" not in found
    for argument in list(inspect.signature(METHODS[name]).parameters.values())[1:]:
        default = "needed" if argument.default is argument.empty else f"default: {argument.default}"
        assert f"  --method.args.{argument.name}  ({argument.annotation}, {default})\n" in found


def test_the_arguments_of_what_a_config_names(capsys):
    found = said(main_pretrain.main, capsys, "--config", str(ROOT / "configs/pretrain/fastmim_swin_base.yaml"))
    assert "method.args of fastmim" in found and "encoder.args of swin_base_patch4_window7_224, for Pyramid" in found
    assert "for SwinTransformer; swin_base_patch4_window7_224 may bring other defaults than these" in found
    assert found.count("--encoder.args.drop_last") == 1 and "--encoder.args.window_size" in found


def test_the_arguments_of_tasks_and_their_encoders(capsys):
    for name, builder in TASKS.items():
        found = said(main_finetune.main, capsys, "--task.name", name, "--encoder.name", "cswin_tiny")
        arguments = list(inspect.signature(builder).parameters)[2:]
        assert all(f"--task.args.{argument}  (" in found for argument in arguments) and "args.classes" not in found
        assert "--encoder.args.stripes  (Sequence[int], default: (1, 2, 7))" in found
    found = said(main_finetune.main, capsys, "--task.name", "knn")
    assert "--task.args.k  (int, default: 20)" in found and "bank" not in found.split("task.args")[-1]
    found = said(main_finetune.main, capsys, "--task.name", "export")
    assert "--task.args.to  (str | list[str], needed)" in found and "--task.args.licence" in found
    found = said(main_finetune.main, capsys, "--task.name", "embed")
    assert "--task.args.what  (str, default: mean)" in found and "--task.args.to  (str, default: npy)" in found


def test_a_name_that_does_not_exist_is_told():
    with pytest.raises(UserError, match='no method is called "fastmmi"; the nearest is "fastmim"'):
        main_pretrain.main(["--method.name", "fastmmi", "--help"])
    with pytest.raises(UserError, match='encoder: no encoder is called "swin_bse"'):
        main_pretrain.main(["--encoder.name", "swin_bse", "--help"])


def test_families_are_the_classes_that_take_the_arguments():
    from timm.models.vision_transformer import VisionTransformer

    assert families("vit_tiny_patch16_224") == [ViT, VisionTransformer]
    assert families("cswin_tiny") == [OWN["cswin_tiny"][0]]
    with pytest.raises(ValueError, match='has no argument "drop_path_rat"; the nearest is "drop_path_rate"'):
        build_encoder("vit_tiny_patch16_224", drop_path_rat=0.1)


def test_it_imports_only_what_it_tells():
    code = "import sys; sys.argv = ['main_pretrain.py', {}'--help']\nimport main_pretrain\n"
    code += "try: main_pretrain.main()\nexcept SystemExit: print('torch' in sys.modules)"
    for words, imported in (("", "False"), ("'--method.name', 'mae', ", "True")):
        argv = [sys.executable, "-c", code.format(words)]
        found = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
        assert found.stdout.splitlines()[-1] == imported
