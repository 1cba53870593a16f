"""Any folder of wnid folders -> train and val images, and their decoding in worker processes."""
import hashlib
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from kit.store import InputError

BATCH = 64  # images through the backbone at once; ViT-g/14 then takes 6 GB of a card
PROCESSES = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of this run on this machine
WORKERS = max(1, min(os.cpu_count() or 1, 16 * PROCESSES) // PROCESSES)  # that decode, for each
ENDINGS = tuple(".jpeg .jpg .png .webp .bmp .gif .tif .tiff .ppm .pgm".split())


class Split(NamedTuple):
    """The images of a split, in the order of their rows in the token files."""

    root: Path
    names: list[str]  # paths relative to root
    labels: np.ndarray  # (N,) int64, a class's place among the sorted wnids


def find_images(data: str, images_per_class: int | None = None) -> tuple[Split, Split, list[str]]:
    """(train, val, classes as sorted wnids) of a folder; train in a fixed random order.

    Layouts: train/ and val/ of wnid folders, images at any depth inside; a flat val/ with
    LOC_val_solution.csv (Kaggle's ImageNet) or val_annotations.txt (Tiny ImageNet); without a val/,
    a fixed 10% of each class is held out. Raises InputError where it is none of these.
    """
    root = Path(data).expanduser()
    if not root.is_dir():
        raise InputError(f"--data {data}: no such folder")
    kaggle = root / "ILSVRC/Data/CLS-LOC"
    base = kaggle if kaggle.is_dir() else root
    train_root, val_root = base / "train", base / "val"
    if not train_root.is_dir():
        if val_root.is_dir():
            raise InputError(f"--data {data}: it has a val folder but no train folder")
        train_root = base
    train = images_by_class(train_root)
    if len(train) < 2:
        raise InputError(f"--data {data}: {len(train)} class folders in {train_root}; give two")
    rng = np.random.default_rng(0)  # not --seed: the split and the order belong to the data
    if val_root.is_dir():
        val = labelled_flat_images(val_root) or images_by_class(val_root)
        for wnid in sorted(set(val) ^ set(train)):
            places = "val but not in train" if wnid in val else "train but not in val"
            raise InputError(f"--data {data}: class {wnid} is in {places}; give both the same")
    else:
        print("      there is no val folder: a fixed 10% of each class is held out for evaluation")
        val_root, val = train_root, {}
        for wnid, names in train.items():
            order = rng.permutation(len(names))
            held_out = max(1, round(len(names) / 10))
            if len(names) == 1:
                raise InputError(f"--data {data}: class {wnid} has one image; two are needed, as "
                                 "without a val folder one is held out for evaluation")
            val[wnid] = [names[i] for i in sorted(order[:held_out])]
            train[wnid] = [names[i] for i in sorted(order[held_out:])]
    if images_per_class:
        train = {wnid: [names[i] for i in sorted(rng.permutation(len(names))[:images_per_class])]
                 for wnid, names in train.items()}
    splits = []
    for at, found in ((train_root, train), (val_root, val)):
        labels = np.repeat(np.arange(len(found)), [len(names) for names in found.values()])
        splits.append(Split(at, [name for names in found.values() for name in names], labels))
    _, names, labels = splits[0]
    order = rng.permutation(len(names))
    return Split(train_root, [names[i] for i in order], labels[order]), splits[1], list(train)


def images_by_class(folder: Path) -> dict[str, list[str]]:
    """wnid -> its images, relative to `folder`; both sorted."""
    def fail(error):  # os.walk would pass over a folder that cannot be read
        raise error

    found = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if not entry.is_dir() or entry.name.startswith("."):
            continue
        if not re.fullmatch(r"n\d{8}", entry.name):
            raise InputError(f"{entry.path} is no class: class folders are named by wnid, as "
                             "n02085620; rename or move it")
        paths = [os.path.join(at, name) for at, _, names in os.walk(entry.path, onerror=fail)
                 for name in names if name.lower().endswith(ENDINGS) and name[0] != "."]
        if not paths:
            raise InputError(f"{entry.path} holds no images: fill or remove the class folder")
        found[entry.name] = sorted(os.path.relpath(path, folder) for path in paths)
    return found


def labelled_flat_images(val: Path) -> dict[str, list[str]] | None:
    """wnid -> images of a flat val folder, by the list in or above it; None where there is none."""
    lists = [place / name for place in (val, *list(val.parents)[:4])  # Kaggle's lies far above
             for name in ("LOC_val_solution.csv", "val_annotations.txt")]
    listed = next((path for path in lists if path.is_file()), None)
    if listed is None or any(val.glob("n" + 8 * "[0-9]")):
        return None
    lines = listed.read_text(errors="replace").splitlines()
    labels = {}
    for line in lines[1:] if listed.suffix == ".csv" else lines:
        row = re.match(r"([^,\t]+)[,\t](n\d{8})\b", line)
        if row is None:
            raise InputError(f"{listed} is no list of an image and its wnid in each line: {line!r}")
        if labels.setdefault(Path(row[1]).stem, row[2]) != row[2]:
            raise InputError(f"{listed} gives {row[1]} two classes")
    folder = val / "images" if (val / "images").is_dir() else val
    found = {}
    for name in sorted(name for name in os.listdir(folder) if name.lower().endswith(ENDINGS)):
        if Path(name).stem not in labels:
            raise InputError(f"{folder / name} has no label in {listed}")
        found.setdefault(labels[Path(name).stem], []).append(os.path.relpath(folder / name, val))
    return dict(sorted(found.items()))


def fingerprint(*splits: Split) -> str:
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


def read_image(path) -> Image.Image:
    """Any image that Pillow reads (grey, 16-bit, CMYK, palette, alpha; of several, the first)."""
    with Image.open(path) as image:
        if max(image.size) > 100 * min(image.size):
            raise ValueError("%d x %d pixels, which resizing would make too large" % image.size)
        if image.mode == "I;16":
            image = image.point(lambda value: value / 256, "L")
        if "transparency" in image.info:
            image = image.convert("RGBA")  # or Pillow warns
        return image.convert("RGB")


class Decoded(torch.utils.data.Dataset):
    """Image i -> (tensor (3, H, W), "", False). If it cannot be read: (a blank tensor, the reason,
    True if the system is at fault and not the image)."""

    def __init__(self, split: Split, transform):
        self.split, self.transform = split, transform

    def __getitem__(self, i):
        path = self.split.root / self.split.names[i]
        try:
            return self.transform(read_image(path)), "", False
        except Exception as error:  # Pillow raises anything from OSError to SyntaxError
            systems = isinstance(error, MemoryError) or bool(getattr(error, "errno", None))
            why = str(error) if systems else f"{path} is no readable image ({error})"
            return self.transform(Image.new("RGB", (64, 64))), why or "out of memory", systems


def batches(split: Split, transform, start: int, end: int, pinned: bool = False):
    """Images `start` to `end`, BATCH at a time, as a DataLoader of what Decoded returns."""
    return torch.utils.data.DataLoader(
        Decoded(split, transform), batch_size=BATCH, sampler=range(start, end), pin_memory=pinned,
        num_workers=WORKERS, timeout=600 if WORKERS else 0)  # silent for ten minutes: an error
