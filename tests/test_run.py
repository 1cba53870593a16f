"""Whole runs of reproduce.py on small images: its tables, what is made again, what is refused."""

import csv
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, WNIDS, refused, results, small_run, write_images

import metrics
import reproduce
from kit import figures, scores
from kit.inputs import parse_layers
from kit.tables import cell, over_seeds
from reproduce import main, parse_settings, trainings_of
from sae import SparseAutoencoder, fast_precision

pytestmark = pytest.mark.usefixtures("work")


def read_csv(name):
    (path,) = Path("out/results").glob(f"*/{name}.csv")
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def made():
    """Every file of stages 1 to 3, and when it was written."""
    times = {}
    for stage in ("tokens", "saes", "scores"):
        for path in Path("out", stage).rglob("*"):
            if path.is_file() and path.name not in ("made_of.json", "left_out.json", "README.md"):
                times[str(path)] = path.stat().st_mtime_ns
    return times


def made_again(before):
    """The stages of which files were written since."""
    return {path.split("/")[1] for path, time in made().items() if before.get(path) != time}


def test_whole_run(data, hub, capsys):
    assert main(small_run(data, hub)) == 0
    columns = {
        "layers": "layer seed width latents gamma probe_top1 probe_on_reconstruction nmse fvu l0 "
        "dead",
        "hierarchy": "layer seed dictionary tree alive single_class lch_height lch_height_pairwise "
        "lch_height_between coverage match ontology_covered hypernyms_lch "
        "hypernyms_matched",
        "relations": "layer seed dictionary related_pairs related expected unrelated_pairs "
        "unrelated absorption",
        "readings": "layer seed claim reading value permuted",
        "probes": "layer seed dictionary units tree iou iou_small above_half best",
        "claims": "claim about_hierarchy verdict seeds value permuted spread low high p_value "
        "statistic",
        "training": "layer seed step loss reconstruction sparsity l0 dead",
        "latents": "layer seed latent fires lch lch_height_between hypernym match classes",
        "hypernyms": "layer wnid name term indent classes height matched best_latent match lch "
        "top_images responds_to emergence_layer shown",
        "consistency": "layer_a layer_b seed kappa",
    }
    for name, expected in columns.items():
        assert list(read_csv(name)[0]) == expected.split(), name
    layers, hierarchy = read_csv("layers"), read_csv("hierarchy")
    assert [row["layer"] for row in layers] == ["0", "1", "2"]
    kinds = itertools.product(
        ("sae", "neurons", "untrained"), ("wordnet", "permuted", "permuted_sd", "part")
    )
    assert [(row["dictionary"], row["tree"]) for row in hierarchy[:12]] == list(kinds)
    assert len(read_csv("readings")) == 3 * (9 + 3 + 3)
    assert len(read_csv("probes")) == 3 * (3 * 3 + 1) * 2
    alive = [
        int(row["alive"])
        for row in hierarchy
        if (row["dictionary"], row["tree"]) == ("sae", "wordnet")
    ]
    assert len(read_csv("latents")) == sum(alive)
    assert {row["verdict"] for row in read_csv("claims")} == {"too few classes"}
    said = capsys.readouterr().out
    assert "report.html" in said and max(map(len, said.splitlines()[-9:])) <= 99
    # the numbers of the answer are those of the tables
    said, claim = " ".join(said.split()), read_csv("claims")[0]
    last = {
        (row["dictionary"], row["tree"]): cell(float(row["lch_height_between"] or "nan"))
        for row in hierarchy
        if row["layer"] == "2"
    }
    assert f"are {float(claim['value']):.3g} edges apart" in said
    assert f"under permuted trees {float(claim['permuted']):.3g}, as" in said
    for name, words in (("untrained", "The untrained SAE has"), ("neurons", "raw neurons")):
        assert f"{words} {last[name, 'wordnet']} (permuted {last[name, 'permuted']})" in said
    assert f"leaves {float(layers[-1]['fvu']):.0%} of the variance" in said
    assert not [*Path("out").rglob("*.part")]

    # the SAE's statistics are the train split's, and it takes raw tokens
    (folder,) = Path("out/saes").iterdir()
    assert folder.name.startswith("epochs_3-")
    sae = SparseAutoencoder.from_pretrained(folder / "layer_01")
    train, val = (
        np.load(f"out/tokens/{split}/layer_01.npy").astype(np.float64) for split in ("train", "val")
    )
    np.testing.assert_allclose(sae.shift.numpy(), train.mean(0), rtol=1e-5, atol=1e-6)
    x = torch.from_numpy(val).float()
    fvu = ((sae(x)[0] - x) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert float(layers[1]["fvu"]) == pytest.approx(float(fvu), rel=1e-4)
    deviation = np.sqrt(((train - train.mean(0)) ** 2).sum(1).mean())
    assert float(layers[1]["gamma"]) == pytest.approx(np.linalg.norm(train.mean(0)) / deviation)


def test_a_metric_is_one_function(data, hub, monkeypatch):
    """As a student adds one: it is in the tables, the claims and the figures, unasked."""
    monkeypatch.setattr("metrics.METRICS", metrics.METRICS.copy())
    drawn = []
    real = figures.draw_metric
    monkeypatch.setattr(
        figures, "draw_metric", lambda *given: drawn.append(given[-1]) or real(*given)
    )
    for name in ("kit.rows", "kit.claims"):
        monkeypatch.setattr(f"{name}.METRICS", metrics.METRICS, raising=False)

    @metrics.metric("share of the commonest class", better=-1)
    def commonest(placed):
        return placed.responses.shown.amax(1) / placed.responses.shown.sum(1)

    @metrics.metric("latents of two classes")
    def two_classes(placed):
        return (placed.responses.shown > 0).sum(1) == 2

    assert main(small_run(data, hub)) == 0
    rows = [row for row in read_csv("hierarchy") if row["tree"] == "wordnet"]
    assert all(0.25 <= float(row["commonest"]) <= 1 for row in rows)
    assert all(int(row["two_classes"]) <= int(row["alive"]) for row in rows)
    claims = {row["claim"] for row in read_csv("claims")}
    for claim in ("the hierarchy is there", "it grows with depth"):
        assert f"{claim}, by share of the commonest class (exploratory)" in claims
    assert "share of the commonest class ↓, permuted" in report_file("tables.md").read_text()
    assert "commonest" in drawn and "two_classes" not in drawn


def report_file(name):
    (path,) = Path("out/results").glob(f"*/{name}")
    return path


def test_report_is_one_safe_file(data, hub, tmp_path, monkeypatch):
    monkeypatch.undo()  # with figures
    monkeypatch.chdir(tmp_path / "work")
    tricky = tmp_path / "<b>'\"&\udcff\n.d"
    data.rename(tricky)
    assert main(small_run(tricky, hub)) == 0
    (folder,) = Path("out/results").iterdir()
    text = (folder / "report.html").read_text()
    assert "<b>'" not in text and "&lt;b&gt;" in text and "<script" not in text
    sources = re.findall(r"(?:src|url|@import)[=( ]*[\"']?([^\"' >)]*)", text)
    assert sources and all(re.match("data:image/(png|webp);base64,", source) for source in sources)
    targets = re.findall(r'href="#([^"]*)"', text)
    assert targets and all(f'id="{target}"' in text for target in targets)
    images = re.findall("<img [^>]*>", text)
    assert len(images) >= 3 and all("alt=" in image for image in images)
    for name in ("fvu", "hierarchy", "picture", "by_units", "loss", "agreement"):
        for ending in ("png", "pdf"):
            assert os.path.getsize(folder / f"figures/{name}.{ending}") > 3000


def test_what_is_done_is_not_done_again_and_what_has_changed_is(data, hub, monkeypatch):
    """As a student changes things: a comment, the loss, a baseline, a setting."""
    home = Path("home")
    for name in ("sae.py", "metrics.py", "taxonomy.py", "dinov2_hooks.py", "reproduce.py"):
        home.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, home / name)
    shutil.copytree(ROOT / "kit", home / "kit")
    monkeypatch.setattr(reproduce, "HERE", home)
    run = small_run(data, hub, "--layers", "1")

    def change(name, old, new):
        text = (home / name).read_text()
        assert old in text
        (home / name).write_text(text.replace(old, new, 1))
        before = made()
        assert main(run) == 0
        return made_again(before)

    assert main(run) == 0
    before = made()
    assert main(run) == 0 and not made_again(before)
    assert "other settings tried" not in report_file("tables.md").read_text()
    comment = "    # why\n    z = sae.latents(x)"
    assert change("sae.py", "    z = sae.latents(x)", comment) == set()
    assert change("reproduce.py", 'help="of the SAEs', 'help="of all SAEs') == set()
    assert change("sae.py", '"""x̃ (B, n) -> its loss, with λ = l1"""', '"""another"""') == set()
    assert change("kit/scores.py", "VAL_BATCH = 2048", "VAL_BATCH = 1024") == {"scores"}
    assert change("metrics.py", "axes, -axes", "-axes, axes") == {"scores"}
    assert change("sae.py", "l1 * sparsity", "2 * l1 * sparsity") == {"saes", "scores"}
    for more, stages in (
        (["--layers", "1,2"], {"tokens", "saes", "scores"}),
        (["--top-k", "3"], {"scores"}),
        (["--response-rate", "0.4"], {"scores"}),
        (["--l1", "0.3"], {"saes", "scores"}),
    ):
        before = made()
        assert main([*run, *more]) == 0 and made_again(before) == stages
        assert before.items() <= made().items()  # nothing old is lost
    assert len(os.listdir("out/results")) == 8  # no code or setting replaces another's


