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
    repo = remote / "me/saes"
    files = {str(path.relative_to(repo)): path.read_bytes() for path in repo.rglob("*.*")}
    (saes,) = Path("out/saes").iterdir()
    (results,) = Path("out/results").iterdir()
    for name in ("layer_00/config.json", "layer_02/model.safetensors"):
        assert files[name] == (saes / name).read_bytes()
    assert files["results/claims.csv"] == (results / "claims.csv").read_bytes()
    card = files["README.md"].decode()
    assert card.startswith("---\nlicense: mit") and "| claim |" in card
    assert 'from_pretrained("me/saes", subfolder="layer_02")' in card
    for name, content in files.items():  # nothing of this machine, and no photographs
        assert str(work).encode() not in content and str(hub).encode() not in content
        assert not name.endswith((".html", ".json.part"))

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

    for name in ("kit.hub.snapshot_download", "huggingface_hub.HfApi.whoami"):
        monkeypatch.setattr(name, refuse)
    for option in ("--saes", "--push-to-hub"):
        words = "Hugging Face: Token is required (`hf auth login`"
        refused(capsys, small_run(data, hub, option, "me/saes"), words)


def test_saes_from_a_folder(data, hub, work, capsys):
    run = small_run(data, hub, "--layers", "0,1")
    assert main(run) == 0
    (saes,) = Path("out/saes").iterdir()
    other = ["--layers", "0", "--saes", str(saes), "--backbone", "chunked_vit", "--out", "scored"]
    assert main([*run, *other]) == 0
    said = capsys.readouterr().out
    assert "layer_00 was trained on small_vit, and is scored on chunked_vit" in said
    shutil.copytree(saes, "broken")
    Path("broken/layer_01/model.safetensors").write_bytes(b"\x80\x04pickle")
    for a, b in ((0, 1), (1, 0)):
        shutil.copytree(saes / f"layer_0{a}", f"swapped/layer_0{b}")
    SparseAutoencoder(17, 8).save_pretrained("wide/layer_00")
    for folder, *words in (
        ("no where", "Hugging Face: "),
        (str(hub), "there is no SAE in", "layer_00"),
        ("broken", "layer_01 is damaged, or of another kind"),
        ("swapped", "layer_00 was trained on layer 1"),
        ("wide", "layer_00 is for tokens of width 17, not 16"),
    ):
        refused(capsys, [*run, "--out", "never", "--saes", folder], *words)
    assert not Path("never/scores").exists()
