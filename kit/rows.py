"""Rows of tables: hierarchy.csv, latents.csv, hypernyms.csv."""
import numpy as np


def values_of(rows, column, **where):
    """A column of the rows that agree with `where`, as numbers, NaN for None; with the layer and
    all other keys given one for each seed."""
    chosen = [row[column] for row in rows if where.items() <= row.items()]
    return np.array(chosen, float)


def hierarchy_rows(dictionary, scores, controls):
    """Rows of hierarchy.csv: WordNet's tree, mean and standard deviation over permuted trees, and
    the hierarchy's part, WordNet's less that mean. And the scores of all permuted trees by column.
    """
    columns = scores.summary()
    own = np.array(list(columns.values()), float)
    draws = np.array([list(control.summary().values()) for control in controls], float)
    mean = draws.mean(0)
    rows = []
    for tree, values in (("wordnet", columns.values()), ("permuted", mean),
                         ("permuted_sd", draws.std(0)), ("part", own - mean)):
        rows.append({"dictionary": dictionary, "tree": tree, **dict(zip(columns, values))})
    return rows, dict(zip(columns, draws.T))


def hypernym_rows(scores, profile, responses, tree):
    """Of a layer: every hypernym that can be found, the most general first, and the latent that was
    chosen for it on half A, if any shows it."""
    sizes = tree.leaves.sum(1)
    order = np.lexsort((scores.nodes, -sizes[scores.nodes], -tree.height[scores.nodes]))
    rows = []
    for h in order:
        v = scores.nodes[h]
        i = scores.best_latent[h]
        row = {"wnid": tree.wnids[v], "name": tree.names[v], "classes": sizes[v],
               "height": tree.height[v], "matched": scores.matched[h],
               "best_latent": None, "match": 0.0, "lch": None, "top_images": [],
               "responds_to": []}
        if i >= 0:
            latent = scores.latents[i]
            top_images = profile.top_images[latent, : profile.fires[latent]]
            row |= {"best_latent": latent, "match": scores.best_latent_match[h],
                    "lch": tree.names[scores.lch[i]], "top_images": top_images,
                    "responds_to": responses.responds[i].nonzero().flatten()}
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


def latent_rows(scores, profile, responses, tree):
    """A row of latents.csv for every alive latent. It is named on half A by the hypernym that it
    shows and matches best; the match is half B's."""
    names = np.array(tree.names)
    hypernyms = [*names[scores.nodes], None]  # last for none
    rate = profile.rate
    rows = []
    for i, latent in enumerate(scores.latents.tolist()):
        by_rate = rate[latent].argsort(descending=True, stable=True).cpu().numpy()
        classes = by_rate[: int(responses.responds[i].sum())][:10]
        rows.append({
            "latent": latent, "fires": profile.fires[latent], "lch": names[scores.lch[i]],
            "lch_height_between": scores.lch_height_between[i],
            "hypernym": hypernyms[scores.best_node[i]], "match": scores.best_node_match[i],
            "classes": " ".join(names[tree.classes[classes]])})
    return rows
