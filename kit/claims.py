"""Verdicts on the claims, each beside what trees without kinship give.

S is how much better a score is than its mean over permuted trees, with the sign that makes more
hierarchy larger. Growth and training are judged by an interval over seeds; in the other claims all
seeds must agree, and the worst p or interval is shown. How often each verdict is wrong where the
truth is known is in docs/results.md (tests/controls.py).
"""
import numpy as np

from kit.probes import class_draws
from kit.rows import values_of
from metrics import METRICS

MAIN = "lch_height_between"
DEFINED = {  # in docs/definitions.md, before any result was seen; others are exploratory
    "lch_height_between", "lch_height_pairwise", "coverage", "hypernyms_lch", "hypernyms_matched"}
LAST_LESS_FIRST = "last third of layers less first"
FEWEST_LAYERS = 4  # below these, no growth is judged
FEWEST_SEEDS = 3
FEWEST_CLASSES = 10
T_QUANTILES = 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262  # 0.975, for 3 to 10 seeds
BY_CLASS = {  # columns of layers.csv as a ratio of two sums over classes
    "probe_top1": ("category information grows with depth", "correct", "images"),
    "nmse": ("early layers are easier to auto-encode", "error", "squares"),
    "l0": ("early layers need fewer active latents", "active", "images"),
}


def claimed():
    """(column, metric) of what claims are made, the main one first."""
    metrics = [(name, metric) for name, metric in METRICS.items() if metric.better]
    return sorted(metrics, key=lambda item: item[0] != MAIN)


def gather(scores, table, key):
    """(L, S, ...) one entry of every record, by layer and seed."""
    layers = {layer for layer, _ in scores}
    values = np.array([record[table][key] for record in scores.values()], float)
    return values.reshape(len(layers), -1, *values.shape[1:])


def score_of(scores, column, dictionary="sae", tree="wordnet"):
    """(L, S) a column of hierarchy.csv by layer and seed; larger means more hierarchy."""
    rows = sum((record["hierarchy"] for record in scores.values()), [])
    values = values_of(rows, column, dictionary=dictionary, tree=tree)
    return METRICS[column].better * values.reshape(len({layer for layer, _ in scores}), -1)


def surplus(scores, column, dictionary="sae"):
    """(L, S) S: how much better than under permuted trees."""
    permuted = score_of(scores, column, dictionary, "permuted")
    return score_of(scores, column, dictionary) - permuted


def p_values(scores, column):
    """(L, S) the share of trees, WordNet's among them, at least as good; and at least as bad."""
    value = score_of(scores, column)[..., None]
    draws = METRICS[column].better * gather(scores, "permuted_draws", column)  # (L, S, D)
    as_good = ~(draws < value)
    as_bad = ~(draws > value)  # if a score is NaN, both
    return tuple((1 + trees.sum(2)) / (1 + trees.shape[2]) for trees in (as_good, as_bad))


def t_interval(values):
    """The 95% interval of a mean over seeds; above ten seeds a little too wide."""
    half = T_QUANTILES[min(len(values), 10) - 3] * np.std(values, ddof=1) / len(values) ** 0.5
    return np.mean(values) - half, np.mean(values) + half


def verdict(holds, opposite):
    """One for each seed or one for all: what holds has to hold in all."""
    return "holds" if np.all(holds) else "contradicted" if np.all(opposite) else "open"


def thirds(by_layer):
    """(L, ...) -> the mean of the last third of the layers less that of the first."""
    count = -(-len(by_layer) // 3)
    return by_layer[-count:].mean(0) - by_layer[:count].mean(0)


# ---------------------------------------------------------------- the claims, a row each


def row_of(claim, statistic, values, verdict, about_hierarchy=True, **more):
    """A row of claims.csv; values: one for each seed."""
    values = np.array(values, float)
    row = {"claim": claim, "about_hierarchy": about_hierarchy, "verdict": verdict,
           "seeds": len(values), "value": values.mean(), "permuted": None,
           "spread": values.std() if len(values) > 1 else None,
           "low": None, "high": None, "p_value": None, "statistic": statistic}
    return row | more


def over_the_seeds(claim, statistic, values, first=True, last=True):
    """Is a difference above 0 in the mean over seeds? Only if the hierarchy is there, in the
    `last` layer; it is below 0 only if it is there in the `first`."""
    if len(values) < FEWEST_SEEDS:
        return row_of(claim, statistic, values, "needs --seeds 3")
    low, high = t_interval(values)
    return row_of(claim, statistic, values, verdict(low > 0 and last, high < 0 and first),
                  low=low, high=high)


def over_the_classes(claim, statistic, draws):
    """The same by a bootstrap over classes: draws (S, 1 + D), of which the first is no draw: in it
    each class is there once."""
    low, high = np.nanquantile(draws[:, 1:], [0.025, 0.975], axis=1)  # (S,) each
    return row_of(claim, statistic, draws[:, 0], verdict(low > 0, high < 0), about_hierarchy=False,
                  low=low.min(), high=high.max())


def hierarchy_claims(scores):
    rows = []
    for column, (name, sign, _) in claimed():
        by = "" if column == MAIN else f", by {name}"
        if column not in DEFINED:
            by += " (exploratory)"
        as_good, as_bad = p_values(scores, column)
        permuted = score_of(scores, column, tree="permuted")[-1].mean()
        rows.append(row_of(f"the hierarchy is there{by}", f"{name}, last layer",
                           sign * score_of(scores, column)[-1],
                           verdict(as_good[-1] <= 0.05, as_bad[-1] <= 0.05),
                           permuted=sign * permuted, p_value=as_good[-1].max()))
        there = (as_good <= 0.05).all(1)  # (L,)
        by_layer = surplus(scores, column)
        rows.append(over_the_seeds(f"it grows with depth{by}", f"{name}: S, {LAST_LESS_FIRST}",
                                   thirds(by_layer), there[0], there[-1]))
        if column == MAIN:
            training = by_layer - surplus(scores, column, "untrained")
            rows.append(over_the_seeds("training brings it", f"{name}: S, SAE less untrained SAE, "
                                       "last layer", training[-1], last=there[-1]))
    return rows


def layer_claims(scores, draws):
    """What the paper says of layers, whatever the hierarchy; draws: of `class_draws`."""
    rows = []
    for column, (claim, above, below) in BY_CLASS.items():
        ratio = gather(scores, "by_class", above) @ draws
        ratio /= gather(scores, "by_class", below) @ draws  # (L, S, 1 + D)
        rows.append(over_the_classes(claim, f"{column}, {LAST_LESS_FIRST}", thirds(ratio)))
    return rows


def probe_claims(scores):
    """Does one latent tell a hypernym better than one unit of the baselines?"""
    rows = []
    for other, name in (("untrained", "an untrained one"), ("neurons", "a neuron")):
        draws = gather(scores, "iou_draws", "sae") - gather(scores, "iou_draws", other)
        rows.append(over_the_classes(f"a latent tells a hypernym better than {name}",
                                     "probe IoU with one unit, difference, last layer", draws[-1]))
    return rows


def claims_of(scores):
    """Rows of claims.csv. scores: by (layer, seed), sorted, as stage 3 makes them."""
    layers, _, classes = gather(scores, "by_class", "images").shape
    rows = hierarchy_claims(scores) + layer_claims(scores, class_draws(classes).numpy())
    rows += probe_claims(scores)
    for row in rows:
        if classes < FEWEST_CLASSES:
            row["verdict"] = "too few classes"
        elif layers < FEWEST_LAYERS and LAST_LESS_FIRST in row["statistic"]:
            row["verdict"] = "too few layers"
    return rows
