"""The taxonomy against brute force, against NLTK, and against facts about ImageNet-1k."""

import itertools
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from conftest import imagenet1k

from taxonomy import SHIPPED, Synset, Taxonomy, TaxonomyError, read_graph, wordnet_graph


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
    above = graph[wnid].hypernyms
    return (
        [[wnid, *path] for hypernym in above for path in paths_up(graph, hypernym)]
        if above
        else [[wnid]]
    )


def brute_force(graph, classes):
    """(ancestors of each class, heights, depths) by listing paths."""
    paths = {wnid: paths_up(graph, wnid) for wnid in classes}
    above = {wnid: set().union(*paths[wnid]) for wnid in classes}
    nodes = set().union(*above.values())
    below = {
        v: [path.index(v) for wnid in classes for path in paths[wnid] if v in path] for v in nodes
    }
    height = {v: max(lengths) for v, lengths in below.items()}
    depth = {v: max(len(path) for path in paths_up(graph, v)) - 1 for v in nodes}
    return above, height, depth, below


def brute_force_lch(above, height, depth, classes, of):
    common = set.intersection(*(above[wnid] for wnid in of))
    leaves = {v: sum(v in above[wnid] for wnid in classes) for v in common}
    return min(common, key=lambda v: (-depth[v], height[v], leaves[v], v))


def check_against_brute_force(graph, classes, rng, sets):
    tree = Taxonomy.from_graph(graph, classes)
    above, height, depth, below = brute_force(graph, classes)
    assert tree.wnids == sorted(set().union(*above.values()))
    assert [tree.wnids[v] for v in tree.classes] == classes
    for v, wnid in enumerate(tree.wnids):
        assert tree.height[v] == height[wnid] and tree.depth[v] == depth[wnid]
        assert tree.height_shortest[v] == min(below[wnid])
        assert [wnid in above[c] for c in classes] == tree.leaves[v].tolist()
    chosen = [rng.sample(range(len(classes)), rng.choice([1, 2, 2, 3, 5, 8])) for _ in range(sets)]
    members = np.zeros((sets, len(classes)), bool)
    for row, of in zip(members, chosen):
        row[of] = True
    for of, v in zip(chosen, tree.lch(members)):
        assert tree.wnids[v] == brute_force_lch(
            above, height, depth, classes, [classes[c] for c in of]
        )
    for a, b in itertools.islice(itertools.combinations(range(len(classes)), 2), 300):
        lch = brute_force_lch(above, height, depth, classes, [classes[a], classes[b]])
        assert tree.wnids[tree.pair_lch[a, b]] == tree.wnids[tree.pair_lch[b, a]] == lch
    assert (tree.pair_lch.diagonal() == tree.classes).all()
    by_set = {}
    for v, wnid in enumerate(tree.wnids):
        by_set.setdefault(tree.leaves[v].tobytes(), []).append(v)
    for nodes in by_set.values():
        deepest = max(tree.depth[nodes])
        assert len(set(tree.lowest[nodes])) == 1 and tree.depth[tree.lowest[nodes[0]]] == deepest
    inner = {key for key, nodes in by_set.items() if tree.leaves[nodes[0]].sum() >= 2}
    assert {tree.leaves[v].tobytes() for v in tree.hypernyms} == inner and len(
        tree.hypernyms
    ) == len(inner)


@pytest.mark.parametrize("seed", range(12))
def test_random_dag_against_brute_force(seed):
    check_against_brute_force(*random_dag(seed), random.Random(seed), sets=60)


def test_imagenet_against_brute_force():
    rng = random.Random(0)
    check_against_brute_force(read_graph(SHIPPED), rng.sample(imagenet1k(), 150), rng, sets=300)


def test_imagenet_facts(imagenet):
    graph = read_graph(SHIPPED)
    assert len(imagenet1k()) == 1000 and len(graph) == 1860
    assert sum(len(synset.hypernyms) for synset in graph.values()) == 1937
    assert sum(len(synset.hypernyms) > 1 for synset in graph.values()) == 75
    root = imagenet.depth.argmin()
    assert (
        imagenet.names[root] == "entity.n.01"
        and imagenet.height[root] == 18
        and imagenet.leaves[root].all()
    )
    inner = np.setdiff1d(np.arange(1860), imagenet.classes)
    assert len(inner) == 860 and len({imagenet.leaves[v].tobytes() for v in inner}) == 667
    chihuahua, tabby = (imagenet1k().index(wnid) for wnid in ("n02085620", "n02123045"))
    pair = np.zeros((1, 1000))
    pair[0, [chihuahua, tabby]] = 1
    assert (
        imagenet.names[imagenet.lch(pair)[0]] == "carnivore.n.01"
    )  # and not domestic_animal.n.01, which is less high


