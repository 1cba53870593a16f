"""Every layout of images, every kind of image, and what is none of them: one sentence each."""

import io
import os
import shutil
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import WNIDS
from PIL import Image
from pytest import raises

from dinov2_hooks import eval_transform
from kit.data import Decoded, find_images, fingerprint, read_image, workers_for
from kit.files import InputError


def moved(data, to):
    """Val's images in one flat folder; returns [(name, wnid)]."""
    to.mkdir(parents=True, exist_ok=True)
    listed = []
    for path in sorted((data / "val").glob("n*/*"))[::-1]:  # the first is of the last class
        listed.append((f"val_{len(listed):04d}", path.parent.name))
        path.rename(to / f"{listed[-1][0]}.png")
    remove(data, "val/n*")
    return listed


def remove(data, *patterns):
    for path in [path for pattern in patterns for path in data.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def at_any_depth(data):
    for path in sorted((data / "train").glob("*/*.png")):
        folder = path.parent / ("images/more" if int(path.stem) % 2 else "images")
        folder.mkdir(parents=True, exist_ok=True)
        path.rename(folder / path.with_suffix(".jfif").name)
        (folder / "boxes.heic").touch()
        (folder / ".hidden.png").touch()
    (data / "train/stray.png").touch()
    (data / "readme.txt").touch()


def links(data):
    (data / "train").rename(data.parent / "elsewhere")
    for wnid in WNIDS:
        folder = data / "train" / wnid
        folder.parent.mkdir(exist_ok=True)
        folder.symlink_to(data.parent / "elsewhere" / wnid)
        (folder / "up").symlink_to("..")  # is not followed
        (folder / "folder.png").mkdir()


def copies(data):
    """In hidden and system folders, and of no class."""
    for wnid in WNIDS:
        for folder in (".ipynb_checkpoints", ".Trash-1000/files", "@eaDir", "__MACOSX"):
            shutil.copytree(data / "val" / wnid, data / "train" / wnid / folder)
    shutil.copytree(data / "val" / WNIDS[0], data / "train/Annotations")


def one_more_class_in_valid(data):
    shutil.copytree(data / "val" / WNIDS[0], data / "val/n01440764")
    (data / "val").rename(data / "valid")


def tiny_imagenet(data):
    lines = [f"{name}.png\t{wnid}\t0\t0\t9\t9\n" for name, wnid in moved(data, data / "val/images")]
    (data / "val/val_annotations.txt").write_text("".join(lines))


def kaggle(data):
    base = data / "ILSVRC/Data/CLS-LOC"
    listed = moved(data, base / "val")
    (data / "train").rename(base / "train")
    rows = [f"{name},{wnid} 1 2 3 4 {wnid} 5 6 7 8\n" for name, wnid in reversed(listed)]
    text = "ImageId,PredictionString\n" + "".join(rows)
    (data / "LOC_val_solution.csv").write_text(text, encoding="utf-8-sig")  # with a mark
    (data / "ILSVRC/Annotations").mkdir()
    (base / "val/._val_0000.png").write_bytes(b"of a Mac")


@pytest.mark.parametrize(
    "change, roots, said",
    [
        (lambda data: None, [""], "beware"),
        (
            at_any_depth,
            [""],
            "9 files that are not images or in no class folder: stray.png, boxes.heic",
        ),
        (links, [""], "links"),
        (copies, [""], "17 folders that are hidden, links or without a wnid: Annotations"),
        (lambda data: (data / "val").rename(data / "validation"), [""], ""),
        (one_more_class_in_valid, [""], "ignored: 1 classes of"),
        (tiny_imagenet, [""], ""),
        (kaggle, ["", "ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC"], ""),
        (lambda data: remove(data, "val"), ["", "train"], "10% of each class is held out"),
    ],
)
def test_layouts(data, capsys, change, roots, said):
    """Images of a class are alike in all folders: what they show tells their class."""
    known = {path.read_bytes(): path.parent.name for path in data.glob("train/*/*.png")}
    change(data)
    counts = (11, 1) if "held out" in said else (12, 5)
    for root in roots:
        train, val, classes = find_images(data / root)
        assert classes == WNIDS and said in capsys.readouterr().out
        for split, count in zip((train, val), counts):
            paths = [split.root / name for name in split.names]
            assert [known[path.read_bytes()] for path in paths] == [WNIDS[c] for c in split.labels]
            assert len(set(paths)) == len(paths) == 4 * count
            assert (np.bincount(split.labels) == count).all()
        assert not {train.root / name for name in train.names} & set(paths)
        assert len(set(train.labels[:11])) > 1  # in random order, as the buffer counts on
        assert find_images(data / root)[0].names == train.names
        capsys.readouterr()


@pytest.mark.parametrize("level", ["", WNIDS[0], f"{WNIDS[0]}/00.png"])
def test_val_that_is_train_is_refused(data, level):
    path = data / "val" / level
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(data / "train" / level)
    with raises(InputError, match="00.png is the training image .*val needs images of its"):
        find_images(data)


def test_images_per_class(data):
    train, val, _ = find_images(data, 3)
    assert np.bincount(train.labels).tolist() == [3] * 4 and len(val.names) == 20


def test_fingerprint_is_of_names_sizes_labels_and_order(data):
    train, val, _ = find_images(data)
    known = fingerprint(train, val)
    assert known == fingerprint(*find_images(data)[:2])
    assert known != fingerprint(val, train)
    assert known != fingerprint(train._replace(labels=train.labels[::-1]), val)
    assert known != fingerprint(train._replace(names=train.names[::-1]), val)
    with open(train.root / train.names[0], "ab") as file:
        file.write(b"1")
    assert known != fingerprint(train, val)


def annotate(data, lines):
    moved(data, data / "val")
    if lines is not None:
        (data / "val/val_annotations.txt").write_bytes(lines)


EVERY_LINE = "".join(f"val_{i:04d}.png\t{WNIDS[i // 5]}\n" for i in range(20)).encode()


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda data: (data / "val" / WNIDS[1]).rename(data / "val/n02085782"),
            "class n02085620 is in .*train but not in",
        ),
        (lambda data: remove(data, "val/n*"), "val holds 0 images in no class folders, .* sorts"),
        (lambda data: annotate(data, None), "val holds 20 images in no .*val_annotations"),
        (lambda data: remove(data, "train/n*"), "expected train/ and val/ .*train holds nothing"),
        (lambda data: remove(data, "*"), "expected train/ and val/ .* holds nothing"),
        (lambda data: remove(data, "*/n0[2-9]*"), "expected .* holds n01531178"),
        (lambda data: remove(data, "train"), "expected train/ and val/ .* holds val"),
        (lambda data: remove(data, f"val/{WNIDS[3]}/*"), "the class folder .* holds no images"),
        (lambda data: data.rename(data.parent / "other"), "no such folder"),
        (
            lambda data: remove(data, "*") or (data / "ILSVRC2012_img_train.tar").touch(),
            "holds ILSVRC2012_img_train.tar. torchvision.datasets.ImageNet sorts",
        ),
        (lambda data: remove(data, "val", "train/*/0[1-9].png", "train/*/1*.png"), "has one image"),
        (lambda data: annotate(data, EVERY_LINE.partition(b"\n")[2]), "has no label in"),
        (
            lambda data: annotate(data, EVERY_LINE.replace(b"n02085620\n", b"n02085782\n")),
            "is in .*train but not in",
        ),
        (lambda data: annotate(data, b"\xff\xfe\x00"), "has no label in .*val_annotations.txt"),
        (
            lambda data: (
                annotate(data, b""),
                (data / "val/LOC_val_solution.csv").write_text("a,b\n1,2\n"),
            ),
            "has no label in .*csv",
        ),
    ],
)
def test_bad_folders(data, change, words):
    change(data)
    with raises(InputError, match=words):
        find_images(data)


