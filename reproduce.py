"""Does DINOv2's class token, layer by layer, hold the ImageNet hierarchy? (after arXiv 2505.15970)

    python reproduce.py --layers all                    the built-in demo, under 3 minutes on a CPU
    python reproduce.py --layers all --data imagenet    the paper's job: dinov2_vitg14 on ImageNet, on one GPU

Four stages, each skipped where its work is already in the output folder:
    1. images -> class tokens of every asked-for layer     tokens/{train,val}/layer_NN.npy
    2. class tokens -> one sparse autoencoder a layer      saes/<settings>/layer_NN/
    3. latents -> reconstruction, probe, hierarchy         saes/<settings>/layer_NN/scores.json
    4. scores -> tables, claims, figures, report           results/

torchrun --nproc-per-node 8 reproduce.py ...  shares the images of stage 1 and the layers of stages 2 and 3 among GPUs.
"""
# In this file: settings, files, data, the demo, the stages, published SAEs, results, the plan, the run.
import argparse
import base64
import csv
import errno
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import re
import shutil
import socket
import stat
import sys
import time
import zipfile
import zlib
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from dataclasses import asdict
from datetime import timedelta
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
    import resource
except ImportError:  # Windows: there, two runs in one output folder are not told apart
    fcntl = resource = None

import numpy as np
import torch
from huggingface_hub import CommitOperationAdd, HfApi, get_token, snapshot_download
from PIL import Image
from safetensors.torch import load_file, save
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import CenterCrop
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from dinov2_hooks import (
    HEADER, HUB, Attention, BackboneError, Block, GrowingArray, SmallViT, blocks_of, checksum, class_tokens,
    eval_transform, load_backbone, record_class_tokens, relevancy_maps,
)
from metrics import (
    Profile, Scores, agreement_trend, linear_probe, neurons, probe_steps, profile_latents, reconstruction, rising_trend,
    score_hierarchy,
)
from sae import (
    SAE_FILES, ActivationBuffer, SAEError, SparseAutoencoder, Statistics, Trainer, Training, fast_precision,
    fitting_batch_size, new_sae, pool_bytes, step_flop, together, train_together,
)
from taxonomy import Taxonomy, TaxonomyError

IMAGE_ENDINGS = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
IMAGES_PER_STEP = 64  # through the backbone at once; ViT-g/14 then fits a card of 12 GB
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of this process, as torchrun says
WORKERS = max(1, min(os.cpu_count() or 1, 16) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # processes that read images
VAL_BATCH = 2048  # tokens scored at once
COMMIT_SECONDS = 30  # how often a stage under way is put on disk; an epoch of training is not parted


class InputError(ValueError):
    """Data or settings that the run cannot go on with: one sentence that names the thing and the way out."""


# ---------------------------------------------------------------------------------------------------------------------
# settings


def parse_settings(argv=None) -> argparse.Namespace:
    def number(kind, low, high=math.inf, above=False):
        def parse(text):
            try:
                value = kind(text)
            except ValueError:
                value = math.nan
            if not (low < value if above else low <= value) or not value <= high or value == math.inf:
                bound = f"{'above' if above else 'at least'} {low}" + (f" and at most {high}" if high < math.inf else "")
                raise argparse.ArgumentTypeError(f"{text} is not {'a whole' if kind is int else 'a'} number {bound}")
            return value
        return parse

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS, allow_abbrev=False
    )
    add = parser.add_argument
    add("--layers", default="all", help="blocks, from 0: all, last, 0-11 or 3,7,11 (default: all)")
    add("--data", help="folder with train/ and val/ of wnid folders, or Kaggle's ImageNet (default: $IMAGENET_DIR, "
        "./imagenet, else the built-in demo)")
    add("--backbone", help="entry point of the hub: dinov2_vits14, dinov2_vitb14, dinov2_vitl14, dinov2_vitg14, each "
        "also with _reg (default: dinov2_vitg14, the paper's)")
    add("--hub", help=f"torch.hub repository, or a local folder with a hubconf.py (default: {HUB})")
    add("--out", help="output folder (default: runs/<data>-<backbone>)")
    add("--expansion", type=number(int, 1), default=8, help="SAE latents per dimension of the token (default: 8)")
    add("--l1", type=number(float, 0), default=0.1, help="λ, the weight of the latents' L1 norm (default: 0.1)")
    add("--inputs", choices=["centred", "raw"], default="centred", help="what the SAE sees: tokens minus their mean, or "
        "as they come; both over one scalar (default: centred)")
    add("--epochs", type=number(int, 1), default=50, help="of SAE training (default: 50)")
    add("--batch-size", type=number(int, 1), help="of SAE training (default: 4096; smaller where that leaves few steps)")
    add("--lr", type=number(float, 0, 1, above=True), default=4e-4, help="of SAE training (default: 4e-4)")
    add("--top-k", type=number(int, 2), default=16, help="top images of a latent (default: 16)")
    add("--response-rate", type=number(float, 0, 1, above=True), default=0.5, help="θ: a latent responds to a class if it "
        "fires on this share of its images (default: 0.5)")
    add("--images-per-class", type=number(int, 1), help="use no more training images of a class (default: all)")
    add("--skip-bad-images", action="store_true", help="list images that do not decode and go on without them")
    add("--plan", action="store_true", help="say what the run would write, compute and take on this machine, and end")
    add("--saes", metavar="USER/NAME", help="score published SAEs instead of training: from the Hub, or a folder of layer_NN")
    add("--push-to-hub", metavar="USER/NAME", help="publish the SAEs and results on the Hugging Face Hub at the end")
    add("--device", choices=["cuda", "cpu"], help="(default: cuda where there is one)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of SAE training, probes and shuffled labels (default: 0)")
    settings = parser.parse_args(argv)
    if not re.fullmatch(r"all|last|\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*", str(settings.layers)):
        parser.error(f"--layers {settings.layers}: give all, last, a range like 0-11, or a list like 3,7,11")
    if settings.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here; leave --device out, or give --device cpu")
    settings.device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return settings


def parse_layers(text: str, depth: int) -> list[int]:
    """"all", "last", "0-3", "1,4-6" -> layer numbers, in order and each once."""
    if text in ("all", "last"):
        return list(range(depth)) if text == "all" else [depth - 1]
    layers = set()
    for part in text.split(","):
        first, last = int(part.partition("-")[0]), int(part.rpartition("-")[2])
        if last < first:
            raise InputError(f"--layers {text}: the range {part} is empty")
        if last >= depth:
            raise InputError(f"--layers {text}: layer {last} is out of range, the backbone has layers 0 to {depth - 1}")
        layers |= set(range(first, last + 1))
    return sorted(layers)


# ---------------------------------------------------------------------------------------------------------------------
# files: one way to write them, one way to tell whether what is there may be used


class Stale(InputError):
    """A file that was made from something else than is asked for now, or that is damaged."""


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on disk for good."""
    if os.name != "nt":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def whole(path: Path):
    """Yields PATH.part, where a file or a folder is to be written; then, on disk for good, it takes its name."""
    part = path.with_name(path.name + ".part")
    shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    yield part
    for written in [part, *part.rglob("*")]:
        sync(written)
    if path.is_dir():
        shutil.rmtree(path)
    part.replace(path)
    sync(path.parent)


def to_json(content) -> str:
    """NaN becomes null."""
    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(content), indent=1)


def write_record(path: Path, identity: dict, **content) -> dict:
    """Write what was made, with all that it was made from (`identity`) and a checksum; returns it as it will be read.

    `files`, if given, are the `checksum`s of files beside it.
    """
    record = {"identity": identity, **content}
    with whole(path) as part:
        part.write_text(to_json({"crc32": zlib.crc32(to_json(record).encode()), **record}) + "\n")
    return json.loads(to_json(record))


def read_record(path: Path, identity: dict) -> dict | None:
    """What write_record wrote, or None where there is nothing. Raises Stale if it was made from something else than
    `identity`, or it or one of its files is damaged."""
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_bytes())
        crc = record.pop("crc32")
    except (ValueError, KeyError, AttributeError):
        record, crc = None, None
    if record is None or crc != zlib.crc32(to_json(record).encode()):
        raise Stale(f"{path} is damaged")
    check_identity(path, record["identity"], identity)
    for name, known in record.get("files", {}).items():
        if not (path.parent / name).is_file() or checksum(path.parent / name) != known:
            raise Stale(f"{path.parent / name} is damaged")
    return record


def check_identity(path: Path, known: dict, asked: dict) -> None:
    asked = json.loads(to_json(asked))
    differing = [key for key in {**known, **asked} if known.get(key) != asked.get(key)]
    if differing:
        changes = "; ".join(f"{key} was {known.get(key)} and is now {asked.get(key)}" for key in differing)
        raise Stale(f"{path} was made with other settings ({changes})")


def usable(path: Path, identity: dict) -> dict | None:
    """read_record of what can be made again for little; None, with a word why, where it has to be."""
    try:
        return read_record(path, identity)
    except Stale as stale:
        tqdm.write(f"      {stale}: it is made again")
        return None


def code_of(*parts) -> str:
    """A hash over the source of functions, classes or modules (by name), comments and blank lines aside."""
    def source(part):
        try:
            return inspect.getsource(sys.modules[part] if isinstance(part, str) else part)
        except (OSError, TypeError):  # compiled, or made while running
            return repr(part)

    code = "\n".join(re.sub(r"\s*(#.*)?$", "", source(part), flags=re.M).strip() for part in parts)
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def now_and_then(write):
    """`write`, which then does nothing when called again within COMMIT_SECONDS."""
    last = time.monotonic()

    def commit(state):
        nonlocal last
        if time.monotonic() - last >= COMMIT_SECONDS:
            write(state)
            last = time.monotonic()

    return commit


def wait_for_all() -> None:
    """Until every process of this torchrun is here; if one has failed, and said why, end."""
    if WORLD > 1:
        try:
            torch.distributed.barrier()
        except RuntimeError:
            sys.exit(1)


@contextmanager
def held(out: Path):
    """One run at a time in an output folder. The lock ends with the process, however that ends."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "a+") as file:
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            holder = file.read() or "another run"
            raise InputError(f"{out} is in use by {holder}: wait for it to end, or give another --out") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        yield


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk, quota, file size limit


@contextmanager
def room(out: Path, needed: dict[str, int]):
    """A disk too full for the bytes `needed`, by part, is an InputError: beforehand where it can be told, else when it is."""
    parts = ", ".join(f"{size(count)} of {name}" for name, count in needed.items() if count)
    free = shutil.disk_usage(next(place for place in (out, *out.resolve().parents) if place.exists())).free
    if sum(needed.values()) > free:
        raise InputError(f"not enough disk: {parts} are to go to {out}, where {size(free)} are free; make room there, "
                         "choose another --out, fewer --layers or a lower --images-per-class")
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise InputError(f"the disk is full ({error}): {parts} were to go to {out} when this run began; make room there "
                         "and give the same command again, which goes on from here") from error


