"""Hypernym probes: how well K units of a dictionary tell the images under a hypernym.

Not in the paper. It takes the place of the overlap of a hypernym with the images on which a latent
fires, under which a latent looks poor only because of where its threshold lies. Fitted on training
tokens, scored on validation tokens by IoU: images that are under the hypernym *and* get a yes, over
those of which either is true.
"""
import numpy as np
import torch

from metrics import as_labels, leaves_of, mean_of, sort_rows

TOKENS = 65_536  # training tokens on which the probes are fitted
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
    """The m units of a dictionary, on N training and N' validation tokens of C classes.

    Their values are standardised by those on training tokens; a constant unit tells nothing.
    """

    def __init__(self, encode, train, val, labels, classes):
        N = min(TOKENS, train.rows)
        self.z = unit_values(encode, train, N)  # (m, N)
        self.z_val = unit_values(encode, val, val.rows)  # (m, N')
        self.labels = as_labels(labels["train"], train.rows)[:N].to(train.device)
        self.val_labels = as_labels(labels["val"], val.rows).to(val.device)
        self.sums = torch.zeros(len(self.z), classes, device=train.device)  # over a class's images
        for rows in torch.arange(len(self.z), device=train.device).split(512):  # bounds the memory
            values = self.z[rows].float()
            deviation, mean = torch.std_mean(values, dim=1, correction=0, keepdim=True)
            deviation[deviation == 0] = torch.inf
            values = (values - mean) / deviation
            self.z[rows] = values.half()
            self.z_val[rows] = ((self.z_val[rows].float() - mean) / deviation).half()
            self.sums[rows] = self.sums[rows].index_add(1, self.labels, values)

    def hits(self, values, val_values, classes):
        """values (N,), (N',) of a rule -> (C,) on how many validation images of a class it says
        yes, by the threshold for the hypernym of these classes (C,), 0 or 1."""
        threshold = best_threshold(values, classes[self.labels] > 0)
        yes = self.val_labels[val_values >= threshold]
        return torch.bincount(yes, minlength=len(classes)).cpu().float()


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


def ridge(x, products):
    """Weights (K, H) of standardised units x (K, N) for H targets, products = x @ targets (K, H);
    the penalty is 0.001 N."""
    K, N = x.shape
    return torch.linalg.solve(x @ x.T + 0.001 * N * torch.eye(K, device=x.device), products)


@torch.inference_mode()
def hypernym_probes(units, leaves, counts=UNITS):
    """{K: hits (H, C)} for hypernyms with leaves (H, C). K None takes all units at once.

    Units are ranked by |mean under the hypernym|. On the first K ridge regression to the indicator
    of the hypernym's images; then the threshold of the largest IoU on the same tokens.
    """
    leaves = leaves.to(units.z.device)
    products = leaves @ units.sums.T  # (H, m) of the units and the indicators of the hypernyms
    hits = {count: [] for count in counts}
    if None in counts:
        x = units.z.float()
        x_val = units.z_val.float()
        weights = ridge(x, products.T).T  # (H, m)
        for values, val_values, classes in zip(weights @ x, weights @ x_val, leaves):
            hits[None].append(units.hits(values, val_values, classes))
    for product, classes in zip(products, leaves):
        best = product.abs().topk(min(max(UNITS), len(product))).indices
        x = units.z[best].float()
        x_val = units.z_val[best].float()
        for count in filter(None, counts):
            weights = ridge(x[:count], product[best[:count], None]).squeeze(1)
            hits[count].append(units.hits(weights @ x[:count], weights @ x_val[:count], classes))
    return {count: torch.stack(rows) for count, rows in hits.items()}


def iou_of(hits, images, leaves, drawn):
    """IoU by hypernym: hits (H, C), images (C,), leaves (H, C), and how often each class is drawn
    in each draw of a bootstrap (C, D) -> (H, D); NaN where no class of the hypernym is drawn."""
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
    counts = (*UNITS, None) if dictionary == "neurons" else UNITS
    units = Units(encode, train, val, labels, C)
    images = torch.bincount(units.val_labels.cpu(), minlength=C)
    large = tree.leaves[tree.hypernyms_to_find].sum(1) >= LARGE  # (H,)
    if not large.any():
        large = ~large
    draws = class_draws(C)
    rows = []
    for name, this_tree in (("wordnet", tree), ("permuted", permuted)):
        leaves = leaves_of(this_tree, this_tree.hypernyms_to_find)
        for count, hits in hypernym_probes(units, leaves, counts).items():
            drawn = iou_of(hits, images, leaves, draws)  # (H, 1 + D)
            if (name, count) == ("wordnet", 1):
                one_unit = drawn[large].nanmean(0)
            iou = drawn[:, 0].numpy()
            rows.append({
                "dictionary": dictionary if count else "token",
                "units": count or train.width, "tree": name,
                "iou": mean_of(iou[large]), "iou_small": mean_of(iou[~large]),
                "above_half": (iou > 0.5).sum(), "best": np.nanmax(iou)})
    return rows, one_unit
