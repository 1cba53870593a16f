"""Rows of tables: hierarchy.csv, latents.csv, hypernyms.csv."""
import numpy as np
import torch

from metrics import (hypernyms_to_find, leaves_of, matches_on_A,
                     matches_on_B)


def hierarchy_rows(about, scores, controls):
    """Rows of hierarchy.csv and permuted_sd.csv of a dictionary, and every permuted tree's scores
    by column."""
    summaries = [control.summary() for control in controls]
    draws = {}
    mean = {}
    spread = {}
    for column in summaries[0]:
        values = np.array([summary[column] for summary in summaries], float)
        draws[column] = values.tolist()
        mean[column], spread[column] = float(values.mean()), float(values.std())
    return {"hierarchy": [{**about, "tree": "wordnet", **scores.summary()},
                          {**about, "tree": "permuted", **mean}],
            "permuted_sd": [{**about, **spread}], "permuted_draws": draws}


def best_latents(scores, profile, responses, tree):
    """wnid of each hypernym that some latent shows -> the latent chosen for it on half A."""
    lch = dict(zip(scores.latents.tolist(), scores.lch))
    best = {}
    for h in np.flatnonzero(scores.hypernym_latent >= 0):
        latent = int(scores.hypernym_latent[h])
        fires = int(profile.fires[latent])
        best[tree.wnids[scores.hypernyms[h]]] = {
            "latent": latent, "match": float(scores.hypernym_match[h]),
            "matched": bool(scores.hypernym_matched[h]), "lch": tree.names[lch[latent]],
            "k": responses.top.shape[1],
            "top_images": profile.top_images[latent, :fires].tolist(),
            "responds": responses.responds[latent].nonzero().flatten().tolist()}
    return best


def matched_sets(layers, tree):
    """`best_latents` of L layers -> (L, H) bool, which hypernyms are matched."""
    nodes = hypernyms_to_find(tree)
    sets = np.zeros((len(layers), len(nodes)), bool)
    for row, best in zip(sets, layers):
        for h, v in enumerate(nodes):
            row[h] = best.get(tree.wnids[v], {}).get("matched", False)
    return sets


@torch.inference_mode()
def latent_rows(layer, scores, profile, responses, tree):
    """A row of latents.csv for every alive latent. It is named on half A by the hypernym that it
    shows and matches best; the match is half B's."""
    nodes = hypernyms_to_find(tree)
    device = responses.top.device
    if len(nodes) == 0:
        return []
    leaves = leaves_of(tree, nodes, device) * responses.halved  # (H, C)
    match_A, named = (x[scores.latents] for x in matches_on_A(responses, leaves).max(1))
    match_B = matches_on_B(responses, torch.from_numpy(scores.latents), leaves[named]).tolist()
    rate = profile.rate
    names = np.array(tree.names)[tree.classes]
    rows = []
    for i, latent in enumerate(scores.latents.tolist()):
        by_rate = rate[latent].argsort(descending=True, stable=True).cpu().numpy()
        classes = names[by_rate[: int(responses.responds[latent].sum())]]
        is_named = bool(match_A[i] > 0)
        rows.append({
            "layer": layer, "latent": latent, "fires": int(profile.fires[latent]),
            "lch": tree.names[scores.lch[i]],
            "lch_height_between": float(scores.height_between[i]),
            "hypernym": tree.names[nodes[named[i]]] if is_named else None,
            "match": match_B[i] if is_named else None, "classes": " ".join(classes[:10])})
    return rows


def hypernym_rows(layers, tree):
    """`best_latents` by layer -> a row of hypernyms.csv for every hypernym that can be found, the
    most general first: the layer in which it emerges, and its best latent in any layer."""
    rows = []
    sizes = tree.leaves.sum(1)
    nodes = hypernyms_to_find(tree).tolist()
    for v in sorted(nodes, key=lambda v: (-tree.height[v], -sizes[v], tree.wnids[v])):
        wnid = tree.wnids[v]
        shown = {layer: best[wnid] for layer, best in layers.items() if wnid in best}
        matched = [layer for layer, best in shown.items() if best["matched"]]
        layer = max(matched or shown, key=lambda n: shown[n]["match"], default=None)
        best = shown.get(layer, {})
        rows.append({
            "wnid": wnid, "name": tree.names[v], "classes": int(sizes[v]),
            "height": int(tree.height[v]), "emergence_layer": min(matched, default=None),
            "best_layer": layer, "best_latent": best.get("latent"),
            "match": best.get("match", 0.0), "lch": best.get("lch")})
    return rows
