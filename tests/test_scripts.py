"""Every script in tests/ and examples/ runs, on something small: none can rot unseen."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from conftest import ROOT, WNIDS, write_images

import reproduce


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
    monkeypatch.setattr("reproduce.linear_probe", reproduce.linear_probe)  # controls.py sets it
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(ROOT / "tests" / arguments[0]), run_name="__main__")
    assert words in capsys.readouterr().out


def test_walkthrough(data, hub, work, monkeypatch, capsys):
    path = ROOT / "examples/walkthrough.py"
    text = path.read_text()
    for given, small in (
        ("LAYER = 11", "LAYER = 2"),
        ("IMAGES = 50", "IMAGES = 12"),
        ("STEPS = 1500", "STEPS = 60"),
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
    assert list(Path("walkthrough").glob("data-small_vit-12/latent.png"))


def test_the_notebook_is_made_of_the_script():
    cells = json.loads((ROOT / "examples/walkthrough.ipynb").read_text())["cells"]
    script = (ROOT / "examples/walkthrough.py").read_text().split("\n# %%\n")[1:]
    code = [part.split("\n# %% [markdown]")[0].strip() for part in script]
    assert code == [
        "".join(cell["source"]).strip() for cell in cells if cell["cell_type"] == "code"
    ]
