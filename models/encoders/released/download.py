"""A URL to a file on this machine: fetched once, by one process, whole or not at all."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shutil
import socket
import ssl
import string
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

from filelock import FileLock
from tqdm import tqdm

PATIENCE = 10  # seconds for an answer: a network that drops what is sent never says no
BROKEN = URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError
DRIVE = re.compile(r"https://drive\.google\.com/file/d/([\w-]+).*")
Headers = dict[str, str]


class Unfetched(Exception):
    """Why a file could not be fetched, in a few words; `code` is the server's answer, if it was one."""

    def __init__(self, why: str, code: int | None = None):
        super().__init__(" ".join(why.split())[:160])
        self.code = code


@dataclass(frozen=True)
class Answer:
    """What a server says of a file.

    size:  in bytes, if it says
    tag:   changes with the content, empty if it gives none
    parts: whether it gives the rest of a file that was begun
    """

    size: int | None
    tag: str
    parts: bool


def download(url: str, path: Path, digest: str = "", size: int | None = None) -> Path:
    """The file of a URL at `path`, which stays there: it is fetched if it is not there, by one process at a time.

    digest: "md5:" or "sha256:" and how the file's begins
    size:   in bytes, if it is known

    ValueError in one line if it cannot be had, with what to do; what came is kept only if it can be gone on with.
    """
    if path.is_file():
        if size not in (None, held(path)):
            raise ValueError(f"{path} has {held(path):,} bytes, but {size:,} when it was released: remove it")
        return path
    try:
        at = direct(url)
        answer = ask(at)  # before the lock, so that of many processes without network none waits for another
        if size is not None and answer.size not in (None, size):
            raise Unfetched(f"it has {answer.size:,} bytes there, but {size:,} when it was released")
        if answer.size == 0:
            raise Unfetched("it is empty there")
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(beside(path, "lock")):
            if not path.is_file():
                part = beside(path, f"{key(answer)}.part")
                receive(at, part, answer)
                check(part, digest, size)
                os.replace(part, path)
                for stale in path.parent.glob(f"{glob.escape(beside(path, '').name)}*.part"):
                    stale.unlink(missing_ok=True)
    except Unfetched as error:
        raise ValueError(f"{url} cannot be fetched: {error}; save it as {path}") from error
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"{url} cannot be kept in {path}: {reason}; MIM_CACHE names another folder") from error
    return path


def direct(url: str) -> str:
    """The URL of a file for that of the page that shows it, at Google Drive or huggingface.co."""
    url = re.sub(r"(https://huggingface\.co/.+?)/blob/", r"\1/resolve/", url)
    return DRIVE.sub(r"https://drive.usercontent.google.com/download?id=\1&export=download&confirm=t", url)


def ask(url: str, headers: Headers | None = None) -> Answer:
    """What the server of a URL says of its file, redirections followed. Unfetched if it has none."""
    try:
        with reach(url, {"Range": "bytes=0-0"} | (headers or {})) as response:
            if response.headers.get_content_type() == "text/html":
                raise Unfetched("a web page answers, perhaps with a question for a person")
            parts, total = response.status == 206, response.headers["Content-Length"]
            if parts:
                total = (response.headers["Content-Range"] or "").rpartition("/")[2]
            tag = response.headers["ETag"] or response.headers["Last-Modified"] or ""
    except BROKEN as error:
        raise Unfetched(why(error), getattr(error, "code", None)) from error
    return Answer(int(total) if total and total.isdigit() else None, tag, parts)


