"""What a run writes, computes and takes: sizes from the settings, time from a short trial."""
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from dinov2_hooks import class_tokens
from kit.images import BATCH, Split, batches
from kit.process import WORLD, size
from sae import ActivationBuffer, Training, train_sae

RESULT_BYTES = 15_000_000  # of tables and figures, at most


class Part(NamedTuple):
    name: str
    written: int  # bytes
    flop: float
    seconds: float | None = None  # None where it was not tried


def plan(model, transform, train: int, val: int, layers, trainings) -> list[Part]:
    """What class tokens and SAEs take, for so many images, from the sizes alone."""
    n, L, training = model.cls_token.shape[-1], len(layers), trainings[0]
    saes = L * len(trainings)
    image = torch.zeros(1, 3, *transform.transforms[1].size, device=model.cls_token.device)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        class_tokens(model, image, layers)
    rows, image_flop = train + val, counter.get_total_flops()
    weights, steps = 2 * training.expansion * n * n, train // training.batch_size * training.epochs
    return [Part("class tokens", L * 2 * n * rows, rows * image_flop),
            Part("SAEs", saes * 4 * weights, saes * steps * 5 * training.batch_size * weights)]


def with_seconds(parts: list[Part], model, split: Split, transform, val: int, training: Training,
                 precision: str) -> list[Part]:
    """The parts with the time they take here, from a trial on some training images."""
    n, device, train = model.cls_token.shape[-1], model.cls_token.device.type, len(split.names)
    times = [time.perf_counter()]
    with torch.inference_mode():
        for images, *_ in batches(split, transform, 0, min(train, 16 * BATCH), device == "cuda"):
            class_tokens(model, images.to(device), [0], precision).cpu()
            times.append(time.perf_counter())
            if len(times) > 2 and times[-1] - times[1] > 10:
                break
    rows = min(train, (len(times) - 1) * BATCH)
    if len(times) > 2:  # the first batch waits for the workers to start
        times, rows = times[1:], rows - BATCH
    an_image = (times[-1] - times[0]) / rows
    times = []

    def watch(step, steps, loss):
        loss.total.item()  # waits for a GPU
        times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/x.npy", np.random.randn(10 * training.batch_size, n).astype(np.float16))
        buffer = ActivationBuffer(f"{folder}/x.npy", device)
        train_sae(buffer, replace(training, epochs=1), progress=watch)
    step = float(np.median(np.diff(times)))
    steps = parts[1].flop / (10 * training.batch_size * training.expansion * n * n)
    found = (train + val) * an_image / WORLD, steps * step / WORLD
    return [part._replace(seconds=seconds) for part, seconds in zip(parts, found)]


def still_to_write(parts: list[Part], out: Path, saes, layers) -> int:
    """Bytes of class tokens, SAEs and results that are not there yet."""
    tokens = sum(not (out / f"tokens/val/layer_{layer:02d}.json").is_file() for layer in layers)
    folders = [(root / f"layer_{layer:02d}").is_dir() for root in saes for layer in layers]
    share = tokens / len(layers), folders.count(False) / len(folders)
    return RESULT_BYTES + int(share[0] * parts[0].written + share[1] * parts[1].written)


def table(parts: list[Part]) -> str:
    lines = [f"      {'':14}{'on disk':>10}{'FLOP':>10}" + f"{'time':>12}" * bool(parts[0].seconds)]
    for part in parts:
        hours = "" if part.seconds is None else f"{part.seconds / 3600:10.3g} h"
        lines.append(f"      {part.name:14}{size(part.written):>10}{part.flop:>10.2g}{hours}")
    return "\n".join(lines)
