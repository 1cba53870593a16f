"""The taxonomy against brute force, against NLTK, and against facts about ImageNet-1k."""

import itertools
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from conftest import imagenet1k
from pytest import raises

from taxonomy import SHIPPED, Synset, Taxonomy, TaxonomyError, read_graph, wordnet_graph

PETS = ["n02123045", "n02085620", "n02690373"]  # tabby, Chihuahua, and an airliner


@pytest.fixture(scope="module")
def imagenet():
    return Taxonomy.from_wnids(imagenet1k())


def random_dag(seed):
    """A DAG with one root, and some of its nodes as classes, inner ones among them."""
    rng = random.Random(seed)
    wnids = [f"n{i:08d}" for i in rng.sample(range(10**6), 40)]
    graph = {wnids[0]: Synset("root.n.01", ())}
    for i in range(1, len(wnids)):
        hypernyms = rng.sample(wnids[:i], min(i, rng.choice([1, 1, 1, 2, 3])))
        graph[wnids[i]] = Synset(f"node.n.{i}", tuple(hypernyms))
    return graph, rng.sample(wnids[1:], 15)


def paths_up(graph, wnid):
    """Every path from a node to the root, as lists of wnids."""
    paths = [path for above in graph[wnid].hypernyms for path in paths_up(graph, above)]
    return [[wnid, *path] for path in paths or [[]]]


def check_against_brute_force(graph, classes, rng, sets):
    """By listing paths."""
    tree = Taxonomy.from_graph(graph, classes)
    paths = {wnid: paths_up(graph, wnid) for wnid in classes}
    above = [set().union(*paths[wnid]) for wnid in classes]
    assert tree.wnids == sorted(set().union(*above))
    assert [tree.wnids[v] for v in tree.classes] == classes
    height, depth, leaves = {}, {}, {}
    for v, wnid in enumerate(tree.wnids):
        below = [path.index(wnid) for each in paths.values() for path in each if wnid in path]
        height[wnid] = max(below)
        depth[wnid] = max(map(len, paths_up(graph, wnid))) - 1
        leaves[wnid] = [wnid in of_class for of_class in above]
        assert (tree.height[v], tree.height_shortest[v]) == (max(below), min(below))
        assert tree.depth[v] == depth[wnid] and tree.leaves[v].tolist() == leaves[wnid]

    def lch(of):
        common = set.intersection(*(above[c] for c in of))
        return min(common, key=lambda v: (-depth[v], height[v], sum(leaves[v]), v))

    chosen = [rng.sample(range(len(classes)), rng.choice([1, 2, 2, 3, 5, 8])) for _ in range(sets)]
    members = np.zeros((sets, len(classes)), bool)
    for row, of in zip(members, chosen):
        row[of] = True
    assert [tree.wnids[v] for v in tree.lch(members)] == list(map(lch, chosen))
    for a, b in itertools.islice(itertools.combinations(range(len(classes)), 2), 300):
        assert tree.wnids[tree.pair_lch[a, b]] == tree.wnids[tree.pair_lch[b, a]] == lch([a, b])
    assert (tree.pair_lch.diagonal() == tree.classes).all()
    by_set = {}
    for v, wnid in enumerate(tree.wnids):
        by_set.setdefault(tuple(leaves[wnid]), []).append(v)
    for nodes in by_set.values():
        (lowest,) = set(tree.lowest[nodes])
        assert lowest in nodes and tree.depth[lowest] == max(tree.depth[nodes])
    inner = sorted(key for key in by_set if sum(key) >= 2)
    assert sorted(tuple(tree.leaves[v].tolist()) for v in tree.hypernyms) == inner


@pytest.mark.parametrize("seed", range(12))
def test_random_dag_against_brute_force(seed):
    check_against_brute_force(*random_dag(seed), random.Random(seed), sets=60)


def test_imagenet_against_brute_force():
    rng = random.Random(0)
    check_against_brute_force(read_graph(SHIPPED), rng.sample(imagenet1k(), 150), rng, sets=300)


