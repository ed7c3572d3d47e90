"""Teachers: any repository's file gives the same tower, which stays frozen and leaves no trace in a run."""

import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from models.encoders.build import build_encoder
from models.encoders.released import CLIP, IMAGENET
from models.encoders.weights import load_encoder, load_normalization
from models.mim.recipes import METHODS, build_target, eva, mae, milan
from models.monitor.draw import draw
from models.monitor.picture import reconstruct
from models.targets.frozen import Teacher
from models.targets.load import load_teacher
from models.targets.tower import Tower
from tests import towers
from tests.methods import built, rough_images, targets
from tests.towers import clip_file, random_tower, write
from util import checkpoint
from util.checkpoint import export
from util.optim import build_optimizer

PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SMALL = {"unit": 16, "depth": 1, "width": 32, "heads": 2}


def student(in_chans=3, name="vit_base_patch16_224", **args):
    torch.manual_seed(0)
    return build_encoder(name, in_chans, **PLAIN | args)


def exact(source, **options):
    return load_teacher(source, torch.float32, **options)


def everything(tower, images, attention=True):
    seen = tower(images, tower.patch, attention)
    return [seen.cells, seen.prefix, seen.attention]


# files

LAYOUTS = {
    "openai.pt": towers.openai,
    "milan.pth.tar": towers.bare,
    "open_clip.pt": lambda state: {"state_dict": towers.prefixed("module.", towers.openai(state))},
    "transformers.bin": towers.hugging,
    "transformers.safetensors": towers.hugging,
    "timm.pth": towers.timms,
    "timm.safetensors": towers.timms,
}


@pytest.fixture(scope="module")
def clip():
    return exact(f"clip:{clip_file()}")


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_repositorys_file_is_the_same_clip(name, clip, tmp_path):
    path = write(LAYOUTS[name](random_tower()), tmp_path / name)
    images = torch.randn(2, 3, 32, 48)
    for ours, theirs in zip(everything(exact(f"clip:{path}"), images), everything(clip, images)):
        assert torch.equal(ours, theirs)
    assert clip.dim == 16 and clip.patch == 8 and clip.mean == CLIP["mean"]


def test_openais_archive_is_read_without_running_it(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.jit, "load", None)
    towers.scripted(towers.openai(random_tower()), tmp_path / "ViT.pt")
    images = torch.randn(2, 3, 32, 32)
    for ours, theirs in zip(everything(exact(f"clip:{tmp_path / 'ViT.pt'}"), images), everything(clip, images)):
        assert torch.equal(ours, theirs)


def test_slip_and_dino_are_the_same_tower_but_for_the_projection(tmp_path):
    state = random_tower(clip=False)
    with_projection = exact(f"slip:{write(towers.slip(state), tmp_path / 'slip.pt')}")
    full = exact(f"dino:{write(towers.dino(state), tmp_path / 'full.pth')}")
    plain = exact(f"dino:{write({k: v for k, v in state.items() if 'head' not in k}, tmp_path / 'dino.pth')}")
    images = torch.randn(2, 3, 32, 32)
    cells, prefix, attention = everything(plain, images)
    for ours, theirs in zip(everything(full, images), (cells, prefix, attention)):
        assert torch.equal(ours, theirs)
    projected = with_projection(images, 8, attention=True)
    torch.testing.assert_close(projected.cells, cells @ state["head.weight"].T)
    assert torch.equal(projected.attention, attention)
    assert plain.dim == 64 and with_projection.dim == 16 and plain.mean == IMAGENET["mean"]
    assert plain.parts[0].vit.norm.eps == 1e-6 and not isinstance(plain.parts[0].vit.norm_pre, nn.LayerNorm)


def test_what_tensors_do_not_tell(tmp_path):
    """The activation: by the word before the file. Heads: by the width, as published, or as told."""
    path = write(towers.bare(random_tower()), tmp_path / "clip.pth")
    acts = [type(exact(f"{kind}:{path}").parts[0].vit.blocks[0].mlp.act).__name__ for kind in ("clip", "open_clip")]
    assert acts == ["QuickGELU", "GELU"]
    for width, clip, heads in ((64, True, 1), (384, True, 6), (384, False, 12), (1280, True, 16)):
        state = random_tower(clip, width=width, depth=1)
        path = write(towers.bare(state) if clip else towers.slip(state), tmp_path / "other.pth")
        assert exact(f"clip:{path}").parts[0].vit.blocks[0].attn.num_heads == heads
    path = write(towers.bare(random_tower(width=24)), tmp_path / "narrow.pth")
    assert exact(f"clip:{path}", heads=3).parts[0].vit.blocks[0].attn.num_heads == 3
    with pytest.raises(ValueError, match="does not tell how many attention heads"):
        exact(f"clip:{path}")


