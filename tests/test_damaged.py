"""Files that are damaged or hostile: each is refused in one line, nothing of it is run, and no part of it is loaded."""

import argparse
import functools
import gzip
import importlib
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import main_finetune
import main_pretrain
from models.encoders import released
from models.encoders.build import build_encoder
from models.encoders.released.source import open_weights
from models.encoders.weights import build_found, checksum, load_encoder, load_found
from models.mim.weights import load_weights
from tests import towers
from tests.official import GOLDEN
from tests.test_weights import NORMALIZATION, official, random
from util.checkpoint import export
from util.errors import command

ROOT = Path(__file__).parent.parent
FOLDER = tempfile.TemporaryDirectory()
CANARY = Path(FOLDER.name) / "it_ran"
SOURCES = ("ours", "mae", "simmim", "convnextv2", "clip", "archive")
FIXTURES = {"mae": "mae", "simmim": "simmim_swin", "convnextv2": "convnextv2_fcmae"}
CALM = {"derandomize": True, "deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


# whole files, and how each is loaded


@functools.cache
def whole(source):
    """A file that loads, as bytes; its tensors, and the arguments that it does not tell."""
    path, args = Path(FOLDER.name) / f"{source}.whole", {}
    if source == "ours":
        encoder = random(build_encoder("vit_base_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=2,
                                       num_heads=3))  # fmt: skip
        export(path, encoder, NORMALIZATION)
        return path.read_bytes(), load_file(path), args
    if source == "archive":
        towers.scripted(towers.openai(towers.random_tower()), path)
        return path.read_bytes(), {}, args
    if source == "clip":
        state = towers.openai(towers.random_tower())
    else:
        told, state = official(FIXTURES[source])
        args = {"num_heads": told["num_heads"]} if source == "mae" else {}
    return saved(state), state, args


def saved(state, **how):
    file = io.BytesIO()
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-3), "epoch": 3}, file, **how)
    return file.getvalue()


@functools.cache
def callers(source):
    """An encoder of a caller's, such as a source's file describes, with weights of its own."""
    content, _, args = whole(source)
    return random(build_found(open_weights(write(content)), **args))


def write(content, name="damaged.pth"):
    path = Path(FOLDER.name) / name
    path.write_bytes(content)
    return str(path)


def refused(source, content):
    """The line with which a file is refused: by whoever builds an encoder of it, and by whoever loads into theirs."""
    args, encoder = whole(source)[2], callers(source)
    path = write(content)
    before = checksum(encoder)
    with pytest.raises(ValueError) as error:
        load_encoder(path, **args)
    try:
        load_found(encoder, open_weights(path))
    except ValueError:
        assert checksum(encoder) == before
    else:  # the weights are all there, what was damaged is how to build their encoder
        assert checksum(encoder) == checksum(load_encoder(write(whole(source)[0]), **args))
        callers.cache_clear()
    assert not CANARY.exists()
    return one_line(str(error.value), path)


def one_line(line, path):
    assert line.startswith(path) and line.isprintable() and len(line) < 900, line
    assert not re.search(r"Traceback|weights_only=False|0x[0-9a-f]{6}", line), line
    return line.removeprefix(path)


def test_the_whole_files_load():
    for source in SOURCES:
        content, _, args = whole(source)
        for name in ("a.pth", "a.safetensors", "a"):  # what a file is called says nothing
            lines = []
            encoder = load_encoder(write(content, name), log=lines.append, **args)
            n = len(encoder.state_dict())
            assert len(lines) == 1 and f"encoder {n}/{n} tensors" in lines[0]


# damage


@functools.cache
def encoders_keys(source):
    state = whole(source)[1]
    if source == "ours":
        return list(state)
    _, family, prepared = released.recognise(state)
    keys = [key for key in family.prepare(prepared) if family.rename(key)]
    return [
        key for key in state if key in keys or source == "clip" and key.startswith("visual.") and key[-4:] != "proj"
    ]


