"""The command: every data layout, every bad input, and a whole small run."""
import csv
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import reproduce
from conftest import WNIDS, make_quick, small_run, write_images
from reproduce import (
    DEMO_CLASSES, InputError, check_claims, consistency, demo_traits, draw, eval_transform, find_images, hypernym_rows, main,
    named_latents, parse_layers, read_image,
)
from sae import SparseAutoencoder
from taxonomy import Taxonomy


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Runs in an empty folder, without the user's ImageNet, with short probes."""
    make_quick(monkeypatch.setattr, figures=True)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("IMAGENET_DIR", raising=False)


# ---------------------------------------------------------------------------------------------------------------------
# data


def names_by_class(split, classes):
    return {wnid: sorted(n for n, label in zip(split.names, split.labels) if label == c) for c, wnid in enumerate(classes)}


def check_layout(root, train_count=12, val_count=5):
    train, val, classes, remarks = find_images(str(root), None)
    assert classes == WNIDS
    for split, count in [(train, train_count), (val, val_count)]:
        by_class = names_by_class(split, classes)
        assert {len(names) for names in by_class.values()} == {count}
        for wnid, names in by_class.items():  # the images of a class are the ones drawn for it
            for name in names:
                assert (split.root / name).is_file()
    assert len(set(train.labels[:12])) > 1  # in random order, as the activation buffer counts on
    assert find_images(str(root), None)[0].names == train.names
    return train, val, classes, remarks


def test_wnid_folders(data):
    train, val, classes, remarks = check_layout(data)
    assert all(name.startswith(classes[label]) for name, label in zip(val.names, val.labels)) and not remarks


def test_images_at_any_depth_and_other_files_left_alone(data):
    for wnid in WNIDS:
        folder = data / "train" / wnid
        (folder / "images/more").mkdir(parents=True)
        for i, path in enumerate(sorted(folder.glob("*.png"))):
            path.rename(folder / ("images" if i % 2 else "images/more") / path.name)
        (folder / "boxes.txt").write_text("a list")
        (folder / ".hidden.png").write_text("no image")
    (data / "train/.cache").mkdir()
    (data / "readme.txt").write_text("hello")
    check_layout(data)


def test_linked_class_folders(data, tmp_path):
    shutil.move(data / "train", tmp_path / "elsewhere")
    (data / "train").mkdir()
    for wnid in WNIDS:
        os.symlink(tmp_path / "elsewhere" / wnid, data / "train" / wnid)
    check_layout(data)


def flatten_val(data, wnid_folders, to):
    """Move val images into one flat folder; returns [(new name, wnid)]."""
    to.mkdir(parents=True, exist_ok=True)
    listed = []
    for wnid in WNIDS:
        for path in sorted((wnid_folders / wnid).iterdir()):
            name = f"val_{len(listed):04d}.png"
            listed.append((name, wnid))
            shutil.move(path, to / name)
        (wnid_folders / wnid).rmdir()
    return listed


def test_tiny_imagenets_own_layout(data):
    listed = flatten_val(data, data / "val", data / "val/images")
    (data / "val/val_annotations.txt").write_text("".join(f"{name}\t{wnid}\t0\t0\t9\t9\n" for name, wnid in listed))
    _, val, classes, _ = check_layout(data)
    assert {(os.path.basename(n), classes[c]) for n, c in zip(val.names, val.labels)} == set(listed)


