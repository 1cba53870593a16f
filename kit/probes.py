"""Hypernym probes: how well K units of a dictionary tell the images under a hypernym.

Not in the paper. It takes the place of the overlap of a hypernym with the images on which a latent
fires, under which a latent looks poor only because of where its threshold lies. Fitted on training
tokens, scored on validation tokens by IoU: images that are under the hypernym *and* get a yes, over
those of which either is true.
"""
from typing import NamedTuple

import numpy as np
import torch

from metrics import as_labels, hypernyms_to_find, leaves_of, mean_of, sort_rows

TOKENS = 65_536  # training tokens on which the probes are fitted
UNITS = (1, 4, 16)  # how many a probe may use
LARGE = 5  # classes; two- and three-class hypernyms are half of ImageNet's, and hard to probe
CHUNK = 16  # hypernyms at once: bounds the memory


@torch.inference_mode()
def unit_values(encode, batches, rows):
    """The first tokens -> (m, rows) in half precision, a unit's values side by side in memory."""
    z = None
    start = 0
    for x in batches:
        part = encode(x[: rows - start]).half().T
        if z is None:
            z = part.new_empty(len(part), rows)
        z[:, start : start + part.shape[1]] = part
        start += part.shape[1]
        if start == rows:
            break
    return z


class UnitStatistics(NamedTuple):
    """Over the training tokens; tensors on the units' device."""

    mean: torch.Tensor  # (m,)
    deviation: torch.Tensor  # (m,), infinite for a constant unit, which tells nothing
    sums: torch.Tensor  # (m, C) of the values over a class's images
    images: torch.Tensor  # (C,)


def unit_statistics(z, labels, classes):
    sums = torch.zeros(len(z), classes, device=z.device)
    mean = torch.zeros_like(sums[:, 0])
    deviation = torch.zeros_like(sums[:, 0])
    for rows in torch.arange(len(z), device=z.device).split(512):
        values = z[rows].float()
        deviation[rows], mean[rows] = torch.std_mean(values, dim=1, correction=0)
        sums[rows] = sums[rows].index_add(1, labels, values)
    deviation.masked_fill_(deviation == 0, torch.inf)
    images = torch.bincount(labels, minlength=classes).float()
    return UnitStatistics(mean, deviation, sums, images)


def best_threshold(values, under):
    """The t for which {values (N,) >= t} has the largest IoU with the images under (N,), bool. It
    is the value of one of these; infinite where there is none."""
    everything = sort_rows(values[None])[0]
    candidates = sort_rows(values[under][None])[0]
    if len(candidates) == 0:
        return values.new_tensor(torch.inf)
    yes = len(values) - torch.searchsorted(everything, candidates)
    right = len(candidates) - torch.searchsorted(candidates, candidates)
    return candidates[(right / (yes + len(candidates) - right)).argmax()]


class Rule(NamedTuple):
    """For H hypernyms: the first K of their units @ weights at or above the threshold."""

    weights: torch.Tensor  # (H, K), of standardised units
    threshold: torch.Tensor  # (H,)


class HypernymProbe:
    """Rules for the hypernyms of a tree, for each number of units; None is all units at once.

    Units are standardised and ranked by |mean under the hypernym|. On the first K ridge regression,
    with a penalty of 0.001 N, to the indicator of the hypernym's images less its mean; then the
    threshold of the largest IoU on the same tokens.
    """

    def __init__(self, z, labels, about, tree, counts):
        self.about = about
        self.rules = {}
        N = z.shape[1]
        leaves = leaves_of(tree, hypernyms_to_find(tree), z.device)  # (H, C)
        under = leaves[:, labels] > 0  # (H, N)
        positives = leaves @ about.images  # (H,)
        target = leaves @ about.sums.T - positives[:, None] * about.mean
        target = target / about.deviation  # (H, m): the units' products with the indicator
        ranks = (target / positives[:, None].clamp(min=1)).abs()
        several = [count for count in counts if count]
        self.units = ranks.topk(min(max(several), len(z)), dim=1).indices  # (H, K)
        chosen = target.gather(1, self.units)
        rules = {count: ([], []) for count in counts}
        for rows in self.chunks():
            x = self.standardised(z, rows)  # (h, K, N)
            gram = x @ x.mT + 0.001 * N * torch.eye(x.shape[1], device=z.device)
            for count in several:
                part = chosen[rows, :count, None]
                weights = torch.linalg.solve(gram[:, :count, :count], part)
                values = (weights.mT @ x[:, :count]).squeeze(1)
                rules[count][0].append(weights.squeeze(2))
                rules[count][1].extend(map(best_threshold, values, under[rows]))
        if None in counts:
            x = self.standardised(z)  # (m, N)
            gram = x @ x.T + 0.001 * N * torch.eye(len(x), device=z.device)
            weights = torch.linalg.solve(gram, target.T).T
            rules[None] = [weights], list(map(best_threshold, weights @ x, under))
        for count, (weights, thresholds) in rules.items():
            self.rules[count] = Rule(torch.cat(weights), torch.stack(thresholds))

    def chunks(self):
        return torch.arange(len(self.units), device=self.units.device).split(CHUNK)

    def standardised(self, z, rows=None):
        """The units of some hypernyms, (h, K, N), or all, (m, N)."""
        units = slice(None) if rows is None else self.units[rows]
        mean = self.about.mean[units]
        deviation = self.about.deviation[units]
        return z[units].float().sub_(mean[..., None]).div_(deviation[..., None])

    def hits(self, z, labels):
        """K -> (H, C) on how many images of a class the rule says yes."""
        shape = (len(self.units), len(self.about.images))
        hits = {}
        for count in self.rules:
            hits[count] = torch.zeros(shape, device=z.device)
        for rows in self.chunks():
            x = self.standardised(z, rows)
            for count, rule in self.rules.items():
                if count is not None:
                    values = (rule.weights[rows, None] @ x[:, :count]).squeeze(1)
                    yes = (values >= rule.threshold[rows, None]).float()
                    hits[count][rows] = hits[count][rows].index_add(1, labels, yes)
        if None in self.rules:
            rule = self.rules[None]
            yes = (rule.weights @ self.standardised(z) >= rule.threshold[:, None]).float()
            hits[None].index_add_(1, labels, yes)
        return hits


