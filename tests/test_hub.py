"""Publishing SAEs and scoring published ones: huggingface_hub against a stand-in for the Hub."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from conftest import ROOT, refused, small_run
from reproduce import main
from sae import SparseAutoencoder


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks for to make a repository, commit to it and fetch from it."""

    def answer(self, status, content=b"", **headers):
        content = json.dumps(content).encode() if isinstance(content, (dict, list)) else content
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self):
        repos, token, path = (
            self.server.repos,
            self.headers.get("Authorization"),
            self.path.partition("?")[0],
        )
        if path == "/api/whoami-v2":
            return (
                self.answer(200, {"name": "me", "type": "user"})
                if token in TOKENS
                else self.answer(401)
            )
        if (match := re.fullmatch(r"/api/models/(\w+/\w+)(/revision/\w+)?", path)) and match[
            1
        ] in repos:
            files = [{"rfilename": name} for name in repos[match[1]]]
            return self.answer(200, {"id": match[1], "sha": SHA, "siblings": files})
        if (match := re.fullmatch(r"/api/models/(\w+/\w+)/tree/\w+(/.*)?", path)) and match[
            1
        ] in repos:
            return self.answer(
                200,
                [
                    {
                        "type": "file",
                        "path": name,
                        "size": len(content),
                        "oid": hashlib.sha1(content).hexdigest(),
                    }
                    for name, content in repos[match[1]].items()
                    if name.startswith((match[2] or "")[1:])
                ],
            )
        if (match := re.fullmatch(r"/(\w+/\w+)/resolve/\w+/(.*)", path)) and match[2] in repos.get(
            match[1], {}
        ):
            content = repos[match[1]][match[2]]
            return self.answer(
                200, content, X_Repo_Commit=SHA, ETag=f'"{hashlib.sha1(content).hexdigest()}"'
            )
        self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self):
        body, repos = self.rfile.read(int(self.headers.get("Content-Length", 0))), self.server.repos
        if self.headers.get("Authorization") != "Bearer write":
            return self.answer(403, {"error": "this token may only read"})
        if self.path == "/api/repos/create":
            repos.setdefault(f"me/{json.loads(body)['name']}", {})
            return self.answer(
                200, {"url": f"https://huggingface.co/me/{json.loads(body)['name']}"}
            )
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if re.search("/preupload/main$", self.path):
            asked = [file["path"] for file in json.loads(body)["files"]]
            return self.answer(
                200,
                {
                    "files": [
                        {"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in asked
                    ]
                },
            )
        if match := re.fullmatch(r"/api/models/(\w+/\w+)/commit/main", self.path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    repos[match[1]][line["value"]["path"]] = base64.b64decode(
                        line["value"]["content"]
                    )
            url = f"https://huggingface.co/{match[1]}/commit/{SHA}"
            return self.answer(
                200, {"success": True, "commitOid": SHA, "commitUrl": url, "hookOutput": ""}
            )
        self.answer(404)

    def log_message(self, *of):
        pass


TOKENS, SHA = ("Bearer write", "Bearer read"), "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos = {}
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield server
    server.shutdown()


def at(server, tmp_path, *runs):
    """Each run, (token, arguments), in one process with the stand-in: [(exit code, said)]."""
    code = (
        "import io, json, os, sys\n"
        "from contextlib import redirect_stderr, redirect_stdout\n"
        f"sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]!r}\n"
        "import conftest, reproduce\n"
        "conftest.make_quick()\n"
        "for token, arguments in json.loads(sys.argv[1]):\n"
        "    os.environ.pop('HF_TOKEN', None)\n"
        "    os.environ |= {'HF_TOKEN': token} if token else {}\n"
        "    said = io.StringIO()\n"
        "    with redirect_stdout(said), redirect_stderr(said):\n"
        "        code = reproduce.main(arguments) if arguments[0] != 'load' else print(\n"
        "            reproduce.SparseAutoencoder.from_pretrained(\n"
        "                arguments[1], subfolder=arguments[2]).about)\n"
        "    print('\\0' + json.dumps([code, said.getvalue()]), flush=True)\n"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": server,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-c", code, json.dumps(runs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    found = [json.loads(line[1:]) for line in done.stdout.splitlines() if line.startswith("\0")]
    assert len(found) == len(runs), done.stdout + done.stderr
    return found


def sentence(outcome):
    code, said = outcome
    errors = [line for line in said.splitlines() if "error: " in line]
    assert code == 2 and len(errors) == 1 and "Traceback" not in said, said
    return errors[0]


def test_published_loaded_and_scored(data, hub, tmp_path, work, server):
    address = f"http://127.0.0.1:{server.server_port}"
    publish = small_run(data, hub, "--layers", "0,2", "--push-to-hub", "me/saes")
    score = small_run(data, hub, "--layers", "0,2", "--out", "scored", "--saes", "me/saes")
    *outcomes, (code, said), (_, about), (scored, again), nothing, lacking = at(
        address,
        tmp_path,
        (None, publish),
        ("wrong", publish),
        ("read", publish),
        ("write", publish),
        (None, ["load", "me/saes", "layer_02"]),
        (None, score),
        (None, [*score[:-1], "me/nothing"]),
        (None, [*score, "--layers", "1"]),
    )
    for outcome, words in zip(outcomes, ("hf auth login", "hf auth login", "403")):
        assert "--push-to-hub me/saes: " in sentence(outcome) and words in sentence(outcome)

    assert code == 0 and "Published: https://huggingface.co/me/saes" in said, said
    files = server.repos["me/saes"]
    (saes,) = Path("out/saes").iterdir()
    for layer in ("layer_00", "layer_02"):
        for name in ("config.json", "model.safetensors"):
            assert files[f"{layer}/{name}"] == (saes / layer / name).read_bytes()
    for name in ("layers.csv", "hierarchy.csv", "claims.csv", "hypernyms.csv"):
        assert files[f"results/{name}"] == next(Path("out").glob(f"results/*/{name}")).read_bytes()
    card = files["README.md"].decode()
    assert card.startswith("---\nlicense: mit")
    assert 'from_pretrained("me/saes", subfolder="layer_02")' in card
    assert "| layer |" in card and "| claim |" in card
    for path in (tmp_path, hub):  # nothing of this machine
        assert not any(str(path).encode() in content for content in files.values())

    assert "'layer': 2" in about and "'backbone': 'small_vit'" in about
    assert scored == 0, again
    assert tables("scored") == tables("out") and not Path("scored/saes").exists()

    assert "--saes me/nothing: " in sentence(nothing)
    assert "--saes me/saes: layer_01 is no SAE of this kit" in sentence(lacking)


def test_the_hub_out_of_reach(data, hub, work, capsys, monkeypatch):
    def refuse(*given, **more):
        raise ConnectionError("[Errno 111] Connection refused\nmore")

    monkeypatch.setattr("kit.hub.snapshot_download", refuse)
    monkeypatch.setattr("kit.hub.HfApi.whoami", refuse)
    for option in ("--saes", "--push-to-hub"):
        refused(
            capsys,
            small_run(data, hub, option, "me/saes"),
            f"{option} me/saes: [Errno 111] Connection refused",
        )


def tables(out):
    """The tables of a run, whatever its name."""
    names = ("layers", "hierarchy", "hypernyms", "consistency", "claims")
    return [next(Path(out).glob(f"results/*/{name}.csv")).read_text() for name in names]


def test_saes_from_a_folder(data, hub, work, capsys):
    assert main(small_run(data, hub)) == 0
    (saes,) = Path("out/saes").iterdir()
    given = small_run(data, hub, "--out", "scored", "--saes", saes)
    assert main(given) == 0 and tables("scored") == tables("out")
    assert main([*given, "--backbone", "chunked_vit", "--out", "other"]) == 0
    said = capsys.readouterr().out
    assert "layer_00 was trained on small_vit, and is scored on chunked_vit" in said
    run = small_run(data, hub, "--out", "never", "--saes")
    refused(capsys, [*run, "nowhere"], "--saes nowhere: ")
    refused(capsys, [*run, str(hub)], "layer_00 is no SAE of this kit (there is no SAE in")
    refused(capsys, [*run, str(saes), "--push-to-hub", "me/saes"], "leave out --saes")
    shutil.copytree(saes, "broken")
    Path("broken/layer_01/model.safetensors").write_bytes(b"\x80\x04pickle")
    refused(capsys, [*run, "broken"], "layer_01 is no SAE of this kit")
    assert main([*small_run(data, hub), "--expansion", "2", "--layers", "1"]) == 0
    wide = SparseAutoencoder(17, 8)
    wide.save_pretrained("wide/layer_00")
    refused(capsys, [*run, "wide", "--layers", "0"], "layer_00 is for tokens of width 17, not 16")
    assert not Path("never/saes").exists()
