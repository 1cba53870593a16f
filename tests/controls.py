"""Which claims hold where they should not? Worlds of synthetic class tokens whose truth is known.

    python tests/controls.py WORLD COUNT [FIRST]     such worlds, numbered from FIRST on, a row each

flat          random class codes without kinship, the signal grows with depth
constant      kin classes have like codes, and nothing grows
hierarchical  the same codes, the signal grows from almost nothing
amplitude     the same codes, a signal that is strong from the first layer on grows

No images: real SAEs, real scoring and real claims on 100 ImageNet classes, six layers of width 48,
three seeds. In a flat world no claim about the hierarchy may hold, in a constant one no growth.
"""

import functools
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import imagenet1k

import reproduce
from kit.runs import to_json
from metrics import linear_probe
from sae import Training, train_sae
from taxonomy import Taxonomy

WIDTH = 48
IMAGES = {"train": 40, "val": 20}  # of each class
SIGNALS = {  # first and last layer's, over noise of deviation 1 in every coordinate
    "flat": (0.05, 0.5),
    "constant": (0.3, 0.3),
    "hierarchical": (0.05, 0.5),
    "amplitude": (0.3, 0.6),
}


def class_codes(world, tree, rng):
    """(C, WIDTH), of variance 1: random, or the sums of the random codes of all nodes above."""
    if world == "flat":
        codes = rng.normal(size=(len(tree.classes), WIDTH))
    else:
        distinct = tree.lowest == np.arange(len(tree.wnids))
        below_root = distinct & (tree.leaves.sum(1) < len(tree.classes))
        codes = tree.leaves[below_root].T @ rng.normal(size=(below_root.sum(), WIDTH))
    return (codes - codes.mean(0)) / codes.std()


def make_world(folder, world, tree, layers, seed):
    """Token files of every layer and split in `folder`; returns the labels by split."""
    rng = np.random.default_rng(seed)
    codes, labels = class_codes(world, tree, rng), {}
    for split, count in IMAGES.items():
        labels[split] = rng.permutation(np.repeat(np.arange(len(codes)), count))
    for layer, signal in enumerate(np.linspace(*SIGNALS[world], layers)):
        for split, classes in labels.items():
            tokens = 3 + signal * codes[classes] + rng.normal(size=(len(classes), WIDTH))
            np.save(folder / f"{split}_{layer}.npy", tokens.astype(np.float16))
    return labels


def claims_of_world(world, seed, layers=6, seeds=3, epochs=25, classes=100):
    """The rows of claims.csv on a world."""
    tree = Taxonomy.from_wnids(imagenet1k()[:: 1000 // classes])
    trainings = [
        Training(4, batch_size=256, epochs=epochs, lr=1e-3, seed=10 * seed + i)
        for i in range(seeds)
    ]
    controls, scores = reproduce.permuted_trees(tree), {}
    with tempfile.TemporaryDirectory() as name:
        labels = make_world(Path(name), world, tree, layers, seed)
        for n in range(layers):
            paths = [Path(name, f"{split}_{n}.npy") for split in IMAGES]
            layer = reproduce.open_layer(*paths, labels, len(tree.classes), "cpu")
            for training in trainings:
                sae = train_sae(layer[0], training, layer[2], {"seed": training.seed}, title=None)
                where = {"layer": n, "seed": training.seed}
                scores[n, training.seed] = reproduce.score_layer(
                    where, sae, layer, labels, tree, controls, k=16, response_rate=0.5
                )
        return json.loads(to_json(reproduce.tables_of(scores)["claims"]))


def main(world, count, first="0"):
    torch.set_num_threads(1)
    reproduce.linear_probe = functools.partial(linear_probe, least_steps=300)
    for seed in range(int(first), int(first) + int(count)):
        for row in claims_of_world(world, seed):
            print(json.dumps({"world": world, "seed": seed, **row}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
