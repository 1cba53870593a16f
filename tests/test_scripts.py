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
from kit import look
from kit.data import find_images
from kit.tables import write_csv
from metrics import linear_probe
from sae import SparseAutoencoder, learning_rate


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["benchmark.py", "--quick"], "without encoding"),
        (["paper_cost.py"], "H100: class tokens"),
        (["controls.py", "flat", "0"], ""),
    ],
)
def test_scripts(monkeypatch, capsys, arguments, words):
    """As `python tests/NAME ...`, in this process."""
    monkeypatch.setattr("kit.scores.linear_probe", linear_probe)  # controls.py sets it
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(ROOT / "tests" / arguments[0]), run_name="__main__")
    assert words in capsys.readouterr().out


def test_scripts_on_the_folder_of_a_run(data, hub, work, monkeypatch, capsys):
    """kit.compare on two settings, and tests/training.py on the tokens of layers 1 and 2."""
    rates = []
    for name in ("reproduce.learning_rate", "sae.learning_rate"):
        monkeypatch.setattr(name, lambda *given: rates.append(given) or learning_rate(*given))
    for more in (["--seeds", "2"], ["--activation", "topk-4"], ["--l1", "0.3"]):
        assert reproduce.main(small_run(data, hub, *more)) == 0
    assert rates[::2] == rates[1::2]  # what config.json says is what the SAE is trained with
    monkeypatch.setattr(sys, "argv", ["compare", "out"])
    with pytest.raises(SystemExit):
        runpy.run_module("kit.compare", run_name="__main__")
    made = {path.name for path in Path("out/compare").iterdir()}
    for nothing in ([], ["nowhere"]):
        monkeypatch.setattr(sys, "argv", ["compare", *nothing])
        with pytest.raises(SystemExit) as stop:
            runpy.run_module("kit.compare", run_name="__main__")
        assert stop.value.code == 2 and "give output folders of runs" in capsys.readouterr().out
    assert made == {"sparsity.csv", "sparsity.md", *FIGURES}
    with open("out/compare/sparsity.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert sorted((row["activation"], row["λ"]) for row in rows) == [
        ("relu", "0.1"),
        ("relu", "0.3"),
        ("topk-4", "0.1"),
    ]
    (path,) = Path("out/results").glob("*topk*/layers.csv")
    with open(path, newline="") as file:
        layers = list(csv.DictReader(file))
    (row,) = (row for row in rows if row["activation"] == "topk-4")
    assert row["L0"] == layers[-1]["l0"] and row["FVU"] == layers[-1]["fvu"]
    # kit.look takes the newest results, their SAE of the last layer
    capsys.readouterr()
    look.main("out", str(data / "val" / find_images(data)[1].names[0]))
    (folder,) = Path("out/saes").glob("*l1_0.3*")
    x = torch.from_numpy(np.load("out/tokens/val/layer_02.npy")[:1]).float()
    best = SparseAutoencoder.from_pretrained(folder / "layer_02").encode(x)[0].max(0)
    said = re.search(r": layer 2, .*\n *([\d.]+)  latent (\d+): ", capsys.readouterr().out)
    assert float(said[1]) == pytest.approx(float(best.values), abs=0.002)
    assert int(said[2]) == best.indices
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["training.py", "out", str(data), "1,2"])
    runpy.run_path(str(ROOT / "tests/training.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "32 -> 256, relu, batch 16, float32" in printed and printed.count("\n| 0.0") == 11


def test_look_names_latents_by_their_layer(tmp_path):
    rows = []
    for layer, latent, term in ((1, 5, "dog"), (1, 6, "cat"), (2, 5, "bird"), (2, 7, "")):
        match = 0.5 if term else ""
        rows.append({"layer": layer, "latent": latent, "hypernym": term, "match": match})
    write_csv(tmp_path / "latents.csv", [row | {"classes": "wren"} for row in rows])
    names = look.names_in(tmp_path / "latents.csv", 2)
    assert names == {5: "bird (match 0.50)", 7: "no general term; classes: wren (match 0.00)"}


def test_other_libraries_on_the_same_tokens(data, hub, work, monkeypatch, capsys):
    for package in ("sae_lens", "overcomplete"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    assert reproduce.main(small_run(data, hub)) == 0
    monkeypatch.setattr(sys, "argv", ["peers.py", "out", str(data), "1,2", "quick"])
    runpy.run_path(str(ROOT / "tests/peers.py"), run_name="__main__")
    assert capsys.readouterr().out.count("| SAELens |") == 4 and Path("peers.png").exists()


NAMES = ("fvu", "height", "matched", "one_unit", "layers")
FIGURES = [f"{name}{ending}" for name in NAMES for ending in (".png", ".pdf")]


def test_own_images(data, hub, work, monkeypatch, capsys):
    """An image of the validation split: its latents are those of the run's SAE, by name."""
    assert reproduce.main(small_run(data, hub, "--layers", "1,2")) == 0
    image = sorted((data / "val" / WNIDS[0]).iterdir())[0]
    capsys.readouterr()

    def look(*arguments):
        monkeypatch.setattr(sys, "argv", ["look", *map(str, arguments)])
        runpy.run_module("kit.look", run_name="__main__")

    look("out", image)
    said = capsys.readouterr().out
    tokens = np.load("out/tokens/val/layer_02.npy")[0]  # the first class's first image
    (folder,) = Path("out/saes").iterdir()
    sae = SparseAutoencoder.from_pretrained(folder / "layer_02")
    z = sae.encode(torch.from_numpy(tokens).float()[None])[0]
    latents = list(map(int, re.findall(r"latent (\d+):", said)))
    assert latents == z.topk(min(5, int((z > 0).sum()))).indices.tolist() != []
    with open(next(Path("out/results").glob("*/latents.csv"))) as file:
        named = {row["latent"]: row for row in csv.DictReader(file) if row["layer"] == "2"}
    for latent in set(map(str, latents)) & named.keys():
        assert f"latent {latent}: {named[latent]['hypernym'] or 'no general term'}" in said
    for arguments, words in (
        (["nowhere", image], "nowhere holds no results"),
        (["out"], "no image is given"),
        (["out", data / "none.png"], "none.png is not a readable image"),
    ):
        with pytest.raises(SystemExit) as stop:
            look(*arguments)
        assert stop.value.code == 2 and words in capsys.readouterr().err


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