def test_the_linear_probe_is_fitted_once_a_layer(data, hub, monkeypatch):
    """Whatever the SAEs; again if its file is damaged."""
    fitted = []
    real = scores.linear_probe
    monkeypatch.setattr(scores, "linear_probe", lambda *given: fitted.append(1) or real(*given))
    for l1 in ("0.1", "0.2"):
        assert main(small_run(data, hub, "--l1", l1)) == 0 and len(fitted) == 3
    rows = [
        row["probe_top1"]
        for row in csv.DictReader(open(next(Path("out/results").glob("l1*/layers.csv"))))
    ]
    (path,) = Path("out/probes").glob("*/layer_01.pt")
    path.write_bytes(path.read_bytes()[:100])
    assert main(small_run(data, hub, "--l1", "0.3")) == 0 and len(fitted) == 4
    again = csv.DictReader(open(next(Path("out/results").glob("l1_0.3*/layers.csv"))))
    assert [row["probe_top1"] for row in again] == rows


def test_tokens_of_something_else_are_refused(data, hub, capsys):
    run = small_run(data, hub, "--layers", "1")
    assert main(run) == 0
    before = made()
    refused(
        capsys, [*run, "--images-per-class", 9], "other images: 48 training and", "now 36 training"
    )
    refused(capsys, [*run, "--backbone", "chunked_vit"], "backbone: small_vit, now chunked_vit")
    refused(
        capsys, [*run, "--precision", "float16"], f"precision: {fast_precision('cpu')}, now float16"
    )
    write_images(data / "train" / WNIDS[0], 12, seed=9)
    refused(capsys, run, "recorded with other images", "give another --out, or delete")
    assert made() == before