def test_kaggles_layout(data, tmp_path):
    base = tmp_path / "kaggle/ILSVRC/Data/CLS-LOC"
    base.mkdir(parents=True)
    shutil.move(data / "train", base / "train")
    listed = flatten_val(data, data / "val", base / "val")
    rows = [f"{os.path.splitext(name)[0]},{wnid} 1 2 3 4 {wnid} 5 6 7 8\n" for name, wnid in reversed(listed)]
    (tmp_path / "kaggle/LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(rows))
    for root in (tmp_path / "kaggle", base):
        _, val, classes, _ = check_layout(root)
        assert {(n, classes[c]) for n, c in zip(val.names, val.labels)} == set(listed)


@pytest.mark.parametrize("inside_train", [True, False])
def test_no_val(data, inside_train):
    shutil.rmtree(data / "val")
    root = data if inside_train else data / "train"
    train, val, classes, remarks = check_layout(root, train_count=11, val_count=1)
    assert "10% of each class is held out" in remarks[0]
    assert not set(train.names) & set(val.names) and len(set(train.names) | set(val.names)) == 48


def test_images_per_class(data):
    train, val, classes, _ = find_images(str(data), 3)
    assert {len(names) for names in names_by_class(train, classes).values()} == {3} and len(val) == 20


def test_images_of_any_mode(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    rgb = Image.fromarray(pixels)
    sixteen = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
    palette = rgb.quantize(16)
    alpha = rgb.copy()
    alpha.putalpha(128)
    for name, image, options in [
        ("rgb.png", rgb, {}), ("grey.jpg", rgb.convert("L"), {}), ("cmyk.jpg", rgb.convert("CMYK"), {}),
        ("palette.png", palette, {"transparency": 3}), ("palette.gif", palette, {}), ("alpha.png", alpha, {}),
        ("grey_alpha.png", alpha.convert("LA"), {}), ("bits.png", rgb.convert("1"), {}), ("sixteen.png", sixteen, {}),
    ]:
        image.save(tmp_path / name, **options)
        read = read_image(tmp_path / name)
        assert read.mode == "RGB" and read.size == (24, 20)
        assert eval_transform()(read).shape == (3, 224, 224)
    assert np.abs(np.asarray(read_image(tmp_path / "sixteen.png")).astype(int)[..., 0] - np.asarray(rgb.convert("L"))).max() <= 1


# ---------------------------------------------------------------------------------------------------------------------
# the demo


def test_every_node_of_the_demo_has_a_trait_that_its_classes_inherit():
    tree = Taxonomy.from_wnids(DEMO_CLASSES)
    traits = demo_traits(tree).numpy()
    assert len({tuple(row) for row in traits.tolist()}) == len(DEMO_CLASSES) == 30
    kinds = range(traits.shape[1])
    for v in tree.hypernyms:
        below = tree.leaves[v]
        if below.all():
            continue
        shared = [kind for kind in kinds if len(set(traits[below, kind])) == 1 and traits[below, kind][0] >= 0]
        assert any(traits[below, kind][0] not in traits[~below, kind] for kind in shared) or len(shared) >= 2


def test_the_demos_object_lies_where_it_is_said_to_lie():
    traits = demo_traits(Taxonomy.from_wnids(DEMO_CLASSES))
    images, inside = draw(traits, torch.Generator().manual_seed(0))
    again, _ = draw(traits, torch.Generator().manual_seed(0))
    assert torch.equal(images, again) and images.dtype == torch.uint8
    assert 0.05 < inside.float().mean() < 0.5
    for image, mask in zip(images.float(), inside):  # the ground is one colour under noise, the object is another
        assert image[:, ~mask].std(1).max() < 0.6 * image[:, mask].std(1).max() or (
            (image[:, mask].mean(1) - image[:, ~mask].mean(1)).abs().max() > 30
        )


# ---------------------------------------------------------------------------------------------------------------------
# a whole run


def reproduce_here(data, hub, *more):
    return main(small_run(data, hub, "--epochs", "2", *more))


def read_csv(name):
    with open(f"out/results/{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_whole_run(data, hub, capsys):
    assert reproduce_here(data, hub) == 0
    layers, hierarchy, claims = (read_csv(name) for name in ("layers", "hierarchy", "claims"))
    assert [row["layer"] for row in layers] == ["0", "1", "2"]
    assert list(layers[0]) == "layer width gamma probe_top1 nmse fvu l0 dead".split()
    assert list(hierarchy[0]) == (
        "layer dictionary labels alive lch_height lch_height_pairwise coverage match hypernyms_lch hypernyms_matched".split()
    )
    assert [(row["dictionary"], row["labels"]) for row in hierarchy[:4]] == [
        ("sae", "true"), ("sae", "shuffled"), ("neurons", "true"), ("untrained", "true"),
    ]
    assert list(claims[0]) == "claim statistic value p_value verdict".split()
    results = json.loads(open("out/results/results.json").read())
    assert results["settings"]["seed"] == 0 and results["settings"]["backbone"] == "small_vit" and results["versions"]["torch"]
    assert float(layers[1]["fvu"]) == results["layers"][1]["fvu"]
    assert list(read_csv("hypernyms")[0]) == "wnid name classes height emergence_layer best_layer best_latent match lch".split()
    assert [(row["layer_a"], row["layer_b"]) for row in read_csv("consistency")] == [("0", "1"), ("0", "2"), ("1", "2")]
    for name in ("tables.md", "report.html", *(f"figures/{name}.png" for name in ("layers", "hierarchy", "consistency", "emergence"))):
        assert os.path.getsize(f"out/results/{name}") > 500
    printed = capsys.readouterr().out
    assert "## Layers" in printed and "out/results" in printed

    # the SAE's statistics are the train split's, and it takes raw tokens
    (folder,) = [path for path in os.scandir("out/saes")]
    sae = SparseAutoencoder.from_pretrained(os.path.join(folder.path, "layer_01"))
    train, val = (np.load(f"out/tokens/{split}/layer_01.npy").astype(np.float64) for split in ("train", "val"))
    np.testing.assert_allclose(sae.shift.numpy(), train.mean(0), rtol=1e-5, atol=1e-6)
    assert np.abs(val.mean(0) - train.mean(0)).max() > 1e-4
    np.testing.assert_allclose(sae.scale.item(), np.sqrt(((train - train.mean(0)) ** 2).sum(1).mean()), rtol=1e-5)
    x = torch.from_numpy(val).float()
    with torch.inference_mode():
        fvu = ((sae(x)[0] - x) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert float(layers[1]["fvu"]) == pytest.approx(float(fvu), rel=1e-4)


@pytest.mark.parametrize("more", [[], ["--layers", "1", "--images-per-class", "7", "--expansion", "3"]])
@pytest.mark.usefixtures("quick")
def test_the_plan_is_what_is_written(data, hub, capsys, monkeypatch, more):
    assert reproduce_here(data, hub, "--plan", *more) == 0
    table = capsys.readouterr().out
    assert os.listdir(".") == [] and "time here" in table and "peak memory: " in table
    works, plan = [], reproduce.plan
    monkeypatch.setattr(reproduce, "plan", lambda *of: works.append(plan(*of)) or works[-1])
    assert reproduce_here(data, hub, *more) == 0
    tokens, saes = works[0][:2]
    written = lambda pattern: sum(path.stat().st_size for path in Path("out").glob(pattern))
    assert (tokens.written, saes.written) == (written("tokens/*/*.npy"), written("saes/*/*/model.safetensors"))
    assert reproduce.size(tokens.written) in table and reproduce.size(saes.written) in table
    # by hand: a ViT of 3 blocks of width 16 on 4 x 4 patches of 56 x 56 and a class token
    N, n, M = 17, 16, 16 * 3 * 56 * 56
    an_image = 2 * (16 * M + 3 * (12 * n * n * N + 2 * N * N * n) + 2 * n)
    images = len(np.load("out/tokens/train/ids.npy")) + 20
    assert tokens.flop == pytest.approx(an_image * images, rel=0.011)  # some versions of PyTorch leave out attention on a CPU: 1.07%


def snapshot(folder):
    return {os.path.join(at, f): os.stat(os.path.join(at, f)).st_mtime_ns for at, _, files in os.walk(folder) for f in files if f != "lock"}


@pytest.mark.usefixtures("quick")
def test_no_work_is_done_twice(data, hub, monkeypatch):
    assert reproduce_here(data, hub, "--layers", "0,2") == 0
    tokens, saes, tables = snapshot("out/tokens"), snapshot("out/saes"), open("out/results/tables.md").read()
    with monkeypatch.context() as patch:
        patch.setattr(reproduce, "record_share", None)
        patch.setattr(reproduce, "train_together", None)
        patch.setattr(reproduce, "profile_latents", None)
        assert reproduce_here(data, hub, "--layers", "0,2") == 0
        assert (snapshot("out/tokens"), snapshot("out/saes")) == (tokens, saes)
        assert open("out/results/tables.md").read() == tables

    with monkeypatch.context() as patch:  # other scores need neither tokens nor training
        patch.setattr(reproduce, "record_share", None)
        patch.setattr(reproduce, "train_together", None)
        assert reproduce_here(data, hub, "--layers", "0,2", "--response-rate", "0.9") == 0
        assert snapshot("out/tokens") == tokens and snapshot("out/saes") != saes
    assert reproduce_here(data, hub, "--layers", "0,2", "--l1", "0.3") == 0  # other SAEs need no tokens, and lie beside the old
    assert snapshot("out/tokens") == tokens and len(os.listdir("out/saes")) == 2
    assert reproduce_here(data, hub, "--layers", "all") == 0  # another layer keeps those there are
    assert tokens.items() <= {k: v for k, v in snapshot("out/tokens").items() if "layer_0" in k}.items() | tokens.items()
    assert [row["layer"] for row in read_csv("layers")] == ["0", "1", "2"]


def test_one_layer_and_two_classes(data, hub):
    for wnid in WNIDS[2:]:
        for split in ("train", "val"):
            shutil.rmtree(data / split / wnid)
    assert reproduce_here(data, hub, "--layers", "last") == 0
    assert read_csv("consistency") == read_csv("hypernyms") == []  # no pair of layers; no hypernym of at most half
    assert [row["layer"] for row in read_csv("layers")] == ["2"] and {row["verdict"] for row in read_csv("claims")} == {"open"}
    assert os.path.getsize("out/results/report.html") > 10_000


@pytest.mark.usefixtures("quick")
def test_raw_inputs(data, hub):
    assert reproduce_here(data, hub, "--inputs", "raw") == 0
    (folder,) = os.listdir("out/saes")
    assert "inputs-raw" in folder
    assert SparseAutoencoder.from_pretrained(f"out/saes/{folder}/layer_00").shift.abs().max() == 0


def test_parse_layers():
    assert parse_layers("all", 4) == [0, 1, 2, 3] and parse_layers("last", 4) == [3]
    assert parse_layers("0-2", 4) == [0, 1, 2] and parse_layers("3,1,1-2", 4) == [1, 2, 3]
    with pytest.raises(InputError, match="the range 3-1 is empty"):
        parse_layers("3-1", 4)


def test_verdicts_follow_from_the_numbers():
    def claims(depth, slope):
        layers = [{"layer": i, "probe_top1": 0.1 * slope * i, "nmse": 0.1, "l0": -slope * i} for i in range(depth)]
        rows = [
            {"dictionary": "sae", "labels": labels, "layer": i, "lch_height_pairwise": 5 - slope * i * (labels == "true"),
             "hypernyms_lch": slope * i * (labels == "true"), "hypernyms_matched": slope * i * (labels == "true")}
            for i in range(depth) for labels in ("true", "shuffled")
        ]
        agreement = 1 - 0.1 * slope * np.abs(np.subtract.outer(np.arange(depth), np.arange(depth)))
        emerged = [{"height": 20 - i, "emergence_layer": slope * i} for i in range(depth)] + [{"height": 0, "emergence_layer": None}]
        return [(row["verdict"], row["p_value"]) for row in check_claims(layers, rows, agreement, emerged)]

    assert [verdict for verdict, _ in claims(7, 1)] == ["holds", "open", "contradicted"] + ["holds"] * 8
    assert claims(6, 1)[0][1] == pytest.approx(1 / 720)
    assert [verdict for verdict, _ in claims(7, -1)] == ["contradicted", "open", "holds"] + ["contradicted"] * 8
    assert {verdict for verdict, _ in claims(3, 1)} == {"open"}  # too few layers to tell


# ---------------------------------------------------------------------------------------------------------------------
# hypernyms, consistency, report


@pytest.fixture
def three_layers():
    """A small taxonomy, and scores as stage 3 keeps them: toy dog is matched from layer 4 on, domestic animal in 2 and 6."""
    tree = Taxonomy.from_wnids(["n02085620", "n02085782", "n02123045", "n02690373", "n02701002", "n01440764"])
    dog, domestic = (tree.wnids[tree.names.index(name)] for name in ("toy_dog.n.01", "domestic_animal.n.01"))
    matches = {2: {domestic: 0.6}, 4: {dog: 0.7, domestic: 0.5}, 6: {dog: 0.9, domestic: 0.8}}
    scores = [
        {"layers": {"layer": layer}, "hypernyms": {"shuffled": {}, "true": {
            wnid: {"match": match, "latent": 10 * layer, "lch": dog, "coverage": 1.0, "top_images": [0]} for wnid, match in found.items()
        }}}
        for layer, found in matches.items()
    ]
    return tree, scores


def test_emergence(three_layers):
    rows = {row["name"]: row for row in hypernym_rows(three_layers[1], three_layers[0])}
    dog, domestic = rows["toy_dog.n.01"], rows["domestic_animal.n.01"]
    assert (dog["emergence_layer"], dog["best_layer"], dog["best_latent"], dog["match"], dog["classes"]) == (4, 6, 60, 0.9, 2)
    assert (domestic["emergence_layer"], domestic["match"], domestic["lch"]) == (2, 0.8, "toy_dog.n.01")
    never = [row for row in rows.values() if row["emergence_layer"] is None]
    assert len(never) == len(rows) - 2 and all(row["match"] == 0 and row["best_layer"] is None for row in never)
    assert all(2 <= row["classes"] <= 3 for row in rows.values())  # at most half of six
    assert [row["name"] for row in named_latents(list(rows.values()))] == ["domestic_animal.n.01"]  # one picture of one latent


def test_consistency_is_the_jaccard_of_what_is_matched(three_layers):
    agreement = consistency(three_layers[1], "true")
    assert agreement.tolist() == [[1, 0, 0.5], [0, 1, 0.5], [0.5, 0.5, 1]]  # at exactly 0.5 nothing is matched
    assert np.isnan(consistency(three_layers[1], "shuffled")).all()


def test_report_is_one_safe_file(data, hub, tmp_path):
    tricky = tmp_path / "<b>'\"&\udcff\n.d"
    data.rename(tricky)
    assert reproduce_here(tricky, hub) == 0
    report = open("out/results/report.html").read()
    assert "<b>'" not in report and "&lt;b&gt;" in report
    sources = re.findall(r"(?:src|href|url|@import)[=( ]*[\"']?([^\"' >)]*)", report)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<script" not in report and "http" not in re.sub("data:image/png;base64,[^\"]*", "", report)
    images = re.findall("<img [^>]*>", report)
    assert len(images) >= 4 and all(re.search('alt="[^"]{20,}"', image) for image in images)
    position = [report.index(heading) for heading in ("What was run", ">Claims<", ">Figures<", ">Named latents<", ">Layers<", ">Hypernyms<")]
    assert position == sorted(position)


# ---------------------------------------------------------------------------------------------------------------------
# bad input: one clear sentence, exit code 2, no traceback, and nothing written


def refused(capsys, arguments, *words):
    capsys.readouterr()
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse's
        code = stop.code
    said = capsys.readouterr().err
    message = [line for line in said.splitlines() if "error: " in line]
    assert code == 2 and len(message) == 1 and "Traceback" not in said, said
    for word in words:
        assert word in message[0]


@pytest.mark.parametrize("arguments, words", [
    (["--data", "nowhere"], ["--data nowhere: no such folder"]),
    (["--l1", "-1"], ["--l1", "-1 is not a number at least 0"]),
    (["--l1", "nan"], ["--l1"]),
    (["--l1", "inf"], ["--l1"]),
    (["--lr", "0"], ["--lr", "above 0"]),
    (["--lr", "2"], ["--lr", "at most 1"]),
    (["--epochs", "0"], ["--epochs"]),
    (["--epochs", "1.5"], ["--epochs", "whole number"]),
    (["--batch-size", "0"], ["--batch-size"]),
    (["--expansion", "0"], ["--expansion"]),
    (["--response-rate", "1.2"], ["--response-rate"]),
    (["--top-k", "1"], ["--top-k"]),
    (["--images-per-class", "0"], ["--images-per-class"]),
    (["--layers", "first"], ["--layers first", "0-11"]),
    (["--layers", "1-"], ["--layers 1-"]),
    (["--inputs", "white"], ["--inputs", "centred"]),
    (["--backbone", "dinov2_vits14"], ["--backbone", "--data"]),
])
def test_bad_settings(capsys, arguments, words):
    refused(capsys, arguments, *words)
    assert not os.listdir(".")


def test_bad_data(capsys, data, hub, tmp_path):
    def check(*words, **more):
        refused(capsys, ["--data", data, "--hub", hub, "--backbone", "small_vit", "--out", "out"], *words)

    (data / "train/dogs").mkdir()
    check("train/dogs is no class", "wnid")
    (data / "train/dogs").rename(data / "train/n00000002")
    check("train/n00000002 holds no images")
    write_images(data / "train/n00000002", 2)
    check("class n00000002 is in train but not in val")
    write_images(data / "val/n00000002", 2)
    check("n00000002" if "NLTK_DATA" in os.environ else "WordNet")
    for split in ("train", "val"):
        shutil.rmtree(data / split / "n00000002")
        for wnid in WNIDS[1:]:
            shutil.rmtree(data / split / wnid)
    check("1 class folders", "at least two")
    shutil.rmtree(data / "train")
    check("a val folder but no train folder")
    assert not os.path.exists("out")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("content", [b"", b"this is text", None])
def test_bad_images(capsys, data, hub, content):
    bad = data / "train" / WNIDS[1] / "03.png"
    bad.write_bytes(bad.read_bytes()[:200] if content is None else content)
    run = ["--data", data, "--hub", hub, "--backbone", "small_vit", "--out", "out", "--top-k", "4", "--epochs", "2"]
    refused(capsys, run, str(bad), "--skip-bad-images")
    if content is not None:
        return
    assert main([*map(str, run), "--skip-bad-images"]) == 0
    printed = capsys.readouterr().out
    assert "left out 1 images" in printed and str(bad) in printed
    assert len(np.load("out/tokens/train/labels.npy")) == len(np.load("out/tokens/train/layer_00.npy")) == 47


def test_bad_choices(capsys, data, hub, monkeypatch):
    run = ["--data", data, "--hub", hub, "--out", "out"]
    refused(capsys, [*run, "--backbone", "dinov2_vits15"], "dinov2_vits15", "it has", "small_vit")
    run += ["--backbone", "small_vit"]
    refused(capsys, [*run, "--layers", "0-3"], "layer 3 is out of range", "0 to 2")
    refused(capsys, [*run, "--top-k", "21"], "--top-k 21 is above the number of validation images, 20")
    refused(capsys, [*run, "--batch-size", "49"], "--batch-size 49 is above the number of training images, 48")
    refused(capsys, [*run[:2], "--hub", "nowhere", *run[4:]], "--hub nowhere: no such folder")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(capsys, [*run, "--device", "cuda"], "no GPU", "--device cpu")
    with monkeypatch.context() as patch:
        patch.setattr(reproduce.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10_000))
        refused(capsys, run, "not enough disk", "10 kB", "--out")
    assert not os.path.exists("out")


@pytest.mark.usefixtures("quick")
def test_folder_of_other_settings(capsys, data, hub):
    assert reproduce_here(data, hub) == 0
    before = snapshot("out")
    run = ["--data", data, "--hub", hub, "--backbone", "small_vit", "--out", "out", "--top-k", "4", "--epochs", "2"]
    refused(capsys, [*run, "--images-per-class", "5"], "made with other settings", "train images was 48 and is now 20", "--out")
    (data / "val" / WNIDS[0] / "00.png").write_bytes((data / "val" / WNIDS[1] / "01.png").read_bytes() + b"1")
    refused(capsys, run, "made with other settings", "fingerprint of images was")
    assert snapshot("out") == before


def test_out_of_gpu_memory(capsys, data, hub, monkeypatch):
    def full(*arguments, **more):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(reproduce, "train_saes", full)
    refused(capsys, ["--data", data, "--hub", hub, "--backbone", "small_vit", "--out", "out", "--top-k", "4"],
            "out of memory", "--batch-size", "--device cpu")
    assert len(np.load("out/tokens/train/layer_02.npy")) == 48


@pytest.mark.usefixtures("quick")
def test_a_layer_without_a_living_latent_is_a_gap_and_no_error(data, hub):
    assert reproduce_here(data, hub, "--inputs", "raw", "--l1", "1000", "--lr", "0.1", "--epochs", "50") == 0
    first = open("out/results/hierarchy.csv").read()
    rows = [row for row in read_csv("hierarchy") if row["dictionary"] == "sae"]
    assert any(row["alive"] == "0" and row["match"] == "" for row in rows)
    assert reproduce_here(data, hub, "--inputs", "raw", "--l1", "1000", "--lr", "0.1", "--epochs", "50") == 0
    assert open("out/results/hierarchy.csv").read() == first
