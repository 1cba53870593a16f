"""Every layout of images, every kind of image, and what is none of them: one sentence each."""

import io
import os
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import WNIDS, write_images
from PIL import Image

from dinov2_hooks import eval_transform
from kit.data import Decoded, find_images, fingerprint, read_image, workers_for
from kit.files import InputError


def names_by_class(split, classes):
    return {
        wnid: sorted(n for n, label in zip(split.names, split.labels) if label == c)
        for c, wnid in enumerate(classes)
    }


def check_layout(root, train_count=12, val_count=5):
    train, val, classes = find_images(str(root))
    assert classes == WNIDS
    for split, count in [(train, train_count), (val, val_count)]:
        by_class = names_by_class(split, classes)
        assert {len(names) for names in by_class.values()} == {count}
        assert all((split.root / name).is_file() for name in split.names)
    assert len(set(train.labels[:12])) > 1  # in random order, as the activation buffer counts on
    assert find_images(str(root))[0].names == train.names
    return train, val, classes


def test_wnid_folders(data):
    train, val, classes = check_layout(data)
    for split in (train, val):
        assert all(n.startswith(classes[label]) for n, label in zip(split.names, split.labels))


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


def test_copies_in_hidden_and_system_folders_are_left_aside_and_said(data, capsys):
    for wnid in WNIDS:
        for folder in (".ipynb_checkpoints", ".Trash-1000/files", "@eaDir", "__MACOSX"):
            shutil.copytree(data / "val" / wnid, data / "train" / wnid / folder)
    shutil.copytree(data / "val" / WNIDS[0], data / "train/Annotations")
    check_layout(data)
    said = capsys.readouterr().out
    assert "ignored in" in said and "17 folders that are hidden, links or without a wnid: Annotations" in said


def test_other_names_of_val_and_classes_of_val_alone(data, capsys):
    for name in ("validation", "valid"):
        (data / ("val" if name == "validation" else "validation")).rename(data / name)
        check_layout(data)
    shutil.copytree(data / "valid" / WNIDS[0], data / "valid/n01440764")
    check_layout(data)
    assert "ignored: 1 classes of" in capsys.readouterr().out


def test_what_is_ignored_is_said(data, capsys):
    (data / "train" / WNIDS[0] / "00.png").rename(data / "train" / WNIDS[0] / "00.heic")
    (data / "val" / WNIDS[1] / "00.png").rename(data / "val" / "00.png")
    os.symlink(data / "val" / WNIDS[2], data / "train" / WNIDS[2] / "more")
    image_of().save(data / "val" / WNIDS[3] / "a.jfif", "JPEG")
    train, val, _ = find_images(str(data))
    assert len(train.names) == 47 and f"{WNIDS[3]}/a.jfif" in val.names
    said = capsys.readouterr().out
    for word in ("00.heic", "00.png", "more"):
        assert word in said


@pytest.mark.parametrize("level", ["", WNIDS[0], f"{WNIDS[0]}/00.png"])
def test_val_that_is_train_is_refused(data, level):
    path = data / "val" / level
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(data / "train" / level)
    with pytest.raises(InputError, match="00.png is the training image .*val needs images of its"):
        find_images(str(data))


def test_links(data, tmp_path):
    shutil.move(data / "train", tmp_path / "elsewhere")
    (data / "train").mkdir()
    for wnid in WNIDS:
        os.symlink(tmp_path / "elsewhere" / wnid, data / "train" / wnid)
        os.symlink("..", data / "train" / wnid / "up")  # is not followed
        (data / "train" / wnid / "folder.png").mkdir()
    check_layout(data)


def flatten_val(data, wnid_folders, to):
    """Move val images into one flat folder; returns [(new name, wnid)]."""
    to.mkdir(parents=True, exist_ok=True)
    listed = []
    for wnid in WNIDS[::-1]:  # the first image is of the last class
        for path in sorted((wnid_folders / wnid).iterdir()):
            name = f"val_{len(listed):04d}.png"
            listed.append((name, wnid))
            shutil.move(path, to / name)
        (wnid_folders / wnid).rmdir()
    return listed


def test_tiny_imagenets_own_layout(data):
    listed = flatten_val(data, data / "val", data / "val/images")
    lines = [f"{name}\t{wnid}\t0\t0\t9\t9\n" for name, wnid in listed]
    (data / "val/val_annotations.txt").write_text("".join(lines))
    _, val, classes = check_layout(data)
    assert {(os.path.basename(n), classes[c]) for n, c in zip(val.names, val.labels)} == set(listed)


