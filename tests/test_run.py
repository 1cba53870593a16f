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
from kit.figures import save
from kit.inputs import parse_layers
from kit.tables import cell, over_seeds
from reproduce import main, parse_settings, trainings_of
from sae import SparseAutoencoder

pytestmark = pytest.mark.usefixtures("work")


def one(pattern):
    (path,) = Path("out").glob(pattern)
    return path


def read_csv(name):
    with open(one(f"results/*/{name}.csv"), newline="") as file:
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


def copy_of_the_code(monkeypatch):
    """From here on reproduce.py asks for the code in this folder."""
    home = Path("home").absolute()
    home.mkdir()
    for name in ("sae.py", "metrics.py", "taxonomy.py", "dinov2_hooks.py", "reproduce.py"):
        shutil.copy(ROOT / name, home / name)
    shutil.copytree(ROOT / "kit", home / "kit")
    monkeypatch.setattr(reproduce, "HERE", home)
    return home


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def check_answer(said, layers, hierarchy):
    """The numbers of the answer are those of the tables."""
    claim = read_csv("claims")[0]

    def last(dictionary, tree):
        where = {"layer": "2", "dictionary": dictionary, "tree": tree}
        chosen = [row for row in hierarchy if where.items() <= row.items()]
        return cell(np.mean([float(row["lch_height_between"] or "nan") for row in chosen]))

    assert f"meet {float(claim['value']):.3g} edges up" in said
    assert f"under permuted trees {float(claim['permuted']):.3g}, as" in said
    for name, words in (("untrained", "The untrained SAE has"), ("neurons", "raw neurons")):
        assert f"{words} {last(name, 'wordnet')} (permuted {last(name, 'permuted')})" in said
    fvu = np.mean([float(row["fvu"]) for row in layers[-2:]])
    assert f"leaves {fvu:.0%} of the variance" in said


def test_whole_run(data, hub, capsys):
    assert main(small_run(data, hub, "--seeds", "2", "--seed", "4")) == 0
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
    assert [row["layer"] + row["seed"] for row in layers] == "04 05 14 15 24 25".split()
    kinds = itertools.product(
        ("sae", "neurons", "untrained"), ("wordnet", "permuted", "permuted_sd", "part")
    )
    assert [(row["dictionary"], row["tree"]) for row in hierarchy[:12]] == list(kinds)
    assert len(read_csv("readings")) == 6 * (9 + 3 + 3)
    assert len(read_csv("probes")) == 6 * (3 * 3 + 1) * 2
    best = []
    for path in sorted(Path("out").glob("scores/*seed_[45]-*/layer_01.json")):
        best.append([row["top_images"] for row in json.loads(path.read_text())["hypernyms"]])
    shown = [json.loads(row["top_images"]) for row in read_csv("hypernyms") if row["layer"] == "1"]
    assert shown == best[0] != best[1] and {row["seed"] for row in read_csv("latents")} == {"4"}
    of_saes = [row for row in hierarchy[::12] if row["seed"] == "4"]  # latents are the first's
    assert len(read_csv("latents")) == sum(int(row["alive"]) for row in of_saes)
    assert {row["verdict"] for row in read_csv("claims")} == {"too few classes"}
    heights = [float(row["lch_height_pairwise"]) for row in hierarchy[::12] if row["layer"] == "1"]
    assert over_seeds(heights) in one("results/*/tables.md").read_text()
    said = capsys.readouterr().out
    assert "report.html" in said and max(map(len, said.splitlines()[-9:])) <= 99
    check_answer(" ".join(said.split()), layers, hierarchy)
    assert not [*Path("out").rglob("*.part")]

    # the SAE's statistics are the train split's, and it takes raw tokens
    sae = SparseAutoencoder.from_pretrained(one("saes/epochs_3-seed_4-*/layer_01"))
    train, val = (
        np.load(f"out/tokens/{split}/layer_01.npy").astype(np.float32) for split in ("train", "val")
    )
    np.testing.assert_allclose(sae.shift, train.mean(0), rtol=1e-4, atol=1e-5)
    error = ((sae(torch.from_numpy(val))[0].numpy() - val) ** 2).sum()
    fvu = error / ((val - val.mean(0)) ** 2).sum()
    assert float(layers[2]["fvu"]) == pytest.approx(float(fvu), rel=1e-4)