@st.composite
def keys_changed(draw):
    """A tensor of the encoder is missing, has another name or another shape, or holds no numbers."""
    source = draw(st.sampled_from([source for source in SOURCES if source != "archive"]))
    state = dict(whole(source)[1])
    key = draw(st.sampled_from(encoders_keys(source)))
    how = draw(st.sampled_from(["missing", "renamed", "shape", "NaN", "infinite", "integers", "escape"]))
    value = state.pop(key)
    if how == "renamed":
        state[key + draw(st.sampled_from(["s", ".weight", "_2", "0"]))] = value
    elif how == "shape":
        side = draw(st.integers(0, value.ndim - 1))
        assume(value.ndim < 4 or side != 1)  # an encoder of images of another number of channels is whole
        state[key] = torch.cat([value, value.narrow(side, 0, 1)], side)
    elif how in ("NaN", "infinite"):
        value = value.clone()
        place = draw(st.integers(0, value.numel() - 1))
        value.view(-1)[place] = float("nan") if how == "NaN" else draw(st.sampled_from([-1, 1])) * float("inf")
        state[key] = value
    elif how == "integers":
        state[key] = (value * 100).to(torch.int8)
    elif how == "escape":
        state[f"\x1b[31m{key}\n"] = value
    return source, content_of(source, state)


def content_of(source, state):
    if source != "ours":
        return saved(state)
    header = whole("ours")[0]
    metadata = json.loads(header[8 : 8 + struct.unpack("<Q", header[:8])[0]])["__metadata__"]
    path = Path(FOLDER.name) / "ours.changed"
    save_file({key: value.contiguous() for key, value in state.items()}, path, metadata)
    return path.read_bytes()


@st.composite
def cut(draw):
    source = draw(st.sampled_from(SOURCES))
    content = whole(source)[0]
    return source, content[: draw(st.integers(0, len(content) - 1))]


@st.composite
def other_beginning(draw):
    source = draw(st.sampled_from(SOURCES))
    content, begin = whole(source)[0], draw(st.binary(min_size=8, max_size=8))
    assume(begin[:4] != content[:4] and begin[5:] != bytes(3))
    return source, begin + content[8:]


@st.composite
def offsets_changed(draw):
    """The header of a safetensors file says something else of one tensor, or of the encoder."""
    content = whole("ours")[0]
    n = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + n])
    key = draw(st.sampled_from([key for key in header if key != "__metadata__"]))
    entry, (begin, end) = header[key], header[key]["data_offsets"]
    step = draw(st.integers(1, 2**40))
    how = draw(st.sampled_from(["longer", "shorter", "later", "swapped", "type", "shape", "length", "plan", "no plan"]))
    if how == "length":
        n += step
    elif how == "plan":
        header["__metadata__"]["encoder"] = draw(st.sampled_from(["{", "[]", '{"name": 3}', '{"name": "vit\\u001b"}',
            '{"name": "a\\nb", "in_chans": 3, "args": {}}',
            '{"name": "vit_base_patch16_224", "in_chans": "x", "args": {}}',
            '{"name": "vit_base_patch16_224", "in_chans": 3, "args": {"depth": 1, "embed_dim": -4}}',
            '{"name": "vit_base_patch16_224", "in_chans": 3, "args": {"depth": "a"}}']))  # fmt: skip
    elif how == "no plan":
        del header["__metadata__"]["encoder"]
    else:
        entry |= {
            "longer": {"data_offsets": [begin, end + step]},
            "shorter": {"data_offsets": [begin, end - min(step, 3)]},
            "later": {"data_offsets": [begin + step, end + step]},
            "swapped": {"data_offsets": [end, begin]},
            "type": {"dtype": draw(st.sampled_from(["F64", "F16", "I64", "F\x1b", "U7"]))},
            "shape": {"shape": [step, *entry["shape"][1:], 2]},
        }[how]
    text = json.dumps(header).encode()
    return "ours", struct.pack("<Q", len(text) if how != "length" else n) + text + content[8 + struct.unpack(
        "<Q", content[:8])[0] :]  # fmt: skip


def gadget(module, name, *args):
    """What pickles as a call of a function, which does something that can be seen."""

    class Gadget:
        def __reduce__(self):
            return getattr(importlib.import_module(module), name), args

    return Gadget()


TOUCH = f"open({str(CANARY)!r}, 'w')"
GADGETS = {
    "posix.system": ("os", "system", f"touch {CANARY}"),
    "os.popen": ("os", "popen", f"touch {CANARY}"),
    "builtins.eval": ("builtins", "eval", TOUCH),
    "builtins.exec": ("builtins", "exec", TOUCH),
    "builtins.getattr": ("builtins", "getattr", "a", "upper"),
    "builtins.__import__": ("builtins", "__import__", "this"),
    "io.open": ("builtins", "open", str(CANARY), "w"),
    "subprocess.Popen": ("subprocess", "Popen", ["touch", str(CANARY)]),
    "subprocess.call": ("subprocess", "call", ["touch", str(CANARY)]),
    "timeit.timeit": ("timeit", "timeit", TOUCH),
    "runpy.run_path": ("runpy", "run_path", str(CANARY)),
    "pickle.loads": ("pickle", "loads", pickle.dumps(3)),
    "importlib.import_module": ("importlib", "import_module", "this"),
    "torch.serialization.load": ("torch", "load", str(CANARY)),
    "torch.storage._load_from_bytes": ("torch.storage", "_load_from_bytes", b"x"),
    "torch.hub.load": ("torch.hub", "load", str(CANARY), "model"),
    "numpy.load": ("numpy", "load", str(CANARY)),
    "functools.partial": ("functools", "partial", print),
}


