"""Does the default training converge? Its loss beside other rates, and ten times the steps.

    python tests/training.py RUN DATA LAYERS [ACTIVATION [PRECISION [SEEDS [LONGER]]]]

RUN is the folder of a run on the images in DATA; the class tokens of LAYERS (as 9,11) are put side
by side, each centred and scaled. A row for each training: the default, a grid fixed beforehand, ten
times the epochs at the rate that the rule has for these and at half of it (LONGER 0: without).
Losses are on validation tokens; matched are hypernyms, confirmed on held-out images.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import reproduce
from dinov2_hooks import token_path
from kit.data import find_images
from metrics import Placed, profile_latents, responses_of
from sae import ActivationBuffer, learning_rate, loss_of, top_k_of, train_sae
from taxonomy import Taxonomy

GRID = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)


def side_by_side(run, layers, split):
    """(N, sum of widths) float32: each layer minus its training mean, of mean squared norm 1."""
    parts = []
    for layer in layers:
        train, tokens = (
            np.load(token_path(run / "tokens" / name, layer)).astype(np.float32)
            for name in ("train", split)
        )
        mean = train.mean(0)
        parts.append((tokens - mean) / np.sqrt(np.square(train - mean).sum(1).mean()))
    return np.concatenate(parts, axis=1)


def trained(train, val, labels, tree, training):
    """A row: what became of one training."""
    sae = train_sae(train, training, title=None)
    x = val.rows_at(slice(None))
    loss = loss_of(sae, sae.normalise(x), training.l1 if sae.top_k is None else 0).total
    x_hat, z = sae(x)
    fvu = (x_hat - x).square().sum() / (x - x.mean(0)).square().sum()
    l0, dead = (z > 0).sum(1).float().mean(), (z == 0).all(0).float().mean()
    profile = profile_latents(sae.encode, val.batches(2048), labels, len(tree.classes))
    matched = Placed(responses_of(profile), tree).choice.matched.sum()
    steps = training.epochs * train.batches_of_an_epoch(training.batch_size)
    lr = training.lr or learning_rate(len(sae.b_enc), steps, sae.top_k)
    return (
        f"| {lr:.2g} | {steps:,} | {training.seed} | {loss:.4f} | {fvu:.4f} | {l0:.1f} | "
        f"{dead:.1%} | {matched} |"
    )


def main(run, data, layers, activation="relu", precision="float32", seeds="3", long="2"):
    run, layers = Path(run), [int(layer) for layer in layers.split(",")]
    _, val, wnids = find_images(data)
    tree = Taxonomy.from_wnids(wnids)
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "val"):
            np.save(f"{folder}/{split}.npy", side_by_side(run, layers, split))
        train, held_out = (ActivationBuffer(f"{folder}/{split}.npy") for split in ("train", "val"))
        settings = reproduce.parse_settings(["--activation", activation, "--device", "cpu"])
        (default,) = reproduce.trainings_of(settings, train.rows)
        default = replace(default, precision=precision)
        longer = replace(default, epochs=10 * default.epochs)
        latents = default.expansion * train.width
        steps = longer.epochs * train.batches_of_an_epoch(longer.batch_size)
        rate = learning_rate(latents, steps, top_k_of(activation, latents))
        trainings = [replace(default, seed=seed) for seed in range(int(seeds))]
        trainings += [replace(default, lr=lr) for lr in GRID]
        trainings += [replace(longer, lr=factor * rate) for factor in (1, 0.5)[: int(long)]]
        print(f"{train.width} -> {latents}, {activation}, batch {default.batch_size}, {precision}")
        print("| rate | steps | seed | loss | FVU | L0 | dead | matched |")
        print("|---|---|---|---|---|---|---|---|")
        for training in trainings:
            print(trained(train, held_out, val.labels, tree, training), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