@torch.inference_mode()
def hypernym_probes(encode, train, train_labels, val, val_labels, trees, counts=UNITS):
    """{name of the tree: {K: hits (H, C) on validation images}}; train, val: ActivationBuffers."""
    rows = min(TOKENS, train.rows)
    classes = len(next(iter(trees.values())).classes)
    z = unit_values(encode, train.batches(2048), rows)
    labels = as_labels(train_labels, train.rows)[:rows].to(z.device)
    about = unit_statistics(z, labels, classes)
    probes = {}
    for name, tree in trees.items():
        probes[name] = HypernymProbe(z, labels, about, tree, counts)
    del z  # before the next takes its room
    z = unit_values(encode, val.batches(2048), val.rows)
    labels = as_labels(val_labels, val.rows).to(z.device)
    hits = {}
    for name, probe in probes.items():
        hits[name] = {count: hit.cpu() for count, hit in probe.hits(z, labels).items()}
    return hits


def iou_of(hits, images, leaves, weights=None):
    """IoU by hypernym: hits (H, C), images (C,), leaves (H, C) -> (H,). With weights (C, D) of the
    classes, as a bootstrap draws them, (H, D); NaN where no class of the hypernym was drawn."""
    drawn = hits.new_ones(hits.shape[1], 1) if weights is None else weights
    both = (hits * leaves) @ drawn
    under = (images * leaves) @ drawn
    either = hits @ drawn + under - both
    iou = torch.where(under > 0, both / either.clamp(min=1), torch.nan)
    return iou.squeeze(1) if weights is None else iou


def large_hypernyms(tree):
    """(H,) bool: of at least five classes; where none is, all."""
    large = tree.leaves[hypernyms_to_find(tree)].sum(1) >= LARGE
    return large if large.any() else ~large


def class_draws(classes, draws=1000, seed=0):
    """(C, draws) how often each class is drawn in a bootstrap over classes: the same in every layer
    and dictionary, so that these can be compared draw by draw."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(classes, np.full(classes, 1 / classes), draws).T
    return torch.from_numpy(counts).float()


def probe_rows(dictionary, train, val, labels, tree, permuted):
    """Rows of probes.csv of one dictionary, and (draws,) its mean IoU with one unit in a bootstrap
    over classes, thresholds fixed. All neurons at once are the token: the most that is there."""
    neurons = dictionary.name == "neurons"
    trees = {"wordnet": tree, "permuted": permuted}
    rows = []
    hits = hypernym_probes(dictionary.probed, train, labels["train"], val, labels["val"], trees,
                           (*UNITS, None) if neurons else UNITS)
    images = torch.bincount(as_labels(labels["val"], val.rows), minlength=len(tree.classes))
    large = large_hypernyms(tree)
    for name, of_tree in hits.items():
        leaves = leaves_of(trees[name], hypernyms_to_find(trees[name]))
        for count, hit in of_tree.items():
            iou = iou_of(hit, images, leaves).numpy()
            rows.append({
                "dictionary": dictionary.name if count else "token",
                "units": count or train.width, "tree": name,
                "iou": mean_of(iou[large & np.isfinite(iou)]),
                "iou_small": mean_of(iou[~large & np.isfinite(iou)]),
                "above_half": int((iou > 0.5).sum()), "best": float(np.nanmax(iou))})
    leaves = leaves_of(tree, hypernyms_to_find(tree))
    drawn = iou_of(hits["wordnet"][1], images, leaves, class_draws(len(tree.classes)))
    return rows, drawn[large].nanmean(0)
