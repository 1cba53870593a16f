"""Hypernym probes against a loop over thresholds, ridge regression by NumPy, planted units."""

import numpy as np
import pytest
import torch
from conftest import imagenet1k

from kit.probes import Units, best_threshold, class_draws, fit_probes, hits_of, iou_of, probe_rows
from metrics import leaves_of
from sae import ActivationBuffer
from taxonomy import Taxonomy

TREE = Taxonomy.from_wnids(imagenet1k()[150:270:6])  # 20 dogs
NODES = TREE.hypernyms_to_find
LEAVES = leaves_of(TREE, NODES)
ONCE = torch.ones(20, 1)


def buffers(tmp_path, train, val):
    for split, tokens in (("train", train), ("val", val)):
        np.save(tmp_path / f"{split}.npy", tokens.astype(np.float16))
    return [ActivationBuffer(tmp_path / f"{split}.npy") for split in ("train", "val")]


def hits_by_count(train, val, labels, leaves, counts):
    """Fitted on train, counted on val."""
    units = Units(lambda x: x, train, labels["train"], 20)
    fitted = fit_probes(units, leaves, counts)
    return hits_of(fitted, units, val, torch.from_numpy(labels["val"]), 20)


def overlap(yes, under):
    return (yes & under).sum() / max((yes | under).sum(), 1)


@pytest.mark.parametrize("step", [0, 0.5])  # with many values level, as a ReLU's zeros are
def test_the_best_threshold_against_a_loop_over_all_values(step):
    rng = np.random.default_rng(0)
    for _ in range(20):
        under = rng.random(60) < 0.3
        values = rng.normal(size=60) + under
        values = np.maximum(np.round(values / step) * step, 0) if step else values
        best = max(overlap(values >= t, under) for t in values)
        threshold = float(best_threshold(torch.from_numpy(values), torch.from_numpy(under)))
        assert overlap(values >= threshold, under) == pytest.approx(best)
    assert best_threshold(torch.ones(3), torch.zeros(3, dtype=torch.bool)) == torch.inf


def test_probes_against_numpy(tmp_path):
    """Units ranked, ridge, threshold: all on training tokens alone."""
    rng = np.random.default_rng(1)
    labels = {"train": rng.integers(0, 20, 500), "val": rng.integers(0, 20, 300)}
    codes = rng.normal(size=(20, 9))
    tokens = {split: 3 + codes[y] + rng.normal(size=(len(y), 9)) for split, y in labels.items()}
    train, val = buffers(tmp_path, tokens["train"], tokens["val"])
    hits = hits_by_count(train, val, labels, LEAVES, (1, 4, None))
    x, x_val = (np.load(tmp_path / f"{split}.npy").astype(float) for split in ("train", "val"))
    mean, deviation = x.mean(0), x.std(0)
    x, x_val = (x - mean) / deviation, (x_val - mean) / deviation
    for count, hit in hits.items():
        expected = []
        for v in NODES:
            under = TREE.leaves[v][labels["train"]]
            units = np.argsort(-abs(x[under].mean(0)))[:count]
            z = x[:, units]
            weights = np.linalg.solve(
                z.T @ z + 0.5 * np.eye(z.shape[1]), z.T @ (under - under.mean())
            )
            values = z @ weights
            best = max(sorted(values), key=lambda t: overlap(values >= t, under))
            yes = x_val[:, units] @ weights >= best
            expected.append(overlap(yes, TREE.leaves[v][labels["val"]]))
        images = torch.bincount(torch.from_numpy(labels["val"])).float()
        iou = iou_of(hit, images, LEAVES, ONCE)[:, 0]
        assert iou.numpy() == pytest.approx(np.array(expected), abs=0.02)  # half precision
    same = TREE.permuted(np.arange(20))
    rows, draws = probe_rows("neurons", lambda x: x, train, val, labels, TREE, same)
    large = TREE.leaves[NODES].sum(1) >= 5
    assert [row["units"] for row in rows] == [1, 4, 16, 9] * 2 and rows[3]["dictionary"] == "token"
    assert rows[3]["iou"] == pytest.approx(float(iou[large].mean()))
    assert rows[3]["iou_small"] == pytest.approx(float(iou[~large].mean()))
    assert rows[3]["above_half"] == (iou > 0.5).sum() and rows[3]["best"] == iou.max()
    assert draws[0] == pytest.approx(rows[0]["iou"]) and len(draws) == 1001
    assert abs(draws.mean() - rows[0]["iou"]) < 0.1


def test_one_planted_unit_is_enough_and_a_permuted_tree_is_not_told(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(20).repeat(30))
    planted = TREE.leaves[NODES][:, labels].T * (1 + rng.random((600, len(NODES))))
    train, val = buffers(tmp_path, planted, planted[::-1])
    labels = {"train": labels, "val": labels[::-1].copy()}
    images = torch.full((20,), 30.0)
    hits = hits_by_count(train, val, labels, LEAVES, (1,))[1]
    assert (iou_of(hits, images, LEAVES, ONCE) == 1).all()
    leaves = LEAVES[:, torch.from_numpy(rng.permutation(20))]
    hits = hits_by_count(train, val, labels, leaves, (1,))[1]
    assert iou_of(hits, images, leaves, ONCE).mean() < 0.7


def test_the_threshold_never_saw_validation(tmp_path):
    """Validation tokens moved by a constant: a threshold chosen on them would move along."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(20).repeat(30))
    planted = TREE.leaves[NODES][:, labels].T.astype(float)
    train, val = buffers(tmp_path, planted, planted - 5)
    hits = hits_by_count(train, val, {"train": labels, "val": labels}, LEAVES, (1,))
    assert (iou_of(hits[1], torch.full((20,), 30.0), LEAVES, ONCE) < 0.6).all()


def test_the_bootstrap_over_classes_by_hand():
    draws, rng = class_draws(20), np.random.default_rng(0)
    assert draws.shape == (20, 1001) and (draws.sum(0) == 20).all() and (draws[:, 0] == 1).all()
    images = torch.full((20,), 10.0)
    hits = torch.from_numpy(rng.integers(0, 11, (len(NODES), 20))).float()
    iou = iou_of(hits, images, LEAVES, draws)
    for h, d in ((0, 0), (2, 7), (3, 20)):
        weights = draws[:, d]
        both = sum(weights[c] * hits[h, c] for c in range(20) if LEAVES[h, c])
        under = sum(weights[c] * 10 for c in range(20) if LEAVES[h, c])
        either = (weights * hits[h]).sum() + under - both
        assert iou[h, d] == pytest.approx(float(both / either)) if under else iou[h, d].isnan()
    assert torch.equal(class_draws(20), draws)
