"""Killed, resumed, damaged, out of room, out of date, and given all kinds of bad input: the right result, or one sentence.

`python tests/survival.py` does it at length, with SIGKILL and a disk that is full."""
import io
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from safetensors.torch import load_file

import reproduce
import taxonomy
from conftest import WNIDS, copied, results, same_sae, small_run, write_images
from dinov2_hooks import GrowingArray, checksum
from reproduce import InputError, main, parse_layers
from sae import ActivationBuffer, Training, train_sae
from taxonomy import Synset, Taxonomy
from test_reproduce import elsewhere, refused, snapshot  # noqa: F401
from test_taxonomy import check_against_brute_force

pytestmark = pytest.mark.usefixtures("quick")
resource = pytest.importorskip("resource", reason="no POSIX system")
MOVED = ("data", "hub")  # settings that name another place with the same in it
few = settings(max_examples=25, deadline=None)  # hypothesis' own examples for each property


# ---------------------------------------------------------------------------------------------------------------------
# killed and resumed


class Killed(BaseException):
    """Past every handler of the code under test, as a SIGKILL is."""


@pytest.mark.parametrize("writes", [2, 5])  # an SAE is a folder and, in it, a record: two
def test_killed_after_every_few_writes(data, hub, monkeypatch, capsys, writes):
    monkeypatch.setattr(reproduce, "COMMIT_SECONDS", 0)
    monkeypatch.setattr(reproduce, "IMAGES_PER_STEP", 8)
    run = small_run(data, hub, "--layers", "0,2")
    assert main(run) == 0
    expected, whole, kills = results(aside=MOVED), reproduce.whole, 0
    shutil.rmtree("out")
    while True:
        count = itertools.count()

        def counted(path):
            if next(count) == writes:
                raise Killed
            return whole(path)

        with monkeypatch.context() as patch:
            patch.setattr(reproduce, "whole", counted)
            try:
                assert main(run) == 0
                break
            except Killed:
                kills += 1
    assert kills >= 20 // writes and "anew" not in capsys.readouterr().out  # nothing that was committed is thrown away
    assert results(aside=MOVED) == expected
    assert not [*Path("out").rglob("*.part"), *Path("out").rglob("*.npz"), *Path("out").rglob("pass.json")]


def test_no_committed_work_is_done_again(data, hub, monkeypatch):
    monkeypatch.setattr(reproduce, "COMMIT_SECONDS", 0)
    monkeypatch.setattr(reproduce, "IMAGES_PER_STEP", 8)
    seen, read_image = [], reproduce.read_image
    monkeypatch.setattr(reproduce, "WORKERS", 0)  # images are then read in this process

    def counted(path):
        seen.append(path.parent.parent.name)
        if len(seen) == 30:
            raise Killed
        return read_image(path)

    counted.__wrapped__ = read_image  # inspect.getsource follows it: the code's hash stays
    monkeypatch.setattr(reproduce, "read_image", counted)
    with pytest.raises(Killed):
        main(small_run(data, hub))
    assert main(small_run(data, hub)) == 0
    assert seen.count("train") == 48 + 6  # the five images of the batch of eight that was under way, and the one at fault


@few
@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.data())
def test_a_growing_array_resumes_anywhere(tmp_path_factory, pieces, drawn):
    folder, rng = tmp_path_factory.mktemp("array"), np.random.default_rng(len(pieces))
    rows = rng.normal(size=(sum(pieces), 3)).astype(np.float16)
    file, at, done = GrowingArray(folder / "rows.npy", np.float16, (3,)), 0, (0, 0)
    for piece in pieces:
        file.append(rows[at : at + piece])
        at += piece
        what = drawn.draw(st.sampled_from(["go on", "commit", "kill"]))
        if what == "commit":
            done = file.sync()
        elif what == "kill":
            file.file.close()
            file, at = GrowingArray(folder / "rows.npy", np.float16, (3,), *done), done[0]
    file.append(rows[at:])
    file.sync()
    assert file.finish() == checksum(folder / "rows.npy")
    np.save(folder / "expected.npy", rows)
    assert (folder / "rows.npy").read_bytes() == (folder / "expected.npy").read_bytes()