def test_other_code_stops_a_recording_that_is_not_finished_and_is_said_of_one_that_is(
    data, hub, capsys, monkeypatch
):
    home = Path("home")
    (home / "kit").mkdir(parents=True)
    for name in {*reproduce.RECORDING, *reproduce.SCORING}:
        shutil.copy(ROOT / name, home / name)
    monkeypatch.setattr(reproduce, "HERE", home)
    assert main(small_run(data, hub, "--layers", "1")) == 0
    before = made()
    text = (home / "dinov2_hooks.py").read_text()
    (home / "dinov2_hooks.py").write_text(text.replace("[:, 0]\n", "[:, 1]\n"))
    capsys.readouterr()
    assert main(small_run(data, hub, "--layers", "1")) == 0 and made() == before
    assert "the code has changed since out/tokens was recorded" in capsys.readouterr().out
    words = "recorded with other code", "put that back, give another --out, or delete out/tokens"
    refused(capsys, small_run(data, hub), *words)
    assert made() == before


def test_damaged_files_are_named(data, hub, capsys):
    """Cut or empty: one sentence that names the file, and without it the run goes on."""
    run = small_run(data, hub, "--layers", "1")
    assert main(run) == 0
    whole = results()
    for pattern in (
        "tokens/val/layer_01.npy",
        "scores/*/layer_01.json",
        "saes/*/layer_01/model.safetensors",
        "saes/*/layer_01/config.json",
        "saes/*/layer_01/training.csv",
        "tokens/train/left_out.json",
    ):
        (path,) = Path("out").glob(pattern)
        for content in (b"", path.read_bytes()[:-5] if len(path.read_bytes()) > 9 else b"["):
            path.write_bytes(content)
            for score in Path("out").glob("scores/*/layer_01.json"):
                score.unlink() if "saes" in pattern else None
            folder = path.parent if "saes" in pattern else path
            refused(capsys, run, f"{folder}", "damaged", "delete this")
            shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
            assert main(run) == 0
            again = results()
            assert all(again[name] == content for name, content in whole.items() if name in again)