def receive(url: str, part: Path, answer: Answer) -> None:
    """Write the file of a URL, from where `part` ends; where the connection breaks, go on as long as more comes."""
    lasting = bool(answer.parts and answer.tag and answer.size)  # what came can be gone on with, now or another day
    have = held(part) if lasting else 0
    while have != answer.size:
        free, missing = shutil.disk_usage(part.parent).free, (answer.size or 0) - have
        if free < missing:
            raise Unfetched(f"{missing:,} bytes are to come, but {part.parent} has room for {free:,}")
        broken = ""
        try:
            copy(url, part, have, answer)
        except BROKEN as error:
            broken = f", then: {why(error)}"
        except OSError:
            part.unlink(missing_ok=True)  # perhaps there is no room; leave what there was
            raise
        before, have = have, held(part)
        if answer.size is None and not broken:
            return
        if have != answer.size and not (lasting and have > before):
            kept = lasting and have < answer.size
            if not kept:
                part.unlink(missing_ok=True)
            whole = f" of {answer.size:,}" if answer.size else ""
            raise Unfetched(f"{have:,}{whole} bytes came{broken}; " + ("they are kept" if kept else "removed"))


def copy(url: str, part: Path, have: int, answer: Answer) -> None:
    """Add what a server sends after the first `have` bytes, or begin anew if it sends all."""
    headers = {"Range": f"bytes={have}-"} if have else {}
    if have and answer.tag and not answer.tag.startswith("W/"):
        headers["If-Range"] = answer.tag
    with reach(url, headers) as response:
        goes_on = response.status == 206
        bar = tqdm(
            total=answer.size,
            initial=have if goes_on else 0,
            desc=part.name[1:].rsplit(".", 2)[0],
            unit="B",
            unit_scale=True,
            leave=False,
            disable=None,  # unless on a terminal
        )
        with bar, part.open("ab" if goes_on else "wb") as file:
            while chunk := response.read(1 << 20):
                file.write(chunk)
                bar.update(len(chunk))


def check(file: Path, digest: str, size: int | None) -> None:
    """Remove a file that is not what was released, and say so with both figures."""
    kind, _, begins = digest.partition(":")
    wrong = ""
    if size is not None and held(file) != size:
        wrong = f"it has {held(file):,} bytes, but {size:,} when it was released"
    elif digest and not (found := hash_of(file, kind)).startswith(begins):
        wrong = f"its {kind} begins with {found[: len(begins)]}, but with {begins} when it was released"
    if wrong:
        file.unlink()
        raise Unfetched(f"{wrong}, so it was removed")


def hash_of(file: Path, kind: str) -> str:
    number = hashlib.new(kind, usedforsecurity=False)
    with file.open("rb") as content:
        while chunk := content.read(1 << 20):
            number.update(chunk)
    return number.hexdigest()


def reach(url: str, headers: Headers) -> HTTPResponse:
    """The response to a GET, within PATIENCE however many addresses a host has and however long its name takes."""
    request = Request(quote(url, safe=string.punctuation), headers={"User-Agent": "mim"})
    for name, value in headers.items():
        if name.lower() == "authorization":  # for this host alone
            request.add_unredirected_header(name, value)
        else:
            request.add_header(name, value)
    return within(PATIENCE, lambda: urlopen(request, timeout=PATIENCE))


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """What a call gives or raises; TimeoutError if it takes longer, and it is left to itself."""
    done: dict[str, Any] = {}

    def run() -> None:
        try:
            done["value"] = call()
        except BaseException as error:
            done["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if "error" in done:
        raise done["error"]
    if "value" not in done:
        raise TimeoutError
    return done["value"]


def why(error: BaseException) -> str:
    """In a few words, what went wrong with a connection."""
    if isinstance(error, HTTPError):
        return f"the server answers {error.code}, {error.reason}"
    reason = getattr(error, "reason", error)
    if isinstance(reason, socket.gaierror):
        return "there is no network, or no host of that name"
    if isinstance(reason, ConnectionRefusedError):
        return "the connection is refused"
    if isinstance(reason, TimeoutError):
        return f"there is no answer within {PATIENCE} seconds"
    return str(reason) or type(reason).__name__


def held(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def key(answer: Answer) -> str:
    """A few letters that differ for another content."""
    return hashlib.sha256(f"{answer.tag} {answer.size}".encode()).hexdigest()[:8]


def beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{ending}")
