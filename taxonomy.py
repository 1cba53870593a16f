"""The ImageNet ancestor graph from WordNet: ancestors, heights, lowest common hypernyms (LCH).

    tree = Taxonomy.from_wnids(["n02085620", "n02123045", "n02690373"])
    v = tree.lch([[1, 1, 0]])[0]     # of Chihuahua and tabby, not of airliner
    tree.names[v], tree.height[v]    # carnivore.n.01, 4

WordNet's noun hypernyms form a directed acyclic graph with one root, entity.n.01, not a tree: a
synset may have several hypernyms. A node is known by its wnid, "n" and the eight-digit offset in
WordNet 3.0, never by its name: "crane", "cardigan" and "maillot" each name two ImageNet classes.

The graph over ImageNet-1k's classes is shipped in imagenet1k_wordnet.txt, whose lines `python
taxonomy.py` prints anew from NLTK's WordNet 3.0. Other wnids are looked up in NLTK's WordNet.
"""
import functools
import io
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy import ndarray as Array

SHIPPED = Path(__file__).with_name("imagenet1k_wordnet.txt")


class TaxonomyError(ValueError):
    """A wnid that is none or unknown; WordNet out of reach; a graph without a single root."""


class Synset(NamedTuple):
    name: str  # as NLTK writes it: dog.n.01
    hypernyms: tuple  # wnids, one edge up


@dataclass(frozen=True, eq=False)
class Taxonomy:
    """C classes, and the V nodes that are a class or above one.

    Classes keep the order in which they are given; sorted, that is torchvision's label order.
    """

    wnids: list
    """(V,) sorted"""
    names: list
    """(V,) synset names: dog.n.01"""
    classes: Array
    """(C,) int, the node of each class"""
    leaves: Array
    """(V, C) bool, True if the class is at or below the node: the ancestor matrix"""
    height: Array
    """(V,) int, edges on the longest path from the node down to a class; 0 with none below"""
    height_shortest: Array
    """(V,) int, edges on the shortest of these paths"""
    depth: Array
    """(V,) int, edges on the longest path from the root down to the node"""
    lowest: Array
    """(V,) int, the lowest (deepest) node with the same classes: no latent can tell these apart"""

    @classmethod
    def from_wnids(cls, wnids):
        """The taxonomy of some classes, from the shipped graph, else from NLTK's WordNet.

        Raises TaxonomyError for a wnid that is none or unknown, and if WordNet cannot be had.
        """
        graph = read_graph(SHIPPED) if SHIPPED.exists() else {}
        wnids = list(wnids)
        for wnid in wnids:
            if not re.fullmatch(r"n\d{8}", wnid):
                raise TaxonomyError(f"{wnid!r} is not a wnid: 'n' and eight digits, n02085620")
        if not set(wnids) <= graph.keys():
            graph = wordnet_graph(wnids)
        return cls.from_graph(graph, wnids)

    @classmethod
    def from_graph(cls, graph, wnids):
        """The part of `graph` (wnid -> Synset) at or above classes. Raises TaxonomyError for two
        roots, and for a class given twice; KeyError for a wnid that the graph lacks."""
        classes = list(wnids)
        for wnid in classes:
            if classes.count(wnid) > 1:
                raise TaxonomyError(f"class {wnid} is given twice")
        index = {}
        pending = classes.copy()
        while pending:
            wnid = pending.pop()
            if wnid not in index:
                index[wnid] = None
                pending += graph[wnid].hypernyms
        nodes = sorted(index)
        index = {wnid: v for v, wnid in enumerate(nodes)}
        roots = [wnid for wnid in nodes if not graph[wnid].hypernyms]
        if len(roots) != 1:
            raise TaxonomyError(f"one root is needed, here are {len(roots)}: {', '.join(roots)}")

        @functools.cache
        def depth_of(wnid):
            return 1 + max(map(depth_of, graph[wnid].hypernyms), default=-1)

        depth = np.array([depth_of(wnid) for wnid in nodes])
        class_nodes = np.array([index[wnid] for wnid in classes])
        leaves = np.zeros((len(nodes), len(classes)), bool)
        leaves[class_nodes, np.arange(len(classes))] = True
        height = np.zeros(len(nodes), int)
        shortest = np.full(len(nodes), len(nodes))
        shortest[class_nodes] = 0
        for v in np.argsort(-depth, kind="stable"):  # deepest first: all below v is done
            for wnid in graph[nodes[v]].hypernyms:
                parent = index[wnid]
                leaves[parent] |= leaves[v]
                height[parent] = max(height[parent], height[v] + 1)
                shortest[parent] = min(shortest[parent], shortest[v] + 1)

        first_of_set = {}
        lowest = np.empty(len(nodes), int)
        for v in np.lexsort((np.arange(len(nodes)), height, -depth)).tolist():
            lowest[v] = first_of_set.setdefault(leaves[v].tobytes(), v)
        names = [graph[wnid].name for wnid in nodes]
        return cls(nodes, names, class_nodes, leaves, height, shortest, depth, lowest)

    def permuted(self, order):
        """The same tree, its classes reassigned to its leaves: class c takes the place of order[c].

        The control for kinship: classes, images and latents stay as they are, and the tree keeps
        its shape, but which classes are kin is left to chance.
        """
        return replace(self, classes=self.classes[order], leaves=self.leaves[:, order])

    @functools.cached_property
    def hypernyms(self):
        """(H,) the distinct inner nodes: one, the lowest, for each set of at least two classes; the
        deepest first, then least height, fewest leaves, wnid: the first above a set is its LCH."""
        size = self.leaves.sum(1)
        order = np.lexsort((range(len(size)), size, self.height, -self.depth))
        distinct = self.lowest[order] == order
        return order[distinct & (size[order] >= 2)]

    @functools.cached_property
    def hypernyms_to_find(self):
        """(H',) those that a latent can be matched with: of two classes to half of all."""
        return self.hypernyms[self.leaves[self.hypernyms].sum(1) <= len(self.classes) / 2]

    def lch(self, sets):
        """Lowest common hypernyms of M sets of classes: (M, C), non-zero where in the set -> (M,).

        Among the nodes at or above every class of a set, the deepest (longest path from the root),
        as NLTK's `lowest_common_hypernyms` has it for a pair; ties by least height, then fewest
        leaves, then wnid. Raises TaxonomyError for an empty set.
        """
        sets = (np.asarray(sets) != 0).astype(np.float32)
        size = sets.sum(1)
        if not size.all():
            raise TaxonomyError(f"set {int(np.argmin(size))} is empty and has no LCH")
        under = sets @ self.leaves[self.hypernyms].T.astype(np.float32)  # (M, H), exact
        lowest = self.hypernyms[(under == size[:, None]).argmax(1)]  # the lowest comes first
        return np.where(size == 1, self.classes[sets.argmax(1)], lowest)

    @functools.cached_property
    def pair_lch(self):
        """(C, C) int32, the LCH of every pair of classes; on the diagonal the class itself."""
        pairs = np.zeros((len(self.classes), len(self.classes)), np.int32)
        for v in self.hypernyms[::-1]:  # the lowest node above a pair is written last
            below = np.flatnonzero(self.leaves[v])
            pairs[np.ix_(below, below)] = v
        np.fill_diagonal(pairs, self.classes)
        return pairs

    def heights_of_pairs(self, height):
        """height (V,) of nodes -> (C, C), that of the LCH of every pair of classes; 0 for twice the
        same, also if the class is an inner node."""
        heights = height[self.pair_lch]
        np.fill_diagonal(heights, 0)
        return heights


