"""Tokenizers from files: DALL-E's and BEiT v2's released ones, or those that our own runs train."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from models.encoders.build import build_encoder
from models.encoders.released.common import named
from models.encoders.released.pickles import Refused
from models.encoders.released.read import Objects, read
from models.targets import dvae, quantized
from models.targets.tokenizer import Tokenizer

RELEASED = {"dvae": dvae.from_state, "vqkd": quantized.from_state}
CONVERT = "import torch; torch.save(torch.load('{0}', 'cpu', weights_only=False).state_dict(), '{0}.pt')"


def load_tokenizer(source: str, in_chans: int = 3) -> Tokenizer:
    """The tokenizer of a file, frozen and in evaluation mode.

    source: "dvae:" and the path of the state of DALL-E's encoder, "vqkd:" and that of a released VQ-KD tokenizer, or
            the folder of a run of method vqkd; sizes are read off the tensors

    On the meta device no file is read, the published sizes are built for `in_chans` channels. ValueError in one line
    if the file cannot be read or does not fit.
    """
    if torch.get_default_device().type == "meta":
        if source.startswith("dvae:"):
            return dvae.DVAE(in_chans)
        return quantized.Quantized(build_encoder("vit_base_patch16_224", in_chans))
    kind, path = find(source)
    try:
        content = read(path)
        tokenizer, ours = RELEASED[kind](content.state) if kind else quantized.from_run(content.state, content.metadata)
    except KeyError as error:
        why = f"it has no {error.args[0]}{advice(kind, path, content.metadata)}"
        raise ValueError(f"{path} is no tokenizer of {kind or 'ours'}: {why}") from error
    except ValueError as error:
        if isinstance(error.__cause__, (Objects, Refused)):
            raise ValueError(
                f"{path} holds a whole module, which would run code: if you trust it, pip install DALL-E and keep its "
                f'tensors alone, in {path}.pt, by python -c "{CONVERT.format(path)}"'
            ) from error
        raise
    own = tokenizer.state_dict()
    wrong = [key for key in own if key not in ours or ours[key].shape != own[key].shape]
    wrong += [key for key in ours if key not in own]
    if wrong:
        raise ValueError(f"{path} is no tokenizer of {kind or 'ours'}{named('tensors that do not fit', wrong)}")
    tokenizer.load_state_dict(ours)
    return tokenizer.eval().requires_grad_(False)


def advice(kind: str, path: Path, metadata: dict[str, str]) -> str:
    """What to write instead of a kind and a path that do not go together, as far as the file tells."""
    if "encoder" not in metadata:
        return "" if kind else f"; if it is DALL-E's or BEiT v2's, write dvae:{path} or vqkd:{path}"
    if "vocabulary" in json.loads(metadata["encoder"]):
        return f"; a run of ours trained it: write {path} without {kind}:"
    return "; it is the encoder of a run of ours: give the folder of a run of method vqkd"


def find(source: str) -> tuple[str, Path]:
    """The kind of a source, empty for our own, and its path. ValueError if there is no file."""
    kind, _, rest = source.partition(":")
    if kind not in RELEASED:
        kind, rest = "", source
    path = Path(rest)
    if kind and path.is_dir():
        raise ValueError(
            f"{rest} is a folder, {kind}:FILE takes a file; of a run of ours, write {rest} without {kind}:"
        )
    path = path / "tokenizer.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"there is no tokenizer at {path}: give dvae:FILE (DALL-E's encoder), vqkd:FILE (BEiT v2's) "
                         "or the folder of a run of method vqkd")  # fmt: skip
    return kind, path
