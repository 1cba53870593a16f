"""Every script in tests/ and examples/ runs, on something small: none can rot unseen."""

import csv
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, WNIDS, small_run, write_images

import reproduce
from kit import look, scores
from kit.figures import save
from kit.tables import write_csv
from sae import SparseAutoencoder, learning_rate


@pytest.fixture
def script(monkeypatch, capsys):
    """As `python tests/NAME ...` or `python -m NAME ...`, in this process."""

    def run(name, *arguments):
        """(exit code, what was printed)"""
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            if name.startswith("kit."):
                runpy.run_module(name, run_name="__main__")
            else:
                runpy.run_path(str(ROOT / "tests" / name), run_name="__main__")
        except SystemExit as stop:
            return stop.code, "".join(capsys.readouterr())
        return 0, capsys.readouterr().out

    monkeypatch.setattr(scores, "linear_probe", scores.linear_probe)  # controls.py sets it
    return run


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["benchmark.py", "--quick"], "without encoding"),
        (["paper_cost.py"], "H100: class tokens"),
        (["controls.py", "flat", "0"], ""),
    ],
)
def test_scripts(script, arguments, words):
    code, said = script(*arguments)
    assert code == 0 and words in said


def rows_of(pattern):
    (path,) = Path("out").glob(pattern)
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_scripts_on_the_folder_of_a_run(data, hub, work, script, monkeypatch):
    """kit.compare on two settings, and tests/training.py on the tokens of layers 1 and 2."""
    rates = []
    for name in ("reproduce.learning_rate", "sae.learning_rate"):
        monkeypatch.setattr(name, lambda *given: rates.append(given) or learning_rate(*given))
    for more in (["--seeds", "2"], ["--activation", "topk-4"], ["--l1", "0.3"]):
        assert reproduce.main(small_run(data, hub, *more)) == 0
    assert rates[::2] == rates[1::2]  # what config.json says is what the SAE is trained with
    for nothing in ([], ["nowhere"]):
        code, said = script("kit.compare", *nothing)
        assert code == 2 and "give output folders of runs" in said
    monkeypatch.setattr("kit.figures.save", save)
    script("kit.compare", "out")
    names = ("fvu", "height", "matched", "one_unit", "layers")
    drawn = {f"{name}{ending}" for name in names for ending in (".png", ".pdf")}
    assert {path.name for path in Path("out/compare").iterdir()} == drawn | {
        "sparsity.csv",
        "sparsity.md",
    }
    rows = sorted(rows_of("compare/sparsity.csv"), key=lambda row: (row["activation"], row["λ"]))
    settings = [(row["activation"], row["λ"]) for row in rows]
    assert settings == [("relu", "0.1"), ("relu", "0.3"), ("topk-4", "0.1")]
    last = rows_of("results/*topk*/layers.csv")[-1]
    assert (rows[2]["L0"], rows[2]["FVU"]) == (last["l0"], last["fvu"])
    _, printed = script("training.py", "out", data, "1,2")
    assert "32 -> 256, relu, batch 16, float32" in printed and printed.count("\n| 0.0") == 11


def test_other_libraries_on_the_same_tokens(data, hub, work, script):
    for package in ("sae_lens", "overcomplete"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    assert reproduce.main(small_run(data, hub)) == 0
    _, said = script("peers.py", "out", data, "1,2", "quick")
    assert said.count("| SAELens |") == 4 and Path("peers.png").exists()


def test_own_images(data, hub, work, script):
    """An image of the validation split: its latents are those of the run's SAE, by name."""
    assert reproduce.main(small_run(data, hub, "--layers", "1,2")) == 0
    image = min((data / "val" / WNIDS[0]).iterdir())
    _, said = script("kit.look", "out", image)
    tokens = np.load("out/tokens/val/layer_02.npy")[:1]  # the first class's first image
    (folder,) = Path("out/saes").glob("*/layer_02")
    (z,) = SparseAutoencoder.from_pretrained(folder).encode(torch.from_numpy(tokens).float())
    latents = re.findall(r"latent (\d+):", said)
    assert list(map(int, latents)) == z.topk(min(5, int((z > 0).sum()))).indices.tolist() != []
    named = {row["latent"]: row for row in rows_of("results/*/latents.csv") if row["layer"] == "2"}
    for latent in named.keys() & set(latents):
        assert f"latent {latent}: {named[latent]['hypernym'] or 'no general term'}" in said
    for arguments, words in (
        (["nowhere", image], "nowhere holds no results"),
        (["out"], "no image is given"),
        (["out", data / "none.png"], "none.png is not a readable image"),
    ):
        code, said = script("kit.look", *arguments)
        assert code == 2 and words in said


def test_latents_are_named_in_their_own_layer(tmp_path):
    rows = []
    for layer, latent, term in ((1, 5, "dog"), (1, 6, "cat"), (2, 5, "bird"), (2, 7, "")):
        row = {"layer": layer, "latent": latent, "hypernym": term, "classes": "wren"}
        rows.append(row | {"match": 0.5 if term else ""})
    write_csv(tmp_path / "latents.csv", rows)
    names = look.names_in(tmp_path / "latents.csv", 2)
    assert names == {5: "bird (match 0.50)", 7: "no general term; classes: wren (match 0.00)"}


def test_walkthrough(data, hub, work, monkeypatch, capsys):
    path = ROOT / "examples/walkthrough.py"
    text = path.read_text()
    for given, small in (
        ("LAYER = 11", "LAYER = 2"),
        ('"train": 40, "val": 10', '"train": 12, "val": 20'),
        ("STEPS = 3000", "STEPS = 60"),
        ('OUT = ROOT / f"walk', 'OUT = Path() / f"walk'),
    ):
        assert text.count(given) == 1
        text = text.replace(given, small)
    for wnid in WNIDS:
        write_images(data / "val" / wnid, 20)
    for name, value in (("DATA", data), ("BACKBONE", "small_vit"), ("HUB", hub)):
        monkeypatch.setenv(name, str(value))
    exec(compile(text, path, "exec"), {"__name__": "__main__", "__file__": str(path)})
    said = capsys.readouterr().out
    assert "FVU" in said and "height between classes" in said and "a permuted tree" in said
    assert list(Path("walkthrough").glob("data-small_vit/latent.png"))


def test_the_notebook_is_made_of_the_script():
    cells = json.loads((ROOT / "examples/walkthrough.ipynb").read_text())["cells"]
    script = (ROOT / "examples/walkthrough.py").read_text().split("\n# %%\n")[1:]
    code = [part.split("\n# %% [markdown]")[0].strip() for part in script]
    assert code == [
        "".join(cell["source"]).strip() for cell in cells if cell["cell_type"] == "code"
    ]
