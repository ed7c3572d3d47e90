"""A source of weights to a file on this machine, whatever it names: a path, a URL, a hub, a release."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import timm
from timm.models import PretrainedCfg, get_pretrained_cfg

from models.encoders.released.download import Unfetched, ask, download
from models.encoders.released.releases import RELEASES

OURS = "encoder.safetensors"  # of a run's folder
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a hub's repository or an exported folder
CONFIGS = ("config.json", "preprocessor_config.json")  # beside them
HUB = re.compile(r"(?P<repo>[^/@\s]+/[^/@\s]+)(?:@(?P<revision>[^/\s]+))?(?:/(?P<file>\S+))?")


def fetch(source: str) -> Path:
    """The file of a source, or a folder that holds none of a known name; what is elsewhere is fetched once and kept.

    source: a path, with ~ and $VARIABLES, of a file or a folder; a URL; "hf:owner/name", with "@revision" and "/file"
            where wanted, of huggingface.co or HF_ENDPOINT; "timm:name" of timm's; or a name of RELEASES

    Files are kept in MIM_CACHE, by default ~/.cache/mim, those of hubs where huggingface_hub keeps them.
    ValueError in one line if there is no such source, or it cannot be had: then with the place where it may be put.
    """
    kind, _, rest = source.partition(":")
    if kind == "hf":
        return from_hub(rest)
    if kind == "timm":
        return from_timm(rest)
    if kind in ("http", "https"):
        return from_url(source)
    path = Path(os.path.expandvars(source)).expanduser()
    if path.is_dir():
        return next((path / name for name in (OURS, *WEIGHTS) if (path / name).is_file()), path)
    if path.exists() or not re.fullmatch(r"\w[\w-]*", source):
        return path
    return release(source)


def release(name: str) -> Path:
    """The file of a release. ValueError with the nearest names if there is none of this."""
    if name not in RELEASES:
        near = difflib.get_close_matches(name, RELEASES, n=3, cutoff=0.5)
        raise ValueError(
            f"there are no weights at {name}, and no release is called so; "
            + (f"the nearest releases are {', '.join(near)}; " if near else "")
            + "python -m models.encoders.released.releases lists them"
        )
    found = RELEASES[name]
    if found.url.startswith("hf:"):
        return from_hub(found.url.removeprefix("hf:"))
    suffix = Path(urlsplit(found.url).path).suffix or ".pth"
    return download(found.url, cache() / f"{name}{suffix}", found.digest, found.size)


def from_url(url: str) -> Path:
    """The file of a URL, kept under its host and path; a query tells files of one path apart."""
    parts = urlsplit(url)
    steps = [step for step in unquote(parts.path).split("/") if step not in ("", ".", "..")]
    if not parts.hostname or not steps:
        raise ValueError(f"{url} is the URL of no file")
    if parts.query:
        stem, suffix = os.path.splitext(steps[-1])
        steps[-1] = f"{stem}-{hashlib.sha256(parts.query.encode()).hexdigest()[:8]}{suffix}"
    return download(url, cache() / parts.hostname / Path(*steps))


def from_hub(name: str) -> Path:
    """A file of a hub's repository, its configs beside it, in the cache that timm and transformers share."""
    import huggingface_hub as hub

    named = HUB.fullmatch(name)
    if named is None:
        raise ValueError(f'"hf:{name}" is not of the form hf:owner/name, hf:owner/name@revision or hf:owner/name/file')
    repo, revision, wanted = named["repo"], named["revision"], (named["file"],) if named["file"] else WEIGHTS
    own = cache() / "huggingface" / (f"{repo}@{revision}" if revision else repo)
    at = {"revision": revision, "endpoint": os.environ.get("HF_ENDPOINT")}
    url = {}
    try:
        for file in wanted:
            kept = hub.try_to_load_from_cache(repo, file, revision=revision)
            path = Path(kept) if isinstance(kept, str) else own / file
            if path.is_file():
                return path
            url[file] = hub.hf_hub_url(repo, file, **at)
        file = next((file for file in wanted if exists(url[file])), None)
        if file is None:
            raise Unfetched(f"there is no {' and no '.join(wanted)}")
        for config in CONFIGS:
            if exists(hub.hf_hub_url(repo, config, **at)):
                hub.hf_hub_download(repo, config, **at)
        return Path(hub.hf_hub_download(repo, file, **at))
    except Exception as error:  # of many kinds, by the version of huggingface_hub
        reason, file = " ".join(str(error).split())[:160], wanted[0]
        advice = f"; save {url[file]} as {own / file}" if file in url else ""
        raise ValueError(f"hf:{name} cannot be fetched: {reason}{advice}") from error


def exists(url: str) -> bool:
    """Whether a hub has a file: asked for once, since huggingface_hub itself tries for a minute without network."""
    from huggingface_hub import constants, utils

    if constants.HF_HUB_OFFLINE:
        raise Unfetched("HF_HUB_OFFLINE is set")
    try:
        ask(url, utils.build_hf_headers())
    except Unfetched as error:
        if error.code == 404:
            return False
        if error.code in (401, 403):
            raise Unfetched(f"{error}: it may not exist, or want `hf auth login` and its licence accepted") from error
        raise
    return True


def from_timm(name: str) -> Path:
    """The file of a model of timm's."""
    facts = pretrained(name)
    if facts.file:
        return Path(facts.file)
    if facts.hf_hub_id:
        return from_hub(f"{facts.hf_hub_id}/{facts.hf_hub_filename}" if facts.hf_hub_filename else facts.hf_hub_id)
    return from_url(facts.url)


def pretrained(name: str) -> PretrainedCfg:
    """What timm knows of the weights of a name. ValueError with the nearest names if it knows none."""
    if timm.models.is_model_pretrained(name):
        return get_pretrained_cfg(name)
    known = timm.list_models(pretrained=True)
    near = [other for other in known if name in other] or difflib.get_close_matches(name, known, n=3, cutoff=0.0)
    raise ValueError(f'timm has no weights called "{name}"; the nearest are {", ".join(near[:3])}')


def cache() -> Path:
    """The folder of what was fetched."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "mim"
    return Path(os.environ.get("MIM_CACHE") or default).expanduser()