@pytest.mark.parametrize("target", ["odd.png", "gone"])
def test_links_to_nowhere_among_the_images(data, target):
    (data / "train" / WNIDS[0] / "odd.png").symlink_to(target)
    with raises((InputError, OSError), match="odd.png"):
        fingerprint(*find_images(data)[:2])


def test_a_folder_that_may_not_be_read(data, monkeypatch):
    walk = os.walk

    def closed(path, onerror):  # root may read everything: so as os.walk tells it
        if str(path).endswith(WNIDS[2]):
            onerror(PermissionError(13, "Permission denied", path))
        return walk(path)

    monkeypatch.setattr(os, "walk", closed)
    with raises(PermissionError, match=WNIDS[2]):
        find_images(data)


# --------------------------------------------------------------------------------------------------
# images


def image_of(size=(24, 20), seed=1):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def test_images_of_any_mode(tmp_path):
    rgb = image_of()
    grey = np.asarray(rgb.convert("L"))
    pixels = grey.astype(np.uint16) * 257
    palette, alpha = rgb.quantize(16), rgb.copy()
    alpha.putalpha(128)
    for name, image, options in [
        ("rgb.png", rgb, {}),
        ("grey.png", rgb.convert("L"), {}),
        ("cmyk.jpg", rgb.convert("CMYK"), {}),
        ("palette.png", palette, {"transparency": 3}),
        ("palette.gif", palette, {}),
        ("alpha.png", alpha, {}),
        ("grey_alpha.png", alpha.convert("LA"), {}),
        ("real_grey.tif", Image.fromarray(grey.astype(np.float32)), {}),
        ("bits.png", rgb.convert("1"), {}),
        ("sixteen_grey.png", Image.fromarray(pixels), {}),
        ("thirty_two_grey.tif", Image.fromarray(pixels.astype(np.int32)), {}),
        ("big_grey.tif", Image.frombytes("I;16B", (24, 20), pixels.astype(">u2").tobytes()), {}),
    ]:
        image.save(tmp_path / name, **options)
        read = read_image(tmp_path / name)
        assert read.mode == "RGB" and read.size == (24, 20)
        if "grey." in name:
            assert np.abs(np.asarray(read).astype(int)[..., 0] - grey).max() <= 1, name