def size(count: float) -> str:
    """bytes -> "3.9 GB" """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


# ---------------------------------------------------------------------------------------------------------------------
# data


class Split:
    """The images of a split: paths relative to a root, classes by number, and their order in the recorded tokens."""

    def __init__(self, root: Path, images: list[tuple[str, int]]):
        self.root = root
        self.names = [name for name, _ in images]
        self.labels = [label for _, label in images]

    def __len__(self):
        return len(self.names)

    def batches(self, transform, device: str, start: int, end: int):
        """Batches (images, labels, ids) of images `start` to `end` for record_class_tokens, each with a list of what went
        wrong: a sentence for an image that does not decode, an exception for one that cannot be read at all."""
        return torch.utils.data.DataLoader(
            _Decoded(self, transform), batch_size=IMAGES_PER_STEP, sampler=range(start, end), collate_fn=_collate,
            pin_memory=device == "cuda", num_workers=WORKERS,
            timeout=600 if WORKERS else 0,  # a process silent for ten minutes ends the run
        )


class _Decoded(torch.utils.data.Dataset):
    def __init__(self, split: Split, transform):
        self.split, self.transform = split, transform

    def __getitem__(self, i):
        path = self.split.root / self.split.names[i]
        try:
            return self.transform(read_image(path)), self.split.labels[i], i
        except Exception as error:  # Pillow raises anything from OSError to SyntaxError on a broken file
            if isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno:
                return error  # the disk's fault, or the system's, and not the image's
            return f"{path} is no readable image ({error})"


def _collate(items):
    good = [item for item in items if isinstance(item, tuple)]
    images = torch.stack([image for image, _, _ in good]) if good else torch.empty(0)
    wrong = [item for item in items if not isinstance(item, tuple)]
    return images, torch.tensor([label for _, label, _ in good]), torch.tensor([i for _, _, i in good]), wrong


def read_image(path) -> Image.Image:
    """Any image Pillow reads (grey, 16-bit, CMYK, palette, with alpha; the first frame of several) as RGB."""
    with Image.open(path) as image:
        if max(image.size) > 100 * min(image.size):
            raise ValueError(f"{image.size[0]} x {image.size[1]} pixels, which the resizing would make too large for memory")
        if image.mode.startswith("I;16"):
            image = image.point(lambda value: value / 256, "L") if image.mode == "I;16" else image.convert("I")
        if "transparency" in image.info:
            image = image.convert("RGBA")  # or Pillow warns
        return image.convert("RGB")


def find_images(data: str, images_per_class: int | None) -> tuple[Split, Split, list[str], list[str]]:
    """The train and val images of a folder, its classes (sorted wnids), and remarks for the user.

    Layouts: train/ and val/ of wnid folders, images at any depth inside; a flat val/ with LOC_val_solution.csv
    (Kaggle's ImageNet) or val_annotations.txt (Tiny ImageNet); no val/, then a fixed 10% of each class is held out.
    Train rows are in a fixed random order, which ActivationBuffer counts on.
    """
    root = Path(data).expanduser()
    if not root.is_dir():
        raise InputError(f"--data {data}: no such folder")
    kaggle = root / "ILSVRC/Data/CLS-LOC"
    base = kaggle if kaggle.is_dir() else root
    train_folder, val_folder = base / "train", base / "val"
    if not train_folder.is_dir():
        if val_folder.is_dir():
            raise InputError(f"--data {data}: it has a val folder but no train folder")
        train_folder = base
    remarks = []
    train = images_by_class(train_folder)
    classes = sorted(train)
    if len(classes) < 2:
        raise InputError(f"--data {data}: {len(classes)} class folders in {train_folder}, at least two are needed")
    rng = np.random.default_rng(0)  # not --seed: the split and the order belong to the data
    if val_folder.is_dir():
        val = labelled_flat_images(val_folder) or images_by_class(val_folder)
        if set(val) != set(train):
            wnid = sorted(set(val) ^ set(train))[0]
            has, lacks = ("val", "train") if wnid in val else ("train", "val")
            raise InputError(f"--data {data}: class {wnid} is in {has} but not in {lacks}; both need the same classes")
    else:
        remarks.append("there is no val folder: a fixed 10% of each class is held out for evaluation")
        val = {}
        for wnid in classes:
            if len(train[wnid]) < 2:
                raise InputError(f"--data {data}: class {wnid} has one image, two are needed to hold one out for evaluation")
            order = rng.permutation(len(train[wnid]))
            held_out = max(1, round(len(order) / 10))
            val[wnid] = [train[wnid][i] for i in sorted(order[:held_out])]
            train[wnid] = [train[wnid][i] for i in sorted(order[held_out:])]
    if images_per_class:
        train = {w: [names[i] for i in sorted(rng.permutation(len(names))[:images_per_class])] for w, names in train.items()}
    listed = [(name, label) for label, wnid in enumerate(classes) for name in train[wnid]]
    listed = [listed[i] for i in rng.permutation(len(listed))]
    in_val = [(name, label) for label, wnid in enumerate(classes) for name in val[wnid]]
    return Split(train_folder, listed), Split(val_folder if val_folder.is_dir() else train_folder, in_val), classes, remarks


def images_by_class(folder: Path) -> dict[str, list[str]]:
    """wnid -> image paths relative to `folder`, sorted, from the wnid folders in it."""
    found = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if not entry.is_dir() or entry.name.startswith("."):
            continue
        if not re.fullmatch(r"n\d{8}", entry.name):
            raise InputError(f"{entry.path} is no class: class folders are named by wnid, as n02085620; rename or move it")
        names = [
            os.path.relpath(os.path.join(at, name), folder)
            for at, _, files in os.walk(entry.path, onerror=_raise)
            for name in files
            if name.lower().endswith(IMAGE_ENDINGS) and not name.startswith(".")
        ]
        if not names:
            raise InputError(f"{entry.path} holds no images: fill or remove the class folder")
        found[entry.name] = sorted(names)
    return found


def _raise(error: OSError):
    raise error  # os.walk would pass over a folder that cannot be read