def test_a_metric_is_one_function(data, hub, monkeypatch):
    """As a student adds one: it is in the tables, the claims and the figures, unasked."""
    for name in ("metrics", "kit.claims"):
        monkeypatch.setattr(f"{name}.METRICS", metrics.METRICS.copy())

    @metrics.metric("share of the commonest class", better=-1)
    def commonest(placed):
        return placed.responses.shown.amax(1) / placed.responses.shown.sum(1)

    @metrics.metric("latents of two classes")
    def two_classes(placed):
        return (placed.responses.shown > 0).sum(1) == 2

    monkeypatch.setattr("kit.claims.METRICS", metrics.METRICS)
    drawn = figures.all_figures()
    assert "commonest" in drawn and "two_classes" not in drawn
    assert main(small_run(data, hub)) == 0
    for row in read_csv("hierarchy")[::4]:  # of WordNet's tree
        assert 0.25 <= float(row["commonest"]) <= 1
        assert int(row["two_classes"]) <= int(row["alive"])
    claims = {row["claim"] for row in read_csv("claims")}
    for claim in ("the hierarchy is there", "it grows with depth"):
        assert f"{claim}, by share of the commonest class (exploratory)" in claims
    assert "share of the commonest class ↓, permuted" in one("results/*/tables.md").read_text()


def test_report_is_one_safe_file(data, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "save", save)
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
    home = copy_of_the_code(monkeypatch)
    run = small_run(data, hub, "--layers", "1")
    assert main(run) == 0
    scores, saes = {"scores"}, {"saes", "scores"}
    for name, old, new, stages in (
        ("sae.py", "", "", set()),
        ("sae.py", "    z = sae.latents(x)", "    # why\n    z = sae.latents(x)", set()),
        ("reproduce.py", 'help="of the SAEs', 'help="of all SAEs', set()),
        ("sae.py", '"""x̃ (B, n) -> its loss, with λ = l1"""', '"""another"""', set()),
        ("kit/scores.py", "VAL_BATCH = 2048", "VAL_BATCH = 1024", scores),
        ("metrics.py", "axes, -axes", "-axes, axes", scores),
        ("sae.py", "l1 * sparsity", "2 * l1 * sparsity", saes),
    ):
        change(home / name, old, new)
        before = made()
        assert main(run) == 0 and made_again(before) == stages, new
    tables = [path.read_text() for path in Path("out/results").glob("*/tables.md")]
    assert not any("other settings tried" in text for text in tables)  # but for their code alike
    for more, stages in (
        (["--layers", "1,2"], saes | {"tokens"}),
        (["--top-k", "3"], scores),
        (["--response-rate", "0.4"], scores),
        (["--l1", "0.3"], saes),
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
    for l1, count in (("0.2", 3), ("0.3", 3), ("0.4", 4)):
        if count == 4:
            path = one("probes/*/layer_01.pt")
            path.write_bytes(path.read_bytes()[:100])
        assert main(small_run(data, hub, "--l1", l1)) == 0 and len(fitted) == count
    tables = [csv.DictReader(open(path)) for path in Path("out/results").glob("*/layers.csv")]
    assert len({tuple(row["probe_top1"] for row in table) for table in tables}) == 1


def test_tokens_of_something_else_are_refused(data, hub, capsys):
    run = small_run(data, hub, "--layers", "1")
    assert main(run) == 0
    before = made()
    for more, *words in (
        (["--images-per-class", 9], "other images: 48 training and", "now 36 training"),
        (["--backbone", "chunked_vit"], "backbone: small_vit, now chunked_vit"),
        (["--precision", "float16"], "precision: float32, now float16"),
    ):
        refused(capsys, [*run, *more], *words)
    write_images(data / "train" / WNIDS[0], 12, seed=9)
    refused(capsys, run, "recorded with other images", "give another --out, or delete")
    assert made() == before


def test_other_code_stops_a_recording_that_is_not_finished_and_is_said_of_one_that_is(
    data, hub, capsys, monkeypatch
):
    home = copy_of_the_code(monkeypatch)
    assert main(small_run(data, hub, "--layers", "1")) == 0
    before = made()
    change(home / "dinov2_hooks.py", "[:, 0]\n", "[:, 1]\n")
    capsys.readouterr()
    assert main(small_run(data, hub, "--layers", "1")) == 0
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
        path = one(pattern)
        content = path.read_bytes()
        for damaged in (b"", content[:-5] or b"["):
            path.write_bytes(damaged)
            folder = path
            if "saes" in pattern:
                folder = path.parent
                one("scores/*/layer_01.json").unlink(missing_ok=True)
            refused(capsys, run, str(folder), "damaged", "delete this")
            shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
            assert main(run) == 0
            again = whole | results()  # left_out.json need not be there
            assert all(again[name] == content for name, content in whole.items())


def test_other_precisions(data, hub):
    run = small_run(data, hub, "--layers", "1")
    assert main([*run, "--precision", "float16"]) == 0
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
    run = small_run(data, hub, "--layers", "0,2", "--out")
    assert main([*run, "whole"]) == 0
    codes = []
    for before in (2, 4, 5, 3, 2, 4, 1, 0):  # the last is not killed
        given = before, [*run, "killed"]
        process = multiprocessing.get_context("fork").Process(target=run_until, args=given)
        process.start()
        process.join()
        codes.append(process.exitcode)
    assert codes == [-9] * 7 + [0]
    assert results("killed") == results("whole")


def test_a_full_disk_is_one_sentence_and_nothing_is_lost(data, hub, capsys, monkeypatch):
    run, replace = small_run(data, hub, "--layers", "1"), Path.replace
    for stage in ("tokens", "saes", "scores", "results"):

        def full(path, target):
            if f"/{stage}/" in str(path) and path.name.startswith(("layer_01", "epochs_3")):
                raise OSError(28, "No space left on device", str(path))
            return replace(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", full)
            refused(capsys, run, f"out/{stage}/", "No space left", "make room", "the same command")
    assert main(run) == 0


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
    for rows, batch_size in ((1_281_167, 4096), (20_000, 256), (9, 4)):
        assert trainings_of(parse_settings([]), rows)[0].batch_size == batch_size


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--layers", "3"], "out of range, the backbone has layers 0 to 2"),
        (["--layers", "two"], "give all, last, a range 0-11 or a list"),
        (["--response-rate", "50"], "--response-rate: 50: give a number from 1e-12 to 1"),
        (["--lr", "0"], "--lr: 0: give a number from 1e-12 to"),
        (["--top-k", "21"], "--top-k 21 is above the 20 validation images"),
        (["--activation", "topk-129"], "the number of latents, 128"),
        (["--backbone", "fails"], "does not take images of (1, 3, 224, 224)"),
        (["--data", "nowhere"], "--data nowhere: no such folder"),
        (["--data", ""], "--data: nothing is given: an unset variable?"),
        (["--saes", " "], "--saes: nothing is given"),
        (["--batch-size", "49"], "--batch-size 49 is above the 48 training images"),
        (["--out", "file"], "--out file: file is a file"),
        (["--saes", "nowhere", "--seeds", "2"], "leave out --saes"),
        (["--device", "cuda"], "PyTorch finds no GPU here")
        if not torch.cuda.is_available()
        else (["--seed", "-1"], "--seed: -1"),
    ],
)
def test_bad_input_is_one_sentence(data, hub, capsys, arguments, words):
    Path("file").touch()
    refused(capsys, small_run(data, hub, *arguments), words)
    assert not Path("out/tokens/train/layer_00.npy").exists()