def read_graph(path):
    """Read lines of `wnid <tab> name <tab> hypernyms`; # starts a comment."""
    lines = Path(path).read_text().splitlines()
    rows = [line.split("\t") for line in lines if line and line[0] != "#"]
    return {wnid: Synset(name, tuple(hypernyms.split())) for wnid, name, hypernyms in rows}


def wordnet_graph(wnids):
    """All nodes at or above `wnids` in NLTK's WordNet 3.0; TaxonomyError if it lacks one."""
    wordnet = _wordnet()
    graph = {}
    pending = list(wnids)
    while pending:
        wnid = pending.pop()
        try:
            with warnings.catch_warnings():  # of an unknown offset
                warnings.simplefilter("ignore")
                synset = wordnet.synset_from_pos_and_offset("n", int(wnid[1:]))
            name = synset.name()
        except Exception as error:  # versions of NLTK answer it in their own ways
            raise TaxonomyError(f"WordNet 3.0 has no synset {wnid}") from error
        above = synset.hypernyms() + synset.instance_hypernyms()
        above = sorted(f"n{hypernym.offset():08d}" for hypernym in above)
        graph[wnid] = Synset(name, tuple(above))
        pending += set(above) - graph.keys()
    return graph


def _wordnet():
    """NLTK's WordNet, downloaded on first use; TaxonomyError if it cannot be had."""
    import nltk  # takes a second, and is needed for wnids outside ImageNet-1k only
    from nltk.corpus import wordnet

    try:
        try:
            wordnet.ensure_loaded()
        except LookupError:
            nltk.download("wordnet", quiet=True, print_error_to=io.StringIO())
            wordnet.ensure_loaded()
    except Exception as error:  # not there, or damaged: a truncated zip, say
        lines = str(error).splitlines()  # NLTK's begin with a line of asterisks
        reason = next((line.strip() for line in lines if line.strip(" *")), "it was not found")
        raise TaxonomyError(
            f"WordNet 3.0 is needed for wnids outside ImageNet-1k and cannot be read ({reason}): "
            "where there is internet run `python -m nltk.downloader -d nltk_data wordnet`, and set "
            "NLTK_DATA to a copy of that folder") from error
    return wordnet


if __name__ == "__main__":
    for wnid, synset in sorted(wordnet_graph(read_graph(SHIPPED)).items()):
        print(wnid, synset.name, " ".join(synset.hypernyms), sep="\t")
