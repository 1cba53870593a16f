"""Publishing SAEs and scoring published ones, with a folder in place of the Hub."""

import inspect
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from conftest import refused, small_run
from huggingface_hub.utils import filter_repo_objects

from reproduce import main
from sae import SparseAutoencoder


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """What huggingface_hub would send to the Hub and fetch from it lies in this folder."""
    folder = tmp_path / "remote"

    def copy(source, target, patterns):
        paths = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
        for name in filter_repo_objects(paths, allow_patterns=patterns):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target / name)

    class Api:
        def whoami(self):
            return {"name": "me"}

        def create_repo(self, repo_id, **more):
            inspect.signature(huggingface_hub.HfApi.create_repo).bind(self, repo_id, **more)
            (folder / repo_id).mkdir(parents=True, exist_ok=True)

        def upload_folder(self, *, repo_id, folder_path, allow_patterns, path_in_repo=None):
            target = folder / repo_id / (path_in_repo or "")
            copy(Path(folder_path), target, allow_patterns)

    def download(repo, allow_patterns, **more):
        if not (folder / repo).is_dir():
            raise huggingface_hub.errors.HFValidationError("no such repository")
        copy(folder / repo, tmp_path / "cache", allow_patterns)
        return str(tmp_path / "cache")

    monkeypatch.setattr("kit.hub.HfApi", Api)
    monkeypatch.setattr("reproduce.HfApi", Api)
    monkeypatch.setattr("kit.hub.snapshot_download", download)
    monkeypatch.setattr("sae.snapshot_download", download)
    return folder


def tables(out):
    """The tables of a run, whatever its name."""
    names = ("layers", "hierarchy", "hypernyms", "consistency", "claims")
    return [next(Path(out).glob(f"results/*/{name}.csv")).read_text() for name in names]


def test_published_loaded_and_scored(data, hub, work, remote, capsys):
    layers = ("--layers", "0,2")
    assert main(small_run(data, hub, *layers, "--push-to-hub", "me/saes")) == 0
    assert "Published: https://huggingface.co/me/saes" in capsys.readouterr().out
    files = {}
    for path in (remote / "me/saes").rglob("*.*"):
        files[str(path.relative_to(remote / "me/saes"))] = path.read_bytes()
    (saes,) = Path("out/saes").iterdir()
    for name in ("layer_00/config.json", "layer_02/model.safetensors"):
        assert files[name] == (saes / name).read_bytes()
    (results,) = Path("out/results").iterdir()
    assert files["results/claims.csv"] == (results / "claims.csv").read_bytes()
    card = files["README.md"].decode()
    assert card.startswith("---\nlicense: mit") and "| claim |" in card
    assert 'from_pretrained("me/saes", subfolder="layer_02")' in card
    for content in files.values():  # nothing of this machine, and no photographs
        assert str(work).encode() not in content and str(hub).encode() not in content
    assert not [name for name in files if name.endswith((".html", ".json.part"))]

    about = SparseAutoencoder.from_pretrained("me/saes", subfolder="layer_02").about
    assert (about["layer"], about["backbone"]) == (2, "small_vit")
    score = small_run(data, hub, *layers, "--out", "scored", "--saes", "me/saes")
    assert main(score) == 0 and tables("scored") == tables("out")
    assert not Path("scored/saes").exists()
    refused(capsys, [*score, "--saes", "me/nothing"], "Hugging Face: no such repository")
    refused(capsys, [*score, "--layers", "1"], "there is no SAE in", "layer_01")


def test_the_hub_out_of_reach(data, hub, work, capsys, monkeypatch):
    def refuse(*given, **more):
        raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required\nmore")

    monkeypatch.setattr("kit.hub.snapshot_download", refuse)
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", refuse)
    for option in ("--saes", "--push-to-hub"):
        words = "Hugging Face: Token is required (`hf auth login`"
        refused(capsys, small_run(data, hub, option, "me/saes"), words)


def test_saes_from_a_folder(data, hub, work, capsys):
    assert main(small_run(data, hub, "--layers", "0,1")) == 0
    (saes,) = Path("out/saes").iterdir()
    other = ["--saes", str(saes), "--backbone", "chunked_vit", "--out", "scored"]
    assert main(small_run(data, hub, "--layers", "0", *other)) == 0
    said = capsys.readouterr().out
    assert "layer_00 was trained on small_vit, and is scored on chunked_vit" in said
    run = small_run(data, hub, "--layers", "0,1", "--out", "never", "--saes")
    refused(capsys, [*run, "no where"], "Hugging Face: ")
    refused(capsys, [*run, str(hub)], "there is no SAE in", "layer_00")
    shutil.copytree(saes, "broken")
    Path("broken/layer_01/model.safetensors").write_bytes(b"\x80\x04pickle")
    refused(capsys, [*run, "broken"], "layer_01 is damaged, or of another kind")
    Path("swapped").mkdir()
    for a, b in (("layer_00", "layer_01"), ("layer_01", "layer_00")):
        shutil.copytree(saes / a, Path("swapped") / b)
    refused(capsys, [*run, "swapped"], "layer_00 was trained on layer 1")
    SparseAutoencoder(17, 8).save_pretrained("wide/layer_00")
    refused(capsys, [*run, "wide"], "layer_00 is for tokens of width 17, not 16")
    assert not Path("never/scores").exists()