def test_imagenet_facts(imagenet):
    graph = read_graph(SHIPPED)
    above = [len(synset.hypernyms) for synset in graph.values()]
    assert len(imagenet1k()) == 1000 and len(graph) == 1860
    assert sum(above) == 1937 and sum(count > 1 for count in above) == 75
    root = imagenet.depth.argmin()
    assert imagenet.names[root] == "entity.n.01" and imagenet.height[root] == 18
    inner = np.setdiff1d(np.arange(1860), imagenet.classes)
    assert len(inner) == 860 and len({imagenet.leaves[v].tobytes() for v in inner}) == 667
    # of tabby and Chihuahua; not domestic_animal.n.01, which is less high
    assert lch_of(PETS) == "carnivore.n.01"


def lch_of(wnids):
    """Of the first two of three."""
    tree = Taxonomy.from_wnids(wnids)
    return tree.names[tree.lch([[1, 1, 0]])[0]]


def test_against_nltk(wordnet, imagenet):
    synsets = [wordnet.synset_from_pos_and_offset("n", int(wnid[1:])) for wnid in imagenet.wnids]
    assert [synset.name() for synset in synsets] == imagenet.names
    assert [synset.max_depth() for synset in synsets] == imagenet.depth.tolist()
    for pair in np.random.default_rng(0).integers(0, 1000, (1500, 2)):
        a, b = (synsets[v] for v in imagenet.classes[pair])
        name = imagenet.names[imagenet.pair_lch[tuple(pair)]]
        assert name in [synset.name() for synset in a.lowest_common_hypernyms(b)]


def test_shipped_graph_equals_the_rebuilt_one(wordnet):
    assert wordnet_graph(imagenet1k()) == read_graph(SHIPPED)


def test_classes_outside_imagenet1k_come_from_nltk(wordnet):
    violet = f"n{wordnet.synset('violet.n.01').offset():08d}"
    inner = "n02084071", "n01639765"  # dog, frog
    assert "violet.n.01" in Taxonomy.from_wnids([*inner, violet]).names
    assert lch_of([*inner, violet]) == "vertebrate.n.01"
    with raises(TaxonomyError, match="no synset n00000002"):
        Taxonomy.from_wnids([*inner, "n00000002"])


def test_without_the_shipped_graph_nltk_is_asked(wordnet, monkeypatch, tmp_path):
    monkeypatch.setattr("taxonomy.SHIPPED", tmp_path / "nowhere.txt")
    assert lch_of(PETS) == "carnivore.n.01"


def test_a_damaged_wordnet(monkeypatch, tmp_path):
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import taxonomy
try:
    taxonomy.Taxonomy.from_wnids(['n99999999'])
except taxonomy.TaxonomyError as error:
    print('said', error)
"""
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora/wordnet.zip").write_bytes(b"PK\3\4 cut off")
    nowhere = "http://127.0.0.1:9"
    paths = {"NLTK_DATA": str(tmp_path), "HOME": "/", "http_proxy": nowhere, "https_proxy": nowhere}
    command = [sys.executable, "-c", code, str(SHIPPED.parent)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | paths)
    assert "said WordNet 3.0 is needed" in done.stdout, done.stdout + done.stderr


def test_bad_input():
    root = Synset("a", ())
    for match, action in (
        ("class n02085620 is given twice", lambda: Taxonomy.from_wnids([*PETS, PETS[1]])),
        ("one root", lambda: Taxonomy.from_graph({"n1": root, "n2": root}, ["n1", "n2"])),
        ("set 1 is empty", lambda: Taxonomy.from_wnids(PETS).lch([[1, 0, 0], [0, 0, 0]])),
    ):
        with raises(TaxonomyError, match=match):
            action()
    for wnid in ["dog", "n0208562", "N02085620", "n02085620 "]:
        with raises(TaxonomyError, match="is not a wnid"):
            Taxonomy.from_wnids([wnid, "n02123045"])
