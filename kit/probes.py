"""Hypernym probes: how well K units of a dictionary tell the images under a hypernym.

Not in the paper. It takes the place of the overlap of a hypernym with the images on which a latent
fires, under which a latent looks poor only because of where its threshold lies. Fitted on training
tokens, scored on validation tokens by IoU: images that are under the hypernym *and* get a yes, over
those of which either is true.
"""
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metrics import as_labels, leaves_of, mean_of, sort_rows

TOKENS = 65_536  # training tokens on which the probes are fitted
BLOCK = 4096  # tokens on which they are scored at once
UNITS = (1, 4, 16)  # how many a probe may use
LARGE = 5  # classes; two- and three-class hypernyms are half of ImageNet's, and hard to probe


def unit_values(encode, buffer, rows):
    """The first tokens of an ActivationBuffer -> (m, rows) in half precision: the values of a unit
    lie side by side in memory."""
    m = encode(buffer.rows_at(slice(1))).shape[1]
    z = torch.empty(m, rows, dtype=torch.float16, device=buffer.device)
    for start in range(0, rows, 2048):
        stop = min(rows, start + 2048)
        z[:, start:stop] = encode(buffer.rows_at(slice(start, stop))).T
    return z


class Units:
    """The m units of a dictionary on N training tokens of C classes, standardised by these tokens,
    in half precision; a constant unit tells nothing."""

    def __init__(self, encode, train, labels, classes):
        N = min(TOKENS, train.rows)
        self.encode = encode
        self.labels = as_labels(labels, train.rows, classes)[:N].to(train.device)
        self.z = unit_values(encode, train, N)  # (m, N)
        self.sums = torch.zeros(len(self.z), classes, device=train.device)  # over a class's images
        self.mean = torch.zeros(len(self.z), 1, device=train.device)
        self.deviation = torch.zeros_like(self.mean)
        for rows in self.parts():
            values = self.z[rows].float()
            deviation, self.mean[rows] = torch.std_mean(values, 1, correction=0, keepdim=True)
            self.deviation[rows] = deviation.masked_fill(deviation == 0, torch.inf)
            values = (values - self.mean[rows]) / self.deviation[rows]
            self.z[rows] = values.half()
            self.sums[rows] = self.sums[rows].index_add(1, self.labels, values)

    def parts(self):
        return torch.arange(len(self.mean), device=self.mean.device).split(512)  # bounds the memory

    def on(self, tokens):
        """Tokens (B, n) -> (m, B) the same units on these, as if they had been kept like `z`."""
        z = self.encode(tokens).T.half().float()
        return ((z - self.mean) / self.deviation).half().float()


def best_threshold(values, under):
    """The t for which {values (N,) >= t} has the largest IoU with the images under (N,), bool. It
    is the value of one of these; infinite if there is none."""
    everything = sort_rows(values[None])[0]
    candidates = sort_rows(values[under][None])[0]
    if len(candidates) == 0:
        return values.new_tensor(torch.inf)
    yes = len(values) - torch.searchsorted(everything, candidates)
    right = len(candidates) - torch.searchsorted(candidates, candidates)
    return candidates[(right / (yes + len(candidates) - right)).argmax()]


def ridge(x, products):
    """Weights (K, H) of standardised units x (K, N) for H targets, products = x @ targets (K, H);
    the penalty is 0.001 N."""
    K, N = x.shape
    return torch.linalg.solve(x @ x.T + 0.001 * N * torch.eye(K, device=x.device), products)


class Probe(NamedTuple):
    """Says yes where weights @ units >= threshold."""

    units: Tensor  # (K,) int, or a slice of all
    weights: Tensor  # (K,)
    threshold: Tensor  # of the largest IoU on training tokens


