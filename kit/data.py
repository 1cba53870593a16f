"""Folders of images -> train and val splits; decoding."""
import filecmp
import os
import re
import shutil
import warnings
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from kit.files import InputError, from_torchrun
from kit.made_of import short_hash

ENDINGS = tuple(".jpeg .jpg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm".split())
LISTS = ("LOC_val_solution.csv", "val_annotations.txt")  # Kaggle's, Tiny ImageNet's
VAL = ("val", "validation", "valid")
INSIDE = ("", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC", "tiny-imagenet-200")
EXPECTED = ("expected train/ and val/ with a folder for each class, named by its wnid (n02085620), "
            "or such folders alone")
SORTED = ("torchvision.datasets.ImageNet sorts the official archives and a flat val/ into class "
          "folders")
SYSTEMS = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")


class Split(NamedTuple):
    """The images of a split, in the order of their rows in the token files."""

    root: Path
    names: list  # paths relative to root
    labels: np.ndarray  # (N,) int64, a class's place among the sorted wnids


def find_images(data, images_per_class=None):
    """(train, val, sorted wnids) of a folder; train in a fixed random order.

    Layouts: train/ and val/ of wnid folders, images at any depth inside; a flat val/ with Kaggle's
    or Tiny ImageNet's list; wnid folders alone, or train/ alone, of which a fixed 10% of each class
    is held out. Raises InputError if it is none of these.
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
        inside = ", ".join(sorted(os.listdir(train_root))[:5]) or "nothing"
        raise InputError(f"--data {data}: {EXPECTED}; {train_root} holds {inside}. {SORTED}")
    rng = np.random.default_rng(0)  # not --seed: the split and the order belong to the data
    val_root = val_roots[0] if val_roots else train_root
    val = {}
    if val_roots:
        val = images_by_class(val_root) or flat_images(val_root)
        others = set(val) - set(train)
        if others:
            print(f"      ignored: {len(others)} classes of {val_root} that are not in train")
        lacking = sorted(set(train) - set(val))
        if lacking:
            raise InputError(f"--data {data}: class {lacking[0]} is in {train_root} but not in "
                             f"{val_root}; both need the same classes")
        val = {wnid: val[wnid] for wnid in train}
        refuse_links(train_root, train, val_root, val)
    else:
        print(f"      no val/ beside {train_root}: a fixed 10% of each class is held out")
        for wnid, names in train.items():
            if len(names) < 2:
                raise InputError(f"--data {data}: class {wnid} has one image; two are needed if "
                                 "there is no val/, as one is held out")
            order = rng.permutation(len(names))
            held_out = max(1, round(len(names) / 10))
            val[wnid] = pick(names, order[:held_out])
            train[wnid] = pick(names, order[held_out:])
    if images_per_class:
        for wnid, names in train.items():
            train[wnid] = pick(names, rng.permutation(len(names))[:images_per_class])
    train_split, val_split = split_of(train_root, train), split_of(val_root, val)
    order = rng.permutation(len(train_split.names))
    names = [train_split.names[i] for i in order]
    return Split(train_root, names, train_split.labels[order]), val_split, list(train)


def pick(names, chosen):
    return [names[i] for i in sorted(chosen)]


def split_of(root, classes):
    labels = np.repeat(np.arange(len(classes)), list(map(len, classes.values())))
    return Split(root, sum(classes.values(), []), labels)


def is_image(name):
    return name.lower().endswith(ENDINGS) and name[0] != "."


def images_by_class(folder):
    """wnid -> its images, relative to `folder`; both sorted. What is ignored is said: hidden and
    system folders, linked ones in a class folder, whatever is not a class folder or an image."""
    def fail(error):  # os.walk would pass over a folder that cannot be read
        raise error

    classes = {}
    _, folders, files = next(os.walk(folder, onerror=fail))
    wnids = [name for name in folders if re.fullmatch(r"n\d{8}", name)]
    ignored_folders = sorted(set(folders) - set(wnids))
    ignored_files = [name for name in files if is_image(name)]
    for wnid in sorted(wnids):
        images = []
        for where, folders, names in os.walk(os.path.join(folder, wnid), onerror=fail):
            for name in folders.copy():
                if name[0] == "." or name in SYSTEMS or os.path.islink(os.path.join(where, name)):
                    folders.remove(name)  # a link may lead back to here
                    ignored_folders.append(name)
            inside = os.path.relpath(where, folder)
            images += [os.path.join(inside, name) for name in names if is_image(name)]
            ignored_files += [name for name in names if name[0] != "." and not is_image(name)]
        if not images:
            raise InputError(f"the class folder {os.path.join(folder, wnid)} holds no images")
        classes[wnid] = sorted(images)
    for what, ignored in (("folders that are hidden, links or without a wnid", ignored_folders),
                          ("files that are not images or in no class folder", ignored_files)):
        if classes and ignored:
            print(f"      ignored in {folder}: {len(ignored)} {what}: {', '.join(ignored[:3])} ...")
    return classes


def refuse_links(train_root, train, val_root, val):
    """Raises InputError if val is a link to train, and so would be scored on its own training
    images; of copies it is said. The first image of each class tells."""
    copies = []
    for wnid, names in val.items():
        if names[0] in train[wnid]:
            in_train, in_val = train_root / names[0], val_root / names[0]
            if in_train.samefile(in_val):
                raise InputError(f"{in_val} is the training image {in_train}: val needs images of "
                                 "its own; without val, a tenth of train is held out")
            if filecmp.cmp(in_train, in_val, shallow=False):
                copies.append(in_val)
    if copies:
        print(f"      beware: {copies[0]} is a copy of a training image, as in {len(copies)} "
              "classes: scores are to be on images that the SAEs have not seen")


def flat_images(val):
    """wnid -> images of a flat val folder, by the list in or above it."""
    lists = [folder / name for folder in (val, *list(val.absolute().parents)[:4]) for name in LISTS]
    class_list = next((path for path in lists if path.is_file()), None)
    folder = val / "images" if (val / "images").is_dir() else val
    names = sorted(filter(is_image, os.listdir(folder)))
    if class_list is None:
        raise InputError(f"{val} holds {len(names)} images in no class folders, and there is no "
                         f"{' or '.join(LISTS)} in or above it that gives their classes; {SORTED}")
    labels = {}
    text = class_list.read_text(encoding="utf-8-sig", errors="replace")
    for name, wnid in re.findall(r"^([^,\t\n]+)[,\t](n\d{8})\b", text, re.MULTILINE):
        labels[Path(name).stem] = wnid
    classes = {}
    for name in names:
        if Path(name).stem not in labels:
            raise InputError(f"{folder / name} has no label in {class_list}: an image and its "
                             "wnid in each line")
        image = os.path.relpath(folder / name, val)
        classes.setdefault(labels[Path(name).stem], []).append(image)
    return classes


def fingerprint(*splits):
    """A hash over the names, sizes, labels and order of all images."""
    about = []
    for split in splits:
        try:
            sizes = [os.path.getsize(split.root / name) for name in split.names]
        except OSError as error:  # a link to nowhere
            raise InputError(f"{error.filename}: {error.strerror}; put the image back, or delete "
                             "the link to it") from error
        about.append((split.names, sizes, split.labels.tolist()))
    return short_hash(about)


def read_image(path):
    """Any image that Pillow reads (grey, 16-bit, CMYK, palette, alpha; of several, the first),
    upright: as its EXIF orientation says."""
    with warnings.catch_warnings(), Image.open(path) as image:
        warnings.simplefilter("ignore")  # of a corrupt EXIF, say, without the file's name
        if max(image.size) > 100 * min(image.size):
            raise ValueError("%d x %d pixels, which resizing would make too large" % image.size)
        with suppress(Exception):  # of a corrupt EXIF
            image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # of 16 bits or more, in any order of bytes
            pixels = np.asarray(image).astype(float)
            sixteen = image.mode.startswith("I;16") or pixels.max() > 255
            image = Image.fromarray((pixels / (257 if sixteen else 1)).astype(np.uint8))
        return image.convert("RGB")


class Decoded(torch.utils.data.Dataset):
    """Image i -> (tensor (3, H, W), why it could not be read: "" if it could)."""

    def __init__(self, split, transform):
        self.split = split
        self.transform = transform

    def __len__(self):
        return len(self.split.names)

    def __getitem__(self, i):
        path = self.split.root / self.split.names[i]
        try:
            return self.transform(read_image(path)), ""
        except Exception as error:  # Pillow raises anything from OSError to SyntaxError
            if isinstance(error, MemoryError):
                raise
            side = self.transform.transforms[1].size[0]
            return torch.zeros(3, side, side), f"{path} is not a readable image ({error})"


def workers_for(pixels):
    """Processes that decode: one for each CPU that this process may use, as many as fit in shared
    memory with two batches of float32 images each."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    processes = from_torchrun("LOCAL_WORLD_SIZE", 1)
    shared = Path("/dev/shm")  # 64 MB in a container by default
    room = shutil.disk_usage(shared).free if shared.is_dir() else 2**40
    fitting = room // processes // (3 * 64 * 3 * 4 * pixels)
    return min(16, max(1, cpus // processes), fitting)