def test_kaggles_layout(data, tmp_path):
    base = tmp_path / "kaggle/ILSVRC/Data/CLS-LOC"
    base.mkdir(parents=True)
    shutil.move(data / "train", base / "train")
    listed = flatten_val(data, data / "val", base / "val")
    rows = [
        f"{os.path.splitext(name)[0]},{wnid} 1 2 3 4 {wnid} 5 6 7 8\n"
        for name, wnid in reversed(listed)
    ]
    csv = "ImageId,PredictionString\n" + "".join(rows)
    (tmp_path / "kaggle/LOC_val_solution.csv").write_text(csv, encoding="utf-8-sig")  # with a mark
    (tmp_path / "kaggle/ILSVRC/Annotations").mkdir()
    (base / "val/._val_0000.png").write_bytes(b"of a Mac")
    for root in (tmp_path / "kaggle", tmp_path / "kaggle/ILSVRC", base.parent, base):
        _, val, classes = check_layout(root)
        assert {(n, classes[c]) for n, c in zip(val.names, val.labels)} == set(listed)


@pytest.mark.parametrize("inside_train", [True, False])
def test_no_val(data, capsys, inside_train):
    shutil.rmtree(data / "val")
    train, val, _ = check_layout(data if inside_train else data / "train", 11, 1)
    assert "10% of each class is held out" in capsys.readouterr().out
    assert len(set(train.names)) + len(set(val.names)) == len({*train.names, *val.names}) == 48


def test_images_per_class(data):
    train, val, classes = find_images(str(data), 3)
    assert {len(names) for names in names_by_class(train, classes).values()} == {3}
    assert len(val.names) == 20


def test_fingerprint_is_of_names_sizes_labels_and_order(data):
    train, val, _ = find_images(str(data))
    known = fingerprint(train, val)
    assert known == fingerprint(*find_images(str(data))[:2])
    assert known != fingerprint(val, train)
    assert known != fingerprint(train._replace(labels=train.labels[::-1]), val)
    assert known != fingerprint(train._replace(names=train.names[::-1]), val)
    with open(train.root / train.names[0], "ab") as file:
        file.write(b"1")
    assert known != fingerprint(train, val)


def rename_class(data, new, splits=("train", "val")):
    for split in splits:
        (data / split / WNIDS[1]).rename(data / split / new)


def annotate(data, lines):
    for wnid in WNIDS:
        for path in (data / "val" / wnid).iterdir():
            path.rename(data / "val" / f"{wnid}_{path.name}")
        (data / "val" / wnid).rmdir()
    if lines is not None:
        (data / "val/val_annotations.txt").write_bytes(lines)


def remove(data, *patterns):
    for path in [path for pattern in patterns for path in data.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


EVERY_LINE = "".join(f"{w}_{i:02d}.png\t{w}\n" for w in WNIDS for i in range(5)).encode()


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda data: rename_class(data, "dogs", ["val"]),
            "class n02085620 is in .*train but not in",
        ),
        (
            lambda data: rename_class(data, "n02085782", ["val"]),
            "n02085620 is in .*train but not in",
        ),
        (lambda data: remove(data, "val/n*"), "val holds 0 images in no class folders, .* sorts"),
        (
            lambda data: annotate(data, None),
            "val holds 20 images in no class folders, .*val_annotations",
        ),
        (lambda data: remove(data, "train/n*"), "expected train/ and val/ .*train holds nothing"),
        (lambda data: remove(data, "train", "val"), "expected train/ and val/ .* holds nothing"),
        (
            lambda data: remove(data, "train/n0[2-9]*", "val/n0[2-9]*"),
            "expected .* holds n01531178",
        ),
        (lambda data: remove(data, "train"), "expected train/ and val/ .* holds val"),
        (lambda data: remove(data, f"val/{WNIDS[3]}/*"), "the class folder .* holds no images"),
        (
            lambda data: (remove(data, "*"), data.rmdir(), data.write_text("a file")),
            "no such folder",
        ),
        (
            lambda data: (remove(data, "*"), (data / "ILSVRC2012_img_train.tar").write_bytes(b"")),
            "holds ILSVRC2012_img_train.tar. torchvision.datasets.ImageNet sorts",
        ),
        (lambda data: remove(data, "val", "train/*/0[1-9].png", "train/*/1*.png"), "has one image"),
        (lambda data: annotate(data, EVERY_LINE.partition(b"\n")[2]), "has no label in"),
        (
            lambda data: annotate(data, EVERY_LINE.replace(b"n02085620\n", b"n02085782\n")),
            "is in .*train but not in",
        ),
        (lambda data: annotate(data, b"no tabs here\n"), "has no label in .*val_annotations.txt"),
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
    with pytest.raises(InputError, match=words):
        find_images(str(data))


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: os.symlink(path.name, path), "odd.png"),
        (lambda path: os.symlink("gone", path), "odd.png"),
    ],
)
def test_links_to_nowhere_among_the_images(data, make, words):
    make(data / "train" / WNIDS[0] / "odd.png")
    with pytest.raises((InputError, OSError), match=words):
        fingerprint(*find_images(str(data))[:2])


