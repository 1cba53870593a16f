"""Hypernym probes against a loop over thresholds, ridge regression by NumPy, planted units."""

import numpy as np
import pytest
import torch
from conftest import imagenet1k
from pytest import approx

from kit.probes import best_threshold, class_draws, iou_of, probe_rows
from metrics import leaves_of
from sae import ActivationBuffer
from taxonomy import Taxonomy

TREE = Taxonomy.from_wnids(imagenet1k()[150:270:6])  # 20 dogs


def overlap(yes, under):
    return (yes & under).sum() / max((yes | under).sum(), 1)


@pytest.mark.parametrize("decimals", [9, 0])  # with many values level, as a ReLU's zeros are
def test_the_best_threshold_against_a_loop_over_all_values(decimals):
    rng = np.random.default_rng(0)
    for _ in range(20):
        under = rng.random(60) < 0.3
        values = np.maximum(rng.normal(size=60) + under, 0).round(decimals)
        best = max(overlap(values >= t, under) for t in values)
        threshold = float(best_threshold(torch.from_numpy(values), torch.from_numpy(under)))
        assert overlap(values >= threshold, under) == approx(best)
    assert best_threshold(torch.ones(3), torch.zeros(3, dtype=torch.bool)) == torch.inf


def test_probes_against_numpy(tmp_path):
    """Units ranked, ridge, threshold: all on training tokens alone, from which val's differ."""
    rng = np.random.default_rng(1)
    codes, labels, tokens, buffers = rng.normal(size=(20, 9)), {}, {}, []
    for split, count, moved in (("train", 500, 0), ("val", 300, 0.5)):
        labels[split] = rng.integers(0, 20, count)
        x = 3 + moved + codes[labels[split]] + rng.normal(size=(count, 9))
        np.save(tmp_path / f"{split}.npy", x.astype(np.float16))
        buffers.append(ActivationBuffer(tmp_path / f"{split}.npy"))
        tokens[split] = (x - 3) / 3
    permuted = TREE.permuted(rng.permutation(20))
    rows, draws = probe_rows("neurons", lambda x: x, *buffers, labels, TREE, permuted)
    mean, deviation = tokens["train"].mean(0), tokens["train"].std(0)
    x, x_val = ((tokens[split] - mean) / deviation for split in ("train", "val"))

    def probe(leaves, count):
        under = leaves[labels["train"]]
        units = np.argsort(-abs(x[under].mean(0)))[:count]
        z = x[:, units]
        weights = np.linalg.solve(z.T @ z + 0.5 * np.eye(z.shape[1]), z.T @ under)
        best = max(z @ weights, key=lambda t: overlap(z @ weights >= t, under))
        return overlap(x_val[:, units] @ weights >= best, leaves[labels["val"]])

    large = TREE.leaves[TREE.hypernyms_to_find].sum(1) >= 5
    given = [(tree, units) for tree in (TREE, permuted) for units in (1, 4, 16, None)]
    for row, (tree, units) in zip(rows, given, strict=True):
        iou = np.array([probe(tree.leaves[v], units) for v in tree.hypernyms_to_find])
        expected = {"units": units or 9, "dictionary": "neurons" if units else "token"}
        expected |= {"tree": "wordnet" if tree is TREE else "permuted"}
        assert expected.items() <= row.items()
        numbers = iou[large].mean(), iou[~large].mean(), iou.max()
        ours = [row[name] for name in ("iou", "iou_small", "best")]
        assert ours == approx(numbers, abs=0.01)  # half precision
        assert row["above_half"] == (iou > 0.5).sum()
    assert draws[0] == approx(rows[0]["iou"]) and len(draws) == 1001
    assert abs(draws.mean() - rows[0]["iou"]) < 0.1


def test_the_bootstrap_over_classes_by_hand():
    draws, rng = class_draws(20), np.random.default_rng(0)
    assert draws.shape == (20, 1001) and (draws.sum(0) == 20).all() and (draws[:, 0] == 1).all()
    assert torch.equal(class_draws(20), draws)
    leaves = leaves_of(TREE, TREE.hypernyms_to_find)
    hits = torch.from_numpy(rng.integers(0, 11, leaves.shape)).float()
    iou = iou_of(hits, torch.full((20,), 10.0), leaves, draws)
    for h, d in ((0, 0), (2, 7), (3, 20)):
        drawn = [c for c in range(20) for _ in range(int(draws[c, d]))]
        both = sum(hits[h, c] for c in drawn if leaves[h, c])
        under = sum(10 for c in drawn if leaves[h, c])
        either = under + sum(hits[h, c] for c in drawn if not leaves[h, c])
        assert iou[h, d] == approx(float(both / either)) if under else iou[h, d].isnan()
