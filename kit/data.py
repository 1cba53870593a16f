"""Folders of images -> train and val splits; decoding; Tiny ImageNet, fetched."""
import hashlib
import os
import re
import shutil
import socket
import stat
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.datasets.utils import download_and_extract_archive

from dinov2_hooks import ImageError
from kit.runs import InputError, check_disk, shared_memory

ENDINGS = tuple(".jpeg .jpg .png .webp .bmp .gif .tif .tiff .ppm .pgm".split())
LISTS = ("LOC_val_solution.csv", "val_annotations.txt")  # Kaggle's, Tiny ImageNet's
VAL = ("val", "validation", "valid")
INSIDE = ("", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC", "tiny-imagenet-200")
EXPECTED = ("expected train/ and val/ with a folder for each class, named by its wnid (n02085620), "
            "or such folders alone")
SORTED = ("torchvision.datasets.ImageNet sorts the official archives and a flat val/ into class "
          "folders")
SYSTEMS = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


class Split(NamedTuple):
    """The images of a split, in the order of their rows in the token files."""

    root: Path
    names: list[str]  # paths relative to root
    labels: np.ndarray  # (N,) int64, a class's place among the sorted wnids


def find_images(data, images_per_class=None):
    """(train, val, sorted wnids) of a folder; train in a fixed random order.

    Layouts: train/ and val/ of wnid folders, images at any depth inside; a flat val/ with Kaggle's
    or Tiny ImageNet's list; wnid folders alone, or train/ alone, of which a fixed 10% of each class
    is held out. Raises InputError where it is none of these.
    """
    root = Path(data).expanduser()
    if not root.is_dir():
        raise InputError(f"--data {data}: no such folder")
    bases = [root / inside for inside in INSIDE if (root / inside / "train").is_dir()]
    base = bases[0] if bases else root
    train_root = base / "train" if bases else root
    val_roots = [base / name for name in VAL if (base / name).is_dir()]
    train = images_by_class(train_root)
    if len(train) < 2:
        inside = ", ".join(sorted(path.name for path in train_root.iterdir())[:5]) or "nothing"
        raise InputError(f"--data {data}: {EXPECTED}; {train_root} holds {inside}. {SORTED}")
    rng = np.random.default_rng(0)  # not --seed: the split and the order belong to the data
    if val_roots:
        val_root = val_roots[0]
        val = images_by_class(val_root) or flat_images(val_root)
        others = sorted(set(val) - set(train))
        for wnid in others:
            del val[wnid]
        if others:
            print(f"      left aside: {len(others)} classes of {val_root} that are not in train")
        lacking = sorted(set(train) - set(val))
        if lacking:
            raise InputError(f"--data {data}: class {lacking[0]} is in {train_root} but not in "
                             f"{val_root}; both need the same classes")
    else:
        print(f"      no val/ beside {train_root}: a fixed 10% of each class is held out")
        val_root = train_root
        val = {}
        for wnid, names in train.items():
            if len(names) < 2:
                raise InputError(f"--data {data}: class {wnid} has one image; two are needed where "
                                 "there is no val/, as one is held out")
            order = rng.permutation(len(names))
            held_out = max(1, round(len(names) / 10))
            val[wnid] = [names[i] for i in sorted(order[:held_out])]
            train[wnid] = [names[i] for i in sorted(order[held_out:])]
    if images_per_class:
        for wnid, names in train.items():
            chosen = rng.permutation(len(names))[:images_per_class]
            train[wnid] = [names[i] for i in sorted(chosen)]
    splits = []
    for folder, classes in ((train_root, train), (val_root, val)):
        labels = np.repeat(np.arange(len(classes)), list(map(len, classes.values())))
        splits.append(Split(folder, sum(classes.values(), []), labels))
    order = rng.permutation(len(splits[0].names))
    names = splits[0].names
    labels = splits[0].labels[order]
    return Split(train_root, [names[i] for i in order], labels), splits[1], list(train)


def images_by_class(folder):
    """wnid -> its images, relative to `folder`; both sorted. Hidden and system folders are left
    aside, and so is what is no class folder."""
    def fail(error):  # os.walk would pass over a folder that cannot be read
        raise error

    classes = {}
    aside = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if not re.fullmatch(r"n\d{8}", entry.name) or not entry.is_dir():
            aside += [entry.name] if entry.is_dir() else []
            continue
        images = []
        for where, folders, names in os.walk(entry.path, onerror=fail):
            hidden = [name for name in folders if name[0] == "." or name in SYSTEMS]
            aside += [os.path.join(entry.name, name) for name in hidden]
            folders[:] = sorted(set(folders) - set(hidden))
            for name in names:
                if name.lower().endswith(ENDINGS) and name[0] != ".":
                    images.append(os.path.relpath(os.path.join(where, name), folder))
        if not images:
            raise InputError(f"the class folder {entry.path} holds no images")
        classes[entry.name] = sorted(images)
    if classes and aside:
        more = f" and {len(aside) - 3} more" if len(aside) > 3 else ""
        print(f"      left aside in {folder}: {', '.join(aside[:3])}{more}")
    return classes


def flat_images(val):
    """wnid -> images of a flat val folder, by the list in or above it."""
    lists = [folder / name for folder in (val, *list(val.absolute().parents)[:4]) for name in LISTS]
    given = next((path for path in lists if path.is_file()), None)
    folder = val / "images" if (val / "images").is_dir() else val
    names = [name for name in sorted(os.listdir(folder))
             if name.lower().endswith(ENDINGS) and name[0] != "."]
    if given is None:
        raise InputError(f"{val} holds {len(names)} images in no class folders, and there is no "
                         f"{' or '.join(LISTS)} in or above it that gives their classes; {SORTED}")
    labels = {}
    classes = {}
    lines = given.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    for line in lines[given.suffix == ".csv" :]:
        row = re.match(r"([^,\t]+)[,\t](n\d{8})\b", line)
        if row is None:
            raise InputError(f"{given} is no list of an image and its wnid in each line: {line!r}")
        if labels.setdefault(Path(row[1]).stem, row[2]) != row[2]:
            raise InputError(f"{given} gives {row[1]} two classes")
    for name in names:
        if Path(name).stem not in labels:
            raise InputError(f"{folder / name} has no label in {given}")
        image = os.path.relpath(folder / name, val)
        classes.setdefault(labels[Path(name).stem], []).append(image)
    return dict(sorted(classes.items()))


def fingerprint(*splits):
    """A hash over the names, sizes, labels and order of all images."""
    digest = hashlib.sha256()
    for split in splits:
        for name, label in zip(split.names, split.labels):
            about = os.stat(split.root / name)
            if not stat.S_ISREG(about.st_mode):  # a pipe would be waited for
                raise InputError(f"{split.root / name} is no file: remove it")
            line = f"{name}\0{label}\0{about.st_size}\n"
            digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def read_image(path):
    """Any image that Pillow reads (grey, 16-bit, CMYK, palette, alpha; of several, the first)."""
    with warnings.catch_warnings(), Image.open(path) as image:
        warnings.simplefilter("ignore")  # of a corrupt EXIF, say, without the file's name
        if max(image.size) > 100 * min(image.size):
            raise ValueError("%d x %d pixels, which resizing would make too large" % image.size)
        if image.mode[0] in "IF":  # of 16 bits or more, in any order of bytes
            pixels = np.asarray(image).astype(float)
            sixteen = image.mode.startswith("I;16") or pixels.max() > 255
            image = Image.fromarray((pixels / (257 if sixteen else 1)).astype(np.uint8))
        return image.convert("RGB")


class Decoded(torch.utils.data.Dataset):
    """Image i -> tensor (3, H, W), or the exception: an ImageError, or the system's."""

    def __init__(self, split, transform):
        self.split = split
        self.transform = transform

    def __len__(self):
        return len(self.split.names)

    def __getitem__(self, i):
        if i >= len(self):
            raise IndexError(i)
        path = self.split.root / self.split.names[i]
        try:
            return self.transform(read_image(path))
        except Exception as error:  # Pillow raises anything from OSError to SyntaxError
            if isinstance(error, MemoryError) or getattr(error, "errno", None):
                return error
            return ImageError(f"{path} is no readable image ({error})")


def workers_for(pixels):
    """Processes that decode: one for each CPU that this process may use, as many as fit in shared
    memory with two batches of float32 images each."""
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    room = shared_memory() / processes // (3 * 64 * 3 * 4 * pixels)
    return int(min(16, max(1, cpus // processes), room))


def fetch_tiny_imagenet(data=Path("data")):
    """The folder of Tiny ImageNet (110,000 photographs of 200 classes, 64 x 64) in `data`, fetched
    unless it is there. Raises InputError without network, or for another file than expected."""
    folder = data / "tiny-imagenet-200"
    part = data / "tiny-imagenet-200.part"
    if folder.is_dir():
        return folder
    check_disk(data, 1_050_000_000, "Tiny ImageNet")
    print(f"      fetching Tiny ImageNet (248 MB) into {data}, once")
    shutil.rmtree(part, ignore_errors=True)  # renamed when it is whole
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(60)  # seconds of silence
    try:
        download_and_extract_archive(URL, data, part, md5=MD5, remove_finished=True)
    except (OSError, RuntimeError, zipfile.BadZipFile) as error:
        raise InputError(f"Tiny ImageNet could not be fetched from {URL} ({error}): try again, or "
                         "unpack that file elsewhere and give its folder as --data") from error
    finally:
        socket.setdefaulttimeout(timeout)
    (part / "tiny-imagenet-200").rename(folder)
    part.rmdir()
    return folder
