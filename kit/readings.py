"""LCH height and Ontological Coverage as their names may be meant: their formulas are not known."""
import numpy as np
import torch

from metrics import hypernyms_lch, leaves_of, mean_of, ontology_covered, over_pairs

SHARES = (0.25, 0.5, 0.75)  # of a class's images on which a latent that responds to it fires


@torch.inference_mode()
def readings(profile, placed):
    """{(claim, reading): mean over alive latents}. A height by the depth from the root is negative,
    so that for all of them less is more specific."""
    values = {}
    tree = placed.tree
    top = placed.responses.top
    heights = {
        "longest path": tree.height, "shortest path": tree.height_shortest, "depth": -tree.depth}
    for name, height in heights.items():
        of_pairs = tree.heights_of_pairs(height) if height.min() == 0 else height[tree.pair_lch]
        pairs, between = over_pairs(top, of_pairs)
        values["height", f"{name}, of the set"] = mean_of(height[placed.lch])
        values["height", f"{name}, over pairs"] = mean_of(pairs)
        values["height", f"{name}, between classes"] = mean_of(between)
    leaves = leaves_of(tree, placed.lch, top.device)  # (A, C)
    rate = profile.rate[placed.responses.latents]
    for share in SHARES:
        covered = ((rate >= share) * leaves).sum(1) / leaves.sum(1)
        values["coverage", f"of its LCH, R = {share:.0%}"] = mean_of(covered.cpu().numpy())
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