@torch.inference_mode()
def fit_probes(units, leaves, counts=UNITS):
    """{K: H probes} for hypernyms with leaves (H, C). K None takes all units at once.

    Units are ranked by |mean under the hypernym|. On the first K ridge regression to the indicator
    of the hypernym's images; then the threshold of the largest IoU on the same tokens.
    """
    leaves = leaves.to(units.z.device)
    products = leaves @ units.sums.T  # (H, m) of the units and the indicators of the hypernyms
    probes = {count: [] for count in counts}
    if None in counts:
        x = units.z.float()
        all_weights = ridge(x, products.T).T  # (H, m)
    for h, (product, classes) in enumerate(zip(products, leaves)):
        under = classes[units.labels] > 0
        best = product.abs().topk(min(max(UNITS), len(product))).indices
        x_best = units.z[best].float()
        for count in counts:
            if count is None:
                chosen, weights, values = slice(None), all_weights[h], all_weights[h] @ x
            else:
                chosen = best[:count]
                weights = ridge(x_best[:count], product[chosen, None]).squeeze(1)
                values = weights @ x_best[:count]
            probes[count].append(Probe(chosen, weights, best_threshold(values, under)))
    return probes


@torch.inference_mode()
def hits_of(fitted, units, buffer, labels, classes):
    """{key: H probes} -> {key: (H, C)} on how many tokens of each class a probe says yes. The
    buffer's tokens, with labels (N',), are read in blocks: memory does not grow with them."""
    hits = {key: torch.zeros(len(probes), classes) for key, probes in fitted.items()}
    for start in range(0, buffer.rows, BLOCK):
        rows = slice(start, start + BLOCK)
        z = units.on(buffer.rows_at(rows))  # (m, B)
        of_block = labels[rows].to(z.device)
        for key, probes in fitted.items():
            for h, probe in enumerate(probes):
                yes = of_block[probe.weights @ z[probe.units] >= probe.threshold]
                hits[key][h] += torch.bincount(yes, minlength=classes).cpu()
    return hits


def iou_of(hits, images, leaves, drawn):
    """IoU by hypernym: hits (H, C), images (C,), leaves (H, C), and how often each class is drawn
    in each draw of a bootstrap (C, D) -> (H, D); NaN if no class of the hypernym is drawn."""
    both = (hits * leaves) @ drawn
    under = (images * leaves) @ drawn
    either = hits @ drawn + under - both
    return torch.where(under > 0, both / either.clamp(min=1), torch.nan)


def class_draws(classes):
    """(C, 1 + 1,000) how often each class is drawn in a bootstrap over classes: the same in every
    layer and dictionary, so that these can be compared draw by draw. First comes no draw: once."""
    rng = np.random.default_rng(0)
    counts = rng.multinomial(classes, np.full(classes, 1 / classes), 1000)
    return torch.from_numpy(np.vstack([np.ones(classes), counts]).T).float()


def probe_rows(dictionary, encode, train, val, labels, tree, permuted):
    """Rows of probes.csv of one dictionary, and (1 + draws,) its mean IoU with one unit by
    `class_draws`, thresholds fixed. All neurons at once are the token: the most that is there."""
    C = len(tree.classes)
    val_labels = as_labels(labels["val"], val.rows, C)
    images = torch.bincount(val_labels, minlength=C)
    large = tree.leaves[tree.hypernyms_to_find].sum(1) >= LARGE  # (H,)
    if not large.any():
        large = ~large
    # fitted under both trees before validation is read: their values need not be held together
    counts = (*UNITS, None) if dictionary == "neurons" else UNITS
    units = Units(encode, train, labels["train"], C)
    trees = {"wordnet": tree, "permuted": permuted}
    leaves = {}
    fitted = {}
    for name, this_tree in trees.items():
        leaves[name] = leaves_of(this_tree, this_tree.hypernyms_to_find)
        for count, probes in fit_probes(units, leaves[name], counts).items():
            fitted[name, count] = probes
    units.z = None
    draws = class_draws(C)
    rows = []
    for (name, count), hits in hits_of(fitted, units, val, val_labels, C).items():
        drawn = iou_of(hits, images, leaves[name], draws)  # (H, 1 + D)
        if (name, count) == ("wordnet", 1):
            one_unit = drawn[large].nanmean(0)
        iou = drawn[:, 0].numpy()
        rows.append({
            "dictionary": dictionary if count else "token", "units": count or train.width,
            "tree": name, "iou": mean_of(iou[large]), "iou_small": mean_of(iou[~large]),
            "above_half": (iou > 0.5).sum(), "best": np.nanmax(iou)})
    return rows, one_unit
