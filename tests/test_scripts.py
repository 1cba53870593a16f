"""Every script in tests/ runs, on something small: none can rot unseen."""

import csv
import json
import runpy
import sys
from pathlib import Path

import pytest

import controls
import paper_cost
from conftest import ROOT, small_run
from kit.tables import mean_and_spread


def run_script(monkeypatch, capsys, name, *arguments):
    """As `python tests/NAME ...`, in this process."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "tests" / name), run_name="__main__")
    return capsys.readouterr().out


def test_benchmark(monkeypatch, capsys):
    said = run_script(monkeypatch, capsys, "benchmark.py", "all", "--quick", "--rounds", "1")
    for words in ("float32: ", "all 12 layers on disk", "without encoding", "rows drawn"):
        assert words in said


@pytest.mark.filterwarnings("ignore")
def test_paper_cost(dinov2, monkeypatch, capsys):
    flop = [
        sum(flop for flop, _ in operations)
        for operations in (
            paper_cost.of_a_batch(str(dinov2)),
            paper_cost.of_a_step(),
            paper_cost.of_a_probe_step(),
        )
    ]
    vit_g = 64 * 40 * (24 * 1536**2 * 257 + 4 * 1536 * 257**2)
    assert flop == pytest.approx(
        [vit_g, 5 * 2 * 4096 * 1536 * 12288, 2 * 2 * 256 * 1536 * 1000], 0.01
    )
    said = run_script(monkeypatch, capsys, "paper_cost.py", "--hub", dinov2)
    assert "RTX 4090" in said and "H100 SXM" in said


def test_compare(data, hub, work, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import compare

    monkeypatch.setattr(
        compare, "SAES", {"λ = 0.1": ["--l1", "0.1"], "K = 5": ["--activation", "topk-5"]}
    )
    assert compare.main(small_run(data, hub, "--layers", "1,2", "--seeds", "2")) == 0
    table = Path("out/comparison.md").read_text()
    assert capsys.readouterr().out.count("| λ = 0.1 |") == 2 and table.count("| K = 5 |") == 2
    (path,) = Path("out/results").glob("topk-5*/layers.csv")
    with open(path) as file:
        rows = [row for row in csv.DictReader(file) if row["layer"] == "2"]
    assert mean_and_spread([float(row["fvu"]) for row in rows]) in table.splitlines()[-1]
    assert Path("out/comparison.png").stat().st_size > 5000
    assert compare.main(["--data", "nowhere", "--out", "never"]) == 2


def test_walkthrough(data, hub, work, monkeypatch, capsys):
    text = (ROOT / "examples/walkthrough.py").read_text()
    assert "import reproduce" not in text and "from kit" not in text
    for given, small in (
        ("LAYER = 11", "LAYER = 2"),
        ("IMAGES = 50", "IMAGES = 6"),
        ("STEPS = 1500", "STEPS = 9"),
        ('OUT = ROOT / "walkthrough"', 'OUT = Path("walkthrough")'),
    ):
        assert text.count(given) == 1
        text = text.replace(given, small)
    for name, value in (("DATA", data / "train"), ("BACKBONE", "small_vit"), ("HUB", hub)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    path = ROOT / "examples/walkthrough.py"
    exec(compile(text, path, "exec"), {"__name__": "__main__", "__file__": str(path)})
    said = capsys.readouterr().out
    assert "FVU" in said and "Height between classes" in said and "under a permuted tree" in said
    assert Path("walkthrough/latent.png").stat().st_size > 10_000


def test_the_notebook_is_made_of_the_script():
    cells = json.loads((ROOT / "examples/walkthrough.ipynb").read_text())["cells"]
    script = (ROOT / "examples/walkthrough.py").read_text().split("\n# %%\n")[1:]
    code = [part.split("\n# %% [markdown]")[0].strip() for part in script]
    assert [
        "".join(cell["source"]).strip() for cell in cells if cell["cell_type"] == "code"
    ] == code


def test_controls(monkeypatch, capsys):
    monkeypatch.setattr("kit.claims.FEWEST_LAYERS", 9)  # no curveball, for speed
    text = run_script(monkeypatch, capsys, "controls.py", "flat", "0")
    assert text == "" and "flat" in controls.SIGNALS
