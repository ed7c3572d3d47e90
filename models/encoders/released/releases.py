"""Released weights by short names, from releases.csv: where they lie, their licence, what was published of them.

python -m models.encoders.released.releases prints the table that is in docs/weights.md.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Release:
    """A released file.

    score:   published ImageNet-1K top-1 in %, fine-tuned on ImageNet-1K unless it says otherwise
    licence: of the weights, or of their repository where nothing else is said of them
    note:    what is in the file, how it was trained
    digest:  "md5:" or "sha256:" and how the file's begins; empty where its authors state none
    size:    in bytes, None where nobody states it
    url:     where its authors say it lies, a file or its page; "hf:owner/name/file" for a hub's
    """

    score: str
    licence: str
    note: str
    digest: str
    size: int | None
    url: str

    @property
    def checks(self) -> str:
        """By which a download is checked, in a few words."""
        kind, _, digest = self.digest.partition(":")
        return f"{kind} {digest[:8]}{'...' if len(digest) > 8 else ''}" if digest else ""


def read() -> dict[str, Release]:
    with Path(__file__).with_name("releases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {row.pop("name"): Release(**row | {"size": int(row["size"]) if row["size"] else None}) for row in rows}


def table() -> str:
    """All releases in Markdown."""
    rows = [("name", "top-1 in %", "licence", "what", "checked by", "where"), ("---",) * 6]
    for name, release in RELEASES.items():
        where = f"`{release.url}`" if release.url.startswith("hf:") else f"<{release.url}>"
        rows.append((f"`{name}`", release.score, release.licence, release.note, release.checks, where))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


RELEASES = read()

if __name__ == "__main__":
    print(table(), end="")
