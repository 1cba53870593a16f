"""Verdicts against closed forms and enumeration, and on small worlds whose truth is known."""

import functools
import re

import numpy as np
import pytest
from controls import claims_of_world
from pytest import approx

from kit import scores
from kit.claims import t_interval, thirds, verdict
from kit.tables import doubts
from metrics import linear_probe


def test_t_interval_against_tables():
    for values, t in (([1, 2, 4], 4.3027), ([1, 2, 4, 9], 3.1824), (list(range(10)), 2.2622)):
        low, high = t_interval(values)
        half = t * np.std(values, ddof=1) / np.sqrt(len(values))
        assert (high - low) / 2 == approx(half, rel=1e-3)
        assert (high + low) / 2 == approx(np.mean(values))


def test_thirds_and_verdicts():
    assert thirds(np.array([1.0, 2, 3, 4, 5, 6, 9])) == approx(20 / 3 - 2)  # 3 of 7 layers
    assert verdict(np.array([True, False]), np.array([False, True])) == "open"


@pytest.fixture
def few_trees(monkeypatch):
    """As few as a p of 0.05 allows."""
    monkeypatch.setattr(scores, "TREES", {"sae": 19, "neurons": 2, "untrained": 2})
    quick = functools.partial(linear_probe, least_steps=300)
    monkeypatch.setattr(scores, "linear_probe", quick)
    monkeypatch.setattr("kit.probes.UNITS", (1,))


def claims(world, **more):
    """Of a small world."""
    return {row["claim"]: row for row in claims_of_world(world, 1, **more)}


SMALL = dict(classes=50, images={"train": 40, "val": 20})
LAST = dict(layers=1, epochs=60, **SMALL)


def test_a_world_without_a_hierarchy_earns_no_verdict_on_it(few_trees):
    """Random class codes; and features that follow another tree, in the last layer alone."""
    for rows in (claims("flat", epochs=8, **SMALL), claims("other tree", **LAST)):
        for row in rows.values():
            assert not (row.get("about_hierarchy") and row["verdict"] == "holds"), row


def test_a_world_with_a_hierarchy_does(few_trees):
    rows = claims("hierarchical", epochs=8, **SMALL)
    main = rows["the hierarchy is there"]
    assert main["verdict"] == "holds" and main["value"] < main["permuted"] - 0.3
    assert rows["it grows with depth"]["verdict"] == "holds"


def test_where_an_sae_is_the_right_tool_training_brings_it(few_trees):
    rows = claims("features", **LAST)
    for name in ("the hierarchy is there", "training brings it"):
        assert rows[name]["verdict"] == "holds"
    assert rows["planted directions recovered"]["value"] > 0.8


def tables(loss, fvu=0.3, alive=60, gamma=30):
    """Of two layers, of which the last is as it is told; 100 latents, 20 of them single_class."""
    made = {"layers": [], "hierarchy": [], "training": []}
    for layer, (loss, fvu, alive, gamma) in enumerate(
        [(FLAT, 0.3, 60, 30), (loss, fvu, alive, gamma)]
    ):
        where = {"layer": layer}
        made["layers"].append(where | {"latents": 100, "fvu": fvu, "gamma": gamma})
        row = where | {"dictionary": "sae", "tree": "wordnet"}
        made["hierarchy"].append(row | {"alive": alive, "single_class": 20})
        made["training"] += [where | {"loss": value} for value in loss]
    return made


FLAT = np.r_[1, 0.5, 0.4, 0.35, np.full(12, 0.3), 0.28, 0.27, 0.26, 0.25]


def test_an_sae_that_is_not_good_is_said_to_be_so():
    falling = FLAT * np.linspace(1, 0.8, 20)
    assert doubts(tables(loss=FLAT), [0, 1]) == []
    for more, words in (
        (dict(fvu=0.95), "reconstructs hardly better than the mean.*FVU: layer 1 .95%"),
        (dict(gamma=2000), "hardly differ from their mean.*is rounding: layer 1 .18%"),
        (dict(alive=29), "nearly all latents are in no mean.*Left out: layer 1 .91%"),
        (dict(loss=np.full(20, 0.7)), "the loss hardly fell at all.*Left of it: layer 1 .100%"),
        (dict(loss=falling), "the loss still fell before the learning rate did.*By: layer 1 .5%"),
    ):
        (sentence,) = doubts(tables(**{"loss": FLAT, **more}), [0, 1])
        assert re.search(words, sentence)
    published = tables(loss=FLAT) | {"training": []}
    assert doubts(published, [0, 1]) == []
