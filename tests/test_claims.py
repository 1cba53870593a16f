"""Verdicts against closed forms and enumeration, and on small worlds whose truth is known."""

import functools
import itertools
from collections import Counter

import numpy as np
import pytest
from controls import claims_of_world

import reproduce
from kit.claims import (
    consistency_claim,
    curveball,
    nearness,
    rank_correlation,
    t_interval,
    thirds,
    verdict,
)
from metrics import kappa, linear_probe


def test_t_interval_against_tables():
    for values, t in (([1, 2, 4], 4.3027), ([1, 2, 4, 9], 3.1824), (list(range(10)), 2.2622)):
        low, high = t_interval(values)
        half = t * np.std(values, ddof=1) / np.sqrt(len(values))
        assert (high - low) / 2 == pytest.approx(half, rel=1e-3)
        assert (high + low) / 2 == pytest.approx(np.mean(values))


def test_thirds_and_verdicts():
    assert thirds(np.array([1.0, 2, 3, 4, 5, 6, 9])) == pytest.approx(20 / 3 - 2)  # 3 of 7 layers
    assert thirds(np.array([[1.0, 0], [5, 5], [2, 7], [8, 8]])).tolist() == [2, 5]
    assert verdict(np.array([True, True]), np.array([False, False])) == "holds"
    assert verdict(np.array([True, False]), np.array([False, True])) == "open"
    assert verdict(False, True) == "contradicted"


def test_curveball_keeps_both_margins_and_is_uniform():
    matrix = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 1]], bool)
    rows, columns = matrix.sum(1), matrix.sum(0)
    every = []
    for cells in itertools.product([False, True], repeat=12):
        other = np.array(cells).reshape(3, 4)
        if (other.sum(1) == rows).all() and (other.sum(0) == columns).all():
            every.append(other.tobytes())
    counts = Counter(drawn.tobytes() for drawn in curveball(matrix, 2000))
    assert set(counts) == set(every) and len(every) > 10
    expected = 2000 / len(every)
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < len(every) + 4 * np.sqrt(2 * len(every))


def test_independent_layers_are_not_said_to_agree_when_near():
    """Sets whose sizes grow with depth, as hypernyms matched do; then sets that drift."""
    rng = np.random.default_rng(0)
    sizes = np.array([0.05, 0.1, 0.2, 0.3, 0.45])[:, None]
    verdicts = []
    for _ in range(10):
        sets = rng.random((5, 80)) < sizes
        verdicts.append(consistency_claim([sets], draws=59)["verdict"])
    assert verdicts.count("holds") <= 3  # 99% binomial limit of a 5% coin
    drifting = rng.random(80)[None] + np.linspace(0, 1, 6)[:, None] < 1
    drifting ^= rng.random((6, 80)) < 0.03
    assert consistency_claim([drifting], draws=59)["verdict"] == "holds"
    assert consistency_claim([np.zeros((6, 80), bool)])["verdict"] == "too few layers"


def test_nearness_by_hand():
    sets = np.random.default_rng(0).random((4, 30)) < 0.4
    agreement = kappa(sets)
    near = [agreement[0, 1], agreement[1, 2], agreement[2, 3]]
    far = [agreement[0, 2], agreement[0, 3], agreement[1, 3]]
    assert nearness(sets) == pytest.approx(np.mean(near) - np.mean(far))


def test_rank_correlation_closed_forms():
    # without ties 1 - 6 Σd² / (n (n² - 1)); here d = (0, 1, -1, 0)
    x = np.arange(4)
    assert rank_correlation(x, np.array([1, 3, 2, 4])) == pytest.approx(1 - 6 * 2 / 60)
    ties = np.corrcoef(x, [0.5, 0.5, 2, 3])[0, 1]
    assert rank_correlation(x, np.array([1, 1, 2, 4])) == pytest.approx(ties)
    assert np.isnan(rank_correlation(x, x * 0)) and np.isnan(rank_correlation(x[:0], x[:0]))


@pytest.fixture
def few_trees(monkeypatch):
    """As few as a p of 0.05 allows."""
    monkeypatch.setattr(reproduce, "TREES", {"sae": 19, "neurons": 2, "untrained": 2})
    quick = functools.partial(linear_probe, least_steps=300)
    monkeypatch.setattr(reproduce, "linear_probe", quick)
    monkeypatch.setattr("kit.readings.TOP", (16,))
    monkeypatch.setattr("kit.probes.UNITS", (1,))


def claims(world):
    """Of a world of four layers and three seeds, with fewer tokens than in the calibration."""
    rows = claims_of_world(world, 1, layers=4, epochs=8, classes=50)
    return {row["claim"]: row for row in rows}


def test_a_world_without_a_hierarchy_earns_no_verdict_on_it(few_trees):
    rows = claims("flat")
    for row in rows.values():
        assert not (row["about_hierarchy"] and row["verdict"] == "holds")
    assert rows["category information grows with depth"]["verdict"] == "holds"


def test_a_world_with_a_hierarchy_does(few_trees):
    rows = claims("hierarchical")
    main = rows["the hierarchy is there"]
    assert main["verdict"] == "holds" and main["value"] < main["permuted"] - 0.3
    assert rows["it grows with depth"]["verdict"] == "holds"
    assert rows["general hypernyms emerge earlier"]["verdict"] == "no test"
