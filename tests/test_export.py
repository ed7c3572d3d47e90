"""Encoders taken elsewhere: what is kept agrees with what it was made from, and what does not leaves nothing behind."""

import json
import re
import subprocess
import sys

import jaxtyping
import pytest
import torch
import yaml
from safetensors import safe_open

import main_finetune
from models.encoders.build import build_encoder
from models.encoders.grid import Features
from models.encoders.released.source import open_weights
from models.encoders.weights import load_encoder
from models.export import formats
from models.export.formats import FORMATS, Facts, export
from models.export.onnx import Session
from models.export.onnx import read as read_onnx
from tests.test_main import ROOT, fill_folder
from util.checkpoint import export as save_encoder
from util.errors import UserError

VIT = ("vit_tiny_patch16_224", {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 64})
SWIN = {"embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "img_size": 64, "window_size": 7}
STAGES = {"depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 2]}
ONNX = {  # and whether one file serves images of any size; Swin's windows are shifted and padded at these sizes
    "vit": (*VIT, True),
    "sincos": (VIT[0], VIT[1] | {"position": "sincos", "class_token": False}, True),
    "swin": ("swin_tiny_patch4_window7_224", SWIN, True),
    "convnextv2": ("convnextv2_tiny", {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}, True),
    "hiera": ("hiera_tiny_224", {"embed_dim": 8, "num_heads": 1, "stages": [1, 1, 1, 1], "img_size": 64}, True),
    "resnet": ("resnet50", {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}, True),
    "cswin": ("cswin_tiny", STAGES | {"embed_dim": 8}, False),
}


def encoder_of(name, args, seed=0):
    """With its weights spread so that every part of it is felt."""
    torch.manual_seed(seed)
    encoder = build_encoder(name, **args).eval()
    for parameter in encoder.parameters():
        parameter.data += 0.1 * parameter.requires_grad * torch.randn_like(parameter)  # a fixed table stays
    return encoder


def facts(**more):
    return Facts([0.5, 0.4, 0.3], [0.2, 0.25, 0.3], (64, 64), **more)


def example(card):
    """The Python of a card, run in the folder that it lies in."""
    (code,) = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    code += "print(tuple(features.shape))"
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, "-c", code], cwd=card.parent, capture_output=True, text=True,
                           env=environment)  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout.strip()


@pytest.fixture
def run(tmp_path):
    """The folder of a run with a ViT."""
    folder = tmp_path / "run"
    folder.mkdir()
    norm = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "size": [64, 64], "crop": 0.9}
    save_encoder(folder / "encoder.safetensors", encoder_of(*VIT), norm)
    (folder / "config.yaml").write_text(yaml.safe_dump({
        "method": {"name": "mae", "args": {"ratio": 0.75}}, "data": {"root": "/data/birds", "fraction": 0.1},
        "optim": {"lr": 1.5e-4}}))  # fmt: skip
    (folder / "report.json").write_text(json.dumps({"held_out": 0.37912, "knn": 0.8123, "images": 500}))
    return folder


def taken(run, folder, to, *more):
    argv = ["--task.name", "export", "--weights", str(run), "--task.args.to", to, "--run.folder", str(folder), *more]
    main_finetune.main(argv)


