"""The command: whole small runs, what is done again and what is not, and bad input."""
import csv
import itertools
import json
import os
import pickle
import re
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import reproduce
from conftest import WNIDS, refused, results, small_run, write_images
from kit import demo, recording, report
from kit.store import InputError
from kit.job import parse_layers, trainings_of
from reproduce import main, parse_settings
from sae import SparseAutoencoder, fast_precision
from taxonomy import Taxonomy
from test_store import flip

pytestmark = pytest.mark.usefixtures("work")


def read_csv(name):
    with open(f"out/results/{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_whole_run(data, hub, capsys):
    assert main(small_run(data, hub)) == 0
    layers, hierarchy, claims = (read_csv(name) for name in ("layers", "hierarchy", "claims"))
    assert [row["layer"] for row in layers] == ["0", "1", "2"]
    assert list(layers[0]) == (
        "layer seed width gamma probe_top1 nmse fvu l0 dead probe_on_reconstruction").split()
    assert list(hierarchy[0]) == (
        "layer seed dictionary tree alive single_class lch_height lch_height_pairwise "
        "lch_height_between coverage match ontology_covered hypernyms_lch hypernyms_matched").split()
    assert list(read_csv("relations")[0]) == (
        "layer seed dictionary related_pairs related expected unrelated_pairs unrelated "
        "absorption").split()
    assert list(read_csv("readings")[0]) == "claim reading layer seed value permuted".split()
    assert len(read_csv("readings")) == 3 * (36 + 20 + 3)
    assert [(row["dictionary"], row["tree"]) for row in hierarchy[:6]] == [
        (name, tree) for name in ("sae", "neurons", "untrained") for tree in ("wordnet", "permuted")]
    assert list(claims[0]) == ("claim about_hierarchy verdict seeds value permuted spread low high "
                               "p_value statistic").split()
    assert list(read_csv("probes")[0]) == (
        "layer seed dictionary units tree iou iou_small above_half best").split()
    assert len(read_csv("probes")) == 3 * (3 * 3 + 1) * 2
    assert list(read_csv("latents")[0]) == (
        "layer latent fires lch lch_height_between hypernym match classes").split()
    assert len(read_csv("latents")) == sum(int(row["alive"]) for row in hierarchy
                                           if (row["dictionary"], row["tree"]) == ("sae", "wordnet"))
    record = json.loads(Path("out/results/results.json").read_text())
    assert record["settings"]["backbone"] == "small_vit" and record["versions"]["torch"]
    assert record["made_from"]["precision"] == fast_precision("cpu")
    assert float(layers[1]["fvu"]) == record["layers"][1]["fvu"]
    assert list(read_csv("hypernyms")[0]) == (
        "wnid name classes height emergence_layer best_layer best_latent match lch").split()
    pairs = [(row["layer_a"], row["layer_b"]) for row in read_csv("consistency")]
    assert pairs == [("0", "1"), ("0", "2"), ("1", "2")]
    assert os.path.getsize("out/results/tables.md") > 500
    printed = capsys.readouterr().out
    assert "category information grows with depth: " in printed
    assert "out/results/report.html" in printed and len(printed) < 6000
    assert not [*Path("out").rglob("*.part"), *Path("out").rglob("progress_*")]

    # the SAE's statistics are the train split's, and it takes raw tokens
    (folder,) = Path("out/saes").iterdir()
    assert folder.name.startswith("relu-l1_0.1-centred-seed_0-")
    sae = SparseAutoencoder.from_pretrained(folder / "layer_01")
    train, val = (np.load(f"out/tokens/{split}/layer_01.npy").astype(np.float64)
                  for split in ("train", "val"))
    np.testing.assert_allclose(sae.shift.numpy(), train.mean(0), rtol=1e-5, atol=1e-6)
    assert np.abs(val.mean(0) - train.mean(0)).max() > 1e-4
    x = torch.from_numpy(val).float()
    fvu = ((sae(x)[0] - x) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert float(layers[1]["fvu"]) == pytest.approx(float(fvu), rel=1e-4)
    deviation = np.sqrt(((train - train.mean(0)) ** 2).sum(1).mean())
    assert float(layers[1]["gamma"]) == pytest.approx(np.linalg.norm(train.mean(0)) / deviation)
    assert np.load("out/tokens/val/ids.npy").tolist() == list(range(20))
    assert np.load("out/tokens/val/labels.npy").tolist() == [i // 5 for i in range(20)]


def test_report_is_one_safe_file(data, hub, tmp_path, monkeypatch):
    monkeypatch.undo()  # with figures
    monkeypatch.setattr("kit.figures.DPI", 100)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("reproduce.PROBE_STEPS", 1)
    tricky = tmp_path / "<b>'\"&\udcff\n.d"
    data.rename(tricky)
    assert main(small_run(tricky, hub)) == 0
    text = Path("out/results/report.html").read_text()
    assert "<b>'" not in text and "&lt;b&gt;" in text
    sources = re.findall(r"(?:src|href|url|@import)[=( ]*[\"']?([^\"' >)]*)", text)
    assert sources and all(re.match("data:image/(png|webp);base64,", one) for one in sources)
    without = re.sub("data:image/[a-z]*;base64,[^\"]*", "", text)
    assert "<script" not in text and "http" not in without
    images = re.findall("<img [^>]*>", text)
    assert len(images) >= 4 and all(re.search('alt="[^"]{20,}"', image) for image in images)
    for name in ("layers", "hierarchy", "consistency", "emergence"):
        assert os.path.getsize(f"out/results/figures/{name}.png") > 5000


def snapshot(folder):
    return {str(path): path.stat().st_mtime_ns for path in Path(folder).rglob("*")
            if path.is_file() and path.name not in ("lock", "labels.npy", "ids.npy", "README.md")}


def test_no_work_is_done_twice(data, hub, monkeypatch):
    run = small_run(data, hub, "--layers", "0,2")
    assert main(run) == 0
    before, tables = {part: snapshot(f"out/{part}") for part in ("tokens", "saes", "scores")}, results()

    def unchanged(*parts):
        return all(snapshot(f"out/{part}") == before[part] for part in parts)

    with monkeypatch.context() as patch:
        patch.setattr(recording, "record_layers", None)
        patch.setattr(reproduce, "train_sae", None)
        with patch.context() as more:
            more.setattr(reproduce, "profile_latents", None)
            more.setattr(reproduce, "linear_probe", None)
            assert main(run) == 0 and unchanged("tokens", "saes", "scores") and results() == tables
        patch.setattr(reproduce, "linear_probe", None)
        assert main([*run, "--response-rate", "0.9"]) == 0  # other scores of the same SAEs
        assert unchanged("tokens", "saes") and not unchanged("scores")
    with monkeypatch.context() as patch:
        patch.setattr(recording, "record_layers", None)
        patch.setattr(reproduce, "linear_probe", None)
        assert main([*run, "--l1", "0.3"]) == 0  # other SAEs lie beside the old
        assert unchanged("tokens") and len(os.listdir("out/saes")) == 2
    assert main([*run, "--layers", "all"]) == 0  # another layer keeps those there are
    assert before["tokens"].items() <= snapshot("out/tokens").items()
    assert [row["layer"] for row in read_csv("layers")] == ["0", "1", "2"]


def test_other_code_makes_it_again_and_says_so(data, hub, capsys, monkeypatch):
    run = small_run(data, hub, "--layers", "1,2")
    assert main(run) == 0
    expected, hashed = results(), reproduce.hash_of
    for module, made, times in [("metrics", "scores", 1), ("sae", "saes", 1)]:
        capsys.readouterr()
        monkeypatch.setattr(reproduce, "hash_of", lambda *paths: hashed(*paths) + (
            "changed" if any(path.stem == module for path in paths) else ""))
        assert main(run) == 0
        printed = capsys.readouterr().out
        assert len(re.findall(rf"out/{made}/.*code was .* made again", printed)) == times
        assert results() == expected


def test_one_layer_and_two_classes(data, hub):
    for path in [*data.glob("*/n02123*"), *data.glob("*/n0269*")]:
        shutil.rmtree(path)
    assert main(small_run(data, hub, "--layers", "last")) == 0
    assert read_csv("consistency") == read_csv("hypernyms") == []
    assert [row["layer"] for row in read_csv("layers")] == ["2"]
    verdicts = {row["claim"]: row["verdict"] for row in read_csv("claims")}
    assert {verdict for claim, verdict in verdicts.items() if "depth" in claim} == {"open"}


def test_a_layer_without_a_living_latent_is_a_gap_and_no_error(data, hub):
    dead = ["--inputs", "raw", "--l1", "1000", "--lr", "0.1", "--epochs", "50"]
    assert main(small_run(data, hub, *dead)) == 0
    rows = [row for row in read_csv("hierarchy") if row["dictionary"] == "sae"]
    assert any(row["alive"] == "0" and row["match"] == "" for row in rows)
    (folder,) = Path("out/saes").glob("relu-l1_1000-raw-seed_0-*")
    assert SparseAutoencoder.from_pretrained(folder / "layer_00").shift.abs().max() == 0
    first = results()
    assert main(small_run(data, hub, *dead)) == 0 and results() == first


def test_one_image_a_class_and_a_class_above_another(data, hub, wordnet):
    for path in data.rglob("*.png"):
        if path.name != "00.png":
            path.unlink()
    for split in ("train", "val"):  # dog, above Chihuahua
        shutil.copytree(data / split / WNIDS[0], data / split / "n02084071")
    assert main(small_run(data, hub, "--layers", "last")) == 0
    assert len(np.load("out/tokens/train/labels.npy")) == 5


def test_blocks_in_chunks_are_the_same_blocks(data, hub):
    assert main(small_run(data, hub)) == 0
    assert main(small_run(data, hub, "--backbone", "chunked_vit", "--out", "chunked")) == 0
    (a, b) = (results(out)[1] for out in ("out", "chunked"))
    assert a == b and len(a) == 13


def test_the_plan_is_what_is_written(data, hub, capsys):
    assert main(small_run(data, hub, "--plan")) == 0
    table = capsys.readouterr().out
    assert os.listdir(".") == [] and re.search("class tokens .* h\n", table)
    assert main(small_run(data, hub)) == 0
    for name, pattern in [("class tokens", "tokens/*/layer*.npy"), ("SAEs", "saes/*/*/*.safetensors")]:
        written = sum(path.stat().st_size for path in Path("out").glob(pattern))
        said, unit = re.search(rf"{name} +([\d.]+) (k?B)", table).groups()
        assert written == pytest.approx(float(said) * {"B": 1, "kB": 1000}[unit], rel=0.25)  # headers
    # by hand: a ViT of 3 blocks of width 16 on 4 x 4 patches of 56 x 56 and a class token
    N, n = 17, 16
    image = 2 * (16 * n * 3 * 56 * 56 + 3 * (12 * n * n * N + 2 * N * N * n) + 2 * n)
    flop = float(re.search(r"class tokens .*B +(\S+)", table)[1])
    assert flop == pytest.approx(68 * image, rel=0.03)  # two digits; some PyTorch leave out attention
    steps = 3 * (48 // 16)
    assert float(re.search(r"SAEs .*B +(\S+)", table)[1]) == pytest.approx(
        3 * steps * 5 * 2 * 16 * n * 8 * n, rel=0.03)


# --------------------------------------------------------------------------------------------------
# settings, claims


def test_parse_layers():
    rng = np.random.default_rng(0)
    assert parse_layers("all", 4) == [0, 1, 2, 3] and parse_layers("last", 4) == [3]
    for _ in range(200):  # against sets
        depth, parts = int(rng.integers(1, 30)), rng.integers(0, 30, (rng.integers(1, 5), 2))
        text = ",".join(f"{a}-{b}" if rng.random() < 0.7 else f"{a}" for a, b in parts)
        ranges = [[int(n) for n in part.split("-")] for part in text.split(",")]
        expected = [set(range(part[0], part[-1] + 1)) for part in ranges]
        if all(expected) and max(set.union(*expected)) < depth:
            assert parse_layers(text, depth) == sorted(set.union(*expected))
        else:
            with pytest.raises(InputError, match="is empty or out of range"):
                parse_layers(text, depth)


@pytest.mark.parametrize("text", ["", "first", "1-", "-1", "1--2", "1,,2", "1.5", "9" * 20, " 1"])
def test_layers_that_are_none(text):
    with pytest.raises(SystemExit):
        parse_settings([f"--layers={text}"])


def test_fitting_batch_size():
    def trainings(rows, *arguments):
        settings = parse_settings(list(arguments))
        settings.sae_precision = "float32"
        return trainings_of(settings, rows)

    def batch_size(rows, epochs=50):
        return trainings(rows, "--epochs", str(epochs))[0].batch_size

    assert batch_size(1_281_167) == 4096 and batch_size(20_000) == 512 and batch_size(9) == 9
    for rows in (100, 3000, 10**5):
        assert rows * 50 // batch_size(rows) >= 1500 or batch_size(rows) == 16
    given = trainings(100, "--batch-size", "77", "--seed", "5", "--seeds", "3")
    assert [(one.batch_size, one.seed) for one in given] == [(77, 5), (77, 6), (77, 7)]


def test_seeds_and_their_spread(data, hub):
    assert main(small_run(data, hub, "--seeds", "2", "--seed", "4")) == 0
    assert [row["layer"] + row["seed"] for row in read_csv("layers")] == "04 05 14 15 24 25".split()
    both = [float(row["fvu"]) for row in read_csv("layers") if row["layer"] == "1"]
    table = Path("out/results/tables.md").read_text()
    assert f"{np.mean(both):.3g} ± {np.std(both):.1g}" in table
    assert all(row["seeds"] in ("0/2", "1/2", "2/2", "") for row in read_csv("claims"))
    second = [row for row in read_csv("hierarchy") if row["seed"] == "5"]
    assert main(small_run(data, hub, "--seed", "5")) == 0  # is the second of the two
    assert read_csv("hierarchy") == second


def test_top_k_activation(data, hub):
    assert main(small_run(data, hub, "--activation", "topk-3", "--layers", "1")) == 0
    (folder,) = Path("out/saes").glob("topk-3-centred-seed_0-*")
    sae = SparseAutoencoder.from_pretrained(folder / "layer_01")
    x = torch.from_numpy(np.load("out/tokens/val/layer_01.npy")).float()
    assert sae.top_k == 3 and (sae.encode(x) > 0).sum(1).max() <= 3
    assert float(read_csv("layers")[0]["l0"]) <= 3
    first = read_csv("hierarchy")
    assert main(small_run(data, hub, "--layers", "1", "--out", "scored", "--saes", folder)) == 0
    os.rename("out", "trained"), os.rename("scored", "out")
    assert read_csv("hierarchy") == first


def test_named_latents_are_of_all_heights_and_each_once():
    rows = [{"wnid": str(i), "height": height, "match": match, "emergence_layer": layer,
             "best_layer": 3, "best_latent": latent}
            for i, (height, match, layer, latent) in enumerate([
                (5, 0.6, 1, 7), (5, 0.9, 1, 8), (2, 0.8, 2, 8), (2, 0.7, 0, 9), (1, 0.4, None, 1)])]
    records = {3: {"hypernyms": {str(i): {"top_images": [i]} for i in range(5)}}}
    named = report.named_latents(rows, records)
    assert [(row["wnid"], row["top_images"]) for row in named] == [("1", [1]), ("0", [0]), ("3", [3])]
    assert [row["wnid"] for row in report.named_latents(rows, records, 2)] == ["1", "0"]


# --------------------------------------------------------------------------------------------------
# the demo


def test_every_node_of_the_demo_has_a_trait_that_its_classes_inherit():
    tree = Taxonomy.from_wnids(demo.CLASSES)
    traits = demo.class_traits(tree).numpy()
    assert len({tuple(row) for row in traits.tolist()}) == len(demo.CLASSES) == 30
    for v in tree.hypernyms:
        below = tree.leaves[v]
        if below.all():
            continue
        shared = [kind for kind in traits.T if len(set(kind[below])) == 1 and kind[below][0] >= 0]
        own = [kind for kind in shared if kind[below][0] not in kind[~below]]
        assert own or len(shared) >= 2


def test_the_demos_object_lies_where_it_is_said_to_lie():
    traits = demo.class_traits(Taxonomy.from_wnids(demo.CLASSES))
    images, inside = demo.draw(traits, torch.Generator().manual_seed(0))
    again, _ = demo.draw(traits, torch.Generator().manual_seed(0))
    assert torch.equal(images, again) and images.dtype == torch.uint8
    assert 0.05 < inside.float().mean() < 0.5
    for image, mask in zip(images.float(), inside):  # the ground is one colour under noise
        ground, body = image[:, ~mask], image[:, mask]
        assert (ground.std(1).max() < 0.6 * body.std(1).max()
                or (body.mean(1) - ground.mean(1)).abs().max() > 30)


# --------------------------------------------------------------------------------------------------
# killed, damaged, out of room, out of date


class Killed(BaseException):
    """Past every handler of the code under test, as a SIGKILL is."""


@pytest.mark.parametrize("writes", [2, 5])  # an SAE is a folder and, in it, a record: two
def test_killed_after_every_few_writes(data, hub, monkeypatch, capsys, writes):
    monkeypatch.setattr(recording, "COMMIT_SECONDS", 0)
    monkeypatch.setattr("kit.images.BATCH", 8)
    run = small_run(data, hub, "--layers", "0,2")
    assert main(run) == 0
    expected, replace, kills = results(), Path.replace, 0
    shutil.rmtree("out")
    while True:
        count = itertools.count()

        def counted(path, target):  # after a write, and before it takes its name
            if next(count) >= writes:
                raise Killed
            return replace(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", counted)
            try:
                assert main(run) == 0
                break
            except Killed:
                kills += 1
                assert kills < 100
    assert "made again" not in capsys.readouterr().out  # nothing that was committed is thrown away
    assert kills > 10 / writes and results() == expected
    assert not [*Path("out").rglob("*.part"), *Path("out").rglob("progress_*")]


def test_no_committed_image_is_read_again(data, hub, monkeypatch):
    monkeypatch.setattr(recording, "COMMIT_SECONDS", 0)
    monkeypatch.setattr("kit.images.BATCH", 8)
    seen, read_image = [], recording.images.read_image

    def counted(path):
        seen.append(path.parent.parent.name)
        if len(seen) == 30:
            raise Killed
        return read_image(path)

    monkeypatch.setattr(recording.images, "read_image", counted)
    with pytest.raises(Killed):
        main(small_run(data, hub))
    assert main(small_run(data, hub)) == 0
    assert seen.count("train") == 48 + 6  # the batch of eight that was under way: 24 to 29


SAE, SCORES = "saes/*/layer_01/", "scores/*/layer_01.json"


@pytest.mark.parametrize("name", [SAE + "model.safetensors", SAE + "config.json", SAE + "sae.json",
                                  SCORES])
def test_damaged_saes_and_scores_are_made_again(data, hub, capsys, name):
    run = small_run(data, hub, "--layers", "1")
    assert main(run) == 0
    expected = results()
    paths = list(Path("out").glob(name))
    for path in paths:
        flip(path)
    assert main(run) == 0
    assert f"{paths[0].name} is damaged: it is made again" in capsys.readouterr().out
    assert results() == expected


def test_damaged_tokens_are_refused_by_name_and_recorded_anew_once_deleted(data, hub, capsys):
    run = small_run(data, hub, "--layers", "1")
    assert main(run) == 0
    expected = results()
    for name in ("train/layer_01.npy", "val/layer_01.npy"):
        for place in (0.02, 0.5, 0.999):
            flip(Path("out/tokens", name), place)
            shutil.rmtree("out/saes"), shutil.rmtree("out/scores")
            refused(capsys, run, f"out/tokens/{name} is damaged: delete it, and it is made anew")
            Path("out/tokens", name).unlink()
            assert main(run) == 0 and results() == expected
    flip(Path("out/tokens/val/labels.npy"))  # is written in every run, and never read
    assert main(run) == 0 and results() == expected
    flip(Path("out/tokens/train/layer_01.json"))
    refused(capsys, run, "out/tokens/train/layer_01.json is damaged: delete it")


def test_weights_are_never_unpickled(data, hub):
    class Trap:
        def __reduce__(self):
            return os.mkdir, ("sprung",)

    run = small_run(data, hub, "--layers", "1")
    assert main(run) == 0
    expected = results()
    (path,) = Path("out").glob(SAE + "model.safetensors")
    path.write_bytes(pickle.dumps(Trap()))
    (path.parent / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    assert main(run) == 0 and results() == expected and not os.path.exists("sprung")


def test_tokens_of_other_images_or_another_backbone_are_refused(data, hub, capsys, tmp_path):
    hub = shutil.copytree(hub, tmp_path / "own_hub")
    run = small_run(data, hub, "--layers", "1")
    assert main(run) == 0
    moved = shutil.copytree(hub, tmp_path / "moved_hub")
    assert main([*run, "--hub", str(moved)]) == 0  # where a hub lies does not matter
    before = snapshot("out")
    stale = "made with other settings", "another --out"
    refused(capsys, [*run, "--images-per-class", "5"], *stale, "train images was 48 and is now 20")
    code = (hub / "hubconf.py").read_text()
    (hub / "hubconf.py").write_text(code.replace("manual_seed(0)", "manual_seed(1)"))
    refused(capsys, run, *stale, "weights was")
    (hub / "hubconf.py").write_text(code)
    (data / f"val/{WNIDS[0]}/00.png").rename(data / f"val/{WNIDS[0]}/0.png")
    refused(capsys, run, *stale, "images was")
    assert snapshot("out") == before


@pytest.mark.parametrize("limit", [300, 2500, 9_000, 60_000])
def test_a_file_size_limit_is_told_and_resumed_from(data, hub, capsys, monkeypatch, limit):
    """What a full disk does, to files of any stage: 300 bytes stop the tokens, 60 kB the SAEs."""
    run = small_run(data, hub, "--layers", "1", "--expansion", "40" if limit == 60_000 else "8")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        refused(capsys, run, "the disk is full", "goes on from here")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert main(run) == 0
    resumed = results()
    shutil.rmtree("out")
    assert main(run) == 0 and results() == resumed


def test_a_run_writes_nowhere_else(data, hub, tmp_path):
    before = snapshot(tmp_path)
    assert main(small_run(data, hub, "--layers", "1")) == 0
    changed = {path for path, when in snapshot(tmp_path).items() if before.get(path) != when}
    assert changed and all(path.startswith(str(tmp_path / "work/out")) for path in changed)


# --------------------------------------------------------------------------------------------------
# bad input: one clear sentence, exit code 2, no traceback, and nothing written


@pytest.mark.parametrize("arguments, words", [
    (["--data", "nowhere"], ["--data nowhere: no such folder"]),
    (["--l1", "-1"], ["--l1 -1", "from 0"]),
    (["--l1", "nan"], ["--l1"]),
    (["--l1", "inf"], ["--l1"]),
    (["--lr", "0"], ["--lr 0"]),
    (["--lr", "2"], ["--lr", "to 1"]),
    (["--epochs", "0"], ["--epochs 0"]),
    (["--epochs", "1.5"], ["--epochs", "1.5"]),
    (["--batch-size", "0"], ["--batch-size 0"]),
    (["--expansion", "0"], ["--expansion"]),
    (["--response-rate", "1.2"], ["--response-rate"]),
    (["--top-k", "1"], ["--top-k 1: give a number from 2"]),
    (["--images-per-class", "0"], ["--images-per-class"]),
    (["--seed", str(10**30)], ["--seed"]),
    (["--layers", "first"], ["--layers first", "0-11"]),
    (["--inputs", "white"], ["--inputs", "centred"]),
    (["--activation", "gelu"], ["--activation gelu: give relu or topk-K"]),
    (["--activation", "topk-0"], ["--activation topk-0"]),
    (["--seeds", "0"], ["--seeds 0"]),
    (["--backbone", "dinov2_vits14"], ["--backbone", "--data"]),
])
def test_bad_settings(capsys, arguments, words):
    refused(capsys, arguments, *words)
    assert not os.listdir(".")


def test_bad_choices(data, hub, capsys, monkeypatch):
    for more, words in [
        (["--backbone", "dinov2_vits15"], ["Cannot find callable dinov2_vits15"]),
        (["--backbone", "raises"], ["raises failed with RuntimeError: the weights are gone"]),
        (["--backbone", "exits"], ["exits failed with SystemExit: no licence"]),
        (["--backbone", "needs_package"], ["pip install a_package_that_is_missing"]),
        (["--backbone", "no_vit"], ["no_vit is no vision transformer"]),
        (["--layers", "0-3"], ["0-3 is empty or out of range", "0 to 2"]),
        (["--layers", "0-99999999"], ["out of range"]),
        (["--top-k", "21"], ["--top-k 21 is above the 20 validation images"]),
        (["--batch-size", "49"], ["--batch-size 49 is above 48 training images"]),
        (["--images-per-class", "1", "--batch-size", "5"], ["--batch-size 5 is above 4"]),
        (["--expansion", str(10**9)], ["not enough disk"]),
        (["--activation", "topk-129"], ["--activation topk-129", "128 latents"]),
        (["--hub", "nowhere"], ["nowhere is no folder with a hubconf.py"]),
        (["--hub", str(data)], ["is no folder with a hubconf.py"]),
    ]:
        refused(capsys, small_run(data, hub, *more), *words)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    refused(capsys, [*small_run(data, hub), "--device", "cuda"], "no GPU", "--device cpu")
    assert not os.path.exists("out")
    Path("out").write_text("mine")
    refused(capsys, small_run(data, hub), "out")
    assert Path("out").read_text() == "mine"


@pytest.mark.parametrize("text, words", [
    ("def (", "SyntaxError"), ("", "Cannot find callable"), ("raise SystemExit(3)", "SystemExit")])
def test_bad_hubs(data, tmp_path, capsys, text, words):
    (tmp_path / "hubconf.py").write_text(text)
    refused(capsys, small_run(data, tmp_path), words)


def test_backbones_that_fail_while_they_run(data, hub, capsys):
    refused(capsys, small_run(data, hub, "--backbone", "spoilt"), "layer 1, image ", "not finite")
    refused(capsys, small_run(data, hub, "--backbone", "fails"),
            "the backbone fails on images of 3 x 224 x 224 (The size of tensor")
    for path in data.rglob("*.png"):
        shutil.copy(data / f"val/{WNIDS[0]}/00.png", path) if path.name != "00.png" else None
    for path in data.rglob("00.png"):
        if WNIDS[0] not in str(path):
            shutil.copy(data / f"val/{WNIDS[0]}/01.png", path)
    shutil.copy(data / f"val/{WNIDS[0]}/01.png", data / f"train/{WNIDS[0]}/00.png")
    refused(capsys, small_run(data, hub, "--out", "same"), "layer 0: all class tokens are the same")


def test_bad_images_are_refused_or_left_out_if_asked(data, hub, capsys):
    run, bad = small_run(data, hub, "--layers", "last"), data / "train" / WNIDS[1] / "03.png"
    assert main([*run, "--out", "good"]) == 0
    bad.write_bytes(bad.read_bytes()[:200])
    refused(capsys, run, str(bad), "is no readable image", "--skip-bad-images")
    assert main([*run, "--skip-bad-images"]) == 0
    printed = capsys.readouterr().out
    assert "left out 1 images" in printed and str(bad) in printed
    good, kept = (np.load(f"{out}/tokens/train/layer_02.npy") for out in ("good", "out"))
    ids = np.load("out/tokens/train/ids.npy")
    assert len(kept) == len(ids) == len(np.load("out/tokens/train/labels.npy")) == 47
    np.testing.assert_allclose(kept, good[ids], atol=2e-3)
    (missing,) = set(range(48)) - set(ids.tolist())
    train = recording.images.find_images(str(data))[0]
    assert train.names[missing] == f"{WNIDS[1]}/03.png"
    assert json.loads(Path("out/results/results.json").read_text())["left_out"] == {"train": 1, "val": 0}
    for path in (data / "val").rglob("*.png"):
        path.write_text("x")
    refused(capsys, [*run, "--skip-bad-images", "--out", "none"], "none of the 20 images")
    bad.unlink()
    write_images(data / "train" / WNIDS[1], 12)
