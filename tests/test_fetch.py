"""Sources of weights, from a server on this machine that behaves well or badly."""

import contextlib
import hashlib
import io
import json
import re
import resource
import runpy
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from models.encoders.build import build_encoder
from models.encoders.released import download as downloads
from models.encoders.released import fetch as sources
from models.encoders.released.download import download
from models.encoders.released.fetch import fetch
from models.encoders.released.releases import RELEASES, Release, table
from models.encoders.weights import load_encoder
from util.checkpoint import export

ROOT = Path(__file__).parent.parent
CONTENT = bytes(range(256)) * 4000  # 1,024,000 bytes


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`; a path's first step says how."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, way = self.server, self.path.split("/")[1]
        server.asked.append((self.path, self.headers.get("Range"), dict(self.headers)))
        if way in ("404", "500", "401"):
            return self.send_error(int(way))
        if way == "moved":
            return self.answer(302, b"", Location=f"/plain/{self.path.split('/', 2)[2]}")
        if way == "round":
            return self.answer(302, b"", Location=self.path)
        if way == "silent":
            return server.released.wait(20)
        if way == "page":
            return self.answer(200, b"<html>Too large to scan for viruses</html>", **{"Content-Type": "text/html"})
        content = server.files.get(self.path.split("?")[0].partition("/")[2].partition("/")[2])
        if content is None:
            return self.send_error(404)
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        headers = {"ETag": tag} | ({"X-Repo-Commit": "c" * 40} if way == "hub" else {})
        begin, asked = 0, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if self.headers.get("If-Range") not in (None, tag):
            asked = None
        if asked and way != "whole" and way != "cut":
            begin, end = int(asked[1]), int(asked[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(content)}"
            status, body = 206, content[begin : end + 1]
        else:
            status, body = 200, content
        breaks = way == "cut" or way == "breaks" and begin < len(content) // 2 and len(body) > 1
        self.answer(status, body, 300_000 if breaks else None, **headers)

    do_HEAD = do_GET

    def answer(self, status, body, upto=None, **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            time.sleep(self.server.pause if len(body) > 1 else 0)
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body[:upto])
        if upto is not None:
            self.close_connection = True

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked, self.pause, self.released = {"a.pth": CONTENT}, [], 0, threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=partial(self.serve_forever, 0.01), daemon=True).start()

    def bodies(self):
        """Paths of which more than a byte was asked for."""
        return [path for path, wanted, _ in self.asked if wanted != "bytes=0-0"]


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


def refused(call, *parts):
    """The one line of a call's refusal, quickly, with all that it has to say."""
    began = time.monotonic()
    with pytest.raises(ValueError) as refusal:
        call()
    line = str(refusal.value)
    assert time.monotonic() - began < 5
    assert "\n" not in line
    for part in parts:
        assert str(part) in line, line
    return line


def left(folder):
    """What a folder holds but locks."""
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]


# paths


def test_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUNS", "runs")
    run, exported = tmp_path / "runs" / "mae", tmp_path / "exported"
    for folder, name in ((run, "encoder.safetensors"), (exported, "model.safetensors")):
        folder.mkdir(parents=True)
        (folder / name).touch()
    assert fetch(str(run)) == fetch("~/runs/mae") == fetch("~/$RUNS/mae") == run / "encoder.safetensors"
    assert fetch(str(exported)) == exported / "model.safetensors"
    assert fetch(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mae_vit_base").touch()
    assert fetch("mae_vit_base") == Path("mae_vit_base")  # what lies here comes before what is released
    assert fetch("missing/file.pth") == Path("missing/file.pth")  # the reader tells that it is not there


def test_an_encoder_comes_through_the_door(server, tmp_path):
    encoder = build_encoder("vit_tiny_patch16_224", img_size=32, embed_dim=16, depth=1, num_heads=2)
    norm = {"mean": [0.5] * 3, "std": [0.5] * 3}
    export(tmp_path / "encoder.safetensors", encoder, norm)
    server.files["encoder.safetensors"] = (tmp_path / "encoder.safetensors").read_bytes()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        ours = load_encoder(f"{server.url}/plain/encoder.safetensors")(images).maps[-1]
        assert torch.equal(ours, encoder.eval()(images).maps[-1])


# downloads


def test_a_url_is_fetched_once(server, cache):
    path = fetch(f"{server.url}/plain/a.pth")
    assert path == cache / "127.0.0.1" / "plain" / "a.pth"
    assert path.read_bytes() == CONTENT
    asked = len(server.asked)
    assert fetch(f"{server.url}/plain/a.pth") == path
    assert len(server.asked) == asked and left(cache) == [path]


@pytest.mark.parametrize("way", ["moved", "whole"])
def test_redirections_and_servers_without_parts(server, way):
    assert fetch(f"{server.url}/{way}/a.pth").read_bytes() == CONTENT


def test_queries_tell_files_apart(server):
    one, other = (fetch(f"{server.url}/plain/a.pth?id={i}") for i in (1, 2))
    assert one != other and one.suffix == other.suffix == ".pth"


def test_no_url_leaves_the_cache(server, cache):
    server.files["../../b.pth"] = CONTENT
    assert fetch(f"{server.url}/plain/../../b.pth") == cache / "127.0.0.1" / "plain" / "b.pth"


def test_a_broken_connection_is_taken_up_again(server, cache):
    path = fetch(f"{server.url}/breaks/a.pth")
    assert path.read_bytes() == CONTENT and left(cache) == [path]
    assert [wanted for _, wanted, _ in server.asked] == ["bytes=0-0", None, "bytes=300000-"] + ["bytes=600000-"]


def test_what_came_before_an_interruption_is_used(server, cache, monkeypatch):
    url, ask = f"{server.url}/breaks/a.pth", downloads.reach

    def once(url, headers):
        if headers.get("Range", "").startswith("bytes=300000"):
            raise ConnectionResetError("gone")
        return ask(url, headers)

    monkeypatch.setattr(downloads, "reach", once)
    refused(lambda: fetch(url), "300,000 of 1,024,000 bytes came", "gone", "are kept", url, cache)
    monkeypatch.setattr(downloads, "reach", ask)
    server.asked.clear()
    assert fetch(url).read_bytes() == CONTENT
    assert None not in [wanted for _, wanted, _ in server.asked]
    assert len(left(cache)) == 1


def test_what_came_of_another_content_is_not(server, cache, monkeypatch):
    url, ask = f"{server.url}/breaks/a.pth", downloads.reach

    def once(url, headers):
        if headers.get("Range", "").startswith("bytes=300000"):
            raise ConnectionResetError
        return ask(url, headers)

    monkeypatch.setattr(downloads, "reach", once)
    refused(lambda: fetch(url))
    monkeypatch.setattr(downloads, "reach", ask)
    server.files["a.pth"] = CONTENT[::-1]
    path = fetch(url)
    assert path.read_bytes() == CONTENT[::-1] and left(cache) == [path]


def test_a_short_file_is_removed(server, cache):
    refused(lambda: fetch(f"{server.url}/cut/a.pth"), "300,000 of 1,024,000 bytes came", "removed")
    assert not left(cache)


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_a_digest_is_checked(server, tmp_path, kind):
    digest, path = hashlib.new(kind, CONTENT).hexdigest(), tmp_path / "b.pth"
    url = f"{server.url}/plain/a.pth"
    line = refused(lambda: download(url, path, f"{kind}:abcdef99"), kind, digest[:8], "abcdef99", "removed", url, path)
    assert digest[:9] not in line and not left(tmp_path)
    assert download(url, path, f"{kind}:{digest[:6]}", len(CONTENT)).read_bytes() == CONTENT


def test_a_size_is_checked(server, tmp_path):
    url, path = f"{server.url}/plain/a.pth", tmp_path / "b.pth"
    refused(lambda: download(url, path, size=1000), "1,024,000 bytes there", "1,000 when it was released")
    assert not left(tmp_path) and not server.bodies()
    path.write_bytes(b"half")  # by hand, unfinished
    refused(lambda: download(url, path, size=1000), path, "4 bytes", "1,000", "remove it")


@pytest.mark.parametrize(
    ("way", "why"),
    [
        ("404", "answers 404"),
        ("500", "answers 500"),
        ("round", "infinite loop"),
        ("page", "a web page answers"),
        ("silent", "no answer within 0.3 seconds"),
    ],
)
def test_refusals_say_what_to_save_where(server, cache, monkeypatch, way, why):
    monkeypatch.setattr(downloads, "PATIENCE", 0.3)
    url = f"{server.url}/{way}/a.pth"
    refused(lambda: fetch(url), why, url, f"save it as {cache / '127.0.0.1' / way / 'a.pth'}")
    assert not left(cache)


def test_without_network(server, cache):
    server.shutdown()
    server.server_close()
    refused(lambda: fetch(f"{server.url}/plain/a.pth"), "refused", server.url, cache)
    refused(lambda: fetch("https://nowhere.invalid/a.pth"), "no network, or no host", cache)
    place = cache / "nowhere.invalid" / "a.pth"
    place.parent.mkdir(parents=True)
    place.touch()  # as the line said
    assert fetch("https://nowhere.invalid/a.pth") == place


def test_a_slow_network_keeps_nobody_waiting(monkeypatch):
    monkeypatch.setattr(downloads, "PATIENCE", 0.2)
    monkeypatch.setattr(downloads, "urlopen", lambda *_, **__: time.sleep(3))  # a name that takes long, many addresses
    refused(lambda: fetch("https://slow.invalid/a.pth"), "no answer within 0.2 seconds")


def test_no_room(server, cache, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda _: usage)
    refused(lambda: fetch(f"{server.url}/plain/a.pth"), "1,024,000 bytes are to come", "room for 1,000", cache)
    assert not server.bodies()


def test_a_disk_that_takes_no_more(server, cache):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        refused(lambda: fetch(f"{server.url}/plain/a.pth"), "File too large", cache, "MIM_CACHE")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not left(cache)


def test_a_cache_that_is_no_folder(server, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MIM_CACHE", str(tmp_path / "file"))
    refused(lambda: fetch(f"{server.url}/plain/a.pth"), "cannot be kept", "MIM_CACHE")


def test_two_processes_fetch_once(server, cache):
    server.pause = 0.5
    code = (
        "import importlib.util as u, pathlib, sys; spec = u.spec_from_file_location('download', sys.argv[1]);"
        "module = u.module_from_spec(spec); sys.modules['download'] = module; spec.loader.exec_module(module);"
        "print(module.download(sys.argv[2], pathlib.Path(sys.argv[3])).stat().st_size)"
    )
    argv = [sys.executable, "-c", code, downloads.__file__, f"{server.url}/plain/a.pth", str(cache / "a.pth")]
    both = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60) for process in both]
    assert said == [(f"{len(CONTENT)}\n", "")] * 2, "quiet where there is no terminal"
    assert len(server.bodies()) == 1 and left(cache) == [cache / "a.pth"]


def test_a_terminal_sees_how_far_it_is(server, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    fetch(f"{server.url}/plain/a.pth?1")
    assert not screen.getvalue()
    screen.isatty = lambda: True
    fetch(f"{server.url}/plain/a.pth?2")
    assert "a-" in screen.getvalue() and "%" in screen.getvalue() and "1.02M" in screen.getvalue()


def test_an_empty_file_is_none(server, cache):
    server.files["a.pth"] = b""
    refused(lambda: fetch(f"{server.url}/whole/a.pth"), "it is empty there")
    assert not left(cache)


def test_the_cache_is_where_caches_are(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MIM_CACHE", "~/mine")
    assert sources.cache() == tmp_path / "mine"
    monkeypatch.delenv("MIM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert sources.cache() == tmp_path / "xdg" / "mim"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert sources.cache() == tmp_path / ".cache" / "mim"


def test_pages_that_show_a_file_stand_for_it():
    assert (
        downloads.direct("https://huggingface.co/a/b/blob/main/c.pt") == "https://huggingface.co/a/b/resolve/main/c.pt"
    )
    drive = downloads.direct("https://drive.google.com/file/d/1dJn6-Y_w/view?usp=sharing")
    assert drive.startswith("https://drive.usercontent.google.com/download?id=1dJn6-Y_w&")
    assert downloads.direct("https://a.org/blob/x.pth") == "https://a.org/blob/x.pth"


# the hub


@pytest.fixture
def hub(server, monkeypatch):
    """A hub with a repository a/b, whose URLs are those of huggingface.co."""
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    server.files = {
        "a/b/resolve/main/pytorch_model.bin": CONTENT,
        "a/b/resolve/main/config.json": b'{"num_attention_heads": 12}',
        "a/b/resolve/v2/pytorch_model.bin": CONTENT[::-1],
        "a/b/resolve/main/sub/c.pt": b"another file",
    }
    return server


def test_a_repository_of_the_hub(hub, tmp_path):
    path = fetch("hf:a/b")
    assert path.name == "pytorch_model.bin" and path.read_bytes() == CONTENT
    assert json.loads(path.with_name("config.json").read_text()) == {"num_attention_heads": 12}
    assert not path.with_name("preprocessor_config.json").exists()
    assert path.is_relative_to(tmp_path / "hub"), "where timm and transformers look, too"
    asked = len(hub.asked)
    assert fetch("hf:a/b") == path and len(hub.asked) == asked


def test_safetensors_come_first(hub):
    hub.files["a/b/resolve/main/model.safetensors"] = b"safe"
    assert fetch("hf:a/b").name == "model.safetensors"


def test_revisions_and_files_of_the_hub(hub):
    assert fetch("hf:a/b@v2").read_bytes() == CONTENT[::-1]
    assert fetch("hf:a/b/sub/c.pt").read_bytes() == b"another file"
    assert fetch("hf:a/b@main/sub/c.pt").read_bytes() == b"another file"


def test_refusals_of_the_hub(hub, cache, monkeypatch):
    own = cache / "huggingface" / "a" / "none" / "model.safetensors"
    url = f"{hub.url}/hub/a/none/resolve/main/model.safetensors"
    refused(lambda: fetch("hf:a/none"), "no model.safetensors and no pytorch_model.bin", f"save {url} as {own}")
    refused(lambda: fetch("hf:a/b/c.pt"), "there is no c.pt")
    refused(lambda: fetch("hf:name"), '"hf:name" is not of the form hf:owner/name')
    monkeypatch.setenv("HF_ENDPOINT", hub.url + "/401")
    refused(lambda: fetch("hf:a/none"), "answers 401", "hf auth login")
    monkeypatch.setenv("HF_ENDPOINT", hub.url + "/500")
    refused(lambda: fetch("hf:a/none"), "answers 500")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    refused(lambda: fetch("hf:a/none"), "refused", own)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(lambda: fetch("hf:a/none"), "HF_HUB_OFFLINE is set", own)
    own.parent.mkdir(parents=True)
    own.touch()  # as the lines said
    assert fetch("hf:a/none") == own


def test_a_token_stays_with_the_hub(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", hub.url + "/moved")
    assert sources.exists(f"{hub.url}/moved/a/b/resolve/main/config.json")
    (_, _, first), (_, _, second) = hub.asked
    assert first["Authorization"] == "Bearer hf_secret" and "Authorization" not in second


def test_a_model_of_timm(hub):
    hub.files["timm/vit_base_patch16_224.mae/resolve/main/model.safetensors"] = b"weights"
    assert fetch("timm:vit_base_patch16_224.mae").read_bytes() == b"weights"
    refused(lambda: fetch("timm:vit_base_patch16_224.mea"), 'no weights called "vit_base_patch16_224.mea"', ".mae")


# releases


def test_a_release(server, cache, monkeypatch):
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    url = f"{server.url}/plain/a.pth"
    monkeypatch.setitem(RELEASES, "a_release", Release("", "MIT", "", f"sha256:{sha256[:8]}", len(CONTENT), url))
    assert fetch("a_release") == cache / "a_release.pth"
    monkeypatch.setitem(RELEASES, "a_bad_one", Release("", "MIT", "", "md5:123456", None, url))
    refused(lambda: fetch("a_bad_one"), hashlib.md5(CONTENT).hexdigest()[:6], "123456", cache / "a_bad_one.pth")
    assert [path.name for path in left(cache)] == ["a_release.pth"]


def test_a_release_of_a_hub(hub, monkeypatch):
    monkeypatch.setitem(RELEASES, "of_a_hub", Release("", "MIT", "", "", None, "hf:a/b/sub/c.pt"))
    assert fetch("of_a_hub").read_bytes() == b"another file"


def test_an_unknown_release_is_answered_with_the_nearest():
    refused(lambda: fetch("mae_vit_bse"), "mae_vit_bse", "mae_vit_base", "python -m models.encoders.released.releases")
    refused(lambda: fetch("qqqqqq"), "there are no weights at qqqqqq")


def test_releases_are_well_formed():
    for name, release in RELEASES.items():
        assert re.fullmatch(r"[a-z]\w*", name)
        assert release.licence and release.url.startswith(("https://", "hf:"))
        if release.url.startswith("hf:"):
            assert sources.HUB.fullmatch(release.url.removeprefix("hf:"))["file"]
        kind, _, digest = release.digest.partition(":")
        assert not kind or kind in ("md5", "sha256") and re.fullmatch("[0-9a-f]{6,64}", digest)
    urls = [release.url for release in RELEASES.values()]
    assert len({*urls}) == len(urls) > 150
    families = {name.split("_")[0] for name in RELEASES}
    assert {"mae", "simmim", "fcmae", "hiera", "spark", "mixmim", "milan", "eva", "eva02", "beit", "beitv2"} < families
    assert {"clip", "dino", "dinov2", "slip", "capi", "maskfeat", "fastmim", "convnextv2"} < families


def test_digests_in_names_are_those_of_the_table():
    """OpenAI's folders and mmpretrain's endings."""
    for release in RELEASES.values():
        found = re.search(r"/([0-9a-f]{64})/|_\d{8}-([0-9a-f]{8})\.pth$", release.url)
        assert release.digest == f"sha256:{found[1] or found[2]}" if found else not release.digest.startswith("sha")


def test_the_page_of_weights_holds_the_table(capsys):
    assert table() in (ROOT / "docs" / "weights.md").read_text()
    runpy.run_path(ROOT / "models" / "encoders" / "released" / "releases.py", run_name="__main__")
    assert capsys.readouterr() == (table(), "")