def test_a_tower_is_an_encoder_too(clip, tmp_path):
    """To be probed or fine-tuned itself."""
    encoder = load_encoder(f"clip:{clip_file()}")
    images = torch.randn(2, 3, 32, 32)
    cells = clip.parts[1](encoder(images).maps[-1].movedim(1, -1))
    torch.testing.assert_close(cells, clip(images, 8).cells)
    assert load_normalization(f"clip:{clip_file()}") == CLIP and load_normalization(f"dino:{clip_file()}") == IMAGENET


def test_files_that_are_no_teachers(tmp_path):
    state = towers.bare(random_tower())
    write({"model": mae(student(), **SMALL).state_dict()}, tmp_path / "mae.pth")
    write({key: value for key, value in state.items() if "resblocks.1.mlp" not in key}, tmp_path / "missing.pth")
    write(state | {"proj": torch.zeros(63, 16)}, tmp_path / "wrong.pth")
    write(state | {"ln_post.bias": torch.zeros(63)}, tmp_path / "shape.pth")
    write(
        {"visual.conv1.weight": torch.zeros(32, 3, 3, 3), "visual.layer1.0.bias": torch.zeros(3)}, tmp_path / "rn.pth"
    )
    torch.save(nn.Linear(2, 2), tmp_path / "code.pth")
    whole = clip_file().read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("no weights at all")
    save_file(towers.timms(random_tower()), tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:5000])
    for source, message in [
        (f"clip:{tmp_path}/mae.pth", "mae.pth is no teacher: it has no patch_embed.proj.weight"),
        (f"clip:{tmp_path}/rn.pth", "rn.pth is no teacher: it has no patch_embed.proj.weight"),
        (f"clip:{tmp_path}/missing.pth", "missing.pth is no whole teacher: .*missing 4: vit.blocks.1.mlp.fc1.weight"),
        (f"clip:{tmp_path}/wrong.pth", "wrong.pth is no teacher: its tower gives 64 channels, its projection takes 63"),
        (f"clip:{tmp_path}/shape.pth", r"no whole teacher: .*vit.norm.bias \(63 in the file, 64 here\)"),
        (
            f"clip:{tmp_path}/code.pth",
            "code.pth holds no tensors by name but objects of torch.nn.*Linear",
        ),
        (f"clip:{tmp_path}/cut.pt", "cut.pt is a zip archive that is cut short or damaged at"),
        (f"clip:{tmp_path}/text.pt", "text.pt is a text that begins .no weights at all"),
        (f"clip:{tmp_path}/cut.safetensors", "cut.safetensors is a safetensors file cut short"),
        (f"clip:{tmp_path}/nothing.pt", "there is no teacher at .*nothing.pt"),
        (f"moco:{tmp_path}/mae.pth", "no teacher is called .*clip:FILE, .* timm:NAME"),
        ("timm:vit_base_patch16_clip_quickgelu_224.opnai", "nearest are vit_base_patch16_clip_quickgelu_224.openai"),
        ("timm:convnext_base", "convnext_base is no plain transformer"),
        ("timm:eva_giant_patch14_224.clip_ft_in1k", "trained for classes"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            load_teacher(source)
        assert "\n" not in str(error.value)


class Reads:
    """What a pickle must not do."""

    def __reduce__(self):
        return print, ("ran",)


def test_an_archive_that_asks_for_code_is_refused(tmp_path, capsys):
    import pickle
    import zipfile

    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
        archive.writestr("evil/constants.pkl", b"")
        archive.writestr("evil/data.pkl", pickle.dumps(Reads()))
    with pytest.raises(ValueError, match="is refused: to be read it wants to run builtins.print;"):
        load_teacher(f"clip:{tmp_path / 'evil.pt'}")
    assert "ran" not in capsys.readouterr().out


# timm's hub

HUB = "vit_xsmall_patch16_clip_224.tinyclip_yfcc15m"


def test_a_model_of_the_hub_may_lie_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("MIM_CACHE", str(tmp_path))
    torch.manual_seed(0)
    theirs = timm.create_model(HUB).eval()
    place = tmp_path / "huggingface" / "timm" / HUB
    place.mkdir(parents=True)
    save_file(theirs.state_dict(), place / "model.safetensors")
    tower, images = exact(f"timm:{HUB}"), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        wanted = theirs.head(theirs.forward_features(images))
    torch.testing.assert_close(tower(images, 16).cells.flatten(1, 2), wanted[:, 1:])
    torch.testing.assert_close(tower(images, 16).prefix, wanted[:, :1])
    assert tower.dim == theirs.num_classes and tuple(tower.mean) == theirs.pretrained_cfg["mean"]


def test_without_network_one_line_says_which_file_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setenv("MIM_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    name = "vit_small_patch16_224.dino"
    with pytest.raises(ValueError, match=rf"save .*/timm/{name}/.* as .*/timm/{name}/model.safetensors") as error:
        load_teacher(f"timm:{name}")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_on_the_meta_device_nothing_is_fetched_or_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("timm.models._builder.load_pretrained", None)
    write(towers.timms(random_tower()), tmp_path / "timm.safetensors")
    towers.scripted(towers.openai(random_tower()), tmp_path / "ViT.pt")
    files = [clip_file(), tmp_path / "timm.safetensors", tmp_path / "ViT.pt"]
    with torch.device("meta"):
        encoder = student()
    for source in ("timm:eva_giant_patch14_clip_224.laion400m", *(f"clip:{file}" for file in files)):
        target = build_target(source, 8, encoder)  # where the encoder is
        assert {p.device.type for part in target.tower.parts for p in part.parameters()} == {"meta"}
        assert target.dim == (16 if "clip:" in source else 1024)
        with torch.device("meta"):
            build_target(source, 8, encoder)  # as main_pretrain does


# frozen


def test_a_tower_stays_as_it_is(clip):
    state = random_tower()
    tower = exact(f"clip:{clip_file()}")
    task = nn.ModuleDict({"tower": tower, "other": nn.Linear(2, 2)}).train()
    assert tower.training and not any(module.training for part in tower.parts for module in part.modules())
    assert {key.split(".")[0] for key in task.state_dict()} == {"other"}
    assert len(list(task.parameters())) == 2 and not list(task.buffers())
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    seen = tower(images, 8, attention=True)
    assert not (seen.cells.requires_grad or seen.prefix.requires_grad or seen.attention.requires_grad)
    assert not any(p.requires_grad for part in tower.parts for p in part.parameters())
    assert torch.equal(tower.parts[0].vit.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"])
    for build in (lambda: task.to("meta"), lambda: task.double()):
        build()
        other = task.other.weight
        kept = [*(p for part in tower.parts for p in part.parameters()), tower.scale, tower.shift]
        assert {(p.device, p.dtype) for p in kept} == {(other.device, other.dtype)}


def test_low_precision_is_of_the_matrices_alone(clip):
    tower, images = load_teacher(f"clip:{clip_file()}"), torch.randn(4, 3, 32, 32)
    vit = tower.parts[0].vit
    assert vit.blocks[1].mlp.fc1.weight.dtype == tower.parts[1].weight.dtype == torch.bfloat16
    assert vit.norm.weight.dtype == vit.pos_embed.dtype == vit.blocks[0].norm1.bias.dtype == torch.float32
    ours, exact = everything(tower, images), everything(clip, images)
    for low, high in zip(ours, exact):
        assert low.dtype == torch.float32 and not torch.equal(low, high)
        assert F.cosine_similarity(low.flatten(1), high.flatten(1)).min() > 0.995
    with torch.autocast("cpu", torch.bfloat16):  # a run's own precision is not the teacher's
        for inside, outside in zip(everything(clip, images), exact):
            assert torch.equal(inside, outside)


METHODS_WITH_TEACHERS = {
    "eva": lambda: eva(student(), target=f"clip:{clip_file()}"),
    "milan": lambda: milan(student(), target=f"clip:{clip_file()}", **SMALL),
    "its mask alone": lambda: milan(student(), target="normalized", mask=f"clip:{clip_file()}", **SMALL),
}


@pytest.mark.parametrize("name", METHODS_WITH_TEACHERS)
def test_no_teacher_is_saved_or_sent(name, tmp_path):
    """Not in checkpoints, not in the encoder's file, nothing to broadcast between processes; and a run goes on."""
    task = METHODS_WITH_TEACHERS[name]().train()
    optimizer = build_optimizer(task)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    assert all(key.startswith(("hide.", "head.")) for key in task.state_dict())
    task({"image": torch.randn(2, 3, 32, 32)})["loss"].backward()
    optimizer.step()
    checkpoint.save(tmp_path, task, optimizer, scaler, {"step": 1})
    checkpoint.export(tmp_path / "encoder.safetensors", task.encoder, IMAGENET)
    keys = torch.load(tmp_path / "last.pt", weights_only=True)["task"].keys()
    assert keys == task.state_dict().keys()
    assert load_file(tmp_path / "encoder.safetensors").keys() == task.encoder.state_dict().keys()
    again = METHODS_WITH_TEACHERS[name]()
    assert checkpoint.load(tmp_path, again, build_optimizer(again), scaler) == {"step": 1}
    losses = []
    for one in (task, again):
        torch.manual_seed(0)
        losses.append(one({"image": torch.ones(2, 3, 32, 32)})["loss"])
    assert torch.equal(*losses)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        assert DistributedDataParallel(task).modules_buffers == []
    finally:
        distributed.destroy_process_group()


# as a target


def test_a_teacher_sees_images_as_it_learned_to():
    tower = exact(f"clip:{clip_file()}")
    photos = torch.rand(2, 3, 32, 32)

    def normalized(mean, std, images=photos):
        return (images - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)

    wanted = tower(normalized(CLIP["mean"], CLIP["std"]), 8).cells
    mim = eva(student(), target=f"clip:{clip_file()}")
    mim.target = target = Teacher(exact(f"clip:{clip_file()}"), 8, student())
    torch.testing.assert_close(target(normalized(CLIP["mean"], CLIP["std"])), wanted)  # unless told otherwise
    mim.set_normalization([0.2, 0.5, 0.7], [0.1, 0.2, 0.3])
    torch.testing.assert_close(target(normalized([0.2, 0.5, 0.7], [0.1, 0.2, 0.3])), wanted, atol=1e-4, rtol=1e-4)
    grey = photos[:, :1]
    target = Teacher(exact(f"clip:{clip_file()}"), 8, student(1))
    target.set_normalization([0.3], [0.2])
    wanted = tower(normalized(CLIP["mean"], CLIP["std"], grey.expand(-1, 3, -1, -1)), 8).cells
    torch.testing.assert_close(target(normalized([0.3], [0.2], grey)), wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="3 channels, or grey ones, not of 5"):
        Teacher(tower, 8, student(5))


@pytest.mark.parametrize("unit", [4, 8, 16])
def test_one_patch_is_one_cell(unit):
    """A cell is described by what is in it, at the teacher's own scale."""
    target = Teacher(exact(f"clip:{clip_file()}"), unit, student())
    images = torch.randn(2, 3, 8 * unit, 4 * unit)
    cells = target(images)
    assert cells.shape == (2, 8, 4, 16)
    resized = F.interpolate(images, (64, 32), mode="bicubic", antialias=True)
    torch.testing.assert_close(cells, target.tower(resized if unit != 8 else images, 8).cells)


@pytest.mark.parametrize("name", [name for name in METHODS if targets(name) != [{}]])
def test_clip_is_a_target_for_every_method(name):
    mim, images = built(name, target=f"clip:{clip_file()}"), rough_images(8)
    optimizer = torch.optim.AdamW(mim.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        torch.manual_seed(1)
        optimizer.zero_grad()
        loss = mim({"image": images})["loss"]
        loss.backward()
        assert all(p.grad is not None for p in mim.parameters() if p.requires_grad)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_run_of_ours_is_a_teacher(tmp_path):
    norm = {"mean": [0.1], "std": [0.2], "size": [32, 32]}
    encoder = student(1, position="sincos", init="xavier").eval()
    export(tmp_path / "encoder.safetensors", encoder, norm)
    tower, images = exact(f"run:{tmp_path}"), torch.randn(2, 1, 32, 32)
    assert tower.in_chans == 1 and (tower.mean, tower.std) == (norm["mean"], norm["std"])
    torch.testing.assert_close(tower(images, 8).cells, encoder(images).maps[-1].permute(0, 2, 3, 1))
    assert eva(student(1), target=f"run:{tmp_path}", unit=16, least=2)({"image": images})["loss"].isfinite()
    with torch.device("meta"):
        assert load_teacher(f"run:{tmp_path}").parts[0].vit.norm.weight.is_meta
    export(tmp_path / "encoder.safetensors", build_encoder("convnextv2_atto"), norm)
    with pytest.raises(ValueError, match="convnextv2_atto, which is no plain transformer"):
        load_teacher(f"run:{tmp_path}")
    with pytest.raises(ValueError, match="no weights at"):
        load_teacher("run:nowhere")


# MILAN's parts


def test_where_the_teacher_looks_is_shown():
    mim = milan(student(), target="normalized", mask=f"clip:{clip_file()}", **SMALL | {"unit": 8})
    images = torch.randn(1, 3, 32, 32)
    attention = mim.masker.teacher.look(images, attention=True).attention
    torch.manual_seed(0)
    hidden = torch.stack([mim.masker(images).cells for _ in range(300)]).float().mean((0, 1))
    order = attention.flatten().argsort()
    assert hidden.flatten()[order[:4]].mean() > hidden.flatten()[order[-4:]].mean() + 0.2
    assert torch.equal(mim.masker(images, attention * 0).cells.sum(), torch.tensor(12))  # no attention is no error


def test_the_teacher_looks_once_in_a_step(monkeypatch):
    looks, real = [], Tower.forward
    monkeypatch.setattr(Tower, "forward", lambda *args, **more: looks.append(1) or real(*args, **more))
    mim = milan(student(), target=f"clip:{clip_file()}", **SMALL)
    mim({"image": torch.randn(2, 3, 32, 32)})
    assert len(looks) == 1


@pytest.mark.parametrize("decoder", ["prompt", "plain"])
@pytest.mark.parametrize("mask", ["attention", "random"])
@pytest.mark.parametrize("target", ["normalized", "clip"])
@pytest.mark.parametrize("name", ["vit_base_patch16_224", "vit_base_patch16_siglip_224"])  # the latter: no class token
def test_milans_parts_go_with_and_without_each_other(decoder, mask, target, name):
    source = f"clip:{clip_file()}"
    if target == "clip":
        target = source
    elif mask == "attention":
        mask = source
    mim = milan(student(name=name), target=target, mask=mask, decoder=decoder, **SMALL)
    loss = mim({"image": torch.randn(2, 3, 32, 64)})["loss"]
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in mim.parameters() if p.requires_grad)


def test_the_class_token_is_asked_for():
    def loss(mim):
        torch.manual_seed(0)
        return mim({"image": torch.ones(2, 3, 32, 32)})["loss"]

    mim = milan(student(), target=f"clip:{clip_file()}", **SMALL | {"unit": 8})
    torch.manual_seed(0)
    images = torch.ones(2, 3, 32, 32)
    truth = mim.target.look(images, attention=True)
    mask = mim.masker(images, truth.attention)
    cells = mim.distance(mim.head(mim.hide(images, mask), mask), truth.cells)
    tokens = mim.head.tokens(mim.hide(images, mask), mask)
    named = 2 - 2 * F.cosine_similarity(mim.head.cells.linear(tokens[:, 0]), truth.prefix[:, 0], dim=-1)
    torch.testing.assert_close(loss(mim), (cells.sum() + named.sum()) / (2 * 17))


def test_what_is_shown_prompts_and_is_not_changed():
    mim = milan(student(), target=f"clip:{clip_file()}", **SMALL | {"unit": 8, "depth": 2})
    images = torch.randn(2, 3, 32, 32)
    mask = mim.masker(images)
    x = torch.randn(2, 17, 32)
    y = mim.head.decode(x, mask)
    hidden = F.pad(mask.cells.flatten(1), (1, 0))
    assert torch.equal(y[~hidden], x[~hidden]) and not torch.isclose(y[hidden], x[hidden]).any(1).all()
    for change, changes in ((~hidden, True), (hidden, True)):  # hidden cells read all others
        other = mim.head.decode(torch.where(change[..., None], x + torch.randn_like(x), x), mask)
        assert (other != y)[hidden].any() == changes


def test_wrong_combinations_say_what_to_use(tmp_path):
    source, vit = f"clip:{clip_file()}", student()
    siglip = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 1}
    blind = Tower(build_encoder("vit_base_patch16_siglip_224", **siglip), nn.Identity(), (0.5,), (0.5,))
    for build, message in [
        (lambda: milan(vit, target="normalized", **SMALL), r"needs a teacher .*give one as mask \(clip:FILE\)"),
        (lambda: milan(vit, target=source, mask="clip"), 'mask "clip" is not attention, clip:FILE or random'),
        (lambda: milan(vit, target=source, decoder="prmpt"), 'decoder "prmpt" not prompt or plain'),
        (lambda: milan(vit, target=source, unit=12), "12 px, .* 8 px"),
        (lambda: type(milan(vit, target=source, **SMALL).masker)(8, 0.5, Teacher(blind, 8, vit)), "class token"),
        (lambda: eva(student(4), target=source), "3 channels, or grey ones, not of 4"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            build()
        assert "\n" not in str(error.value)


def test_teachers_are_read_by_a_run_and_errors_exit_with_2(tmp_path):
    from tests.test_main import ENVIRONMENT, PRETRAIN, ROOT, SMALL, fill_folder

    write({"model": {"a": torch.zeros(3)}}, tmp_path / "no.pth")
    argv = [sys.executable, ROOT / "main_pretrain.py", *PRETRAIN, *SMALL[:2], "--method.name", "milan"]
    argv += ["--method.args", f"{{target: 'clip:{tmp_path}/no.pth', depth: 1, width: 16, heads: 2}}"]
    argv += ["--data.root", fill_folder(tmp_path / "images", "RGB", 4), "--run.folder", tmp_path / "run"]
    found = subprocess.run(argv, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert found.returncode == 2
    assert len(found.stderr.splitlines()) == 1 and "no.pth is no teacher: it has no patch_embed" in found.stderr


# pictures


class Told(Teacher):
    """A teacher that says what it is told."""

    def __init__(self, truth):
        nn.Module.__init__(self)
        self.truth, self.unit, self.dim = truth, 16, truth.shape[3]

    def forward(self, images):
        return self.truth


def test_features_are_drawn_in_colours():
    """Like features in like colours, unlike in unlike; a guess by the axes of the truth, whatever its length."""
    kinds = torch.eye(8)[:2]
    truth = (kinds[torch.tensor([[0, 1], [0, 1], [0, 1], [1, 1]])] + 0.02 * torch.randn(3, 4, 2, 8)).abs()
    target, images = Told(truth), torch.zeros(3, 3, 64, 32)
    drawn = draw(target, truth, images)
    assert drawn.shape == (3, 3, 64, 32) and drawn.min() == 0 and drawn.max() == 1
    cells = drawn[:, :, ::16, ::16]
    assert torch.equal(drawn, cells.repeat_interleave(16, 2).repeat_interleave(16, 3))  # a cell has one colour
    red = cells[:, 0]  # the widest axis
    assert (red[:, :3, 0] - red[:, :3, 1]).abs().min() > 0.8 and (red[:, :, 1] - red[:, 3:, 0]).abs().max() < 0.2
    torch.testing.assert_close(draw(target, 7 * truth, images), drawn)
    torch.testing.assert_close(draw(target, truth.flip(1), images)[:, :, ::16, ::16], cells.flip(2))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(draw(target, truth, images), drawn)


def test_a_panel_of_a_teachers_features():
    mim = milan(student(), target=f"clip:{clip_file()}", **SMALL)
    pictures = reconstruct(mim, torch.randn(2, 3, 64, 32), (0, 0, 0), (1, 1, 1))
    assert list(pictures.columns) == ["masked input", "prediction", "prediction + visible", "truth", "original"]
    assert "Like colours are like features" in pictures.caption and "Only hidden" not in pictures.caption
    hidden = pictures.columns["masked input"].isnan()
    pasted, truth, guess = (pictures.columns[name] for name in ("prediction + visible", "truth", "prediction"))
    assert torch.equal(pasted[~hidden], truth[~hidden]) and torch.equal(pasted[hidden], guess[hidden])