@st.composite
def hostile(draw):
    """A pickle that wants to run code, wherever in the file, however it was written."""
    name = draw(st.sampled_from(list(GADGETS)))
    trap, place = gadget(*GADGETS[name]), draw(st.sampled_from(["top", "beside", "options", "deep", "key", "weights"]))
    source = draw(st.sampled_from(["mae", "simmim", "convnextv2", "clip"]))
    state = whole(source)[1]
    content = {
        "top": lambda: trap,
        "beside": lambda: {"model": state, "optimizer": trap},
        "options": lambda: {"model": state, "args": argparse.Namespace(lr=1, hook=trap)},
        "deep": lambda: {"model": state, "log": [{"a": ({1: [trap]}, 2)}]},
        "key": lambda: {"model": state, "log": {(1, trap): 2}},
        "weights": lambda: {"model": {**state, "extra": trap}},
    }[place]()
    how = draw(st.sampled_from(["zip", "older", "archive", *range(6)]))
    file = io.BytesIO()
    if how == "archive":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("evil/constants.pkl", b"")
            archive.writestr("evil/data.pkl", pickle.dumps([1, trap], protocol=2))
    elif isinstance(how, int):
        pickle.dump([{"a": 1}, trap], file, protocol=how)
    else:
        torch.save(content, file, _use_new_zipfile_serialization=how == "zip")
    return name, source, file.getvalue()