@few
@given(st.integers(1, 6), st.integers(1, 5), st.sampled_from([16, 33, 60]), st.sampled_from(["centred", "raw"]))
def test_training_resumes_anywhere(tmp_path_factory, epochs, stop, batch_size, inputs):
    path = tmp_path_factory.mktemp("tokens") / "layer.npy"
    np.save(path, np.random.default_rng(0).normal(size=(60, 4)).astype(np.float16))
    training, states = Training(epochs=epochs, batch_size=batch_size, inputs=inputs), [None]
    at_once = train_sae(ActivationBuffer(path), training, checkpoint=lambda state: states.append(copied(state)))
    resumed = train_sae(ActivationBuffer(path), training, resume=states[stop % len(states)])
    assert same_sae(at_once, resumed)


# ---------------------------------------------------------------------------------------------------------------------
# never stale, never false


@pytest.fixture(scope="module")
def finished():
    """Where copies of finished runs of one layer are kept, by their arguments."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture
def done(data, hub, finished):
    """A finished run of one layer; its (arguments, results)."""
    run = small_run(data, hub, "--layers", "1")
    if (finished / "out").is_dir():  # of images drawn alike, elsewhere
        shutil.copytree(finished / "out", "out")
    else:
        assert main(run) == 0
        shutil.copytree("out", finished / "out")
    return run, results(aside=MOVED)


def flip(path, place=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 4
    path.write_bytes(content)


SAE = "saes/*/layer_01/"


def cut(path):
    os.truncate(path, path.stat().st_size - 3)


@pytest.mark.parametrize("damage", [flip, cut, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "sae.json", "scores.json"])
def test_damaged_saes_and_scores_are_made_again(done, capsys, name, damage):
    run, expected = done
    (path,) = Path("out").glob(SAE + name)
    damage(path)
    capsys.readouterr()
    assert main(run) == 0
    assert f"{name} is damaged: it is made again" in capsys.readouterr().out
    assert results(aside=MOVED) == expected


@pytest.mark.parametrize("name", ["train/layer_01.npy", "val/layer_01.npy", "train/labels.npy", "val/ids.npy"])
@pytest.mark.parametrize("place", [0.0, 0.02, 0.5, 0.999])
def test_damaged_tokens_are_refused_by_name_and_recorded_anew_once_deleted(done, capsys, name, place):
    run, expected = done
    flip(Path("out/tokens") / name, place)
    shutil.rmtree("out/saes")
    refused(capsys, run, f"out/tokens/{name} is damaged: delete it, and the same command records it anew")
    Path("out/tokens", name).unlink()
    assert main(run) == 0 and results(aside=MOVED) == expected


def test_damaged_record_of_tokens_is_refused(done, capsys):
    flip(Path("out/tokens/tokens.json"))
    refused(capsys, done[0], "out/tokens/tokens.json is damaged", "give another --out, or delete it")


@few
@given(st.floats(0, 0.9999), st.booleans())
def test_a_damaged_training_state_is_never_used(tmp_path_factory, place, cut):
    path = tmp_path_factory.mktemp("state") / "state.npz"
    states = {"W": torch.arange(12.0).view(3, 4), "step": torch.tensor([7, 7, 7])}
    layers = {f"layer_0{i}": {"seed": 0, "layer": i} for i in range(3)}
    last_two = {name: layers[name] for name in ("layer_01", "layer_02")}
    equal = lambda read, rows: read.keys() == states.keys() and all((read[name] == states[name][rows]).all() for name in states)
    reproduce.write_states(path, layers, states)
    assert equal(reproduce.read_states(path, layers), slice(None))
    assert equal(reproduce.read_states(path, last_two), slice(1, None))
    assert reproduce.read_states(path, {"layer_01": {"seed": 1, "layer": 1}}) is None
    assert reproduce.read_states(path, layers | {"layer_03": {"seed": 0, "layer": 3}}) is None
    flip(path, place) if not cut else os.truncate(path, int(place * path.stat().st_size))
    try:
        read = reproduce.read_states(path, layers)
    except (TypeError, AttributeError, IndexError, struct.error) as error:
        pytest.fail(f"{type(error).__name__}: {error}")
    assert read is None or equal(read, slice(None))  # a flip in padding or a time stamp


def test_weights_are_never_unpickled(done):
    class Trap:
        def __reduce__(self):
            return os.mkdir, ("sprung",)

    run, expected = done
    (path,) = Path("out").glob(SAE + "model.safetensors")
    path.write_bytes(pickle.dumps(Trap()))
    (path.parent / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    assert main(run) == 0 and results(aside=MOVED) == expected and not os.path.exists("sprung")


def rewrite(hub, change):
    (hub / "hubconf.py").write_text(change((hub / "hubconf.py").read_text()))


@pytest.mark.parametrize("change, words", [
    (lambda data, hub: (data / f"val/{WNIDS[0]}/00.png").rename(data / f"val/{WNIDS[0]}/0.png"), "fingerprint of images"),
    (lambda data, hub: write_images(data / "train" / WNIDS[0], 13), "train images was 48 and is now 49"),
    (lambda data, hub: rewrite(hub, lambda code: code.replace("manual_seed(0)", "manual_seed(1)")), "weights was"),
    (lambda data, hub: rewrite(hub, lambda code: code + (
        "class Other(SmallViT):\n    pass\nthe_old = small_vit\n"
        "def small_vit():\n    vit = the_old()\n    vit.__class__ = Other\n    return vit\n"
    )), "backbone_code was"),
])
def test_tokens_of_other_images_or_another_backbone_are_refused(done, capsys, data, hub, tmp_path, change, words):
    own = shutil.copytree(hub, tmp_path / "own_hub")
    assert main([*done[0], "--hub", str(own)]) == 0  # where a hub lies does not matter
    change(data, own)
    before = snapshot("out")
    refused(capsys, [*done[0], "--hub", str(own)], "made with other settings", words, "give another --out, or delete it")
    assert snapshot("out") == before


def test_other_code_makes_it_again_and_says_so(done, capsys, monkeypatch):
    code_of = reproduce.code_of
    for module, words in [("metrics", "scores.json"), ("sae", "layer_01")]:
        monkeypatch.setattr(reproduce, "code_of", lambda *parts: "changed" if parts[0] == module else code_of(*parts))
        capsys.readouterr()
        assert main(done[0]) == 0
        printed = capsys.readouterr().out
        assert "(code was" in printed and "made again" in printed
        assert results(aside=MOVED) == done[1]


def test_comments_are_no_code():
    def hashed(text):
        Path("some_module.py").write_text(text)
        reproduce.sys.modules["some_module"] = module = type(os)("some_module")
        module.__file__ = str(Path("some_module.py").resolve())
        import linecache
        linecache.clearcache()
        return reproduce.code_of("some_module")

    plain = hashed("def f(x):\n    if x:\n        x = 1\n    return x\n")
    assert plain == hashed("# a word\ndef f(x):  # more\n    if x:\n\n        x = 1\n    # ...\n    return x\n")
    assert plain != hashed("def f(x):\n    if x:\n        x = 1\n        return x\n")
    assert plain != hashed("def f(x):\n    if x:\n        x = 2\n    return x\n")


def hold(folder, held, release):
    with reproduce.held(Path(folder)):
        held.set()
        release.wait(30)


def test_the_second_run_says_who_holds_the_folder(data, hub, capsys):
    spawn = multiprocessing.get_context("spawn")
    held, release = spawn.Event(), spawn.Event()
    holder = spawn.Process(target=hold, args=("out", held, release))
    holder.start()
    assert held.wait(60)
    words = f"out is in use by process {holder.pid} on ", "wait for it to end, or give another --out"
    refused(capsys, small_run(data, hub), *words)
    holder.kill()  # the lock goes with the process
    holder.join()
    assert main(small_run(data, hub, "--layers", "1")) == 0


@pytest.mark.parametrize("limit", [300, 2500, 9_000, 60_000])
def test_a_file_size_limit_is_told_with_what_is_needed_and_resumed_from(done, capsys, monkeypatch, limit):
    """What a full disk does, to files of any stage: 300 bytes stop the tokens, 60 kB the figures."""
    monkeypatch.setattr(reproduce, "WORKERS", 0)  # they pass images on in files of shared memory
    run, expected = done
    shutil.rmtree("out")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        words = " of class tokens" if limit == 300 else " of SAEs", "tables and figures", "goes on from here"
        refused(capsys, run, "the disk is full", *words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert main(run) == 0 and results(aside=MOVED) == expected


def test_a_run_writes_nowhere_else(data, hub, tmp_path):
    before = snapshot(tmp_path)
    assert main(small_run(data, hub, "--layers", "1")) == 0
    changed = {path for path, when in snapshot(tmp_path).items() if before.get(path) != when}
    assert changed and all(path.startswith(str(tmp_path / "work/out")) for path in changed)


# ---------------------------------------------------------------------------------------------------------------------
# bad input: each the right result, or one clear sentence and nothing half done


def image_of(size=(24, 20), seed=1):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def png_claiming(width, height):
    """A PNG of a few bytes that says it has so many pixels."""
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def encoded(image, **how):
    file = io.BytesIO()
    image.save(file, **how)
    return file.getvalue()


frames = [image_of(seed=seed) for seed in (1, 2, 3)]
ODD = {  # are images all the same
    "animated.gif": encoded(frames[0], format="GIF", save_all=True, append_images=frames[1:]),
    "animated.png": encoded(frames[0], format="PNG", save_all=True, append_images=frames[1:]),
    "animated.webp": encoded(frames[0], format="WEBP", save_all=True, append_images=frames[1:], lossless=True),
    "one_pixel.png": encoded(image_of((1, 1)), format="PNG"),
    "thin.png": encoded(image_of((1, 90)), format="PNG"),
    "jpeg_inside.png": encoded(image_of(), format="JPEG"),
    "float.tif": encoded(Image.fromarray(np.random.default_rng(0).random((20, 24), np.float32) * 255), format="TIFF"),
    "with spaces  .png": encoded(image_of(), format="PNG"),
    "quotes'\"`$(touch x);.png": encoded(image_of(), format="PNG"),
    "two\nlines.png": encoded(image_of(), format="PNG"),
    "<script>alert(1)<&.png": encoded(image_of(), format="PNG"),
    "Ünïcode 図.PNG": encoded(image_of(), format="PNG"),
    b"not utf-8 \xff\xfe.png": encoded(image_of(), format="PNG"),
    "%s %d {x} \\n.png": encoded(image_of(), format="PNG"),
}
NONE = {  # and what is said of each
    "bomb.png": (png_claiming(60_000, 60_000), "decompression bomb"),
    "liar.png": (png_claiming(5_000, 5_000), "is no readable image"),
    "no_pixels.png": (png_claiming(0, 0), "is no readable image"),
    "thread.png": (encoded(image_of((1, 3000)), format="PNG"), "1 x 3000 pixels"),
    "zeros.jpg": (b"\0" * 5000, "is no readable image"),
    "drawing.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no readable image"),
    "archive.png": (b"PK\x03\x04" + b"\0" * 100, "is no readable image"),
    "half.webp": (encoded(image_of((200, 200)), format="WEBP")[:300], "is no readable image"),
    "half.tif": (encoded(image_of((200, 200)), format="TIFF")[:300], "is no readable image"),
    "two\nlines.png": (b"text", "two lines.png is no readable image"),
    b"not utf-8 \xff.png": (b"text", "\\udcff.png is no readable image"),
}


def put(folder, name, content):
    with open(os.path.join(os.fsencode(folder), os.fsencode(name)), "wb") as file:
        file.write(content)


def test_odd_images_that_are_images(data, hub):
    for name, content in ODD.items():
        put(data / "val" / WNIDS[1], name, content)
    run = small_run(data, hub, "--layers", "last")
    assert main(run) == 0
    expected, split = results(aside=MOVED), reproduce.find_images(str(data), None)[1]
    tokens = np.load("out/tokens/val/layer_02.npy")
    assert len(tokens) == 20 + len(ODD) and not os.path.exists("x")
    rows = {os.path.basename(name): row.tobytes() for name, row in zip(split.names, tokens)}
    same = ["with spaces  .png", "two\nlines.png", "<script>alert(1)<&.png", "Ünïcode 図.PNG"]
    same.append(os.fsdecode(b"not utf-8 \xff\xfe.png"))
    assert len({rows[name] for name in same}) == 1  # one picture under many names
    assert rows["animated.png"] == rows["animated.webp"] == rows[same[0]]  # of several frames the first, which is that picture
    assert "<script" not in Path("out/results/report.html").read_text(encoding="utf-8")
    assert main(run) == 0 and results(aside=MOVED) == expected


@pytest.mark.parametrize("name", NONE)
def test_images_that_are_none(data, hub, capsys, name):
    content, words = NONE[name]
    put(data / "train" / WNIDS[1], name, content)
    refused(capsys, small_run(data, hub, "--layers", "last"), words, "--skip-bad-images")


def test_images_that_are_none_are_left_out_if_asked(data, hub, capsys):
    run = small_run(data, hub, "--layers", "last")
    assert main(run) == 0
    expected = results(aside=MOVED)[1]
    for name, (content, _) in NONE.items():
        put(data / "train" / WNIDS[1], name, content)
    assert main([*run, "--skip-bad-images", "--out", "skipped"]) == 0
    assert f"left out {len(NONE)} images" in capsys.readouterr().out
    assert json.loads(Path("skipped/results/results.json").read_text())["left_out"] == {"train": len(NONE), "val": 0}
    rows = lambda out: sorted(row.tobytes() for row in np.load(f"{out}/tokens/train/layer_02.npy"))
    assert rows("skipped") == rows("out") and len(expected) == 7


def test_folders_and_files_that_may_not_be_read_or_written(data, hub, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "WORKERS", 0)
    graph = taxonomy.read_graph(taxonomy.SHIPPED)  # where the kit's own folder may not be read either
    monkeypatch.setattr(taxonomy, "read_graph", lambda path: graph)
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is closed to all but its user
        data, hub = shutil.copytree(data, f"{folder}/data"), shutil.copytree(hub, f"{folder}/hub")
        monkeypatch.chdir(folder)
        run = small_run(data, hub, "--layers", "last")
        inside = [f"train/{WNIDS[0]}/more", f"val/{WNIDS[2]}", f"train/{WNIDS[1]}/03.png"]
        closed = [Path("."), *(Path(data, at) for at in inside)]
        closed[1].mkdir()  # os.walk would pass over it
        for at, _, files in os.walk(folder):
            for name in [".", *files]:
                os.chown(os.path.join(at, name), 65534, 65534) if os.geteuid() == 0 else None
        for path in closed:
            user, mode = os.geteuid(), path.stat().st_mode
            path.chmod(0o500 if path == Path(".") else 0)
            if user == 0:  # who may read everything
                os.seteuid(65534)
            try:
                refused(capsys, run, "Permission denied", path.name or "out")
            finally:
                os.seteuid(user)
                path.chmod(mode)
        assert main(run) == 0


def test_links_pipes_and_folders_among_the_images(data, hub, capsys):
    run, folder = small_run(data, hub, "--layers", "last"), data / "train" / WNIDS[0]
    for name, make, words in [
        ("loop.png", lambda path: os.symlink(path.name, path), "loop.png"),
        ("nowhere.png", lambda path: os.symlink("gone", path), "nowhere.png"),
        ("pipe.png", os.mkfifo, "pipe.png is no file"),
    ]:
        make(folder / name)
        refused(capsys, run, words)
        (folder / name).unlink()
    os.symlink("n01440764", data / "train/n01440764")  # a class that is a link to itself
    refused(capsys, run, "n01440764")
    (data / "train/n01440764").unlink()
    os.symlink("..", folder / "up")  # is not followed
    (folder / "folder.png").mkdir()
    os.symlink(folder / "00.png", folder / "link.png")
    assert main(run) == 0 and len(np.load("out/tokens/train/labels.npy")) == 49


def rename_class(data, new, splits=("train", "val")):
    for split in splits:
        (data / split / WNIDS[1]).rename(data / split / new)


def annotate(data, lines):
    for wnid in WNIDS:
        for path in (data / "val" / wnid).iterdir():
            path.rename(data / "val" / f"{wnid}_{path.name}")
        (data / "val" / wnid).rmdir()
    (data / "val/val_annotations.txt").write_bytes(lines)


EVERY_LINE = "".join(f"{wnid}_{i:02d}.png\t{wnid}\n" for wnid in WNIDS for i in range(5)).encode()


@pytest.mark.parametrize("change, words", [
    (lambda data: rename_class(data, "N02085620"), "N02085620 is no class"),
    (lambda data: rename_class(data, "n02085620 "), "n02085620  is no class"),
    (lambda data: rename_class(data, "n02085620\n"), "n02085620  is no class"),
    (lambda data: rename_class(data, "Chihuahua <b>"), "Chihuahua <b> is no class"),
    (lambda data: rename_class(data, "n02085782", ["val"]), "class n02085620 is in train but not in val"),
    (lambda data: shutil.copytree(data / "val" / WNIDS[0], data / "val/n01440764"), "class n01440764 is in val but not in train"),
    (lambda data: [shutil.rmtree(data / "val" / wnid) for wnid in WNIDS], "is in train but not in val"),
    (lambda data: [shutil.rmtree(data / "train" / wnid) for wnid in WNIDS], "0 class folders"),
    (lambda data: [shutil.rmtree(data / split) for split in ("train", "val")], "0 class folders"),
    (lambda data: [path.unlink() for path in (data / "val" / WNIDS[3]).iterdir()], "holds no images"),
    (lambda data: (shutil.rmtree(data), data.write_text("a file")), "no such folder"),
    (lambda data: annotate(data, EVERY_LINE + f"{WNIDS[0]}_00.png\t{WNIDS[1]}\n".encode()), f"two classes, {WNIDS[0]} and"),
    (lambda data: annotate(data, EVERY_LINE.partition(b"\n")[2]), "has no label in the list"),
    (lambda data: annotate(data, EVERY_LINE.replace(WNIDS[1].encode() + b"\n", b"n02085782\n")), "is in train but not in val"),
    (lambda data: annotate(data, b"no tabs here\n"), "val_annotations.txt is no list of validation labels"),
    (lambda data: annotate(data, b"\xff\xfe\x00"), "val_annotations.txt is no list of validation labels"),
    (lambda data: (annotate(data, b""), (data / "val/LOC_val_solution.csv").write_text("a,b\n1,2\n")), "csv is no list"),
    (lambda data: [image_of().save(path) for path in data.rglob("*.png")], "all class tokens are the same"),
    (lambda data: [path.write_text("x") for path in (data / "val").rglob("*.png")], "is no readable image"),
])
def test_bad_folders(data, hub, capsys, change, words):
    change(data)
    refused(capsys, small_run(data, hub, "--layers", "last"), words)
    assert not os.path.exists("out/results")


def test_no_image_of_a_split_decodes(data, hub, capsys):
    for path in (data / "val").rglob("*.png"):
        path.write_text("x")
    refused(capsys, small_run(data, hub, "--layers", "last", "--skip-bad-images"), "none of the 20 images", "decodes")


def test_one_image_a_class(data, hub, capsys):
    for path in data.rglob("*.png"):
        if path.name != "00.png":
            path.unlink()
    assert main(small_run(data, hub, "--layers", "last")) == 0
    assert len(np.load("out/tokens/train/labels.npy")) == len(np.load("out/tokens/val/labels.npy")) == 4
    shutil.rmtree(data / "val")
    refused(capsys, small_run(data, hub, "--out", "other"), "has one image, two are needed")


def test_a_class_above_another(data, hub, wordnet):
    rename_class(data, "n02084071")  # dog, and below it
    for split in ("train", "val"):
        shutil.copytree(data / split / WNIDS[0], data / split / "n02085620")  # Chihuahua
    assert main(small_run(data, hub, "--layers", "last")) == 0


@pytest.mark.parametrize("backbone, words", [
    ("raises", "raises failed with RuntimeError: the weights are gone"),
    ("no_vit", "--backbone no_vit is no vision transformer"),
    ("exits", "exits failed with SystemExit: no licence"),
    ("needs_package", "pip install a_package_that_is_missing"),
    ("spoilt", "layer 1, image "),
    ("fails", "the backbone fails on images of 3 x 224 x 224 (RuntimeError: The size of tensor"),
    ("", "has no such model"),
])
def test_bad_backbones(data, hub, capsys, backbone, words):
    refused(capsys, small_run(data, hub, "--backbone", backbone), words)
    assert not os.path.exists("out/saes")


@pytest.mark.parametrize("text, words", [("def (", "SyntaxError"), ("", "no such model"), ("raise SystemExit(3)", "SystemExit")])
def test_bad_hubs(data, tmp_path, capsys, text, words):
    refused(capsys, small_run(data, tmp_path), "has no hubconf.py")
    (tmp_path / "hubconf.py").write_text(text)
    refused(capsys, small_run(data, tmp_path), words)


def test_blocks_in_chunks_are_the_same_blocks(data, hub):
    assert main(small_run(data, hub)) == 0
    expected = results(aside=MOVED)[1]
    assert main(small_run(data, hub, "--backbone", "chunked_vit", "--out", "chunked")) == 0
    for path, content in expected.items():
        assert Path("chunked", path).read_bytes() == content


def test_an_sae_of_another_width_is_not_taken(done, capsys):
    run, expected = done
    (folder,) = Path("out").glob(SAE)
    assert main([*run, "--expansion", "2", "--out", "other"]) == 0
    (other,) = Path("other").glob(SAE)
    shutil.rmtree(folder)
    shutil.copytree(other, folder)
    capsys.readouterr()
    assert main(run) == 0 and results(aside=MOVED) == expected
    assert "expansion was 2 and is now 8" in capsys.readouterr().out
    (folder / "sae.json").unlink()  # a folder that says nothing of itself
    assert main(run) == 0 and results(aside=MOVED) == expected
    assert load_file(folder / "model.safetensors")["W_dec"].shape == (128, 16)


@pytest.mark.parametrize("more, words", [
    (["--layers", "0-99999999"], "layer 99999999 is out of range"),
    (["--layers", "9" * 5000], "--layers 9"),
    (["--seed", str(10**30)], "--seed"),
    (["--expansion", str(10**9)], "not enough disk"),
    (["--images-per-class", "1", "--batch-size", "5"], "--batch-size 5 is above the number of training images, 4"),
])
def test_numbers_out_of_all_bounds(data, hub, capsys, more, words):
    refused(capsys, small_run(data, hub, *more), words)
    assert not os.path.exists("out")


def test_an_output_folder_that_is_a_file(data, hub, capsys):
    Path("out").write_text("mine")
    refused(capsys, small_run(data, hub), "out")
    assert Path("out").read_text() == "mine"


# ---------------------------------------------------------------------------------------------------------------------
# properties


@few
@given(st.randoms(use_true_random=False), st.integers(2, 30), st.data())
def test_any_dag_against_brute_force(rng, size, drawn):
    wnids = [f"n{i:08d}" for i in drawn.draw(st.lists(st.integers(0, 99_999_999), min_size=size, max_size=size, unique=True))]
    graph = {wnids[0]: Synset("root.n.01", ())}
    for i in range(1, size):
        above = drawn.draw(st.sets(st.sampled_from(wnids[:i]), min_size=1, max_size=3))
        graph[wnids[i]] = Synset(f"node.n.{i}", tuple(sorted(above)))
    classes = drawn.draw(st.sets(st.sampled_from(wnids[1:]), min_size=min(9, size - 1), max_size=12))
    if len(classes) >= 8:
        check_against_brute_force(graph, classes, rng, sets=20)
    else:
        assert len(Taxonomy.from_graph(graph, classes).classes) == len(classes)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.none() | st.integers(0, 50)), min_size=1, max_size=6), st.integers(1, 60))
def test_any_list_of_layers(parts, depth):
    text = ",".join(str(first) if last is None else f"{first}-{last}" for first, last in parts)
    expected = {n for first, last in parts for n in range(first, (first if last is None else last) + 1)}
    if any(last is not None and last < first for first, last in parts) or max(expected, default=99) >= depth:
        with pytest.raises(InputError):
            parse_layers(text, depth)
    else:
        assert parse_layers(text, depth) == sorted(expected)


@settings(max_examples=300, deadline=None)
@given(st.text("0123456789-,allst ", max_size=8))
def test_any_text_for_layers(text):
    assert reproduce.main(["--layers", text, "--data", "nowhere"]) == 2 if accepted(text) else True


def accepted(text):
    try:
        reproduce.parse_settings([f"--layers={text}"])
        return all(n < 5 for n in parse_layers(text, 5))
    except (SystemExit, InputError):
        return False
