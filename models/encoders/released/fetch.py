"""A source of weights to a file on this machine."""

from __future__ import annotations

from pathlib import Path


def fetch(source: str) -> Path:
    """The file or folder of a source."""
    return Path(source)
