"""--data tiny-imagenet against a server of this machine with a small archive of the same layout."""

import hashlib
import io
import shutil
import threading
import urllib.request
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from conftest import WNIDS, refused, small_run, write_images
from kit import data as kit_data
from kit import runs
from reproduce import main


@pytest.fixture
def archive(tmp_path):
    """The zip, as Tiny ImageNet has it: train/WNID/images/, val/images/ and their list, test/."""
    top, lines = tmp_path / "tiny-imagenet-200", []
    for wnid in WNIDS:
        write_images(top / "train" / wnid / "images", 12, seed=int(wnid[1:]))
        write_images(tmp_path / "val" / wnid, 5)
        for i, path in enumerate(sorted((tmp_path / "val" / wnid).iterdir())):
            name = f"val_{len(lines)}.png"
            (top / "val/images").mkdir(parents=True, exist_ok=True)
            path.rename(top / "val/images" / name)
            lines.append(f"{name}\t{wnid}\t0\t0\t62\t62\n")
    (top / "val/val_annotations.txt").write_text("".join(lines))
    (top / "wnids.txt").write_text("\n".join(WNIDS))
    write_images(top / "test/images", 2)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(top.rglob("*")):
            archive.write(path, path.relative_to(tmp_path))
    return file.getvalue()


@pytest.fixture
def server(archive, monkeypatch):
    """`asked`: the GETs so far; `sent`: what is sent, of the length of the archive."""

    class Handler(BaseHTTPRequestHandler):
        asked, sent = [], archive

        def do_GET(self):
            self.do_HEAD()
            self.asked.append(self.path)
            self.wfile.write(self.sent)

        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(archive)))
            self.end_headers()

        def log_message(self, *of):
            pass

    for scheme in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(scheme, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # which remembers an earlier test's proxy
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/tiny-imagenet-200.zip"
    monkeypatch.setattr(kit_data, "URL", url)
    monkeypatch.setattr(kit_data, "MD5", hashlib.md5(archive).hexdigest())
    yield Handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(hub, work):
    return small_run("tiny-imagenet", hub, "--layers", "1")


def test_it_is_fetched_once(server, run, capsys):
    assert main(run) == 0
    assert "48 training and 20 validation images of 4 classes" in capsys.readouterr().out
    assert {path.name for path in Path("data").iterdir()} == {"tiny-imagenet-200"}
    shutil.rmtree("out")
    server.asked.clear()
    assert main(run) == 0 and server.asked == []


def test_a_folder_of_that_name_is_used(data, server, run):
    shutil.move(data, "tiny-imagenet")
    assert main(run) == 0 and server.asked == []


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:-1] + b"x", lambda content: content[: len(content) // 2]],
    ids=["another file", "cut off"],
)
def test_what_is_not_the_archive_is_said_and_fetched_again(server, run, capsys, damage, archive):
    server.sent = damage(archive)
    refused(capsys, run, "Tiny ImageNet could not be fetched", "try again")
    assert not Path("data/tiny-imagenet-200").exists()
    server.sent = archive
    assert main(run) == 0


def test_no_network(server, run, capsys, monkeypatch):
    monkeypatch.setattr(kit_data, "URL", "http://127.0.0.1:9/tiny-imagenet-200.zip")
    refused(
        capsys, run, "could not be fetched from http://127.0.0.1:9", "give its folder as --data"
    )


def test_no_room(server, run, capsys, monkeypatch):
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    refused(capsys, run, "not enough disk", "1.05 GB", "data")
    assert server.asked == []


def test_what_was_half_unpacked_is_unpacked_again(server, run, monkeypatch):
    whole = kit_data.download_and_extract_archive

    def killed(url, root, part, **more):
        whole(url, root, part, **more)
        shutil.rmtree(part / "tiny-imagenet-200/train" / WNIDS[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(kit_data, "download_and_extract_archive", killed)
    assert main(run) == 130 and not Path("data/tiny-imagenet-200").exists()
    monkeypatch.setattr(kit_data, "download_and_extract_archive", whole)
    assert main(run) == 0