def test_tiny_imagenet_is_fetched_by_name(work, hub, capsys, monkeypatch):
    def fetch(url, folder, md5):
        raise OSError("no network")

    monkeypatch.setattr("kit.inputs.download_and_extract_archive", fetch)
    refused(capsys, small_run("tiny-imagenet", hub), "tiny-imagenet-200.zip could not be fetched")


def test_no_hypernym_that_could_be_found(data, hub, capsys):
    for split in ("train", "val"):  # of a bird, a cat and a plane none has two of at most 1.5
        shutil.rmtree(data / split / WNIDS[1])
    refused(capsys, small_run(data, hub), "no hypernym has two of these 3 classes")


def test_the_demos_vit_is_not_trained_for_bad_input(capsys, monkeypatch):
    monkeypatch.setattr("kit.demo.open_demo", lambda *given: 1 / 0)
    refused(capsys, ["--out", "out", "--layers", "99"], "--layers")


def test_home_and_a_figure_that_fails(data, hub, monkeypatch, capsys):
    """~ is the home folder; a figure that fails costs a sentence, and the rest is there."""
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    monkeypatch.setenv("MPLBACKEND", "module://of_a_notebook")
    monkeypatch.setattr(figures, "save", save)
    monkeypatch.setattr(figures, "line", lambda *given, **more: 1 / 0)
    assert main(small_run(data, hub, "--layers", "1", "--out", "~/out")) == 0
    assert not Path("~").exists()
    assert "no figure of hierarchy: ZeroDivisionError" in capsys.readouterr().out
    (folder,) = Path("home/out/results").iterdir()
    assert (folder / "tables.md").exists() and (folder / "report.html").exists()


def test_bad_images_and_what_becomes_of_them_when_they_are_mended(data, hub, capsys):
    """Class tokens are deleted and recorded anew: what was left out belongs to what they are."""
    bad = sorted((data / "train" / WNIDS[1]).iterdir())[3]
    content = bad.read_bytes()
    bad.write_bytes(bytes(len(content)))
    run = small_run(data, hub, "--layers", "1")
    refused(capsys, run, str(bad), "is not a readable image")
    run.append("--skip-bad-images")
    assert main(run) == 0
    assert f"left out: {bad} is not a readable image" in capsys.readouterr().err
    assert len(np.load("out/tokens/train/layer_01.npy")) == 47
    assert main([*run, "--layers", "1,2"]) == 0
    assert len(os.listdir("out/saes")) == 1
    bad.write_bytes(content)
    shutil.rmtree("out/tokens")
    assert main(run) == 0 and len(os.listdir("out/saes")) == 2  # other tokens, other SAEs


def test_help_where_the_terminal_knows_no_greek(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit):
        main(["--help"])
    assert b"--layers" in terminal.buffer.getvalue()
