"""A tiny EVA through main_pretrain: it steps with activation checkpointing, and resumes to the bit."""

import json

import pytest
import torch
from safetensors.torch import load_file

import main_pretrain
from models.encoders.build import build_encoder
from models.mim.hide import Paint, Replace, cover
from models.mim.recipes import eva
from tests.test_main import PRETRAIN, fill_folder
from tests.towers import clip_file
from util import checkpoint


class Stop(Exception):
    pass


def pretrain(root, folder, *more):
    """EVA's ViT-g in small; images of 28 px, CLIP of 8 px patches."""
    argv = [*PRETRAIN, "--encoder.name", "eva_giant_patch14_224", "--method.name", "eva", "--data.root", root]
    argv += ["--encoder.args", "{patch_size: 7, embed_dim: 32, depth: 2, num_heads: 2, drop_path_rate: 0.1}"]
    argv += ["--method.args", f"{{ratio: 0.4, least: 2, target: 'clip:{clip_file()}'}}", "--run.checkpointing", "true"]
    main_pretrain.main(
        [*argv, "--run.folder", str(folder), "--run.evaluate_every", "0", "--run.save_every", "2", *more]
    )
    return load_file(folder / "encoder.safetensors")


@pytest.mark.parametrize("kind", ["RGB", "L"])
def test_eva_steps_and_resumes_to_the_bit(tmp_path, monkeypatch, kind):
    root = fill_folder(tmp_path / "images", kind, 60)
    whole = pretrain(root, tmp_path / "whole")
    with monkeypatch.context() as patched:
        saves, save = [], checkpoint.save
        patched.setattr(checkpoint, "save", lambda *args: (save(*args), saves.append(1), stop(saves)))
        with pytest.raises(Stop):
            pretrain(root, tmp_path / "parts")
    kept = torch.load(tmp_path / "parts" / "last.pt", weights_only=True)
    assert kept["counts"]["step"] == 4 and all(key.startswith(("hide.", "head.")) for key in kept["task"])
    parts = pretrain(root, tmp_path / "parts")
    assert all(torch.equal(whole[key], parts[key]) for key in whole) and whole.keys() == parts.keys()
    figures = json.loads((tmp_path / "parts" / "report.json").read_text())
    assert 0 < figures["heldout"] < 4
    assert list((tmp_path / "parts" / "reconstructions").glob("*.png"))
    without = pretrain(root, tmp_path / "without", "--run.checkpointing", "false")
    for key in whole:  # recomputing changes nothing but roundings
        torch.testing.assert_close(without[key], whole[key], atol=1e-3, rtol=1e-2)


def stop(saves):
    if len(saves) == 2:
        raise Stop


def test_cover_hides_from_any_encoder():
    vit = build_encoder("vit_base_patch16_224", patch_size=8, img_size=32, embed_dim=32, depth=1, num_heads=2)
    small = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 32), "num_heads": (1, 1, 2, 2)}
    pvt = build_encoder("pvt_v2_b0", **small)
    assert type(cover(vit)) is Replace and type(cover(pvt)) is Paint
    mim = eva(pvt, target=f"clip:{clip_file()}", least=1)  # 32 px cells, at which CLIP looks in small
    loss = mim({"image": torch.randn(2, 3, 96, 128)})["loss"]
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in mim.parameters() if p.requires_grad)