def test_images_that_are_mended_give_other_saes(data, hub):
    """Class tokens are deleted and recorded anew: what was left out belongs to what they are."""
    bad = sorted((data / "train" / WNIDS[1]).iterdir())[3]
    content = bad.read_bytes()
    bad.write_bytes(bytes(len(content)))
    run = small_run(data, hub, "--layers", "1", "--skip-bad-images")
    assert main(run) == 0
    before = set(os.listdir("out/saes"))
    bad.write_bytes(content)
    shutil.rmtree("out/tokens")
    assert main(run) == 0
    assert len(before) == 1 and len(set(os.listdir("out/saes")) - before) == 1


def test_other_precisions(data, hub):
    for precision in ("float32", "float16"):
        run = small_run(data, hub, "--layers", "1", "--out", precision)
        assert main([*run, "--precision", precision]) == 0
        assert main(run) == 0  # the tokens keep theirs


def run_until(before, run):
    """Die in place of the Nth renaming of a file."""
    left, replace = [before], Path.replace

    def replace_or_die(path, target):
        left[0] -= 1
        os.kill(os.getpid(), 9) if left[0] == 0 else replace(path, target)

    Path.replace = replace_or_die
    sys.exit(main(run))


def test_killed_at_many_writes_the_results_are_the_same_to_the_byte(data, hub):
    """Every file is renamed into its place: the run is killed before the Nth, and goes on."""
    assert main(small_run(data, hub, "--layers", "0,2", "--out", "whole")) == 0
    codes, run = [], small_run(data, hub, "--layers", "0,2", "--out", "killed")
    for before in (2, 4, 5, 3, 2, 4, 1, 0):  # the last is not killed
        process = multiprocessing.get_context("fork").Process(target=run_until, args=(before, run))
        process.start()
        process.join()
        codes.append(process.exitcode)
    assert codes == [-9] * 7 + [0]
    assert results("killed") == results("whole")


def test_a_full_disk_is_one_sentence_and_nothing_is_lost(data, hub, capsys, monkeypatch):
    run = small_run(data, hub, "--layers", "1")
    for stage, name in (
        ("tokens", "layer_01"),
        ("saes", "layer_01"),
        ("scores", "layer_01"),
        ("results", "epochs_3"),
    ):
        with monkeypatch.context() as patch:

            def full(path, target, replace=Path.replace):
                if f"/{stage}/" in str(path) and name in path.name:
                    raise OSError(28, "No space left on device", str(path))
                return replace(path, target)

            patch.setattr(Path, "replace", full)
            refused(capsys, run, f"out/{stage}/", "No space left", "make room", "the same command")
    assert main(run) == 0


def test_seeds_and_their_spread(data, hub):
    assert main(small_run(data, hub, "--seeds", "2", "--seed", "4")) == 0
    rows = read_csv("layers")
    assert [row["layer"] + row["seed"] for row in rows] == "04 05 14 15 24 25".split()
    (folder,) = Path("out/results").iterdir()
    heights = []
    for row in read_csv("hierarchy"):
        if (row["layer"], row["dictionary"], row["tree"]) == ("1", "sae", "wordnet"):
            heights.append(float(row["lch_height_pairwise"]))
    assert over_seeds(heights) in (folder / "tables.md").read_text()
    # latents are the first seed's
    assert {row["seed"] for row in read_csv("latents")} == {"4"}
    best = []
    for seed in (4, 5):
        (path,) = Path("out/scores").glob(f"*seed_{seed}-*/layer_01.json")
        best.append([row["top_images"] for row in json.loads(path.read_text())["hypernyms"]])
    shown = [json.loads(row["top_images"]) for row in read_csv("hypernyms") if row["layer"] == "1"]
    assert shown == best[0] != best[1]


def test_mean_and_spread():
    for values, text in (
        ([540, 560], "550 ± 10"),
        ([0.5], "0.5"),
        ([0.123, 0.125], "0.124 ± 0.001"),
    ):
        assert over_seeds(values) == text


