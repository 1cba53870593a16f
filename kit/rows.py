"""Rows of tables: hierarchy.csv, latents.csv, hypernyms.csv."""
from collections import Counter

import numpy as np


def values_of(rows, column, **where):
    """A column of the rows that agree with `where`, as numbers, NaN for None; with the layer and
    all other keys given one for each seed."""
    chosen = [row[column] for row in rows if where.items() <= row.items()]
    return np.array(chosen, float)


def hierarchy_rows(dictionary, placed, controls):
    """Rows of hierarchy.csv: WordNet's tree, mean and standard deviation over permuted trees, and
    the hierarchy's part, WordNet's less that mean. And all values under permuted trees by column.
    """
    columns = placed.summary()
    own = np.array(list(columns.values()), float)
    draws = np.array([list(control.summary().values()) for control in controls], float)
    mean = draws.mean(0)
    rows = []
    for tree, values in (("wordnet", columns.values()), ("permuted", mean),
                         ("permuted_sd", draws.std(0)), ("part", own - mean)):
        rows.append({"dictionary": dictionary, "tree": tree, **dict(zip(columns, values))})
    return rows, dict(zip(columns, draws.T))


def terms_of(names):
    """dog.n.01 -> dog; crane.n.04 -> crane (4), if there is another crane among the names."""
    plain = [name.rsplit(".", 2)[0].replace("_", " ") for name in names]
    often = Counter(plain)
    return [text if often[text] == 1 else f"{text} ({int(name[-2:])})"
            for text, name in zip(plain, names)]


def tree_order(tree, nodes):
    """Nodes (H,) as a tree is printed: (their order (H,), indents (H,)). Each stands below the
    smallest of the others that is above it, as WordNet has several."""
    leaves = tree.leaves[nodes].astype(int)
    size = leaves.sum(1)
    contains = (leaves @ leaves.T == size) & (size < size[:, None])  # [u, v]: u is above v
    parent = np.where(contains, size[:, None], np.inf).argmin(0)
    parent[~contains.any(0)] = -1
    order = []
    indents = []
    pending = [(-1, -1)]
    while pending:
        h, indent = pending.pop()
        if h >= 0:
            order.append(h)
            indents.append(indent)
        below = np.flatnonzero(parent == h)
        pending += [(child, indent + 1) for child in below[np.argsort(size[below], kind="stable")]]
    return order, indents


def hypernym_rows(placed, profile):
    """Of a layer: every hypernym that can be found, in the tree's order, and the latent that was
    chosen for it on half A, if any shows it."""
    tree = placed.tree
    choice = placed.choice
    terms = terms_of(tree.names)
    rows = []
    for h, indent in zip(*tree_order(tree, placed.hypernyms)):
        v = placed.hypernyms[h]
        i = choice.latent[h]
        row = {"wnid": tree.wnids[v], "name": tree.names[v], "term": terms[v], "indent": indent,
               "classes": tree.leaves[v].sum(), "height": tree.height[v],
               "matched": choice.matched[h], "best_latent": None, "match": 0.0, "lch": None,
               "top_images": [], "responds_to": []}
        if i >= 0:
            latent = placed.latents[i]
            top_images = profile.top_images[latent, : profile.fires[latent]]
            row |= {"best_latent": latent, "match": choice.latent_match[h],
                    "lch": tree.names[placed.lch[i]], "top_images": top_images,
                    "responds_to": placed.responses.responds[i].nonzero().flatten()}
        rows.append(row)
    return rows


def height_rows(tree):
    """How far apart two classes of a height are: an example of each, with one class if it can."""
    heights = tree.heights_of_pairs(tree.height)
    terms = terms_of([tree.names[v] for v in tree.classes])
    anchor = max(range(len(heights)), key=lambda c: len(set(heights[c])))
    rows = []
    for height in sorted(set(heights.flat) - {0}):
        pairs = np.argwhere(heights == height).tolist()
        a, b = min(pairs, key=lambda pair: pair[0] != anchor)
        rows.append({"height": height, "a": terms[a], "b": terms[b]})
    return rows


def matched_sets(layers):
    """`hypernym_rows` of L layers -> (L, H) bool, which are matched."""
    return np.array([[row["matched"] for row in rows] for rows in layers])


def emergence_rows(layers):
    """`hypernym_rows` by layer -> rows of hypernyms.csv, with the layer in which each hypernym is
    first matched, and whether the picture shows it: it is matched in a layer, or above one."""
    matched = matched_sets(layers.values())
    numbers = np.array(list(layers))
    rows = next(iter(layers.values()))
    shown = matched.any(0)
    below = set()  # indents of what is shown further down
    for h in reversed(range(len(rows))):
        indent = rows[h]["indent"]
        shown[h] |= indent + 1 in below
        below.discard(indent + 1)
        if shown[h]:
            below.add(indent)
    merged = []
    for layer, rows in layers.items():
        for h, row in enumerate(rows):
            first = numbers[matched[:, h]].min() if matched[:, h].any() else None
            merged.append({"layer": layer, **row, "emergence_layer": first, "shown": shown[h]})
    return merged


def latent_rows(placed, profile):
    """A row of latents.csv for every alive latent. It is named on half A by the hypernym that it
    shows and matches best; the match is half B's."""
    names = np.array(placed.tree.names)
    hypernyms = [*names[placed.hypernyms], None]  # last for none
    between = placed.pair_heights[1]
    rate = profile.rate
    rows = []
    for i, latent in enumerate(placed.latents.tolist()):
        by_rate = rate[latent].argsort(descending=True, stable=True).cpu().numpy()
        classes = by_rate[: int(placed.responses.responds[i].sum())][:10]
        rows.append({
            "latent": latent, "fires": profile.fires[latent], "lch": names[placed.lch[i]],
            "lch_height_between": between[i], "hypernym": hypernyms[placed.choice.node[i]],
            "match": placed.choice.node_match[i],
            "classes": " ".join(names[placed.tree.classes[classes]])})
    return rows