def labelled_flat_images(val: Path) -> dict[str, list[str]] | None:
    """wnid -> image paths in a flat val folder, labelled by a list in or above it; None where there is no such list."""
    if any(re.fullmatch(r"n\d{8}", entry.name) for entry in os.scandir(val)):
        return None
    places = (val, *list(val.parents)[:4])  # Kaggle's list lies beside ILSVRC/Data/CLS-LOC/val's ILSVRC
    lists = [place / name for place in places for name in ("LOC_val_solution.csv", "val_annotations.txt")]
    listed = next((path for path in lists if path.is_file()), None)
    if listed is None:
        return None
    try:
        with open(listed, newline="") as file:
            if listed.suffix == ".csv":  # ImageId,PredictionString: the latter wnid x y w h, repeated
                pairs = [(row["ImageId"], row["PredictionString"].split()[0]) for row in csv.DictReader(file)]
            else:  # name <tab> wnid <tab> box
                pairs = [(Path(row[0]).stem, row[1]) for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    except (KeyError, IndexError, AttributeError, ValueError, csv.Error) as error:
        raise InputError(f"{listed} is no list of validation labels, an image and its wnid in each line") from error
    labels = {}
    for name, wnid in pairs:
        if labels.setdefault(name, wnid) != wnid:
            raise InputError(f"{listed} gives {name} two classes, {labels[name]} and {wnid}")
    folder = val / "images" if (val / "images").is_dir() else val
    found = {}
    for name in sorted(name for name in os.listdir(folder) if name.lower().endswith(IMAGE_ENDINGS)):
        if Path(name).stem not in labels:
            raise InputError(f"{folder / name} has no label in the list of validation labels")
        found.setdefault(labels[Path(name).stem], []).append(os.path.relpath(folder / name, val))
    return found


def fingerprint(*splits: Split) -> str:
    """A hash over the names, sizes, labels and order of all images."""
    digest = hashlib.sha256()
    for split in splits:
        for name, label in zip(split.names, split.labels):
            about = os.stat(split.root / name)
            if not stat.S_ISREG(about.st_mode):  # a pipe would be waited for
                raise InputError(f"{split.root / name} is no file: remove it, or give it another ending")
            digest.update(f"{name}\0{label}\0{about.st_size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# the built-in demo: a hierarchy that is known, because it was drawn

DEMO_CLASSES = (  # 30 ImageNet classes from several branches of WordNet
    "n01531178 n01532829 n01534433 n01817953 n01818515 n01820546 "  # finches, parrots
    "n02101556 n02102318 n02102480 n02123045 n02123394 n02123597 "  # spaniels, cats
    "n03100240 n03594945 n03670208 n03345487 n03417042 n03930630 "  # cars, trucks
    "n02676566 n02787622 n02992211 n03110669 n03372029 n03394916 "  # stringed and wind instruments
    "n07747607 n07753113 n07753592 n12998815 n13037406 n13040303"  # fruit, fungi
).split()
DEMO_HUB = "built in"
DEMO_KINDS = 5  # of traits: hue, shape, texture, rim, mark
DEMO_SIZE, DEMO_TRAIN, DEMO_VAL = 32, 150, 50  # pixels a side, images a class
DEMO_STEPS, DEMO_BATCH = 500, 64  # of the ViT's training, on images drawn anew for each step
DEMO_HIDDEN = 0.05  # how often a texture, rim or mark is not to be seen; then only the hypernym can be told
DEMO_NOTE = (
    "This is the built-in demo: drawn images with a planted hierarchy and a small ViT trained on the spot. Its numbers "
    "check the pipeline and are not the paper's. The paper's job: python reproduce.py --layers all --data <ImageNet>"
)


def demo_traits(tree: Taxonomy) -> torch.Tensor:
    """(C, kinds) int: every node below the root gives all classes below it one trait; -1 where a kind is not given.

    From the largest node to the smallest, each takes the first kind that its classes have none of yet, and in it a
    value of its own; a single class takes its number among its siblings.
    """
    sizes = tree.leaves.sum(1)
    nodes = [v for v in np.flatnonzero(tree.lowest == np.arange(len(sizes))) if sizes[v] < len(tree.classes)]
    nodes.sort(key=lambda v: -sizes[v])
    traits = np.full((len(tree.classes), DEMO_KINDS), -1)
    values_used = [0] * DEMO_KINDS
    for v in nodes:
        below = tree.leaves[v]
        kind = next(kind for kind in range(DEMO_KINDS) if (traits[below, kind] == -1).all())
        if sizes[v] > 1:
            traits[below, kind] = values_used[kind]
            values_used[kind] += 1
        else:
            parent = min((u for u in nodes if sizes[u] > 1 and (tree.leaves[u] & below).any()), key=lambda u: sizes[u])
            traits[below, kind] = np.flatnonzero(tree.leaves[parent]).tolist().index(int(below.argmax()))
    return torch.from_numpy(traits)


def draw(traits: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Traits (B, kinds) -> images (B, 3, S, S) uint8, and where the object lies (B, S, S) bool.

    One object at a random place and size on a ground of random hue, under pixel noise. Its hue is told from the
    ground's, its rim's and mark's from its own, so that no single patch gives a class away.
    """
    B, S = len(traits), DEMO_SIZE
    hidden = (torch.rand(traits.shape, generator=generator) < DEMO_HIDDEN) & torch.tensor([False, False, True, True, True])
    hue, shape, texture, rim, mark = torch.where(hidden, -1, traits).T[:, :, None, None]  # (B, 1, 1) each

    def uniform(low, high):
        return torch.rand(B, 1, 1, generator=generator) * (high - low) + low

    def colour(hue):  # (B, 1, 1) in turns -> (B, 3, 1, 1)
        return 0.5 + 0.5 * torch.cos(2 * math.pi * (hue[:, None] - torch.tensor([0, 1 / 3, 2 / 3])[:, None, None]))

    radius = uniform(8, 10.5)
    along = torch.arange(S) + 0.5
    x = ((along[None, None, :] - radius - uniform(0, 1) * (S - 2 * radius)) / radius).expand(B, S, S)
    y = ((along[None, :, None] - radius - uniform(0, 1) * (S - 2 * radius)) / radius).expand(B, S, S)
    ax, ay = x.abs(), y.abs()
    shapes = torch.stack([  # distance from the centre, 1 at the edge, of each shape
        (x * x + y * y).sqrt(),  # disc
        torch.maximum(ax, ay) * 1.15,  # square
        (ax + ay) * 0.85,  # diamond
        torch.maximum(torch.minimum(ax, ay) * 2.6, torch.maximum(ax, ay)),  # cross
    ])
    distance = shapes[shape.flatten(), torch.arange(B)]  # (B, S, S)
    inside = distance < 1

    angle, cycles = (texture % 4) * math.pi / 4, torch.where(texture < 4, 1.0, 2.0)
    stripes = torch.sin(2 * math.pi * cycles * (x * angle.cos() + y * angle.sin()) + uniform(0, 2 * math.pi))
    shade = 0.65 + 0.35 * torch.where(texture >= 0, stripes, 0)
    ground_hue = uniform(0, 1)
    body_hue = ground_hue + 1 / 6 + hue / 3 + uniform(-0.05, 0.05)
    image = 0.325 + 0.35 * colour(ground_hue) + uniform(-0.15, 0.15)[:, None]
    image = torch.where(inside[:, None], colour(body_hue) * shade[:, None], image)
    image = torch.where(((distance >= 0.75) & inside & (rim >= 0))[:, None], colour(body_hue + (rim + 1) / 7), image)
    image = torch.where(((x * x + y * y < 0.1) & (mark >= 0))[:, None], colour(body_hue + (mark + 1) / 4), image)
    image = image + 0.05 * torch.randn(B, 3, S, S, generator=generator)
    return (image.clamp(0, 1) * 255).byte(), inside


def make_demo(folder: Path) -> None:
    """Draw the demo's train/ and val/ and train its ViT on images drawn likewise, unless all of it is there."""
    constants = {name: value for name, value in globals().items() if name.startswith("DEMO_") and name != "DEMO_NOTE"}
    identity = {**constants, "code": code_of(demo_traits, draw, make_demo, train_demo_vit, SmallViT, Block, Attention)}
    if read_record(folder / "demo.json", identity):
        return
    tree = Taxonomy.from_wnids(DEMO_CLASSES)
    traits = demo_traits(tree)
    for seed, (split, count) in enumerate([("train", DEMO_TRAIN), ("val", DEMO_VAL)]):
        generator = torch.Generator().manual_seed(seed)
        for label, node in enumerate(tree.classes):
            place = folder / "images" / split / tree.wnids[node]
            place.mkdir(parents=True, exist_ok=True)
            for i, image in enumerate(draw(traits[label].expand(count, -1), generator)[0]):
                to_pil_image(image).save(place / f"{i:03d}.png")
    vit = train_demo_vit(traits, DEMO_STEPS)
    with whole(folder / "vit.safetensors") as part:
        part.write_bytes(save(vit.state_dict()))
    write_record(folder / "demo.json", identity, files={"vit.safetensors": checksum(folder / "vit.safetensors")})


def train_demo_vit(traits: torch.Tensor, steps: int) -> SmallViT:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(2)
    vit, normalise = SmallViT(len(traits), DEMO_SIZE), eval_transform(DEMO_SIZE, DEMO_SIZE).transforms[-1]
    optimizer = torch.optim.AdamW(vit.parameters(), weight_decay=0.05, fused=True)
    warm_up = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.5e-3, total_steps=DEMO_STEPS, pct_start=0.15)
    for _ in (bar := tqdm(range(steps), "      the demo's ViT", unit="step", disable=steps < DEMO_STEPS)):
        labels = torch.randint(len(traits), (DEMO_BATCH,), generator=generator)
        images = normalise(draw(traits[labels], generator)[0].float() / 255)
        loss = cross_entropy(vit(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warm_up.step()
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    return vit


def open_backbone(settings, out: Path):
    """The model, and the transform its images go through."""
    if settings.hub == DEMO_HUB:
        vit = SmallViT(len(DEMO_CLASSES), DEMO_SIZE)
        vit.load_state_dict(load_file(out / "vit.safetensors"))
        return vit.eval().requires_grad_(False).to(settings.device), eval_transform(DEMO_SIZE, DEMO_SIZE)
    if settings.plan:  # what the weights are takes no time, and need not be fetched
        with suppress(BackboneError):
            return load_backbone(settings.backbone, settings.hub, settings.device, pretrained=False), eval_transform()
    return load_backbone(settings.backbone, settings.hub, settings.device), eval_transform()


# ---------------------------------------------------------------------------------------------------------------------
# stages


def identify(model, transform, backbone: str) -> dict:
    """What class tokens are made from, besides images: weights, transform, code."""
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(name.encode() + tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    kinds = sorted({type(module) for module in model.modules() if not type(module).__module__.startswith("torch.")}, key=str)
    return {
        "backbone": backbone, "weights": weights.hexdigest()[:16], "transform": str(transform),
        "code": code_of(class_tokens, blocks_of, record_class_tokens, read_image), "backbone_code": code_of(*kinds),
    }


def layer_name(layer: int) -> str:
    return f"layer_{layer:02d}"


def record_tokens(settings, out: Path, model, transform, splits: dict[str, Split], layers: list[int], identity: dict) -> dict:
    """Stage 1: the class tokens of all asked-for layers, in one pass a split, shared by all processes. Returns their
    checksums by file, as "train/layer_00.npy", and what it left out of each split."""
    folder = out / "tokens"
    record = read_record(folder / "tokens.json", identity) or {"tokens": {}, "left_out": {}}
    for name, split in splits.items():
        there = lambda file: f"{name}/{file}" in record["tokens"] and (folder / name / file).is_file()
        missing = [n for n in layers if not all(map(there, (f"{layer_name(n)}.npy", "labels.npy", "ids.npy")))]
        shares = [folder / name / f"rank_{rank}_of_{WORLD}" for rank in range(WORLD)] if WORLD > 1 else [folder / name]
        if missing:
            record_share(settings, shares[RANK], model, transform, split, missing, identity)
        wait_for_all()
        if missing and RANK == 0:
            passes = [json.loads((share / "pass.json").read_bytes()) for share in shares]
            checksums = passes[0]["checksums"]
            if WORLD > 1:
                parts = {file: {share / file: one["checksums"][file] for share, one in zip(shares, passes)} for file in checksums}
                checksums = {file: join_arrays(part, folder / name / file) for file, part in parts.items()}
            left_out = [error for one in passes for error in one["left_out"]]
            if len(left_out) == len(split):
                raise InputError(f"none of the {len(split)} images of {split.root} decodes; the first: {left_out[0]}")
            if left_out:
                print(f"      left out {len(left_out)} images that do not decode:", *left_out, sep="\n        ")
            if record["left_out"].setdefault(name, left_out) != left_out:
                raise InputError(f"other images of {split.root} decode now than when the tokens in {folder} were recorded: "
                                 "restore them, or give another --out")
            tokens = record["tokens"] | {f"{name}/{file}": crc for file, crc in checksums.items()}
            record = write_record(folder / "tokens.json", identity, tokens=tokens, left_out=record["left_out"])
            (folder / name / "pass.json").unlink(missing_ok=True)
        if RANK == 0:
            for share in folder.glob(f"{name}/rank_*"):
                shutil.rmtree(share)
        wait_for_all()
    return read_record(folder / "tokens.json", identity)


def record_share(settings, folder: Path, model, transform, split: Split, layers: list[int], identity: dict) -> None:
    """This process's share of a pass over a split, or the rest of it; pass.json says how far it is."""
    steps = -(-len(split) // IMAGES_PER_STEP)  # whole ones, so that an image is in the same batch whoever has it
    start, end = (min(len(split), rank * steps // WORLD * IMAGES_PER_STEP) for rank in (RANK, RANK + 1))
    identity = {**identity, "layers": layers, "images": [start, end], "device": settings.device}
    state = usable(folder / "pass.json", identity) or {"seen": start, "left_out": [], "written": None, "checksums": None}
    if state["checksums"]:
        return
    seen, left_out = state["seen"], state["left_out"]

    def batches():
        nonlocal seen
        for images, labels, ids, wrong in split.batches(transform, settings.device, seen, end):
            for error in wrong:
                if isinstance(error, Exception):
                    raise error
                if not settings.skip_bad_images:
                    raise InputError(f"{error}; mend or remove the image, or leave such images out with --skip-bad-images")
            left_out.extend(wrong)
            seen += len(ids) + len(wrong)
            bar.update(seen - start - bar.n)
            if len(ids):
                yield images, labels, ids

    @now_and_then
    def commit(written):
        write_record(folder / "pass.json", identity, seen=seen, left_out=left_out, written=written(), checksums=None)

    title = f"      {(folder if WORLD == 1 else folder.parent).name}"
    with tqdm(total=end - start, initial=seen - start, desc=title, unit="image", disable=RANK > 0) as bar:
        checksums = record_class_tokens(model, batches(), layers, folder, split.names, commit, state["written"])
    sync(folder)
    write_record(folder / "pass.json", identity, seen=seen, left_out=left_out, written=None, checksums=checksums)


def join_arrays(parts: dict[Path, int], to: Path) -> int:
    """One .npy of the rows of several, given with their checksums; returns its own."""
    for path, crc in parts.items():
        if checksum(path) != crc:
            raise InputError(f"{path} is damaged: delete {path.parent}, and the same command records it anew")
    arrays = [np.load(path, mmap_mode="r") for path in parts if path.stat().st_size > HEADER]  # else it has no rows
    joined = GrowingArray(to, arrays[0].dtype, arrays[0].shape[1:])
    for array in arrays:
        for start in range(0, len(array), 8192):
            joined.append(array[start : start + 8192])
    joined.sync()
    return joined.finish()


def intact(out: Path, recorded: dict, file: str) -> Path:
    """The path of a recorded file, as "train/layer_00.npy", after a look at whether it still is what was recorded."""
    path = out / "tokens" / file
    if checksum(path) != recorded["tokens"][file]:
        raise InputError(f"{path} is damaged: delete it, and the same command records it anew")
    return path


def saes_folder(out: Path, training: Training) -> Path:
    return out / "saes" / "_".join(f"{key}-{value}" for key, value in asdict(training).items())


def train_saes(
    settings, out: Path, training: Training, at_once: int, layers: list[int], about: dict, recorded: dict
) -> dict[int, Path]:
    """Stage 2: one SAE a layer, `at_once` layers in one step; returns the SAEs' folders by layer. These lie in one that is
    named by the settings of the training."""
    parent, code = saes_folder(out, training), code_of("sae")
    folders = {layer: parent / layer_name(layer) for layer in layers}
    identities = {
        layer: {**asdict(training), "layer": layer, "tokens": recorded["tokens"][f"train/{layer_name(layer)}.npy"], "code": code}
        for layer in layers
    }
    training_file = lambda layer: parent / f"{layer_name(layer)}_training.npz"
    missing = [layer for layer in layers if not usable(folders[layer] / "sae.json", identities[layer])]
    for layer in set(layers) - set(missing):
        training_file(layer).unlink(missing_ok=True)
    mine = missing[RANK::WORLD]
    with tqdm(total=0, unit="step", disable=not mine or RANK > 0) as bar:
        for place in range(0, len(mine), at_once):
            group = mine[place : place + at_once]
            bar.set_description(f"      layer {group[0]}" + f" to {group[-1]}" * (len(group) > 1))
            saved = training_file(group[-1])  # whose SAE is the last to be written: as long as one lacks, the state is kept
            theirs = {layer_name(layer): identities[layer] for layer in group}

            def progress(step, steps, loss):
                bar.total = steps * len(mine)
                bar.update(steps * place + step * len(group) - bar.n)

            checkpoint = now_and_then(functools.partial(write_states, saved, theirs))
            buffers = [ActivationBuffer(intact(out, recorded, f"train/{name}.npy"), settings.device) for name in theirs]
            abouts = [{**about, **asdict(training), "layer": layer} for layer in group]
            saes = train_together(buffers, training, abouts, progress, checkpoint, read_states(saved, theirs))
            for layer, sae in zip(group, saes):
                with whole(folders[layer]) as part:
                    sae.cpu().save_pretrained(part)
                    files = {path.name: checksum(path) for path in part.iterdir()}
                    write_record(part / "sae.json", identities[layer], files=files)
            saved.unlink(missing_ok=True)
    wait_for_all()
    return folders


def write_states(path: Path, identities: dict[str, dict], states: dict[str, torch.Tensor]) -> None:
    """The state of a training together, a row of each array for each of `identities`; an .npz has a checksum of each."""
    with whole(path) as part, open(part, "wb") as file:
        np.savez(file, identities=np.array(to_json(identities)), **{name: state.cpu().numpy() for name, state in states.items()})


def read_states(path: Path, identities: dict[str, dict]) -> dict[str, torch.Tensor] | None:
    """The rows of `identities` of what write_states wrote; None where there is nothing, or, with a word, nothing of use."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            known = json.loads(str(file["identities"]))
            for name, identity in identities.items():
                check_identity(path, known.get(name, {}), identity)
            rows = [list(known).index(name) for name in identities]
            return {name: torch.from_numpy(file[name][rows]) for name in file.files if name != "identities"}
    except Stale as stale:
        tqdm.write(f"      {stale}: its training starts anew")
    except (OSError, ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        tqdm.write(f"      {path} is damaged ({error}): its training starts anew")


def load_sae(folder: Path, device: str) -> SparseAutoencoder:
    return SparseAutoencoder.from_pretrained(folder).to(device)


def score_layer(settings, out: Path, folder: Path, tree: Taxonomy, layer: int, recorded: dict) -> dict:
    """Stage 3 for one layer: its row of layers.csv, its rows of hierarchy.csv, and every hypernym's best latent."""
    used = {split: [f"{split}/{file}.npy" for file in (layer_name(layer), "labels")] for split in ("train", "val")}
    tokens_used = {"tokens": [recorded["tokens"][file] for files in used.values() for file in files], "seed": settings.seed}
    identity = tokens_used | {
        "top_k": settings.top_k, "response_rate": settings.response_rate, "sae": checksum(folder / "model.safetensors"),
        "taxonomy": zlib.crc32(np.packbits(tree.leaves).tobytes()),
        "code": code_of("metrics", "taxonomy", "sae", score_layer, best_latents),
    }
    if known := usable(folder / "scores.json", identity):
        return known
    tokens = {split: ActivationBuffer(intact(out, recorded, files[0]), settings.device) for split, files in used.items()}
    labels = {split: np.load(intact(out, recorded, files[1])) for split, files in used.items()}
    sae = load_sae(folder, settings.device)
    statistics = tokens["train"].statistics()
    about = {"inputs": "centred", "seed": 0, **(sae.about or {})}
    alike = Training(expansion=len(sae.b_enc) // tokens["train"].width, inputs=about["inputs"], seed=about["seed"])
    untrained = new_sae(statistics, alike).to(settings.device)
    mean = statistics.mean.float().to(settings.device)
    shuffled = np.random.default_rng(settings.seed).permutation(labels["val"])

    probe_file = out / f"tokens/probes/{layer_name(layer)}_seed-{settings.seed}.json"  # a probe does not depend on the SAE
    probe_made_from = {**tokens_used, "code": code_of(linear_probe)}
    probe = usable(probe_file, probe_made_from) or write_record(probe_file, probe_made_from, top1=linear_probe(
        tokens["train"].tokens, labels["train"], tokens["val"].tokens, labels["val"], settings.device, settings.seed
    ))
    row = {"layer": layer, "width": len(mean), "gamma": statistics.gamma, "probe_top1": probe["top1"]}
    row |= reconstruction(sae, tokens["val"].batches(VAL_BATCH))._asdict()
    hierarchy, hypernyms = [], {}
    for name, encode, labelings in [
        ("sae", sae.encode, {"true": labels["val"], "shuffled": shuffled}),
        ("neurons", neurons(mean), {"true": labels["val"]}),
        ("untrained", untrained.encode, {"true": labels["val"]}),
    ]:
        batches = tokens["val"].batches(VAL_BATCH)
        profiles = profile_latents(encode, batches, list(labelings.values()), len(tree.classes), settings.top_k)
        for labeling, profile in zip(labelings, profiles):
            scores = score_hierarchy(profile, tree, settings.response_rate)
            hierarchy.append({"layer": layer, "dictionary": name, "labels": labeling, **scores.summary()})
            if name == "sae":
                hypernyms[labeling] = best_latents(scores, profile, tree)
    return write_record(folder / "scores.json", identity, layers=row, hierarchy=hierarchy, hypernyms=hypernyms)


def best_latents(scores: Scores, profile: Profile, tree: Taxonomy) -> dict:
    """wnid of each hypernym that some latent responds to -> the latent that matches it best."""
    place = {latent: i for i, latent in enumerate(scores.latents.tolist())}
    return {
        tree.wnids[v]: {
            "match": float(match), "latent": latent, "lch": tree.wnids[scores.lch[place[latent]]],
            "coverage": float(scores.coverage[place[latent]]), "top_images": profile.top_images[latent].tolist(),
        }
        for v, match, latent in zip(scores.hypernyms, scores.hypernym_match, scores.hypernym_latent.tolist())
        if latent >= 0
    }


# ---------------------------------------------------------------------------------------------------------------------
# published SAEs: the Hugging Face Hub, or a folder


def fetch_saes(settings, out: Path, layers: list[int], width: int) -> dict[int, Path]:
    """Instead of stage 2: published SAEs, from a folder or the Hub, copied beside the run's own; their folders by layer."""
    source = Path(settings.saes).expanduser()
    if not source.is_dir():
        if not re.fullmatch(HUB_NAME, settings.saes):
            raise InputError(f"--saes {settings.saes}: no such folder, and not of the form USER/NAME on the Hub")
        wanted = [f"{layer_name(layer)}/{file}" for layer in layers for file in SAE_FILES]
        source = Path(on_the_hub("--saes", settings.saes, lambda: snapshot_download(settings.saes, allow_patterns=wanted)))
    folders = {}
    for layer in layers:
        files = [source / layer_name(layer) / file for file in SAE_FILES]
        if not all(file.is_file() for file in files):
            have = sorted(path.parent.name for path in source.glob("layer_*/model.safetensors"))
            has = f"only {', '.join(have)}: give --layers" if have else "and no other SAE either"
            raise InputError(f"--saes {settings.saes} has no {layer_name(layer)}, {has}")
        try:
            sae = SparseAutoencoder.from_pretrained(files[0].parent)
        except Exception as error:  # what a file from elsewhere may hold
            raise InputError(f"--saes {settings.saes}: {layer_name(layer)} is no SAE of this kit ({error})") from error
        if sae.W_enc.shape[1] != width:
            raise InputError(f"--saes {settings.saes}: {layer_name(layer)} is for tokens of width {sae.W_enc.shape[1]}, and "
                             f"{settings.backbone}'s have {width}")
        trained_on = (sae.about or {}).get("backbone", "an unknown backbone")
        if trained_on != settings.backbone and RANK == 0:
            tqdm.write(f"      {layer_name(layer)} was trained on {trained_on}, and is scored on {settings.backbone}")
        folders[layer] = out / "saes" / ("from_" + re.sub(r"[^\w.-]", "_", settings.saes)) / layer_name(layer)
        crcs = {file.name: checksum(file) for file in files}
        if RANK == 0 and not usable(folders[layer] / "sae.json", {"from": settings.saes, **crcs}):
            with whole(folders[layer]) as part:
                part.mkdir()
                for file in files:
                    shutil.copy(file, part / file.name)
                write_record(part / "sae.json", {"from": settings.saes, **crcs}, files=crcs)
    wait_for_all()
    return folders


def on_the_hub(option: str, repo: str, action):
    """action(), or one sentence on why the Hub would not."""
    try:
        return action()
    except Exception as error:  # huggingface_hub's own, and those of the HTTP library of its version
        status, said = getattr(getattr(error, "response", None), "status_code", None), str(error).partition("\n")[0]
        reason = {
            401: "the token is not valid, or the repository is not there: log in again with `hf auth login`",
            403: "the token may not do that: make one with the right to write, at https://huggingface.co/settings/tokens",
            404: "there is no such repository",
        }.get(status, f"the Hub cannot be reached, or refuses ({type(error).__name__}: {said})")
        raise InputError(f"{option} {repo}: {reason}") from error


def open_hub(repo: str) -> HfApi:
    """The Hub, where the right to write to `repo` has been tried: before the hours are spent."""
    if not re.fullmatch(HUB_NAME, repo):
        raise InputError(f"--push-to-hub {repo}: give USER/NAME")
    if get_token() is None:
        raise InputError(f"--push-to-hub {repo}: there is no token; log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    on_the_hub("--push-to-hub", repo, api.whoami)
    on_the_hub("--push-to-hub", repo, lambda: api.create_repo(repo, exist_ok=True))
    return api


def push(api, repo: str, out: Path, title: str, note: str, record: dict, saes: dict) -> None:
    """Publish SAEs, tables and figures, in one commit, under a card made from them."""
    own = ("data", "out", "hub")  # paths of this machine
    public = {**record, "settings": {key: value for key, value in record["settings"].items() if key not in own}}
    card = MODEL_CARD.format(
        repo=repo, title=title, note=note, layer=f"{record['layers'][-1]['layer']:02d}", layers=markdown(record["layers"]),
        claims=markdown(record["claims"]), settings=markdown([{"setting": k, "value": v} for k, v in public["settings"].items()]),
    )
    files = {f"{layer_name(layer)}/{name}": str(folder / name) for layer, folder in saes.items() for name in SAE_FILES}
    files |= {f"results/{path.name}": str(path) for path in (out / "results").glob("*.csv")}
    files |= {f"results/{path.name}": str(path) for path in (out / "results/figures").glob("*.png") if "latent_" not in path.name}
    files |= {"results/results.json": to_json(public).encode(), "README.md": card.encode("utf-8", "backslashreplace")}
    commit = [CommitOperationAdd(name, content) for name, content in files.items()]
    on_the_hub("--push-to-hub", repo, lambda: api.create_commit(repo, commit, commit_message=title))
    print(f"\nPublished: https://huggingface.co/{repo}")


HUB_NAME = r"[\w.-]+/[\w.-]+"  # USER/NAME
MODEL_CARD = """---
license: mit
tags: [sparse-autoencoder, vision, hierarchy]
---
# Sparse autoencoders of class tokens: {title}

{note} One SAE a layer, of the class token after each block, from the reproduction kit of *Analyzing Hierarchical Structure in
Vision Models with Sparse Autoencoders* (arXiv 2505.15970); not by the paper's authors.

```python
from sae import SparseAutoencoder  # the kit's sae.py
sae = SparseAutoencoder.from_pretrained("{repo}", subfolder="layer_{layer}")
z = sae.encode(x)  # raw class tokens (B, n) -> latents (B, m)
```

## Layers

{layers}

## Claims

{claims}

## Settings

{settings}
"""


# ---------------------------------------------------------------------------------------------------------------------
# results


def consistency(scores: list[dict], labels: str) -> np.ndarray:
    """(L, L) Jaccard of the sets of hypernyms matched in two layers; NaN where neither has any."""
    found = [{wnid for wnid, best in score["hypernyms"][labels].items() if best["match"] > 0.5} for score in scores]
    return np.array([[len(a & b) / len(a | b) if a | b else np.nan for b in found] for a in found])


def hypernym_rows(scores: list[dict], tree: Taxonomy) -> list[dict]:
    """Rows of hypernyms.csv, the most general first: where each hypernym emerges, and its best latent in any layer."""
    rows = []
    for v in sorted(tree.hypernyms, key=lambda v: (-tree.height[v], -tree.leaves[v].sum(), tree.wnids[v])):
        by_layer = [(score["layers"]["layer"], score["hypernyms"]["true"].get(tree.wnids[v])) for score in scores]
        by_layer = [(layer, best) for layer, best in by_layer if best]
        if tree.leaves[v].sum() > len(tree.classes) / 2:
            continue
        layer, best = max(by_layer, key=lambda item: item[1]["match"], default=(None, {}))
        rows.append({
            "wnid": tree.wnids[v], "name": tree.names[v], "classes": int(tree.leaves[v].sum()), "height": int(tree.height[v]),
            "emergence_layer": next((layer for layer, best in by_layer if best["match"] > 0.5), None),
            "best_layer": layer, "best_latent": best.get("latent"), "match": best.get("match", 0.0),
            "lch": tree.names[tree.wnids.index(best["lch"])] if best else None,
        })
    return rows


def check_claims(layers: list[dict], hierarchy: list[dict], agreement: np.ndarray, hypernyms: list[dict]) -> list[dict]:
    """The paper's qualitative claims on this run's numbers, and one of ours: rows of claims.csv.

    Each is a one-sided permutation test of Spearman's rho. Verdict: "holds" where p < 0.05, "contradicted" where the
    opposite has p < 0.05, else "open"; "open" too with too few layers to tell.
    """
    def column(name, labels="true"):
        return np.array([row[name] for row in hierarchy if row["dictionary"] == "sae" and row["labels"] == labels], float)

    depth = np.array([row["layer"] for row in layers])
    lch, lch_shuffled = (column("lch_height_pairwise", labels) for labels in ("true", "shuffled"))
    lchs, lchs_shuffled = (column("hypernyms_lch", labels) for labels in ("true", "shuffled"))
    matched, matched_shuffled = (column("hypernyms_matched", labels) for labels in ("true", "shuffled"))
    emerged = [row for row in hypernyms if row["emergence_layer"] is not None]
    tests = [
        (claim, f"layer and {statistic}", lambda sign, y=np.asarray(y, float): rising_trend(depth, sign * y))
        for claim, statistic, y in [
            ("category information grows with depth", "probe_top1", [row["probe_top1"] for row in layers]),
            ("early layers are easier to auto-encode", "nmse", [row["nmse"] for row in layers]),
            ("early layers need fewer active latents", "l0", [row["l0"] for row in layers]),
            ("latents grow more specific: LCH height falls", "-lch_height_pairwise", -lch),
            ("... by more than under shuffled labels", "lch_height_pairwise, shuffled - true", lch_shuffled - lch),
            ("more hypernyms are the LCH of some latent", "hypernyms_lch", lchs),
            ("... by more than under shuffled labels", "hypernyms_lch, true - shuffled", lchs - lchs_shuffled),
            ("more hypernyms are matched by some latent", "hypernyms_matched", matched),
            ("... by more than under shuffled labels", "hypernyms_matched, true - shuffled", matched - matched_shuffled),
        ]
    ]
    heights, emergence = ([row[key] for row in emerged] for key in ("height", "emergence_layer"))
    tests += [
        ("near layers agree more than far ones", "nearness and Jaccard, over pairs of layers (Mantel)",
         lambda sign: agreement_trend(sign * agreement)),
        ("beyond the paper: general hypernyms emerge earlier", f"height and -emergence_layer, over {len(emerged)} hypernyms",
         lambda sign: rising_trend(heights, -sign * np.array(emergence))),
    ]
    rows = []
    for claim, statistic, test in tests:
        trend = test(1)
        verdict = "holds" if trend.p_value < 0.05 else "contradicted" if test(-1).p_value < 0.05 else "open"
        rows.append({
            "claim": claim, "statistic": f"Spearman's rho of {statistic}", "value": trend.rho, "p_value": trend.p_value,
            "verdict": verdict,
        })
    return rows


def best_of(scores: list[dict], row: dict) -> dict:
    """What stage 3 kept of the latent in a row of hypernyms.csv."""
    in_layer = next(score for score in scores if score["layers"]["layer"] == row["best_layer"])
    return in_layer["hypernyms"]["true"][row["wnid"]]


def named_latents(rows: list[dict], count: int = 12) -> list[dict]:
    """The hypernyms to show: matched ones from all heights, in turn from the most general on, the best match first."""
    by_height = {}
    for row in sorted(rows, key=lambda row: (-row["height"], -row["match"])):
        if row["emergence_layer"] is not None:
            by_height.setdefault(row["height"], []).append(row)
    in_turn = [row for turn in itertools.zip_longest(*by_height.values()) for row in turn if row]
    latents = {}  # one latent may match a hypernym and the next above it
    for row in in_turn:
        latents.setdefault((row["best_layer"], row["best_latent"]), row)
    return sorted(list(latents.values())[:count], key=lambda row: (-row["height"], -row["match"]))


def draw_latents(settings, out: Path, saes: dict, recorded: dict, val: Split, scores: list[dict], chosen) -> dict[str, Path]:
    """A picture of each chosen hypernym's latent: its top images, and below them where in them it looks; by wnid.

    Kept beside the SAEs, which they are bound to, so that they are drawn once.
    """
    shown, code = min(8, settings.top_k), code_of(draw_latents, relevancy_maps)

    def picture_of(row):
        return saes[row["best_layer"]] / f"latent_{row['best_latent']}_top-{shown}_{code}.png"

    missing = [row for row in chosen if not picture_of(row).is_file()]
    if missing:
        model, transform = open_backbone(settings, out)
        ids = np.load(intact(out, recorded, "val/ids.npy"))
        normalise = transform.transforms[-1]
        mean, deviation = (torch.tensor(values)[:, None, None] for values in (normalise.mean, normalise.std))
    for row in tqdm(missing, "      latents", unit="latent", disable=not missing):
        layer, latent = row["best_layer"], row["best_latent"]
        sae = load_sae(saes[layer], settings.device)
        tiles = [[], []]
        for i in best_of(scores, row)["top_images"][:shown]:
            image = transform(read_image(val.root / val.names[ids[i]]))
            heat = relevancy_maps(model, image[None].to(settings.device), layer, lambda x: sae.encode(x)[:, latent]).cpu()
            picture = interpolate((image * deviation + mean)[None], (112, 112), mode="bilinear", antialias=True)
            heat = interpolate(heat[:, None], (112, 112), mode="bilinear")
            light = 0.2 + 0.8 * (heat / heat.max().clamp(min=1e-30)).sqrt()  # relevancy is peaked: its root shows more of it
            tiles[0].append(picture[0].clamp(0, 1))
            tiles[1].append((picture * light)[0].clamp(0, 1))
        with whole(picture_of(row)) as part:
            save_image(make_grid(tiles[0] + tiles[1], nrow=len(tiles[0]), pad_value=1), part, format="png")
    return {row["wnid"]: picture_of(row) for row in chosen}


# Okabe and Ito's colours, which the colour-blind can tell apart, and a marker each
STYLES = {
    ("sae", "true"): dict(color="#0072B2", marker="o", label="SAE"),
    ("sae", "shuffled"): dict(color="#D55E00", marker="x", label="SAE, shuffled labels", linestyle="--"),
    ("neurons", "true"): dict(color="#009E73", marker="s", label="raw neurons"),
    ("untrained", "true"): dict(color="#CC79A7", marker="^", label="untrained SAE"),
}


def draw_figures(folder: Path, record: dict, agreement: np.ndarray, hypernyms: list[dict], tree: Taxonomy) -> dict:
    """Draws figures/NAME.png; returns NAME -> (alt text, caption), in the order in which to read them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.grid": True, "grid.alpha": 0.3, "figure.constrained_layout.use": True})
    layers, hierarchy = record["layers"], record["hierarchy"]
    depth = [row["layer"] for row in layers]

    def panel(axis, title, ylabel, **more):
        axis.set(title=title, xlabel="layer", ylabel=ylabel, **more)
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))

    def finish(figure, name):
        figure.savefig(folder / f"{name}.png", dpi=130)
        plt.close(figure)

    figure, ((probe, error), (active, both)) = plt.subplots(2, 2, figsize=(8, 6.4))
    probe.plot(depth, [row["probe_top1"] for row in layers], color="#0072B2", marker="o")
    panel(probe, "Linear probe", "top-1 accuracy", ylim=(0, 1))
    for name, color, marker in [("nmse", "#D55E00", "s"), ("fvu", "#0072B2", "o")]:
        error.plot(depth, [row[name] for row in layers], color=color, marker=marker, label=name.upper())
    panel(error, "SAE reconstruction error", "share left", yscale="log")
    error.legend()
    active.plot(depth, [row["l0"] for row in layers], color="#0072B2", marker="o")
    panel(active, "Active latents", "L0, mean per image", ylim=(0, None))
    points = both.scatter([row["probe_top1"] for row in layers], [row["nmse"] for row in layers], c=depth, cmap="viridis",
                          s=[20 + 180 * row["l0"] / max(max(r["l0"] for r in layers), 1e-9) for row in layers])
    both.set(title="The two together (area: L0)", xlabel="probe accuracy", ylabel="NMSE", yscale="log")
    figure.colorbar(points, ax=both, label="layer")
    finish(figure, "layers")

    figure, axes = plt.subplots(2, 2, figsize=(8, 6.8))
    for axis, column, title, ylabel in [
        (axes[0, 0], "lch_height_pairwise", "LCH height, pairwise", "edges above the classes"),
        (axes[0, 1], "match", "Hypernym match", "mean best Jaccard"),
        (axes[1, 0], "hypernyms_lch", "Hypernyms that are an LCH", f"of {record['hypernyms_possible']}"),
        (axes[1, 1], "hypernyms_matched", "Hypernyms matched", f"of {record['hypernyms_possible']}, Jaccard > 0.5"),
    ]:
        for (dictionary, labels), style in STYLES.items():
            values = [row[column] for row in hierarchy if (row["dictionary"], row["labels"]) == (dictionary, labels)]
            axis.plot(depth, values, **style)
        panel(axis, title, ylabel, ylim=(0, None))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    finish(figure, "hierarchy")

    figure, axis = plt.subplots(figsize=(6, 5))
    axis.grid(False)
    axis.set_facecolor("0.85")
    image = axis.imshow(agreement, vmin=0, vmax=1, cmap="viridis", origin="lower")
    places = range(0, len(depth), -(-len(depth) // 12))
    axis.set(xticks=places, xticklabels=[depth[i] for i in places], yticks=places, yticklabels=[depth[i] for i in places])
    axis.set(xlabel="layer", ylabel="layer", title="Hypernyms that two layers share")
    figure.colorbar(image, ax=axis, label="Jaccard of the hypernyms matched")
    finish(figure, "consistency")
    draw_taxonomy(folder / "emergence.png", hypernyms, depth, tree)
    return {
        "layers": (
            "Four plots by layer: linear probe accuracy, reconstruction error, active latents, accuracy against error.",
            "How much class information the token holds, and how easy it is to auto-encode. NMSE counts the token's "
            "constant part, FVU does not: where NMSE is far below FVU, the token hardly changes from image to image.",
        ),
        "hierarchy": (
            "Four plots by layer of LCH height, hypernym match and hypernyms found, for the SAE and three baselines.",
            "If the hierarchy is there, the blue line leaves the orange one (shuffled labels). Dense units, as raw neurons "
            "and an untrained SAE have, match the root or near it for nothing; the hypernyms found tell them apart.",
        ),
        "consistency": (
            "Heat map of the Jaccard similarity of the hypernyms matched in every pair of layers.",
            "Bright near the diagonal: neighbouring layers match the same hypernyms. Grey: neither layer matches any. "
            + shuffled_level(record["agreement_shuffled"]),
        ),
        "emergence": (
            "The taxonomy from large hypernyms (left) to small ones, each coloured by the layer in which it emerges.",
            "Each box is a hypernym, as tall as it has classes, its own hypernyms to its left; the colour is the first layer "
            "in which some latent matches it. Pale boxes are matched in no layer. Hypernyms of more than half of all "
            "classes are left out.",
        ),
    }


def shuffled_level(level: float) -> str:
    return "Under shuffled labels " + ("no layer matches any." if level != level else f"the mean Jaccard is {level:.2f}.")


def draw_taxonomy(path: Path, rows: list[dict], depth: list[int], tree: Taxonomy) -> None:
    """Hypernyms of at least C/200 classes and at most half as nested boxes, general to specific, by emergence layer."""
    import matplotlib
    import matplotlib.pyplot as plt

    sizes = tree.leaves.sum(1)
    least = max(2, len(tree.classes) // 200)
    emergence = {row["wnid"]: row["emergence_layer"] for row in rows}
    nodes = [v for v in tree.hypernyms if sizes[v] >= least and tree.wnids[v] in emergence]
    nodes.sort(key=lambda v: (-sizes[v], -tree.height[v], v))
    children, level = {}, {}
    holds = lambda u, v: u != v and not (tree.leaves[v] & ~tree.leaves[u]).any()
    for i, v in enumerate(nodes):  # a node goes under its hypernym; of several, under the largest, which is drawn first
        above = [u for u in nodes[:i] if holds(u, v)]
        parent = next((u for u in above if not any(holds(u, w) for w in above)), None)
        level[v] = 0 if parent is None else level[parent] + 1
        children.setdefault(parent, []).append(v)
    boxes, placed = {}, np.zeros(len(tree.classes), bool)

    def place(v, top):  # top to bottom; a class of two hypernyms is drawn under the first
        bottom = top
        for child in children.get(v, []):
            bottom = place(child, bottom)
        bottom += (tree.leaves[v] & ~placed).sum()
        placed[tree.leaves[v]] = True
        boxes[v] = (top, bottom)
        return bottom

    end = 0
    for v in children.get(None, []):
        end = place(v, end)
    colours = matplotlib.colormaps["viridis"]
    span = max(depth[-1] - depth[0], 1)
    inches, levels = max(4.0, end * 0.11 / least), max(level.values(), default=3) + 1
    figure, axis = plt.subplots(figsize=(1.15 * levels, inches + 1))
    axis.grid(False)
    for v, (top, bottom) in boxes.items():
        if top == bottom:  # all its classes are drawn elsewhere
            continue
        layer = emergence[tree.wnids[v]]
        fill = "0.93" if layer is None else colours((layer - depth[0]) / span)
        axis.add_patch(plt.Rectangle((level[v], top), 1, bottom - top, facecolor=fill, edgecolor="0.4", linewidth=0.6))
        if (bottom - top) * inches / end > 0.1:  # room for a line of text
            name = display_name(tree.names[v])
            dark = layer is not None and (layer - depth[0]) / span < 0.6
            axis.text(level[v] + 0.04, (top + bottom) / 2, name if len(name) < 19 else name[:17] + "…", va="center", fontsize=7,
                      color="white" if dark else "black")
    axis.set(xlim=(0, levels), ylim=(max(end, 1), 0), yticks=[], xticks=[])
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(depth[0], depth[0] + span), colours)
    figure.colorbar(scale, ax=axis, label="emergence layer", location="top", aspect=60, pad=0.01,
                    ticks=matplotlib.ticker.MaxNLocator(integer=True))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def display_name(synset: str) -> str:
    """dog.n.01 -> dog"""
    return synset.rsplit(".", 2)[0].replace("_", " ")


def cell(value) -> str:
    if value is None or value != value:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown(rows: list[dict]) -> str:
    if not rows:
        return "none"
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def html_table(rows: list[dict]) -> str:
    if not rows:
        return "<p>none</p>"
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(cell(value))}</td>" for value in row.values()) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def write_report(path: Path, title: str, note: str, record: dict, figures: dict, latents: list[tuple[dict, Path]]) -> None:
    """report.html: one file that opens from disk, with every figure inside."""
    def image(file, alt):
        return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}">'

    def figure(picture, caption):
        return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"

    run = record["settings"] | record["made_from"] | record["versions"]
    run |= {f"seconds, {stage}": seconds for stage, seconds in record["seconds"].items()}
    verdict_first = ("claim", "verdict", "value", "p_value", "statistic")
    parts = [
        f"<h1>{escape(title)}</h1><p>{escape(note)}</p><details open><summary>What was run</summary>",
        html_table([{"setting": key, "value": value} for key, value in run.items()]),
        "<p>A stage of 0 seconds found its work done.</p></details>",
        "<h2>Claims</h2><p>Each is tested on this run's numbers alone; see the README for the tests.</p>",
        html_table([{key: row[key] for key in verdict_first} for row in record["claims"]]),
        "<h2>Figures</h2>",
    ]
    for name, (alt, caption) in figures.items():
        picture = image(path.parent / f"figures/{name}.png", alt)
        parts.append(figure(f'<div class="wide">{picture}</div>' if name == "emergence" else picture, escape(caption)))
    parts.append(
        "<h2>Named latents</h2><p>For hypernyms of all heights, the latent of any layer that matches each best: its top "
        "validation images, and below them the same lit where the latent looks (gradient-weighted attention rollout).</p>"
    )
    for row, picture in latents:
        name = escape(display_name(row["name"]))
        parts.append(figure(
            image(picture, f"Top images of the latent for {name}, and where it looks in them"),
            f"<b>{name}</b> ({row['classes']} classes, height {row['height']}): latent {row['best_latent']} of layer "
            f"{row['best_layer']}, match {row['match']:.2f}, coverage {row['coverage']:.2f}, "
            f"LCH {escape(display_name(row['lch']))}; {name} emerges in layer {row['emergence_layer']}",
        ))
    parts += [f"<h2>{name.capitalize()}</h2>{html_table(record[name])}" for name in ("layers", "hierarchy", "hypernyms")]
    path.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{REPORT_STYLE}</style></head><body>{''.join(parts)}</body></html>\n",
        encoding="utf-8", errors="backslashreplace",
    )


REPORT_STYLE = """
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 56rem; margin: 1rem auto; padding: 0 1rem }
body { color: #111; background: #fff }
h1 { font-size: 1.5rem; line-height: 1.2 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc }
figure { margin: 1.5rem 0; break-inside: avoid } figcaption { color: #444; font-size: .9rem }
img { max-width: 100%; height: auto }
.wide { overflow-x: auto } .wide img { max-width: none; width: 56rem } table { border-collapse: collapse; font-size: .85rem }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: left; font-variant-numeric: tabular-nums }
td:first-child { min-width: 7rem } th { background: #f3f3f3 } summary { font-weight: bold }
@media print { body { max-width: none } .wide { overflow: visible } .wide img { width: 100% } table { font-size: .65rem } }
"""


TABLES = ("layers", "hierarchy", "hypernyms", "consistency", "claims")
NO_ROWS = {"consistency": ["layer_a", "layer_b", "jaccard"], "hypernyms": ["wnid", "name"]}  # one layer; two classes


def write_results(folder: Path, title: str, note: str, record: dict, agreement, hypernyms, tree: Taxonomy, latents) -> str:
    """Stage 4: tables as CSV, Markdown and JSON, figures, the report; returns the Markdown."""
    sections = {name: f"## {name.capitalize()}\n\n{markdown(record[name])}" for name in TABLES if name != "consistency"}
    with whole(folder) as part:
        (part / "figures").mkdir(parents=True)
        for name in TABLES:
            with open(part / f"{name}.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, record[name][0] if record[name] else NO_ROWS[name])
                writer.writeheader()
                writer.writerows(record[name])
        tables = f"# {title}\n\n{note}\n\n" + "\n\n".join(sections.values()) + "\n"
        (part / "tables.md").write_text(tables, encoding="utf-8", errors="backslashreplace")
        (part / "results.json").write_text(to_json(record) + "\n")
        figures = draw_figures(part / "figures", record, agreement, hypernyms, tree)
        for row, picture in latents:
            shutil.copy(picture, part / "figures" / f"latent_{row['wnid']}.png")
        write_report(part / "report.html", title, note, record, figures, latents)
    return "\n\n".join([note, *(section for name, section in sections.items() if name != "hypernyms")])


# ---------------------------------------------------------------------------------------------------------------------
# the plan: what a run writes, computes and takes


class Work(NamedTuple):
    """A row of the plan."""

    part: str
    written: int | None  # bytes
    flop: float | None
    seconds: float | None = None  # None where it was not tried


def plan(model, transform, counts: dict[str, int], classes: int, layers: list[int], training: Training) -> list[Work]:
    """What is to be written and computed, from the sizes alone."""
    n, (images, train, val) = model.cls_token.shape[-1], (sum(counts.values()), counts["train"], counts["val"])
    m, L = training.expansion * n, len(layers)
    with FlopCounterMode(display=False) as one_image, torch.inference_mode():
        class_tokens(model, blank_image(model, transform), layers)
    epochs, steps = probe_steps(train)
    with torch.device("meta"):  # shapes only
        sae = safetensors_bytes(SparseAutoencoder(n, m).state_dict())
    return [
        Work("class tokens", sum(L * (HEADER + 2 * n * count) + 2 * (HEADER + 8 * count) for count in counts.values()),
             images * one_image.get_total_flops()),
        Work("SAEs", L * sae, L * training.epochs * (train // training.batch_size) * step_flop(n, training)),
        Work("scores", None, L * (val * 8 * n * m + epochs * steps * 256 * 6 * n * classes)),  # four passes of 2nm; the probe
        Work("tables, figures: at most", RESULT_BYTES, None),
    ]


def safetensors_bytes(state: dict[str, torch.Tensor]) -> int:
    """The size of the file: the length of a header, the header, padded to eights, and the tensors by name."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in sorted(state.items()):
        start, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    return 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8 + end


def blank_image(model, transform) -> torch.Tensor:
    side = next(step.size for step in transform.transforms if isinstance(step, CenterCrop))
    return torch.zeros(1, 3, *side, device=model.cls_token.device)


def try_out(settings, works, model, transform, read: list, train: int, val: int, tree: Taxonomy, layers, training):
    """The plan with each part's seconds, and the memory it takes, from a few seconds' trial of it on the device at hand, at
    the run's own sizes. Each of `read` reads an image as the run does."""
    n, device, L, cores = model.cls_token.shape[-1], settings.device, len(layers), os.cpu_count() or 1

    def seconds(action):
        action()  # the first time is not typical
        times = []
        while sum(times) < 0.7 and len(times) < 50:
            started = time.perf_counter()
            action()
            torch.cuda.synchronize() if device == "cuda" else None
            times.append(time.perf_counter() - started)
        return float(np.median(times))

    @torch.inference_mode()
    def forward(count=IMAGES_PER_STEP):
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            class_tokens(model, blank_image(model, transform).expand(count, -1, -1, -1), layers).half().cpu()

    one = seconds(lambda: forward(1))
    count = IMAGES_PER_STEP if device == "cuda" or one * IMAGES_PER_STEP < 8 else max(1, int(8 / one))
    through, decode = seconds(lambda: forward(count)) / count, seconds(lambda: [an() for an in read]) / len(read)
    if device == "cuda":
        an_image = max(through, decode / max(WORKERS, 1))
    else:  # they share the cores
        an_image = max(through, (through * torch.get_num_threads() + decode) / cores)

    tokens = torch.randn(VAL_BATCH, n, device=device)
    rows = np.random.default_rng(0).normal(size=(2560, n)).astype(np.float16)
    labels = np.arange(len(rows)) % len(tree.classes)
    statistics = Statistics(torch.zeros(n).double(), n**0.5, n**0.5)
    sae = new_sae(statistics, training).to(device)
    at_once = min(together(train, n, training, device), -(-L // WORLD))
    trainer = Trainer([new_sae(statistics, training).to(device) for _ in range(at_once)], training.batch_size, training.precision)
    pool = torch.randn(4 * training.batch_size, n, device=device).half()

    def train_step():
        rows = [torch.randperm(len(pool))[: training.batch_size].to(device) for _ in range(at_once)]
        trainer.step(torch.stack([sae.normalise(pool[some].float()) for some in rows]), 0.1, 1e-4)

    step = seconds(train_step) / at_once
    spread = seconds(lambda: [tokens.double().sum(0), tokens.double().square().sum()]) / len(tokens)  # as in `statistics`
    profiles = []

    def profile():
        reconstruction(sae, [tokens])
        profiles[:] = [profile_latents(encode, [tokens], [labels[: len(tokens)]] * 2, len(tree.classes), settings.top_k)[0]
                       for encode in (sae.encode, neurons(torch.zeros(n, device=device)), sae.encode)]

    a_batch = seconds(profile)
    hierarchy = seconds(lambda: [score_hierarchy(one, tree) for one in [profiles[0], *profiles]])
    probe = seconds(lambda: linear_probe(rows, labels, rows[:256], labels[:256], device, least=100)) / 100
    a_map = seconds(lambda: relevancy_maps(model, blank_image(model, transform), layers[-1], lambda x: sae.encode(x)[:, 0]))
    steps = training.epochs * (train // training.batch_size)
    found = [
        (train + val) * an_image / WORLD,
        L * (steps * step + train * spread) / WORLD,
        L * (train * spread + val / VAL_BATCH * a_batch + hierarchy + math.prod(probe_steps(train)) * probe) / WORLD,
        96 * a_map + 5,  # 12 latents of 8 images; five seconds of figures and report
    ]
    works = [work._replace(seconds=estimate) for work, estimate in zip(works, found)]
    return works, peak_memory(device, 2 * n * train * at_once)


def plan_demo(settings) -> None:
    """--plan of the demo, of which nothing need be there."""
    tree, started = Taxonomy.from_wnids(DEMO_CLASSES), time.perf_counter()
    traits, files = demo_traits(tree), [io.BytesIO() for _ in range(DEMO_TRAIN)]
    pictures = [to_pil_image(image) for image in draw(traits[0].expand(len(files), -1), torch.Generator())[0]]
    for picture, file in zip(pictures, files):
        picture.save(file, "png")
    classes = len(tree.classes) * (1 + DEMO_VAL / DEMO_TRAIN)
    drawing = (time.perf_counter() - started) * classes
    vit, transform = train_demo_vit(traits, 3).eval().requires_grad_(False), eval_transform(DEMO_SIZE, DEMO_SIZE)
    started = time.perf_counter()
    train_demo_vit(traits, 25)
    training_vit = (time.perf_counter() - started) * DEMO_STEPS / 25
    counts = {name: len(tree.classes) * count for name, count in [("train", DEMO_TRAIN), ("val", DEMO_VAL)]}
    layers, training = parse_layers(settings.layers, len(vit.blocks)), training_of(settings, counts["train"])
    works = plan(vit, transform, counts, len(tree.classes), layers, training)
    read = [functools.partial(transform, picture) for picture in pictures[:16]]
    works, memory = try_out(settings, works, vit, transform, read, *counts.values(), tree, layers, training)
    written = int(sum(len(file.getvalue()) for file in files) * classes) + len(save(vit.state_dict()))
    print(plan_table([Work("the demo's images and ViT", written, None, drawing + training_vit), *works]))
    print(memory)


def plan_table(works: list[Work]) -> str:
    """Text; with times and peak memory where they were tried."""
    whole = Work("together", *(sum(getattr(work, key) or 0 for work in works) for key in ("written", "flop", "seconds")))
    tried = works[-1].seconds is not None
    rows = [("", "on disk", "FLOP", "time here" if tried else "")]
    for work in (*works, whole):
        unit, count = next((u for u in (("h", 3600), ("min", 60)) if (work.seconds or 0) > 5 * u[1]), ("s", 1))
        lasts = f"{work.seconds / count:.3g} {unit}" if tried else ""
        rows.append((work.part, size(work.written) if work.written else "–", f"{work.flop:.2g}" if work.flop else "–", lasts))
    return "\n".join(f"      {part:26}{disk:>10}{flop:>10}{lasts:>11}".rstrip() for part, disk, flop, lasts in rows)


def peak_memory(device: str, buffers: int) -> str:
    """After a trial: what it took at most, and the bytes of the buffers, which it did without."""
    if resource is None:
        return "      peak memory: not told on this system"
    host, buffers = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, min(pool_bytes(device), buffers)
    said = f"      peak memory: {size(host * (1 if sys.platform == 'darwin' else 1024) + buffers)}"
    if device == "cuda":
        said += f", and {size(torch.cuda.max_memory_allocated() + buffers)} of the GPU's"
    return said


def still_to_write(out: Path, works: list[Work], training: Training, at_once: int, layers: list[int]) -> dict[str, int]:
    """Bytes of the plan that are not in the output folder yet, by part."""
    def left(work, *patterns):
        return max(0, work.written - sum(path.stat().st_size for pattern in patterns for path in out.glob(pattern)))

    names, folder = [layer_name(layer) for layer in layers], saes_folder(out, training).name
    tokens = left(works[0], *(f"tokens/*/{name}.npy*" for name in (*names, "labels", "ids")))
    saes = left(works[1], *(f"saes/{folder}/{name}/model.safetensors" for name in names))
    return {
        "class tokens": tokens * (1 if WORLD == 1 else 2),  # shares, and then joined
        "SAEs": saes, "a training's state": 3 * works[1].written * min(at_once * WORLD, len(layers)) // len(layers) * (saes > 0),
        "tables and figures": RESULT_BYTES,
    }


RESULT_BYTES = 15_000_000


# ---------------------------------------------------------------------------------------------------------------------
# the run


def training_of(settings, rows: int) -> Training:
    batch_size = settings.batch_size or fitting_batch_size(rows, settings.epochs)
    return Training(
        settings.expansion, settings.l1, settings.inputs, settings.epochs, batch_size, settings.lr, settings.seed,
        fast_precision(settings.device),
    )


def run(settings: argparse.Namespace) -> None:
    started = time.time()
    seconds = {}

    def finished(stage):
        seconds[stage] = max(0.0, round(time.time() - started - sum(seconds.values()), 1))

    data = settings.data or os.environ.get("IMAGENET_DIR") or ("imagenet" if Path("imagenet").is_dir() else None)
    demo = data is None
    with ExitStack() as stack:
        if settings.push_to_hub and settings.saes:
            raise InputError("--push-to-hub is for SAEs that this run trains: leave out --saes")
        hub = open_hub(settings.push_to_hub) if settings.push_to_hub and RANK == 0 and not settings.plan else None
        if RANK > 0 and settings.plan:
            return
        if RANK > 0:
            wait_for_all()  # until the first process has found all as it should be, and made the demo
        if demo:
            if settings.backbone or settings.hub:
                raise InputError("--backbone and --hub need images: give --data (the built-in demo brings its own ViT)")
            out = Path(settings.out or "runs/demo")
            if settings.plan:
                return plan_demo(settings)
            print(f"{DEMO_NOTE}\n\n[1/4] images, ViT and class tokens")
            stack.enter_context(room(out, {"the demo": 60_000_000}))
            if RANK == 0:
                stack.enter_context(held(out))
                make_demo(out)
            data, settings.backbone, settings.hub = str(out / "images"), "demo", DEMO_HUB
        else:
            settings.backbone, settings.hub = settings.backbone or "dinov2_vitg14", settings.hub or HUB
            out = Path(settings.out or f"runs/{Path(data).resolve().name}-{settings.backbone}")
            print("[1/4] images and class tokens" if not settings.plan else "A plan: nothing is written.")
        train, val, classes, remarks = find_images(data, settings.images_per_class)
        splits = {"train": train, "val": val}
        tree = Taxonomy.from_wnids(classes)
        print(f"      {data}: {len(train):,} training and {len(val):,} validation images of {len(classes):,} classes")
        for remark in remarks:
            print(f"      {remark}")
        if settings.top_k > len(val):
            raise InputError(f"--top-k {settings.top_k} is above the number of validation images, {len(val)}")
        if (settings.batch_size or 1) > len(train):
            raise InputError(f"--batch-size {settings.batch_size} is above the number of training images, {len(train)}")
        model, transform = open_backbone(settings, out)
        width, layers = model.cls_token.shape[-1], parse_layers(settings.layers, len(blocks_of(model)))
        training = training_of(settings, len(train))
        works = plan(model, transform, {name: len(split) for name, split in splits.items()}, len(classes), layers, training)
        if settings.plan:
            images = _Decoded(train, transform)
            read = [functools.partial(images.__getitem__, i) for i in range(min(16, len(train)))]
            works, memory = try_out(settings, works, model, transform, read, len(train), len(val), tree, layers, training)
        print(plan_table([work for work in works if not (settings.saes and work.part == "SAEs")]))
        if settings.plan:
            print(memory)
            return
        at_once = together(len(train), width, training, settings.device)
        needed = still_to_write(out, works, training, at_once, layers)
        if settings.saes:
            needed |= {"SAEs": 0, "a training's state": 0}
        stack.enter_context(room(out, needed))
        if RANK == 0:
            if not demo:
                stack.enter_context(held(out))
            wait_for_all()
        print(f"      still to be written: {size(sum(needed.values()))}")
        saes = fetch_saes(settings, out, layers, width) if settings.saes else None
        images = {"fingerprint of images": fingerprint(train, val), "train images": len(train), "val images": len(val)}
        made_from = {**images, "classes": len(classes), **identify(model, transform, settings.backbone)}
        recorded = record_tokens(settings, out, model, transform, splits, layers, made_from)
        del model  # whose memory the SAEs may need
        finished("tokens")

        if saes:
            print(f"[2/4] published sparse autoencoders: {settings.saes}")
        else:
            training = training_of(settings, len(train) - len(recorded["left_out"]["train"]))
            settings.batch_size = training.batch_size
            print(f"[2/4] sparse autoencoders: {training.inputs} inputs, λ = {training.l1}, {training.epochs} epochs, batch "
                  f"{training.batch_size}, {training.precision}")
            about = {"backbone": settings.backbone, "images": images["fingerprint of images"]}
            about["hub"] = "a local folder" if Path(settings.hub).is_dir() else settings.hub  # it may be published
            saes = train_saes(settings, out, training, at_once, layers, about, recorded)
        finished("saes")

        print("[3/4] scores: reconstruction, probe, hierarchy")
        score = lambda layer: score_layer(settings, out, saes[layer], tree, layer, recorded)
        mine = {layer: score(layer) for layer in tqdm(layers[RANK::WORLD], "      layers", unit="layer", disable=RANK > 0)}
        wait_for_all()
        finished("scores")
        if RANK > 0:
            return

        print("[4/4] tables, figures, report")
        scores = [mine.get(layer) or score(layer) for layer in layers]  # those of other processes as they kept them
        by_layer = [score["layers"] for score in scores]
        hierarchy = [row for score in scores for row in score["hierarchy"]]
        agreement, agreement_shuffled = (consistency(scores, labels) for labels in ("true", "shuffled"))
        pairs = list(itertools.combinations(range(len(layers)), 2))
        off_diagonal = [agreement_shuffled[a, b] for a, b in pairs if np.isfinite(agreement_shuffled[a, b])]
        hypernyms = hypernym_rows(scores, tree)
        chosen = named_latents(hypernyms)
        pictures = draw_latents(settings, out, saes, recorded, val, scores, chosen)
        record = {
            "settings": {**vars(settings), "data": data, "out": str(out)},
            "made_from": made_from,
            "left_out": {name: len(left_out) for name, left_out in recorded["left_out"].items()},
            "versions": {name: version(name) for name in ("torch", "torchvision", "huggingface_hub", "nltk", "numpy")},
            "seconds": seconds,
            "saes": str(saes[layers[0]].parent.relative_to(out)),
            "layers": by_layer,
            "hierarchy": hierarchy,
            "hypernyms_possible": len(hypernyms),
            "hypernyms": [row for row in hypernyms if row["classes"] >= 5] or hypernyms,
            "consistency": [{"layer_a": layers[a], "layer_b": layers[b], "jaccard": agreement[a, b]} for a, b in pairs],
            "agreement_shuffled": float(np.mean(off_diagonal)) if off_diagonal else math.nan,
            "claims": check_claims(by_layer, hierarchy, agreement, hypernyms),
        }
        title = f"{settings.backbone} on {Path(data).resolve().name if not demo else 'drawn images'}, "
        title += f"SAEs from {settings.saes}" if settings.saes else f"{settings.inputs} inputs"
        note = DEMO_NOTE if demo else f"{len(train):,} training and {len(val):,} validation images of {len(classes):,} classes."
        note += f" {len(hypernyms)} hypernyms could be found."
        latents = [({**row, "coverage": best_of(scores, row)["coverage"]}, pictures[row["wnid"]]) for row in chosen]
        print("\n" + write_results(out / "results", title, note, record, agreement, hypernyms, tree, latents))
        print(f"\nDone in {time.time() - started:.0f} s. Tables and figures: {out / 'results'}; SAEs: {out / record['saes']}")
        if hub:
            push(hub, settings.push_to_hub, out, title, note, record, saes)
    if demo:
        print(DEMO_NOTE)


def main(argv=None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file's name may hold bytes that are no UTF-8; a log is to be up to date
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    with redirect_stderr(sys.stderr if RANK == 0 else io.StringIO()):  # said once
        settings = parse_settings(argv)
    if WORLD > 1:
        if settings.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        run(settings)
        if WORLD > 1:
            torch.distributed.destroy_process_group()
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except Stale as error:
        message = f"{error}: give another --out, or delete it"
    except (InputError, BackboneError, SAEError, TaxonomyError) as error:
        message = str(error)
    except (torch.OutOfMemoryError, MemoryError):
        message = ("out of memory: lower --batch-size or --expansion, choose a smaller --backbone, or, if it is the GPU's, give "
                   "--device cpu; what is done is kept")
    except OSError as error:  # a file or folder that may not be read or written
        message = f"{error}; mend it and give the same command again, which goes on from here"
    except RuntimeError as error:
        if not re.search("DataLoader (worker|timed out)|allocate memory", str(error)):
            raise
        said = str(error).partition("\n")[0]
        message = (f"out of memory, or of shared memory for the processes that read images ({said}): "
                   "lower --batch-size or --expansion, or end other programs; the same command goes on from here")
    print("error: " + " ".join(message.split("\n")), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
