"""LCH height and Ontological Coverage as their names may be meant: their formulas are not known."""
import numpy as np
import torch

from metrics import leaves_of, lowest_common, mean_of, over_pairs

TOP = (4, 8, 16, 32)  # top images of a latent


@torch.inference_mode()
def readings(profile, trees, scores):
    """For each tree, with its scores: {(claim, reading): mean over alive latents}. A height by the
    depth from the root is negative, so that for all of them less is more specific."""
    rate = profile.rate  # (m, C)
    responds = {f"{share:.0%}": (rate >= share).float() for share in (0.25, 0.5, 0.75)}
    responds["any"] = (rate > 0).float()
    read = [{} for _ in trees]
    for k in TOP:
        alive = (profile.fires >= k).cpu().numpy()
        top = profile.top_classes[:, :k]
        responds["top images"] = torch.zeros_like(rate).scatter_(1, top, 1.0)
        for tree, values in zip(trees, read):
            lch = lowest_common(responds["top images"], tree)
            for name, height, same in (("longest path", tree.height, 0),
                                       ("shortest path", tree.height_shortest, 0),
                                       ("depth", -tree.depth, None)):
                pairs, between = over_pairs(top, height[tree.pair_lch], same)
                between = between[alive & np.isfinite(between)]
                values["height", f"{name}, of the set, k = {k}"] = mean_of(height[lch[alive]])
                values["height", f"{name}, over pairs, k = {k}"] = mean_of(pairs[alive])
                values["height", f"{name}, between classes, k = {k}"] = mean_of(between)
            leaves = leaves_of(tree, lch, rate.device)  # (m, C)
            for name, classes in responds.items():
                share = ((classes * leaves).sum(1) / leaves.sum(1)).cpu().numpy()
                values["coverage", f"of its LCH, R = {name}, k = {k}"] = mean_of(share[alive])
    for values, score in zip(read, scores):
        values["coverage", "of the ontology, as LCH"] = score.ontology_covered
        values["coverage", "of its hypernyms, as LCH"] = mean_of(score.hypernym_lch)
        values["coverage", "of its hypernyms, matched"] = mean_of(score.hypernym_matched)
    return read