def test_a_folder_that_may_not_be_read(data, monkeypatch):
    walk = os.walk

    def closed(path, onerror):  # root may read everything: so as os.walk tells it
        if str(path).endswith(WNIDS[2]):
            onerror(PermissionError(13, "Permission denied", path))
        return walk(path)

    monkeypatch.setattr(os, "walk", closed)
    with pytest.raises(PermissionError, match=WNIDS[2]):
        find_images(str(data))


# --------------------------------------------------------------------------------------------------
# images


def image_of(size=(24, 20), seed=1):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def test_images_of_any_mode(tmp_path):
    rgb = image_of()
    sixteen = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
    palette, alpha = rgb.quantize(16), rgb.copy()
    alpha.putalpha(128)
    real = Image.fromarray(np.random.default_rng(0).random((20, 24), np.float32) * 255)
    for name, image, options in [
        ("rgb.png", rgb, {}),
        ("grey.jpg", rgb.convert("L"), {}),
        ("cmyk.jpg", rgb.convert("CMYK"), {}),
        ("palette.png", palette, {"transparency": 3}),
        ("palette.gif", palette, {}),
        ("alpha.png", alpha, {}),
        ("grey_alpha.png", alpha.convert("LA"), {}),
        ("real.tif", real, {}),
        ("bits.png", rgb.convert("1"), {}),
        ("sixteen.png", sixteen, {}),
    ]:
        image.save(tmp_path / name, **options)
        read = read_image(tmp_path / name)
        assert read.mode == "RGB" and read.size == (24, 20)
        assert eval_transform()(read).shape == (3, 224, 224)
    pixels = np.asarray(sixteen)
    Image.fromarray(pixels.astype(np.int32)).save(tmp_path / "thirty_two.tif")
    Image.frombytes("I;16B", (24, 20), pixels.astype(">u2").tobytes()).save(tmp_path / "big.tif")
    for name in ("sixteen.png", "thirty_two.tif", "big.tif"):
        read = np.asarray(read_image(tmp_path / name)).astype(int)[..., 0]
        assert np.abs(read - np.asarray(rgb.convert("L"))).max() <= 1, name


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


def png_claiming(width, height):
    """A PNG of a few bytes that says it has so many pixels."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


def encoded(image, kind):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("bomb.png", png_claiming(60_000, 60_000), "decompression bomb"),
        ("liar.png", png_claiming(5_000, 5_000), "is not a readable image"),
        ("no_pixels.png", png_claiming(0, 0), "is not a readable image"),
        ("thread.png", encoded(image_of((1, 3000)), "PNG"), "1 x 3000 pixels"),
        ("empty.png", b"", "is not a readable image"),
        ("drawing.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not a readable image"),
        ("half.png", encoded(image_of((200, 200)), "PNG")[:300], "is not a readable image"),
        ("half.tif", encoded(image_of((200, 200)), "TIFF")[:300], "is not a readable image"),
        ("one.png", encoded(image_of((1, 1)), "PNG"), ""),
        ("jpeg_inside.png", encoded(image_of(), "JPEG"), ""),
        ("quotes'\"`$(touch x);.png", encoded(image_of(), "PNG"), ""),
        ("two\nlines.png", encoded(image_of(), "PNG"), ""),
        (os.fsdecode(b"not utf-8 \xff.png"), encoded(image_of(), "PNG"), ""),
    ],
)
def test_images_and_what_is_none(data, name, content, words):
    (data / "train" / WNIDS[1] / name).write_bytes(content)
    train = find_images(str(data))[0]
    fingerprint(train)
    i = train.names.index(f"{WNIDS[1]}/{name}")
    image, reason = Decoded(train, eval_transform())[i]
    assert image.shape == (3, 224, 224) and words in reason
    assert (name in reason) == bool(words)


def test_one_image_under_two_names_is_one_image(data):
    write_images(data / "train" / WNIDS[0], 1)
    content = (data / "train" / WNIDS[0] / "00.png").read_bytes()
    (data / "train" / WNIDS[0] / "Ünïcode 図.PNG").write_bytes(content)
    train = find_images(str(data))[0]
    images = Decoded(train, eval_transform())
    a, b = (train.names.index(f"{WNIDS[0]}/{name}") for name in ("00.png", "Ünïcode 図.PNG"))
    assert torch.equal(images[a][0], images[b][0])


@pytest.mark.parametrize(
    "cpus, processes, room, workers",
    [
        (2, 1, 8e9, 2),
        (128, 8, 64e9, 16),
        (128, 1, 64e9, 16),
        (4, 8, 8e9, 1),
        (8, 1, 64e6, 0),
        (8, 1, 300e6, 2),
    ],
)
def test_workers_by_cpus_and_shared_memory(cpus, processes, room, workers, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cpus)), raising=False)
    usage = shutil._ntuple_diskusage(room, 0, room)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert workers_for(224**2) == workers
