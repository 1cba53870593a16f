"""Every script in tests/ runs, on something small: none can rot unseen."""
import csv
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import paper_cost
import sae
from conftest import ROOT, small_run
from kit import demo
from kit.store import checksum, hash_of, write_record
from reproduce import main


def run_script(monkeypatch, capsys, name, *arguments):
    """As `python tests/NAME ...`, in this process."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "tests" / name), run_name="__main__")
    return capsys.readouterr().out


def test_benchmark(monkeypatch, capsys):
    monkeypatch.setattr("sae.POOL_BYTES", sae.POOL_BYTES)  # which it changes
    said = run_script(monkeypatch, capsys, "benchmark.py", "all", "--quick", "--rounds", "1")
    for words in ("ours, float32", "of the bare forward's rate", "profile", "rows drawn", "float32:"):
        assert words in said


@pytest.mark.filterwarnings("ignore")
def test_paper_cost(dinov2, monkeypatch, capsys):
    flop = [sum(flop for flop, _ in operations) for operations in (
        paper_cost.of_a_batch(str(dinov2)), paper_cost.of_a_step(), paper_cost.of_a_probe_step())]
    vit_g = 64 * 40 * (24 * 1536**2 * 257 + 4 * 1536 * 257**2)
    assert flop == pytest.approx([vit_g, 5 * 2 * 4096 * 1536 * 12288, 2 * 2 * 256 * 1536 * 1000], 0.01)
    said = run_script(monkeypatch, capsys, "paper_cost.py", "--hub", dinov2)
    assert "RTX 4090" in said and "H100 SXM" in said


def test_survival():  # in a process of its own, which forks
    command = [sys.executable, ROOT / "tests/survival.py", "kill", "--kills", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "of 1 runs: results equal to the byte" in done.stdout, done.stdout + done.stderr


def test_compare(data, hub, work, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import compare

    monkeypatch.setattr(compare, "SAES", [("relu", "0.1"), ("topk-5", "0")])
    assert compare.main(small_run(data, hub, "--layers", "1,2", "--seeds", "2")) == 0
    table = Path("out/comparison.md").read_text()
    assert capsys.readouterr().out.count("ReLU, λ = 0.1") == 2 and table.count("TopK, K = 5") == 2
    with open("out/results/layers.csv") as file:  # the last: TopK
        rows = [row for row in csv.DictReader(file) if row["layer"] == "2"]
    assert f"{np.mean([float(row['fvu']) for row in rows]):.3g} ± " in table.splitlines()[-1]
    assert Path("out/comparison.png").stat().st_size > 5000
    assert compare.main(["--data", "nowhere", "--out", "never"]) == 2


def test_walkthrough(data, hub, work, monkeypatch, capsys):
    text = (ROOT / "examples/walkthrough.py").read_text()
    assert len(text.splitlines()) <= 90 and "reproduce" not in text and "kit." not in text
    for given, small in (("= 11, 50", "= 2, 6"), ("batch_size=256, epochs=50", "batch_size=8, epochs=2")):
        assert text.count(given) == 1
        text = text.replace(given, small)
    path = ROOT / "examples/walkthrough.py"
    monkeypatch.setattr(sys, "argv", [str(path), str(data / "train"), "small_vit", str(hub)])
    exec(compile(text, path, "exec"), {"__name__": "__main__", "__file__": str(path)})
    said = capsys.readouterr().out
    assert "variance left" in said and "mean LCH height" in said
    assert Path("walkthrough/latent.png").stat().st_size > 10_000


def match_everything(out):
    """A random ViT matches nothing: say that it did, so that there are latents to look at."""
    path = Path(out, "results/results.json")
    record = json.loads(path.read_text())
    for row in [row for row in record["hypernyms"] if row["best_layer"] is not None][:3]:
        row["emergence_layer"] = row["best_layer"]
    path.write_text(json.dumps(record))


@pytest.mark.parametrize("kind", ["demo", "photographs"])
def test_relevancy(data, hub, work, monkeypatch, capsys, kind):
    run = small_run(data, hub, "--layers", "last", "--response-rate", "0.01")
    if kind == "demo":
        monkeypatch.setattr(demo, "IMAGES", {"train": 3, "val": 2})
        torch.manual_seed(0)
        save_file(demo.SmallViT().state_dict(), "vit.safetensors")
        demo.draw_images(Path("out/images"), {"train": 3, "val": 2})
        Path("vit.safetensors").rename("out/vit.safetensors")
        files = {"vit.safetensors": checksum(Path("out/vit.safetensors"))}
        write_record(Path("out/demo.json"), {"code": hash_of(demo.__file__)}, files=files)
        run = ["--out", "out", "--layers", "last", "--epochs", "2", "--response-rate", "0.01"]
    assert main(run) == 0
    match_everything("out")
    said = run_script(monkeypatch, capsys, "relevancy.py", "out")
    assert ("pointing game" if kind == "demo" else "deletion") in said
