"""Checkpoints of our own runs as sources of weights, and the proof that what was loaded is what is trained."""

import pytest
import torch

from models.encoders.build import build_encoder
from models.encoders.weights import checksum, load_encoder, untouched
from models.mim.recipes import mae
from models.transfer.classify import Classify
from tests.test_main import fill_folder, finetune, pretrain
from tests.test_weights import NORMALIZATION, VIT, random
from util.checkpoint import BEFORE, LAST, export, save
from util.errors import UserError


def test_a_runs_own_checkpoints_give_its_encoder(tmp_path):
    encoder = random(build_encoder("vit_base_patch16_224", **VIT))
    mim = mae(encoder, depth=1, width=16, heads=2)
    optimizer, scaler = torch.optim.AdamW(mim.parameters()), torch.amp.GradScaler("cpu", enabled=False)
    save(tmp_path, mim, optimizer, scaler, {"step": 1})
    with pytest.raises(ValueError, match=r"last.pt: it is a checkpoint to go on from; .*encoder.safetensors, which is"):
        load_encoder(str(tmp_path / LAST))
    export(tmp_path / "encoder.safetensors", encoder, NORMALIZATION)
    first = checksum(encoder)
    random(encoder).vit.cls_token.data += 1
    save(tmp_path, mim, optimizer, scaler, {"step": 2})
    lines = []
    assert checksum(load_encoder(str(tmp_path / LAST), log=lines.append)) == checksum(encoder) != first
    assert checksum(load_encoder(str(tmp_path / BEFORE))) == first == checksum(load_encoder(str(tmp_path)))
    assert "encoder 30/30 tensors" in lines[0] and "head" in lines[0]
    other = build_encoder("vit_base_patch16_224", **VIT | {"depth": 3})
    export(tmp_path / "encoder.safetensors", other, NORMALIZATION)
    with pytest.raises(ValueError, match="holds no encoder as .* describes: they are of different runs"):
        load_encoder(str(tmp_path / LAST))


def test_the_average_is_what_a_finetunes_checkpoint_gives(tmp_path):
    encoder = random(build_encoder("vit_base_patch16_224", **VIT))
    task = Classify(encoder, 2, ema=0.9)
    random(task.encoder).vit.cls_token.data += 1
    optimizer, scaler = torch.optim.AdamW(task.parameters()), torch.amp.GradScaler("cpu", enabled=False)
    save(tmp_path, task, optimizer, scaler, {"step": 1})
    export(tmp_path / "encoder.safetensors", task.judged.encoder, NORMALIZATION)
    assert checksum(load_encoder(str(tmp_path / LAST))) == checksum(task.average.encoder) != checksum(task.encoder)


def test_what_is_set_up_again_after_loading_is_found_out():
    encoder = random(build_encoder("regnety_002"))  # has buffers, and numbers that are no floats
    loaded, task = checksum(encoder), Classify(encoder, 5, ema=0.9)
    assert untouched(encoder, loaded, task) == f"{loaded:08x}, untouched since loading; fresh: norm 2, head 2"
    encoder.backbone.get_parameter(next(name for name, _ in encoder.backbone.named_parameters())).data[0] += 1e-3
    with pytest.raises(ValueError, match=f"loaded as {loaded:08x} and is [0-9a-f]{{8}} now"):
        untouched(encoder, loaded, task)


def test_main_finetune_says_that_nothing_was_set_up_again(tmp_path, capsys, monkeypatch):
    root = fill_folder(tmp_path / "images", "RGB", 20)
    pretrain(root, tmp_path / "run")
    capsys.readouterr()
    finetune("linear", tmp_path / "run", root, tmp_path / "linear")
    said = capsys.readouterr().out
    number = f"{checksum(load_encoder(str(tmp_path / 'run'))):08x}"
    assert f"weights   {number}, untouched since loading; fresh: head 2" in said
    monkeypatch.setattr(Classify, "__init__", spoilt(Classify.__init__))
    with pytest.raises(UserError, match=f"weights: the encoder was loaded as {number} and is"):
        finetune("linear", tmp_path / "run", root, tmp_path / "again")


def spoilt(init):
    def inner(self, encoder, *args, **kwargs):
        torch.nn.init.zeros_(next(encoder.parameters()))
        init(self, encoder, *args, **kwargs)

    return inner