def test_a_phones_photograph_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6  # turned by a quarter
    image_of((40, 20)).save(tmp_path / "phone.png", exif=exif)
    turned = np.rot90(np.asarray(image_of((40, 20))), -1)
    assert np.array_equal(np.asarray(read_image(tmp_path / "phone.png")), turned)


def test_the_first_of_several_frames(tmp_path):
    frames = [image_of(seed=seed) for seed in (1, 2, 3)]
    for name in ("animated.png", "animated.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert (np.asarray(read_image(tmp_path / name)) == np.asarray(frames[0])).all()


def encoded(image, kind):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def png_claiming(width, height):
    png = bytearray(encoded(image_of(), "PNG"))
    png[16:24] = struct.pack(">II", width, height)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    return png


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("bomb.png", png_claiming(60_000, 60_000), "decompression bomb"),
        ("liar.png", png_claiming(5_000, 5_000), "is not a readable image"),
        ("no_pixels.png", png_claiming(0, 0), "is not a readable image"),
        ("thread.png", encoded(image_of((1, 3000)), "PNG"), "1 x 3000 pixels"),
        ("empty.png", b"", "is not a readable image"),
        ("half.tif", encoded(image_of((200, 200)), "TIFF")[:300], "is not a readable image"),
        ("one.png", encoded(image_of((1, 1)), "PNG"), ""),
        ("jpeg_inside.png", encoded(image_of(), "JPEG"), ""),
        ("two\nlines'\"`$(touch x);.png", encoded(image_of(), "PNG"), ""),
        (os.fsdecode(b"not utf-8 \xff.png"), encoded(image_of(), "PNG"), ""),
        ("Ünïcode 図.PNG", encoded(image_of(), "PNG"), ""),
    ],
)
def test_images_and_what_is_none(data, name, content, words):
    (data / "train" / WNIDS[1] / name).write_bytes(content)
    train = find_images(data)[0]
    fingerprint(train)
    i = train.names.index(f"{WNIDS[1]}/{name}")
    image, reason = Decoded(train, eval_transform())[i]
    assert image.shape == (3, 224, 224) and words in reason
    assert (name in reason) == bool(words)


@pytest.mark.parametrize(
    "cpus, processes, room, workers",
    [(2, 1, 8e9, 2), (128, 8, 64e9, 16), (4, 8, 8e9, 1), (8, 1, 64e6, 0), (8, 1, 300e6, 2)],
)
def test_workers_by_cpus_and_shared_memory(cpus, processes, room, workers, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cpus)), raising=False)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=room))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert workers_for(224**2) == workers
