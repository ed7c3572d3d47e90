import gzip
import os
import tempfile
from pathlib import Path

import numpy as np

from util.errors import UserError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FILES = "{split}-images-idx3-ubyte", "{split}-labels-idx1-ubyte"
CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


class Pixels:
    """Images of one size that are held in memory, (n, C, H, W) uint8."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, prefix: str):
        self.pixels, self.labels = pixels, labels
        self.names = [f"{prefix}/{i:05d}" for i in range(len(pixels))]

    def path(self, i: int) -> str:
        return self.names[i]

    def places(self) -> list[str]:
        return self.names


def append(first: Pixels, second: Pixels) -> Pixels:
    """The images of both, one after the other."""
    both = Pixels(*(np.concatenate([getattr(p, key) for p in (first, second)]) for key in ("pixels", "labels")), "")
    both.names = first.names + second.names
    return both


def has_idx(folder: Path) -> bool:
    """Whether a folder holds the four files of an MNIST-like dataset, packed or not."""
    return all(_find(folder, name.format(split=split)) for split in ("train", "t10k") for name in FILES)


def open_idx(folder: Path, split: str) -> Pixels:
    """Read the images and labels of `train` or `t10k` from idx files (yann.lecun.com/exdb/mnist)."""
    images, labels = (read_idx(_find(folder, name.format(split=split))) for name in FILES)
    return Pixels(images[:, None], labels.astype(np.int64), split)


def read_idx(path: Path) -> np.ndarray:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4)  # the fourth byte counts the dimensions
    return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape).copy()


def find_fashion_mnist(folder: str = "") -> Path:
    """The folder of Fashion-MNIST: the one given, $FASHION_MNIST, the Debian package's, or a download into ~/.cache."""
    given = folder or os.environ.get("FASHION_MNIST", "")
    if given:
        if has_idx(Path(given)):
            return Path(given)
        raise UserError(f"{given} does not hold Fashion-MNIST's four files (train-images-idx3-ubyte.gz and so on)")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fashion-mnist"
    for place in (DEBIAN, cache):
        if has_idx(place):
            return place
    return _download(cache)


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _download(cache: Path) -> Path:
    from torchvision.datasets import FashionMNIST

    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.parent) as aside:  # several processes may download at once
            FashionMNIST(aside, download=True)
            if not has_idx(cache):
                os.rename(Path(aside) / "FashionMNIST" / "raw", cache)
    except Exception as error:  # no network, a proxy, a full disk: for the user it is one case
        if not has_idx(cache):
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(
                f"Fashion-MNIST is not on this machine and its download failed ({reason}): apt-get install "
                "dataset-fashion-mnist, or put its four files in a folder and set data.root to fashion_mnist:/folder"
            ) from error
    return cache
