"""Rows of tables: hierarchy.csv, latents.csv, hypernyms.csv."""
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


def hypernym_rows(placed, profile):
    """Of a layer: every hypernym that can be found, the most general first, and the latent that was
    chosen for it on half A, if any shows it."""
    tree = placed.tree
    nodes = placed.hypernyms
    choice = placed.choice
    sizes = tree.leaves.sum(1)
    rows = []
    for h in np.lexsort((nodes, -sizes[nodes], -tree.height[nodes])):
        v = nodes[h]
        i = choice.latent[h]
        row = {"wnid": tree.wnids[v], "name": tree.names[v], "classes": sizes[v],
               "height": tree.height[v], "matched": choice.matched[h],
               "best_latent": None, "match": 0.0, "lch": None, "top_images": [],
               "responds_to": []}
        if i >= 0:
            latent = placed.latents[i]
            top_images = profile.top_images[latent, : profile.fires[latent]]
            row |= {"best_latent": latent, "match": choice.latent_match[h],
                    "lch": tree.names[placed.lch[i]], "top_images": top_images,
                    "responds_to": placed.responses.responds[i].nonzero().flatten()}
        rows.append(row)
    return rows


def matched_sets(layers):
    """`hypernym_rows` of L layers -> (L, H) bool, which are matched."""
    return np.array([[row["matched"] for row in rows] for rows in layers])


def emergence_rows(layers):
    """`hypernym_rows` by layer -> rows of hypernyms.csv: the layer in which a hypernym is first
    matched, and its best latent in any layer."""
    merged = []
    for rows in zip(*layers.values()):
        by_layer = dict(zip(layers, rows))
        matched = [layer for layer, row in by_layer.items() if row["matched"]]
        shown = [layer for layer, row in by_layer.items() if row["best_latent"] is not None]
        layer = max(matched or shown, key=lambda n: by_layer[n]["match"], default=None)
        merged.append({**by_layer.get(layer, rows[0]), "best_layer": layer,
                       "emergence_layer": min(matched, default=None)})
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
