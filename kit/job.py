"""What a run works on: all of it found, and what is wrong said, before anything is written."""
import argparse
import hashlib
import os
import re
from pathlib import Path
from typing import NamedTuple

import torch

from dinov2_hooks import HUB, blocks_of, eval_transform, load_backbone, transform_of
from kit import demo, hub
from kit.images import Split, find_images
from kit.process import RANK
from kit.store import InputError
from kit.tiny_imagenet import NAME, fetch_tiny_imagenet
from sae import Training, fast_precision
from taxonomy import Taxonomy


class Job(NamedTuple):
    """What a run works on, once all of it has been found in order."""

    settings: argparse.Namespace
    out: Path
    model: torch.nn.Module
    transform: object
    train: Split
    val: Split
    tree: Taxonomy
    layers: list[int]
    trainings: list[Training]  # one a seed, else the same
    note: str  # what was run, in a sentence


def parse_layers(text: str, depth: int) -> list[int]:
    """"all", "last", "0-3", "1,4-6" -> layer numbers, in order and each once."""
    if text in ("all", "last"):
        return list(range(depth)) if text == "all" else [depth - 1]
    layers = set()
    for part in text.split(","):
        first, last = int(part.partition("-")[0]), int(part.rpartition("-")[2])
        if last < first or last >= depth:
            raise InputError(f"--layers {text}: {part} is empty or out of range, the backbone has "
                             f"layers 0 to {depth - 1}")
        layers |= set(range(first, last + 1))
    return sorted(layers)


def saes_name(settings: argparse.Namespace, training: Training) -> str:
    """A short name of SAEs: what one looks for first, and a hash of all settings."""
    if settings.saes:
        return "from_" + re.sub(r"[^\w.-]", "_", settings.saes)
    l1 = f"-l1_{training.l1:g}" if training.activation == "relu" else ""
    digest = hashlib.sha256(repr(training).encode()).hexdigest()[:6]
    return f"{training.activation}{l1}-{training.inputs}-seed_{training.seed}-{digest}"


def precisions(device: str) -> tuple[str, str]:
    """Of the forward pass while recording, and of training SAEs. On a GPU tokens are recorded in
    float16, as in DINOv2's own evaluation: bfloat16 is as fast, and ten times less exact."""
    training = fast_precision(device)
    return "float16" if device == "cuda" else training, training


def trainings_of(settings: argparse.Namespace, rows: int) -> list[Training]:
    batch_size = settings.batch_size or 4096
    if settings.batch_size is None:  # small data needs small batches: 1,500 steps
        while batch_size > 16 and rows * settings.epochs // batch_size < 1500:
            batch_size //= 2
    return [
        Training(settings.expansion, settings.activation, settings.l1, settings.inputs,
                 settings.epochs, min(batch_size, rows), settings.lr, seed,
                 settings.sae_precision)
        for seed in range(settings.seed, settings.seed + settings.seeds)
    ]


def prepare(settings: argparse.Namespace) -> Job:
    """Find all that the run needs, and raise what is wrong with it before anything is written."""
    data = settings.data or os.environ.get("IMAGENET_DIR")
    data = data or ("imagenet" if Path("imagenet").is_dir() else None)
    if data == NAME and not Path(data).is_dir():
        data = str(fetch_tiny_imagenet())
    if data is None and (settings.backbone or settings.hub):
        raise InputError("--backbone and --hub need images: give --data (the demo has its own ViT)")
    if settings.saes and (settings.push_to_hub or settings.seeds > 1):
        raise InputError("--push-to-hub and --seeds are for SAEs that this run trains: leave out "
                         "--saes")
    if settings.push_to_hub and RANK == 0 and not settings.plan:
        hub.check_token(settings.push_to_hub)
    if data is None:
        settings.data, settings.backbone, settings.hub = "drawn images", "demo", "built in"
        out, transform = Path(settings.out or "runs/demo"), eval_transform(demo.SIZE, demo.SIZE)
        print(demo.NOTE)
        model, data = demo.open_demo(out, transform.transforms[-1], settings.plan)
    else:
        settings.data, settings.hub = data, settings.hub or HUB
        settings.backbone = settings.backbone or "dinov2_vitg14"
        out = Path(settings.out or f"runs/{Path(data).resolve().name}-{settings.backbone}")
        model = None
    train, val, classes = find_images(data, settings.images_per_class)
    tree, counts = Taxonomy.from_wnids(classes), (len(train.names), len(val.names))
    note = "{:,} training and {:,} validation images of {:,} classes.".format(*counts, len(classes))
    print(f"      {note}")
    if settings.top_k > counts[1]:
        raise InputError(f"--top-k {settings.top_k} is above the {counts[1]} validation images")
    if (settings.batch_size or 1) > counts[0]:
        raise InputError(f"--batch-size {settings.batch_size} is above {counts[0]} training images")
    if model is None:
        model = load_backbone(settings.backbone, settings.hub)
        transform = transform_of(model) if settings.transform == "model" else eval_transform()
        resize, crop, _, normalise = transform.transforms
        by = "DINOv2's" if str(transform) == str(eval_transform()) else "the model's pretrained_cfg"
        print(f"      images as {by} takes them: short side {resize.size}, crop {crop.size[0]}, "
              f"mean {normalise.mean}, deviation {normalise.std}")
    model = model.to(settings.device)
    layers = parse_layers(settings.layers, len(blocks_of(model)))
    latents = settings.expansion * model.cls_token.shape[-1]
    if settings.activation != "relu" and int(settings.activation[5:]) > latents:
        raise InputError(f"--activation {settings.activation}: there are only {latents} latents")
    return Job(settings, out, model, transform, train, val, tree, layers,
               trainings_of(settings, counts[0]), note)