def test_layers_and_batch_sizes():
    assert parse_layers("all", 3) == [0, 1, 2] and parse_layers("last", 3) == [2]
    assert parse_layers("1,4-6,5", 12) == [1, 4, 5, 6]

    def batch_size(rows, epochs=50):
        return trainings_of(parse_settings(["--epochs", str(epochs)]), rows)[0].batch_size

    assert batch_size(1_281_167) == 4096 and batch_size(20_000) == 256 and batch_size(9) == 4


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--layers", "3"], "out of range, the backbone has layers 0 to 2"),
        (["--layers", "two"], "give all, last, a range 0-11 or a list"),
        (["--response-rate", "50"], "--response-rate: 50: give a number from 1e-12 to 1"),
        (["--lr", "0"], "--lr: 0: give a number from 1e-12 to"),
        (["--top-k", "21"], "--top-k 21 is above the 20 validation images"),
        (["--activation", "gelu"], "give relu, or topk-K"),
        (["--activation", "topk-129"], "the number of latents, 128"),
        (["--backbone", "no_vit"], "is not a vision transformer with a class token"),
        (["--backbone", "exits"], "no licence"),
        (["--backbone", "fails"], "does not take images of (1, 3, 224, 224)"),
        (["--hub", "nowhere"], "is not a folder with a hubconf.py"),
        (["--data", "nowhere"], "--data nowhere: no such folder"),
        (["--data", ""], "--data: nothing is given: an unset variable?"),
        (["--saes", " "], "--saes: nothing is given"),
        (["--batch-size", "49"], "--batch-size 49 is above the 48 training images"),
        (["--out", "hubs/file"], "--out hubs/file: hubs/file is a file"),
        (["--saes", "nowhere", "--seeds", "2"], "leave out --saes"),
        (["--device", "cuda"], "PyTorch finds no GPU here")
        if not torch.cuda.is_available()
        else (["--seed", "-1"], "--seed: -1"),
    ],
)
def test_bad_input_is_one_sentence(data, hub, capsys, arguments, words):
    Path("hubs").mkdir()
    Path("hubs/file").touch()
    refused(capsys, small_run(data, hub, *arguments), words)
    assert not Path("out/tokens/train/layer_00.npy").exists()


def test_tiny_imagenet_is_fetched_by_name(work, hub, capsys, monkeypatch):
    def fetch(url, folder, md5):
        raise OSError("no network")

    monkeypatch.setattr("kit.inputs.download_and_extract_archive", fetch)
    refused(capsys, small_run("tiny-imagenet", hub), "tiny-imagenet-200.zip could not be fetched")


def test_no_hypernym_that_could_be_found(data, hub, capsys):
    for split in ("train", "val"):
        shutil.rmtree(
            data / split / WNIDS[1]
        )  # of a bird, a cat and a plane none has two of at most 1.5
    refused(capsys, small_run(data, hub), "no hypernym has two of these 3 classes")


@pytest.mark.parametrize("error", [KeyError, FileNotFoundError])
def test_a_bug_keeps_its_traceback(data, hub, monkeypatch, error):
    def mistake(*given):
        raise error(2, "a student's")

    monkeypatch.setattr("sae.loss_of", mistake)
    with pytest.raises(error, match="a student's"):
        main(small_run(data, hub))


@pytest.mark.parametrize("arguments", [["--layers", "99"], ["--batch-size", "9999"]])
def test_the_demos_vit_is_not_trained_for_bad_input(capsys, monkeypatch, arguments):
    monkeypatch.setattr("kit.demo.open_demo", lambda *given: 1 / 0)
    refused(capsys, ["--out", "out", *arguments], arguments[0])


def test_home_and_a_figure_that_fails(data, hub, monkeypatch, capsys):
    """~ is the home folder; a figure that fails costs a sentence, and the rest is there."""
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    monkeypatch.setenv("MPLBACKEND", "module://of_a_notebook")
    monkeypatch.setattr("kit.figures.line", lambda *given, **more: 1 / 0)
    assert main(small_run(data, hub, "--layers", "1", "--out", "~/out")) == 0
    assert not Path("~").exists()
    assert "no figure of hierarchy: ZeroDivisionError" in capsys.readouterr().out
    (folder,) = Path("home/out/results").iterdir()
    assert (folder / "tables.md").exists() and (folder / "report.html").exists()


def test_pictures_without_maps_where_attention_has_a_mask(data, hub, monkeypatch):
    def no_map(*given):
        raise reproduce.BackboneError("no relevancy map: masked")

    monkeypatch.setattr("kit.report.relevancy_maps", no_map)
    assert main(small_run(data, hub)) == 0
    (report,) = Path("out/results").glob("*/report.html")
    text = report.read_text()
    assert "no relevancy map: masked" in text or "<section" not in text


def test_bad_images(data, hub, capsys):
    bad = sorted((data / "train" / WNIDS[1]).iterdir())[3]
    bad.write_bytes(b"no picture")
    run = small_run(data, hub, "--layers", "1")
    refused(capsys, run, str(bad), "is not a readable image")
    assert main([*run, "--skip-bad-images"]) == 0
    assert f"left out: {bad} is not a readable image" in capsys.readouterr().err
    assert len(np.load("out/tokens/train/layer_01.npy")) == 47
    assert main([*run, "--skip-bad-images", "--layers", "1,2"]) == 0


def test_help_where_the_terminal_knows_no_greek(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit):
        main(["--help"])
    assert b"--layers" in terminal.buffer.getvalue()