@pytest.mark.parametrize("case", ONNX)
def test_onnx(case, tmp_path, monkeypatch):
    """Batches of any size and, where an encoder allows it, images of any size, square or not."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # to check a shape is to fix it
    name, args, free = ONNX[case]
    encoder, unit = encoder_of(name, args), 32
    learned = [parameter.requires_grad for parameter in encoder.parameters()]
    line = export(encoder, facts(), "onnx", tmp_path / "out")
    assert re.fullmatch(r"max \|difference\| (0|\de-\d+) over 8 images", line)
    run, norm = read_onnx(tmp_path / "out", encoder), facts()
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (norm.mean, norm.std))
    sizes = [(3, 64, 64), (1, 64, 64)] + [(2, 64 + unit, 64 + 4 * unit), (1, 160, 64), (1, 32, 32)] * free
    for batch, height, width in sizes:
        images = torch.rand(batch, 3, height, width)
        ours = encoder((images - mean) / std)
        theirs = run((images - mean) / std)
        assert torch.allclose(ours.maps[-1], theirs.maps[-1], atol=1e-4 * ours.maps[-1].abs().max().item())
        outputs = Session(tmp_path / "out")(images)  # in [0, 1], as users give them
        assert torch.allclose(outputs["pooled"], ours.maps[-1].mean((2, 3)), atol=1e-4 * outputs["map"].abs().max())
        assert ("prefix" in outputs) == (ours.prefix is not None)
        if ours.prefix is not None:
            assert torch.allclose(outputs["prefix"], ours.prefix, atol=1e-4 * ours.prefix.abs().max().item())
    told = Session(tmp_path / "out").session.get_modelmeta().custom_metadata_map
    assert json.loads(told["any_size"]) is free and json.loads(told["normalized_inside"]) is True
    assert json.loads(told["mean"]) == norm.mean and json.loads(told["encoder"])["name"] == name
    said = f"any multiple of {encoder.mask_unit} px" if free else "64 x 64 px alone"
    assert said in (tmp_path / "out/README.md").read_text()
    assert [parameter.requires_grad for parameter in encoder.parameters()] == learned


def test_onnx_for_one_size_alone(run, tmp_path):
    taken(run, tmp_path / "out", "onnx", "--task.args.any_size", "false")
    assert "; 64 x 64 px alone." in (tmp_path / "out/onnx/README.md").read_text()
    with pytest.raises(Exception, match="Got: 96 Expected: 64"):
        Session(tmp_path / "out/onnx")(torch.rand(1, 3, 96, 64))


def test_safetensors_of_others_weights_tells_where_they_are_from(tmp_path):
    encoder = encoder_of(*VIT)
    line = export(encoder, facts(origin="mae", licence="CC-BY-NC-4.0"), "safetensors", tmp_path / "out")
    assert line == "max |difference| 0 over 8 images"
    found = open_weights(str(tmp_path / "out/encoder.safetensors"))
    assert (found.origin, found.licence, found.normalization["size"]) == ("mae", "CC-BY-NC-4.0", [64, 64])
    again, images = load_encoder(str(tmp_path / "out")), torch.randn(2, 3, 64, 64)
    assert torch.equal(again(images).maps[-1], encoder(images).maps[-1])
    assert (tmp_path / "out/encoder.safetensors").stat().st_mode & 0o777 == 0o644


def test_the_command_leaves_files_and_a_card_that_works(run, tmp_path, capsys):
    taken(run, tmp_path / "out", "[safetensors, onnx]", "--task.args.licence", "MIT")
    said = capsys.readouterr().out
    assert re.search(r"onnx +max \|difference\| \de-\d over 8 images, in ", said)
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["onnx", "safetensors"]
    assert json.loads((tmp_path / "out/report.json").read_text()).keys() == {"safetensors", "onnx"}
    assert "64" in (tmp_path / "out/config.yaml").read_text()  # of the weights
    for to in ("safetensors", "onnx"):
        card = tmp_path / "out" / to / "README.md"
        _, header, text = card.read_text().split("---\n", 2)
        assert yaml.safe_load(header) == {
            "license": "mit", "library_name": {"safetensors": "pytorch"}.get(to, to),
            "pipeline_tag": "image-feature-extraction", "tags": ["masked-image-modeling", "mae", VIT[0]]}  # fmt: skip
        for words in ("`/data/birds`, 0.1 of the training images", "ratio: 0.75", "| held_out | 0.3791 |",
                      "mean [0.5, 0.4, 0.3], std [0.2, 0.25, 0.3]", "64 x 64 px", f"`{run}` (a run of this code)",
                      "| licence of the weights | MIT |", r"max \|difference\|", "1.111 of the size"):  # fmt: skip
            assert words in text, words
        assert example(card) == "(1, 24, 4, 4)"
    with safe_open(tmp_path / "out/safetensors/encoder.safetensors", "pt") as file:
        assert json.loads(file.metadata()["method"])["name"] == "mae"
    taken(run, tmp_path / "out", "[safetensors, onnx]", "--task.args.licence", "MIT")  # the same command again


def test_a_card_invents_nothing(tmp_path):
    export(encoder_of(*VIT), facts(origin="clip", source="clip.pt"), "safetensors", tmp_path / "out")
    _, header, text = (tmp_path / "out/README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header)["license"] == "unknown" and "| licence of the weights | unknown |" in text
    assert text.count("Unknown: it is not told with the weights.") == 2
    assert "None measured with these weights." in text and "`clip.pt` (clip)" in text


def test_real_images_are_compared_where_they_are_given(run, tmp_path, capsys):
    root = fill_folder(tmp_path / "images", "RGB", 5)
    taken(run, tmp_path / "out", "safetensors", "--data.root", root)
    assert "over 5 images" in capsys.readouterr().out


class Fake:
    """A format whose library is off by so much of the largest feature, in the last map or in the prefix."""

    def __init__(self, by=0.0, where="maps", change=None):
        self.by, self.where, self.change = by, where, change

    def write(self, encoder, facts, folder):
        (folder / "weights.bin").write_bytes(b"1")

    def read(self, folder, encoder):
        assert (folder / "weights.bin").exists()

        def features(images):
            found = encoder(images)
            largest = max(found.maps[-1].abs().max(), found.prefix.abs().max())
            values = {"maps": found.maps[-1].clone(), "prefix": found.prefix.clone()}
            values[self.where][0, 0, ..., 0] += self.by * largest
            found = Features([values["maps"]], values["prefix"])
            return self.change(found) if self.change else found

        return features

    USE = "features = 1\n"


def fake(monkeypatch, form):
    monkeypatch.setitem(FORMATS, "fake", "models.export.fake")
    monkeypatch.setattr(formats.pkgutil, "resolve_name", lambda name: form)


def raises(error):
    raise error


@pytest.mark.parametrize("form, match", [
    (Fake(2e-4), r"other features, so it is not kept: max \|difference\| \de-\d over 8 images, where the largest"),
    (Fake(2e-4, "prefix"), "other features"),
    (Fake(float("nan")), r"max \|difference\| nan"),
    (Fake(change=lambda found: Features([found.maps[-1][:, :, 1:]])), r"map is \(8, 24, 3, 4\), but \(8, 24, 4, 4\)"),
    (Fake(change=lambda found: Features(found.maps, found.prefix[:, :0])), "its prefix is"),
    (Fake(change=lambda found: raises(KeyError("layer.3"))), "cannot be read back, so it is not kept: 'layer.3'"),
    (Fake(change=lambda found: raises(ImportError("no", name="open_clip.x"))), "pip install open_clip_torch"),
])  # fmt: skip
def test_what_disagrees_leaves_nothing_behind(form, match, tmp_path, monkeypatch):
    fake(monkeypatch, form)
    with pytest.raises(ValueError, match=match) as error:
        export(encoder_of(*VIT), facts(), "fake", tmp_path / "out")
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_a_small_difference_is_kept_and_told(tmp_path, monkeypatch):
    fake(monkeypatch, Fake(5e-5))
    assert export(encoder_of(*VIT), facts(), "fake", tmp_path / "out") != "max |difference| 0 over 8 images"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "weights.bin"]


def test_of_several_formats_one_that_fails_spoils_no_other(run, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "fake", "models.export.fake")
    monkeypatch.setattr(formats, "find", lambda to, find=formats.find: Fake(1) if to == "fake" else find(to))
    with pytest.raises(UserError, match="fake: .*not kept: .*; safetensors done"):
        taken(run, tmp_path / "out", "[fake, safetensors]")
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["safetensors"]
    assert not (tmp_path / "out/report.json").exists()


@pytest.mark.parametrize("to, more, match", [
    ("onx", [], '"onx"; the nearest is "onnx" of safetensors, '),
    ("[safetensors, onx]", [], 'the nearest is "onnx"'),
    ("safetensors", ["--task.args.lisence", "MIT"], "the nearest is licence"),
    ("safetensors", ["--weights", "none"], "weights is none, but export needs some"),
    ("safetensors", ["--weights", "/no/such"], "no weights at /no/such"),
])  # fmt: skip
def test_a_wrong_option_is_told_before_anything_is_written(to, more, match, run, tmp_path):
    with pytest.raises(UserError, match=match):
        taken(run, tmp_path / "out", to, *more)
    assert not (tmp_path / "out").exists()


def test_a_library_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match="onnx needs onnxruntime: pip install onnxruntime"):
        export(encoder_of(*VIT), facts(), "onnx", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_folders_of_others_are_let_be(run, tmp_path):
    (tmp_path / "out/safetensors").mkdir(parents=True)
    (tmp_path / "out/safetensors/thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds thesis.tex, which is not of this export: choose another folder"):
        taken(run, tmp_path / "out", "safetensors")
    assert [path.name for path in (tmp_path / "out/safetensors").iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match=r"holds another run: task.args.to \(safetensors there, onnx here\)"):
        taken(run, tmp_path / "out", "onnx")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="run.folder .* cannot be used"):
        taken(run, tmp_path / "file", "safetensors")
    with pytest.raises(ValueError, match="file/out cannot be written: Not a directory"):
        export(encoder_of(*VIT), facts(), "safetensors", tmp_path / "file/out")


@pytest.mark.parametrize("error, match", [
    (OSError(28, "No space left on device"), "cannot be written: No space left on device"),
    (ValueError("fake has no vit_tiny_patch16_224; it has Swin"), "^fake has no vit_tiny_patch16_224; it has Swin$"),
])  # fmt: skip
def test_what_cannot_be_written_leaves_nothing_behind(error, match, tmp_path, monkeypatch):
    """A full disk; an encoder that the other library does not have."""
    fake(monkeypatch, form := Fake())
    monkeypatch.setattr(form, "write", lambda *given: raises(error))
    with pytest.raises(ValueError, match=match):
        export(encoder_of(*VIT), facts(), "fake", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_older_export_is_replaced(tmp_path):
    for seed in (0, 1):
        encoder = encoder_of(*VIT, seed=seed)
        export(encoder, facts(), "safetensors", tmp_path / "out")
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(load_encoder(str(tmp_path / "out"))(images).maps[-1], encoder(images).maps[-1])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
