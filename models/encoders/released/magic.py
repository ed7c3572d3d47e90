"""What a file is by its first bytes, whatever its name says; and text that fits into one line."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from models.encoders.released.common import Unfit
from models.encoders.released.pickles import ZIP, check, names

SAVED = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # the number with which files of torch.save began
AGAIN = ": copy or download it again"
PACKED = {
    b"\x1f\x8b": "is packed by gzip: unpack it (gunzip, or tar -xf) and give the file inside",
    b"BZh": "is packed by bzip2: unpack it and give the file inside",
    b"\xfd7zXZ": "is packed by xz: unpack it and give the file inside",
    b"(\xb5/\xfd": "is packed by zstd: unpack it and give the file inside",
    b"7z\xbc\xaf": "is packed by 7-Zip: unpack it and give the file inside",
    b"Rar!": "is packed by RAR: unpack it and give the file inside",
    b"\x93NUMPY": "is one array of numpy, not the tensors of a model by name",
    b"\x89HDF": "is HDF5, as Keras writes it: torch.save or safetensors is needed",
    b"GGUF": "is GGUF: torch.save or safetensors is needed",
    b"\x89PNG": "is a picture",
    b"\xff\xd8\xff": "is a picture",
    b"version https://git-lfs": "is a pointer of git-lfs, not the file itself: run `git lfs pull` where it is from",
}


def what_it_is(path: Path) -> str:
    """Whether a file is "safetensors", "torchscript", "torch" or "pickle", to be read. Unfit that says what else.

    "pickle" is an older file of torch.save. Refused for any pickle that wants something run.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(512)
    if not head.strip(b"\0"):
        raise Unfit("is empty" if not size else f"begins with {len(head)} zeros" + AGAIN)
    if head.startswith(ZIP):
        return zipped(path, size)
    if head[5:9] == b"\0\0\0{":  # the length of a header, then JSON
        return "safetensors"
    if head[257:262] == b"ustar":
        raise Unfit("is a tar archive: unpack it (tar -xf) and give the file inside")
    for magic, words in PACKED.items():
        if head.startswith(magic):
            raise Unfit(words)
    if head.startswith(SAVED):
        return "pickle"
    if re.match(rb"\x80[\x00-\x05]", head) or is_old_pickle(path):
        check(found := names(path))
        whose = f" (it names {one_line(', '.join(found), 80)})" if found else ""
        raise Unfit(f"is a pickle, but none of torch.save{whose}: give weights that torch.save or safetensors wrote")
    text = head.decode("utf-8", "ignore")
    if re.match(r"\s*<(!doctype|html|head|\?xml|error)", text, re.I):
        raise Unfit("is a web page, saved in place of the file: download it again, and look at the page for why")
    if len(text) > len(head) - 4 and sum(not c.isprintable() and not c.isspace() for c in text) == 0:
        raise Unfit(f'is a text that begins "{one_line(text, 40)}", no file of weights')
    raise Unfit(f"is neither of torch.save nor safetensors: it begins with the bytes {head[:8].hex(' ')}")


def is_old_pickle(path: Path) -> bool:
    """Whether a file is a pickle of the first kind, which is text, and names anything."""
    try:
        return bool(names(path))
    except (ValueError, LookupError, MemoryError, OverflowError):
        return False


def zipped(path: Path, size: int) -> str:
    """Which of torch's archives a zip is. Unfit if it is none, cut short, or made to fill the memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            members, inside = archive.namelist(), sum(info.file_size for info in archive.infolist())
            if inside > 10 * size + 2**20:
                raise Unfit(f"has {size} bytes, but would unpack to {inside}: no file of weights does")
            damaged = archive.testzip()
    except Unfit:
        raise
    except Exception as error:  # zipfile, zlib and struct raise half a dozen kinds
        raise Unfit(f"is a zip archive that is cut short or damaged at {size} bytes{AGAIN}") from error
    if damaged is not None:
        raise Unfit(f"is damaged: {one_line(damaged, 60)} in it is not what its checksum says{AGAIN}")
    for kind, ending in (("torchscript", "/constants.pkl"), ("torch", "/data.pkl")):
        if any(name.endswith(ending) for name in members):
            return kind
    few = one_line(", ".join(members[:3]), 80)
    what = "arrays of numpy (npz)" if members and all(name.endswith(".npy") for name in members) else "files"
    raise Unfit(f"is a zip archive of {len(members)} {what} ({few}), none of torch.save: give weights of PyTorch")


def one_line(text: object, most: int = 200) -> str:
    """A text in one line, without what a terminal would act on, cut after so many characters."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", str(text))
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= most else text[: most - 3] + "..."
