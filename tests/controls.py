"""Which claims hold where they should not? Worlds of synthetic class tokens whose truth is known.

    python tests/controls.py WORLD COUNT [FIRST [LAYERS]]   such worlds, numbered from FIRST on;
                                                            with LAYERS 1 the main claim alone

flat          random class codes without kinship, the signal grows with depth
constant      kin classes have like codes, and nothing grows
hierarchical  the same codes, the signal grows from almost nothing
amplitude     the same codes, a signal that is strong from the first layer on grows
features      every node below the root is a feature of its own, more of them than dimensions, each
              on for six in ten images of the classes below it; what an SAE is made for
other tree    the same features, planted on a permuted tree

No images: real SAEs, trained to convergence, real scoring and real claims on 100 ImageNet classes,
four layers of width 64, three seeds. In flat worlds and on another
tree no claim about the hierarchy may hold, in a constant one no growth. A row for each claim, and
one for the share of planted directions that are a decoder row (cosine above 0.8), last layer.
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

from kit import scores
from kit.claims import MAIN, claims_of
from kit.files import to_json
from metrics import Placed, linear_probe, profile_latents, responses_of
from sae import ActivationBuffer, Training, train_sae
from taxonomy import Taxonomy

WIDTH = 64
IMAGES = {"train": 100, "val": 20}  # of each class
SIGNALS = {  # first and last layer's, over noise of deviation 1 in every coordinate
    "flat": (0.05, 0.5),
    "constant": (0.3, 0.3),
    "hierarchical": (0.05, 0.5),
    "amplitude": (0.3, 0.6),
    "features": (0.5, 10),
    "other tree": (0.5, 10),
}
RECOVERED = 0.8


def nodes_below_root(tree):
    """(F,) the distinct nodes with fewer than all classes, single classes among them."""
    distinct = tree.lowest == np.arange(len(tree.wnids))
    return np.flatnonzero(distinct & (tree.leaves.sum(1) < len(tree.classes)))


def world_of(world, tree, rng):
    """(directions (F, WIDTH) of the nodes, above (C, F) which are above a class)."""
    if world == "flat":
        directions = rng.normal(size=(len(tree.classes), WIDTH))
        return directions, np.eye(len(tree.classes))
    if world == "other tree":
        tree = tree.permuted(rng.permutation(len(tree.classes)))
    nodes = nodes_below_root(tree)
    directions = rng.normal(size=(len(nodes), WIDTH))
    if world in ("features", "other tree"):
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return directions, tree.leaves[nodes].T.astype(float)


def signal_of(world, directions, above, labels, rng):
    """(N, WIDTH): fixed class codes of variance 1, or features that come and go."""
    if world in ("features", "other tree"):
        on = above[labels] * (rng.random((len(labels), len(directions))) < 0.6)
        return (on * rng.gamma(4, 1 / 4, size=on.shape)) @ directions
    codes = above @ directions
    return ((codes - codes.mean(0)) / codes.std())[labels]


def make_world(folder, world, tree, layers, seed, images=IMAGES):
    """Token files of every layer and split in `folder`; returns labels by split, directions."""
    rng = np.random.default_rng(seed)
    labels = {}
    directions, above = world_of(world, tree, rng)
    first, last = SIGNALS[world]
    for split, count in images.items():
        labels[split] = rng.permutation(np.repeat(np.arange(len(tree.classes)), count))
        for layer, strength in enumerate(np.linspace(last, first, layers)[::-1]):
            signal = signal_of(world, directions, above, labels[split], rng)
            tokens = 3 + strength * signal + rng.normal(size=signal.shape)
            np.save(folder / f"{split}_{layer}.npy", tokens.astype(np.float16))
    return labels, directions


def recovered(directions, sae):
    """The share of directions (F, n) to which a row of the decoder is close."""
    directions = torch.from_numpy(directions).float()
    directions /= directions.norm(dim=1, keepdim=True)
    cosine = directions @ sae.W_dec.T
    return (cosine.amax(1) > RECOVERED).float().mean().item()


def claims_of_world(world, seed, layers=4, seeds=3, epochs=50, classes=100, images=IMAGES):
    """The rows of claims.csv on a world, and the share of planted directions recovered."""
    tree = Taxonomy.from_wnids(imagenet1k()[:: 1000 // classes])
    trainings = [
        Training(4, l1=0.2, batch_size=128, epochs=epochs, seed=10 * seed + i) for i in range(seeds)
    ]
    controls, by_layer, shares = scores.permuted_trees(tree), {}, []
    with tempfile.TemporaryDirectory() as name:
        labels, directions = make_world(Path(name), world, tree, layers, seed, images)
        for n in range(layers):
            paths = [Path(name, f"{split}_{n}.npy") for split in IMAGES]
            layer = scores.open_layer(*paths, labels, len(tree.classes), "cpu")
            for training in trainings:
                sae = train_sae(layer[0], training, layer[2], {"seed": training.seed}, title=None)
                where = {"layer": n, "seed": training.seed}
                by_layer[n, training.seed] = scores.score_layer(
                    where, sae, layer, labels, tree, controls, k=16, response_rate=0.5
                )
                if n == layers - 1:
                    shares.append(recovered(directions, sae))
        rows = json.loads(to_json(claims_of(by_layer)))
    return [*rows, {"claim": "planted directions recovered", "value": np.mean(shares)}]


def last_layer_alone(world, seed):
    """The main claim in a world of the last layer and one seed, without what it does not need."""
    tree = Taxonomy.from_wnids(imagenet1k()[::10])
    with tempfile.TemporaryDirectory() as name:
        labels, _ = make_world(Path(name), world, tree, 1, seed)
        train, val = (ActivationBuffer(f"{name}/{split}_0.npy") for split in IMAGES)
        sae = train_sae(train, Training(4, l1=0.2, batch_size=128, seed=seed), title=None)
        profile = profile_latents(sae.encode, val.batches(2048), labels["val"], len(tree.classes))
    responses = responses_of(profile)
    trees = [tree, *scores.permuted_trees(tree)]
    value, *draws = (Placed(responses, each).summary()[MAIN] for each in trees)
    p = (1 + sum(draw <= value for draw in draws)) / len(trees)
    verdict = "holds" if p <= 0.05 else "open"
    return [{"claim": "the hierarchy is there", "verdict": verdict, "p_value": p, "value": value}]


def main(world, count, first="0", layers="4"):
    torch.set_num_threads(1)
    scores.linear_probe = functools.partial(linear_probe, least_steps=300)
    for seed in range(int(first), int(first) + int(count)):
        alone = layers == "1"
        for row in last_layer_alone(world, seed) if alone else claims_of_world(world, seed):
            print(json.dumps({"world": world, "seed": seed, **row}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