def test_deepest_and_least_high_differ_on_few_pairs(imagenet):
    least_high = np.full((1000, 1000), 99, np.int16)
    for v in np.argsort(-imagenet.height):
        below = np.flatnonzero(imagenet.leaves[v])
        least_high[np.ix_(below, below)] = imagenet.height[v]
    upper = np.triu_indices(1000, 1)
    share = (imagenet.height[imagenet.pair_lch[upper]] != least_high[upper]).mean()
    assert 0.0005 < share < 0.002


def test_subset_is_the_graph_of_its_classes_only():
    tree = Taxonomy.from_wnids(["n02123045", "n02085620", "n02690373"])  # in the order given
    assert [tree.wnids[v] for v in tree.classes] == ["n02123045", "n02085620", "n02690373"]
    v = tree.lch([[1, 1, 0]])[0]
    assert (tree.names[v], tree.height[v]) == ("carnivore.n.01", 4)
    assert tree.leaves[v].tolist() == [True, True, False]


def test_against_nltk(wordnet, imagenet):
    synsets = [wordnet.synset_from_pos_and_offset("n", int(wnid[1:])) for wnid in imagenet.wnids]
    assert [synset.name() for synset in synsets] == imagenet.names
    assert [synset.max_depth() for synset in synsets] == imagenet.depth.tolist()
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 1000, (1500, 2))
    members = np.zeros((len(pairs), 1000), bool)
    members[np.arange(len(pairs))[:, None], pairs] = True
    for (a, b), v in zip(pairs, imagenet.lch(members)):
        theirs = synsets[imagenet.classes[a]].lowest_common_hypernyms(synsets[imagenet.classes[b]])
        assert imagenet.names[v] in [synset.name() for synset in theirs]


def test_shipped_graph_equals_the_rebuilt_one(wordnet):
    assert wordnet_graph(imagenet1k()) == read_graph(SHIPPED)


def test_classes_outside_imagenet1k_come_from_nltk(wordnet):
    dog, tree_frog_order = "n02084071", "n01639765"  # inner nodes of WordNet: dog, frog
    violet = wordnet.synset("violet.n.01")
    wnid = f"n{violet.offset():08d}"
    tree = Taxonomy.from_wnids([dog, tree_frog_order, wnid])
    assert tree.names[tree.wnids.index(wnid)] == "violet.n.01"
    assert tree.names[tree.lch([[1, 1, 0]])[0]] == "vertebrate.n.01"
    with pytest.raises(TaxonomyError, match="no synset n00000002"):
        Taxonomy.from_wnids([dog, "n00000002"])


def test_without_the_shipped_graph_nltk_is_asked(wordnet, monkeypatch, tmp_path):
    monkeypatch.setattr("taxonomy.SHIPPED", tmp_path / "nowhere.txt")
    tree = Taxonomy.from_wnids(["n02123045", "n02085620", "n02690373"])
    assert tree.names[tree.lch([[1, 1, 0]])[0]] == "carnivore.n.01"


def test_a_damaged_wordnet(monkeypatch, tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\nimport taxonomy\ntry:\n"
        "    taxonomy.Taxonomy.from_wnids(['n99999999'])\n"
        "except taxonomy.TaxonomyError as error:\n    print('said', error)"
    )
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora/wordnet.zip").write_bytes(b"PK\3\4 cut off")
    done = subprocess.run(
        [sys.executable, "-c", code, str(SHIPPED.parent)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "NLTK_DATA": str(tmp_path),
            "HOME": "/",
            "http_proxy": "http://127.0.0.1:9",
            "https_proxy": "http://127.0.0.1:9",
        },
    )
    assert "said WordNet 3.0 is needed" in done.stdout, done.stdout + done.stderr


def test_bad_input():
    with pytest.raises(TaxonomyError, match="class n02085620 is given twice"):
        Taxonomy.from_wnids(["n02085620", "n02123045", "n02085620"])
    for wnid in ["dog", "n0208562", "N02085620", "n02085620 "]:
        with pytest.raises(TaxonomyError, match="is not a wnid"):
            Taxonomy.from_wnids([wnid, "n02123045"])
    with pytest.raises(TaxonomyError, match="one root"):
        Taxonomy.from_graph({"n1": Synset("a", ()), "n2": Synset("b", ())}, ["n1", "n2"])
    with pytest.raises(TaxonomyError, match="set 1 is empty"):
        Taxonomy.from_wnids(["n02085620", "n02123045"]).lch([[1, 0], [0, 0]])
