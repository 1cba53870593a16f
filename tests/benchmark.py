"""How long the scores of one layer and seed take at the paper's size, and how much memory.

python tests/benchmark.py [--quick]         --quick: small shapes, to see that it runs
"""

import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import imagenet1k

import metrics
from kit import probes, scores
from sae import Training, new_sae
from taxonomy import Taxonomy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def write_tokens(path, labels, codes, rng):
    tokens = np.lib.format.open_memmap(path, "w+", np.float16, (len(labels), codes.shape[1]))
    for start in range(0, len(labels), 4096):
        here = labels[start : start + 4096]
        tokens[start : start + 4096] = 0.5 * codes[here] + rng.normal(size=codes[here].shape)


def score(quick):
    """Three dictionaries, all trees, probes, readings; without the linear probe."""
    width, expansion, C, rows = 1536, 8, 1000, {"train": 65_536, "val": 50_000}
    if quick:
        width, expansion, C, rows = 64, 4, 100, {"train": 2000, "val": 1000}
    tree, encoding = Taxonomy.from_wnids(imagenet1k()[:C]), [0.0]

    def timed(function):
        def called(*given):
            start = time.perf_counter()
            out = function(*given)
            encoding[0] += time.perf_counter() - start
            return out

        return called

    def dictionaries(*given):
        for name, encode, probed in metrics.dictionaries_of(*given):
            yield name, timed(encode), timed(probed)

    rng = np.random.default_rng(0)
    codes, labels = rng.normal(size=(C, width)).astype(np.float32), {}
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{split}.npy" for split in rows]
        for (split, count), path in zip(rows.items(), paths):
            labels[split] = rng.permutation(np.arange(count) % C)
            write_tokens(path, labels[split], codes, rng)
        with mock.patch("kit.scores.linear_probe", lambda *given: lambda x: x[:, :C]):
            layer = scores.open_layer(*paths, labels, C, DEVICE)
        sae = new_sae(layer[2], Training(expansion=expansion)).to(DEVICE).requires_grad_(False)
        sae.b_enc.fill_(-0.05)  # about 5% of random latents fire
        sae.forward = timed(sae.forward)
        controls = scores.permuted_trees(tree)
        start = time.perf_counter()
        with mock.patch("kit.scores.dictionaries_of", dictionaries):
            where = {"layer": 0, "seed": 0}
            scores.score_layer(where, sae, layer, labels, tree, controls, 16, 0.5)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{len(sae.b_enc):,} latents, {rows['val']:,} + {min(rows['train'], probes.TOKENS):,} "
        f"tokens, {C:,} classes: {seconds:.0f} s, {seconds - encoding[0]:.0f} s without encoding; "
        f"{peak:.2f} GiB at most"
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{os.cpu_count()} cores"
    print(f"{card}, torch {torch.__version__}")
    score("--quick" in sys.argv)