def zip_of(members, how=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def npz():
    file = io.BytesIO()
    np.savez(file, a=np.ones(3))
    return file.getvalue()


def tar():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"))
    return file.getvalue()


def expanded(rows):
    return saved({"patch_embed.proj.weight": torch.zeros(()).expand(rows, 2**10, 2**4, 2**4)})


OTHERS = {
    "is empty": b"",
    "zeros": bytes(600),
    "web page": b"<!DOCTYPE html>\n<html><title>404 \x1b[31mNot Found</title></html>",
    "git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    'text that begins "{ "model_type': b'{\n  "model_type": "vit_mae"\n}',
    "gzip": gzip.compress(b"weights"),
    "tar archive": tar(),
    "arrays of numpy (npz) (a.npy)": npz(),
    "files (readme.txt, model/weights.pth)": zip_of({"readme.txt": "hello", "model/weights.pth": b"x"}),
    "would unpack to": zip_of({"model/data.pkl": bytes(2**25)}),
    "but tensors of": expanded(2**30),
    "none of torch.save (it names numpy": pickle.dumps({"a": np.ones(2)}),
    "none of torch.save: give": pickle.dumps({"a": [1, 2]}),
    "picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(range(256)),
    "holds no tensors by name": saved({}),
    "objects of torch.nn.modules": saved(torch.nn.Linear(2, 2)),
    "with no protocol": saved({"a": torch.ones(2)}, pickle_protocol=4),
    "as torch.float8_e4m3fn": saved({"a": torch.ones(2).to(torch.float8_e4m3fn)}),
    "sparse": saved({"a": torch.eye(2).to_sparse()}),
    "meta device": saved({"a": torch.ones(2, device="meta")}),
    "as torch.complex64": saved({"a": torch.ones(2, dtype=torch.complex64)}),
    "no encoder that is known": saved({"a": torch.ones(2)}),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_else_a_file_may_be_is_told(what):
    assert what in refused("mae", OTHERS[what])


def test_200_damaged_files_are_refused_in_one_line_each():
    kinds = keys_changed(), keys_changed(), cut(), other_beginning(), offsets_changed(), hostile()
    files = {(source, whole(source)[0]) for source in SOURCES}
    for source in SOURCES[:-1]:
        encoders_keys(source)  # now, as the checks of types draw at random, which a strategy may not

    @settings(max_examples=240, **CALM)
    @given(st.one_of(kinds))
    def check(drawn):
        *name, source, content = drawn
        line = refused(source, content)
        if name:
            assert name[0] in line and ("it wants to run" in line or "none of torch.save" in line)
        files.add((source, content))

    check()
    assert len(files) >= len(SOURCES) + 200


def headers(content):
    """The places in a file that are no tensor's numbers."""
    if content[:2] != b"PK":
        return list(range(8 + struct.unpack("<Q", content[:8])[0]))
    numbers = set()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for info in archive.infolist():
            at = info.header_offset
            if "/data/" in info.filename:
                begin = at + 30 + sum(struct.unpack("<HH", content[at + 26 : at + 30]))
                numbers |= set(range(begin, begin + info.file_size))
    return [i for i in range(len(content)) if i not in numbers]


places = functools.cache(lambda source: headers(whole(source)[0]))


def test_a_flipped_byte_in_a_header_is_refused_or_changes_no_weight():
    sources = ["ours", "mae", "simmim", "archive"]
    places = {source: headers(whole(source)[0]) for source in sources}
    right = {source: checksum(load_encoder(write(whole(source)[0]), **whole(source)[2])) for source in sources}
    ends = set()

    @settings(max_examples=150, **CALM)
    @given(st.sampled_from(sources), st.integers(0), st.integers(1, 255))
    def check(source, place, flip):
        content = bytearray(whole(source)[0])
        content[places[source][place % len(places[source])]] ^= flip
        path = write(bytes(content))
        try:
            encoder = load_encoder(path, **whole(source)[2])
        except ValueError as error:
            ends.add(one_line(str(error), path)[:20])
        else:
            assert checksum(encoder) == right[source]

    check()
    assert len(ends) > 2


# what is no damage


def test_objects_beside_the_weights_are_passed_over(tmp_path):
    """A config object, numbers of numpy, paths: real files have them, and none of their classes is imported."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "elsewhere_config.py").write_text(
        "class Node(dict):\n    pass\n\nclass Options:\n    pass\n\n"
        "def fill():\n    node, options = Node(a=1), Options()\n    node.frozen, options.b = True, [node]\n"
        "    return {'config': node, 'options': options}\n"
    )
    make = (
        "import collections, datetime, pathlib, sys, numpy, torch; import elsewhere_config as e;"
        "old = torch.load(sys.argv[1], weights_only=False) | e.fill();"
        "old |= {'best': numpy.float64(3), 'log': numpy.ones(3), 'folder': pathlib.Path('a')};"
        "old |= {'when': datetime.datetime.now(), 'd': collections.defaultdict(list, a=[1])};"
        "[torch.save(old, sys.argv[1] + n, _use_new_zipfile_serialization=n == '.new') for n in ('.new', '.old')]"
    )
    content, _, args = whole("mae")
    path = write(content, "mae.pth")
    env = {**os.environ, "PYTHONPATH": str(folder)}
    subprocess.run([sys.executable, "-c", make, path], check=True, env=env)
    plain = checksum(load_encoder(path, **args))
    for kind in (".new", ".old"):
        lines = []
        assert checksum(load_encoder(path + kind, log=lines.append, **args)) == plain
        assert "objects of elsewhere_config.Node, elsewhere_config.Options" in lines[0] and "best" in lines[0]
    assert "elsewhere_config" not in sys.modules


def test_wrappers_and_prefixes():
    content, state, args = whole("mae")
    plain = checksum(load_encoder(write(content), **args))
    worse = {key: torch.zeros_like(value) for key, value in state.items()}

    def put(prefix, state):
        return {f"{prefix}{key}": value for key, value in state.items()}

    for wrapped, said in [
        (state, "(mae)"),
        ({"model": worse, "model_ema": state}, "(mae, the average in model_ema)"),
        ({"state_dict": worse, "state_dict_ema": put("module.", state)}, "(mae, the average in state_dict_ema)"),
        ({"model": worse, "ema": {"module": state, "decay": 0.9}}, "(mae, the average in ema)"),
        ({"student": put("module.", worse), "teacher": state}, "(mae, the average in teacher)"),
        ({"model": state, "teacher": {"a": torch.ones(2)}}, "(mae)"),
        ({"model": {}, "model_state": put("_orig_mod.module.", state)}, "(mae)"),
        ({"state_dict": put("model.", state) | {"loss.weight": torch.ones(3)}, "epoch": 1}, "loss 1"),
        ({"module": {"model": put("module.model.", state)}}, "(mae)"),
        ({"model": put("backbone.", state)}, "(mae)"),
        ({"model": put("model.encoder.", state)}, "(mae)"),
    ]:
        lines, file = [], io.BytesIO()
        torch.save(wrapped, file)
        encoder = load_encoder(write(file.getvalue()), log=lines.append, **args)
        assert checksum(encoder) == plain and said in lines[0], (said, lines)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32_and_it_is_said(dtype):
    _, state, args = whole("simmim")
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    lines = []
    encoder = load_encoder(write(saved(state)), log=lines.append, **args)
    assert {value.dtype for value in encoder.parameters()} == {torch.float32}
    n = sum(value.is_floating_point() for value in encoder.state_dict().values())
    assert f"to float32: {str(dtype).removeprefix('torch.')} ({n})" in lines[0]


def test_a_decoder_that_does_not_fit_leaves_the_encoder_alone():
    from models.mim.recipes import mae

    told, state = official("mae")
    size = {"depth": told["decoder_depth"], "width": told["decoder_embed_dim"], "heads": told["decoder_num_heads"]}
    mim = mae(random(build_found(open_weights(write(saved(state))), num_heads=told["num_heads"])), **size)
    before = {key: value.clone() for key, value in mim.state_dict().items()}
    key = "decoder_embed.weight"
    for value in (state[key][1:], state[key].T, state[key] * float("nan")):
        with pytest.raises(ValueError):
            load_weights(mim, open_weights(write(saved(state | {key: value.contiguous()}))))
        assert all(torch.equal(value, before[key]) for key, value in mim.state_dict().items())
    assert load_weights(mim, open_weights(write(saved(state))))


# as a user meets them


def fails(main, argv, capsys):
    """The one line with which a main ends, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        command(functools.partial(main, argv))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and said.rstrip("\n").isprintable(), said
    return said


def sample():
    mae, state, _ = whole("mae")
    ours, archive = whole("ours")[0], whole("archive")[0]
    key = next(key for key in state if key.endswith("blocks.1.mlp.fc1.bias"))
    trap = gadget(*GADGETS["posix.system"])
    return {
        "cut short or damaged": mae[:-30],
        "safetensors file cut short": ours[:-30],
        "at 2000 bytes": archive[:2000],
        "begins with the bytes": b"\x07" * 8 + mae[8:],
        "missing 1: ": saved({k: v for k, v in state.items() if k != key}),
        "unread 1: ": saved(state | {f"{key}_2": state[key]}),
        "of other shape 1: ": saved(state | {key: torch.zeros(3)}),
        "are NaN or infinite": saved(state | {key: state[key] * float("nan")}),
        "wants to run posix.system": saved(state | {"extra": trap}),
        "wants to run posix.system; nothing": saved(state | {"extra": trap}, _use_new_zipfile_serialization=False),
        **{what: OTHERS[what] for what in ("is empty", "web page", "git lfs pull", "would unpack to", "gzip")},
    }


def finetune_argv(weights, folder, *more):
    changes = json.dumps(whole("mae")[2] if "ours" not in weights else {})
    return ["--config", str(ROOT / "configs/quickstart/knn.yaml"), "--weights", weights, "--data.root", str(folder),
            "--run.folder", f"{folder}/run", "--changes", changes, *more]  # fmt: skip


def test_fifteen_of_them_end_main_finetune_with_code_2(tmp_path, capsys):
    files = sample()
    assert len(files) == 15
    for i, (what, content) in enumerate(files.items()):
        folder = tmp_path / str(i)
        folder.mkdir()
        assert what in fails(main_finetune.main, finetune_argv(write(content), folder), capsys)
    assert not CANARY.exists()


def test_five_teachers_end_main_pretrain_with_code_2(tmp_path, capsys):
    for i, (what, content) in enumerate(list(sample().items())[:1] + list(sample().items())[-6:-2]):
        source = f"{{target: 'clip:{write(content)}'}}"
        argv = ["--config", str(ROOT / "configs/quickstart/pretrain.yaml"), "--data.root", str(tmp_path)]
        argv += ["--run.folder", str(tmp_path / str(i)), "--method.args", source]
        assert what in fails(main_pretrain.main, argv, capsys)
    assert not CANARY.exists()


def test_no_traceback_in_a_process_of_its_own(tmp_path):
    weights = write(saved({"model": gadget(*GADGETS["posix.system"])}))
    argv = [sys.executable, ROOT / "main_finetune.py", *finetune_argv(weights, tmp_path)]
    found = subprocess.run(
        argv, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert found.returncode == 2 and len(found.stderr.splitlines()) == 1 and "posix.system" in found.stderr
    assert not CANARY.exists()


def test_the_fixtures_are_there():
    assert all((GOLDEN / f"{name}.safetensors").is_file() for name in FIXTURES.values())
