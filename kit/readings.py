"""LCH height and Ontological Coverage as their names may be meant: their formulas are not known."""
import numpy as np
import torch

from metrics import hypernyms_lch, leaves_of, mean_of, ontology_covered, over_pairs

TOP = (4, 8, 16, 32)  # top images of a latent


@torch.inference_mode()
def readings(profile, placed):
    """{(claim, reading): mean over alive latents}. A height by the depth from the root is negative,
    so that for all of them less is more specific."""
    values = {}
    tree = placed.tree
    rate = profile.rate  # (m, C)
    heights = {
        "longest path": tree.height, "shortest path": tree.height_shortest, "depth": -tree.depth}
    for k in TOP:
        alive = (profile.fires >= k).nonzero().flatten()
        top = profile.top_classes[alive, :k]
        responds = {"top images": torch.zeros_like(rate[alive]).scatter_(1, top, 1.0),
                    "any": rate[alive] > 0}
        for share in (0.25, 0.5, 0.75):
            responds[f"{share:.0%}"] = rate[alive] >= share
        lch = tree.lch(responds["top images"].cpu())
        for name, height in heights.items():
            pairs, between = over_pairs(top, height[tree.pair_lch])
            values["height", f"{name}, of the set, k = {k}"] = mean_of(height[lch])
            values["height", f"{name}, over pairs, k = {k}"] = mean_of(pairs)
            values["height", f"{name}, between classes, k = {k}"] = mean_of(between)
        leaves = leaves_of(tree, lch, top.device)  # (A, C)
        for name, classes in responds.items():
            share = ((classes * leaves).sum(1) / leaves.sum(1)).cpu().numpy()
            values["coverage", f"of its LCH, R = {name}, k = {k}"] = mean_of(share)
    values["coverage", "of the ontology, as LCH"] = mean_of(ontology_covered(placed))
    values["coverage", "of its hypernyms, as LCH"] = mean_of(hypernyms_lch(placed))
    values["coverage", "of its hypernyms, matched"] = mean_of(placed.choice.matched)
    return values


def reading_rows(profile, placed, controls):
    """Rows of readings.csv; controls: the same latents in permuted trees."""
    others = [readings(profile, control) for control in controls]
    rows = []
    for (claim, reading), value in readings(profile, placed).items():
        permuted = [other[claim, reading] for other in others]
        rows.append({"claim": claim, "reading": reading, "value": value,
                     "permuted": np.mean(permuted)})
    return rows
