"""Who may import whom: encoders know nothing of methods, methods nothing of transfers, util nothing of models."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "models/encoders": {"models.encoders"},
    "models/targets": {"models.encoders", "models.targets", "util.dist"},
    "models/mim": {"models.encoders", "models.targets", "models.mim", "util.dist"},
    "models/monitor": {"models.encoders", "models.targets", "models.mim", "models.monitor", "util.dist"},
    "models/export": {"models.encoders", "models.export"},
    "models/transfer": {"models.encoders", "models.transfer", "util.dist"},
    "util": {"util"},
}


def imported(path):
    """Modules of this project that a file imports, `from util import dist` as util.dist."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = (
                [node.module]
                if node.module not in ("util", "models")
                else [f"{node.module}.{a.name}" for a in node.names]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (
            name for name in names if name.split(".")[0] in ("models", "util", "main_pretrain", "main_finetune")
        )


def test_each_room_imports_only_what_it_may():
    wrong, seen = [], 0
    for room, allowed in ALLOWED.items():
        for path in (ROOT / room).rglob("*.py"):
            for name in imported(path):
                seen += 1
                if not any(name == one or name.startswith(f"{one}.") for one in allowed):
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong and seen > 50


def test_only_the_encoders_know_their_kinds():
    """An isinstance of an encoder elsewhere is an attribute that Encoder lacks."""
    for room in ("models/targets", "models/mim", "models/monitor", "models/transfer", "models/export", "util"):
        for path in (ROOT / room).rglob("*.py"):
            for kind in ("ViT", "Pyramid", "ConvNeXt", "MixSwin"):
                assert f"isinstance(encoder, {kind}" not in path.read_text()
