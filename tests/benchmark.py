"""How fast each stage is.

    python tests/benchmark.py train|extract|score|buffer|all [--rounds 7] [--quick]

Rounds are interleaved, times are medians, and a ratio is one of medians of one run. --quick: small
shapes, to see that it runs.
"""

import argparse
import os
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import metrics
import reproduce
import sae as sae_module
from dinov2_hooks import finish, record
from kit.demo import SmallViT
from kit.runs import keep_freed_memory
from sae import ActivationBuffer, SparseAutoencoder, Training, fast_precision, loss_of
from taxonomy import Taxonomy, imagenet1k

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def measure(contestants, rounds):
    """name -> function, called in turn, once unmeasured, then `rounds` times; name -> seconds."""
    seconds = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, function in contestants.items():
            start = time.perf_counter()
            function()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(times)) for name, times in seconds.items()}


def training_step(n, m, x, precision):
    """The step in sae.train_sae."""
    sae = SparseAutoencoder(n, m).to(DEVICE)
    optimizer = torch.optim.Adam(sae.parameters(), lr=4e-4, fused=True)

    def step():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = loss_of(sae, x, 0.1)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        with torch.no_grad():
            sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)

    return step


def train(rounds, quick):
    keep_freed_memory(True)
    for n, B in [(16, 32)] if quick else [(192, 512), (384, 1024), (768, 1024), (1536, 4096)]:
        x, steps = torch.randn(B, n, device=DEVICE) / n**0.5, {}
        for precision in dict.fromkeys(["float32", fast_precision(DEVICE)]):
            steps[precision] = training_step(n, 8 * n, x, precision)
        for precision, seconds in measure(steps, rounds).items():
            print(
                f"one training step, {n} -> {8 * n}, batch {B}, {precision}: {1e3 * seconds:.1f} ms"
            )


def extract(rounds, quick):
    shapes = [("ViT-Ti/16", 16, 192, 3, 64), ("ViT-S/14", 14, 384, 6, 64)]
    precision = "float16" if DEVICE == "cuda" else fast_precision(DEVICE)
    for name, patch, width, heads, count in [("tiny", 56, 16, 2, 4)] if quick else shapes:
        vit = SmallViT(classes=2, size=224, patch=patch, width=width, depth=12, heads=heads)
        vit, images = vit.eval().requires_grad_(False).to(DEVICE), torch.randn(count, 3, 224, 224)

        @torch.inference_mode()
        def bare():
            low = precision != "float32"
            with torch.autocast(DEVICE, getattr(torch, precision), enabled=low):
                vit(images.to(DEVICE))

        with tempfile.TemporaryDirectory() as folder:

            def recorded():
                record(vit, images, folder, range(12), precision)
                finish(folder, range(12), count, width)
                for path in Path(folder).iterdir():
                    path.unlink()

            seconds = measure({"bare": bare, "recorded": recorded}, rounds)
        print(
            f"class tokens of {count} images, {name} in shape, {precision}: "
            f"{count / seconds['bare']:.0f} images/s bare, all 12 layers on disk at "
            f"{seconds['bare'] / seconds['recorded']:.1%} of that rate"
        )


def timed(function, seconds):
    """The function, whose time is added to seconds[0]."""

    def called(*given):
        start = time.perf_counter()
        out = function(*given)
        seconds[0] += time.perf_counter() - start
        return out

    return called


def score(rounds, quick):
    """One layer and seed at the paper's size: three dictionaries, all trees, probes, readings."""
    keep_freed_memory(False)
    width, expansion, C, rows = 1536, 8, 1000, {"train": 65_536, "val": 50_000}
    if quick:
        width, expansion, C, rows = 64, 4, 100, {"train": 2000, "val": 1000}
    tree, encoding = Taxonomy.from_wnids(imagenet1k()[:C]), [0.0]
    rng = np.random.default_rng(0)
    codes, labels = rng.normal(size=(C, width)).astype(np.float32), {}

    def dictionaries(*given):
        for one in metrics.dictionaries_of(*given):
            yield one._replace(
                encode=timed(one.encode, encoding), probed=timed(one.probed, encoding)
            )

    with tempfile.TemporaryDirectory() as folder:
        buffers = []
        for split, count in rows.items():
            labels[split] = rng.permutation(np.arange(count) % C)
            path = f"{folder}/{split}.npy"
            tokens = np.lib.format.open_memmap(path, "w+", np.float16, (count, width))
            for start in range(0, count, 4096):
                here = labels[split][start : start + 4096]
                noise = rng.normal(size=(len(here), width))
                tokens[start : start + 4096] = 0.5 * codes[here] + noise
            del tokens  # whose pages would count as memory
            buffers.append(ActivationBuffer(path, DEVICE))
        statistics = buffers[0].statistics()
        sae = sae_module.new_sae(statistics, Training(expansion=expansion)).to(DEVICE)
        sae.b_enc.data.fill_(-0.05)  # about 5% of random latents fire
        sae.requires_grad_(False)
        sae.forward = timed(sae.forward, encoding)
        classifier = torch.nn.Linear(width, C).requires_grad_(False).to(DEVICE)
        start = time.perf_counter()
        with mock.patch("reproduce.dictionaries_of", dictionaries):
            reproduce.score_layer(
                0,
                0,
                sae,
                *buffers,
                labels,
                statistics,
                tree,
                reproduce.permuted_trees(tree),
                classifier,
                16,
                0.5,
            )
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"one layer, {len(sae.b_enc):,} latents, {rows['val']:,} + {rows['train']:,} tokens, "
        f"{C:,} classes: {seconds:.0f} s, {seconds - encoding[0]:.0f} s without encoding; "
        f"{peak:.2f} GiB at most"
    )


def buffer(rounds, quick):
    rows, width = (20_000, 64) if quick else (1_281_167, 1536)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "layer.npy")
        tokens = np.lib.format.open_memmap(path, "w+", np.float16, (rows, width))
        block = np.random.default_rng(0).normal(size=(8192, width)).astype(np.float16)
        for start in range(0, rows, len(block)):
            tokens[start : start + len(block)] = block[: rows - start]
        del tokens
        times = [time.perf_counter()]
        fresh = ActivationBuffer(path, DEVICE)
        fresh.statistics()
        times.append(time.perf_counter())
        for _ in range(2):
            drawn = sum(map(len, fresh.batches(4096, torch.Generator().manual_seed(0))))
            times.append(time.perf_counter())
    statistics, first, second = np.diff(times)
    print(
        f"a layer of {rows:,} x {width}: statistics {statistics:.1f} s; {drawn:,} rows drawn in "
        f"{first:.1f} s, in the next epoch {second:.1f} s"
    )


if __name__ == "__main__":
    stages = {stage.__name__: stage for stage in (train, extract, score, buffer)}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", default="all", choices=[*stages, "all"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{os.cpu_count()} cores"
    print(
        f"{device}, {platform.machine()}; Python {platform.python_version()}, torch "
        f"{torch.__version__}; {arguments.rounds} rounds"
    )
    for name, stage in stages.items():
        if arguments.what in (name, "all"):
            stage(arguments.rounds, arguments.quick)
