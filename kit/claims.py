"""Verdicts on the claims, each beside what trees without kinship give.

S is how much better a score is than its mean over permuted trees, with the sign that makes more
hierarchy larger. Over several seeds all must agree, and the worst p or interval is shown. How often
each verdict is wrong where the truth is known is in docs/results.md (tests/controls.py).
"""
import math
import random

import numpy as np

from kit.probes import class_draws
from kit.rows import matched_sets
from metrics import kappa

SCORES = {  # columns of hierarchy.csv: name, and the sign that makes more hierarchy larger
    "lch_height_between": ("LCH height between classes", -1),
    "lch_height_pairwise": ("pairwise LCH height", -1),
    "coverage": ("coverage", 1),
    "hypernyms_lch": ("hypernyms that are an LCH", 1),
    "hypernyms_matched": ("hypernyms matched", 1),
}
MAIN = "lch_height_between"
FEWEST_LAYERS = 4  # below these, nothing can be judged
FEWEST_SEEDS = 3
FEWEST_CLASSES = 10
T_QUANTILES = {  # 0.975 quantiles of Student's t, by the number of seeds
    2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
BY_CLASS = {  # columns of layers.csv as a ratio of two sums over classes
    "probe_top1": ("category information grows with depth", "correct", "images"),
    "nmse": ("early layers are easier to auto-encode", "error", "squares"),
    "l0": ("early layers need fewer active latents", "active", "images"),
}


def hierarchy_value(record, column, dictionary="sae", tree="wordnet"):
    """One number of a layer's rows of hierarchy.csv; NaN where it is not defined."""
    for row in record["hierarchy"]:
        if (row["dictionary"], row["tree"]) == (dictionary, tree):
            return float("nan") if row[column] is None else row[column]
    raise KeyError((dictionary, tree))


def surplus(record, column, dictionary="sae"):
    """S: how much better than under permuted trees."""
    value = hierarchy_value(record, column, dictionary)
    return SCORES[column][1] * (value - hierarchy_value(record, column, dictionary, "permuted"))


def p_values(record, column):
    """The share of trees, WordNet's among them, at least as good; and at least as bad."""
    sign = SCORES[column][1]
    value = sign * hierarchy_value(record, column)
    draws = sign * np.array(record["permuted_draws"][column], float)
    as_good = ~(draws < value)
    as_bad = ~(draws > value)  # where a score is NaN, both
    return tuple(float(1 + count.sum()) / (1 + len(draws)) for count in (as_good, as_bad))


def t_interval(values):
    """The 95% interval of a mean over seeds; above ten seeds a little too wide."""
    t = T_QUANTILES[min(len(values), 10)]
    mean = np.mean(values)
    half = t * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(mean - half), float(mean + half)


def verdict(holds, opposite):
    """One for each seed or one for all: what holds has to hold in all."""
    return "holds" if np.all(holds) else "contradicted" if np.all(opposite) else "open"


def thirds(by_layer):
    """(L, ...) -> the mean of the last third of the layers less that of the first."""
    count = -(-len(by_layer) // 3)
    return by_layer[-count:].mean(0) - by_layer[:count].mean(0)


def curveball(matched, draws, seed=0):
    """Yields random matrices with the row and column sums of matched (L, H), bool (Strona et al.
    2014). A trade reassigns what only one of two rows holds; between two draws there are 5 L²
    trades, at most 1,000."""
    rows = [set(np.flatnonzero(row).tolist()) for row in matched]
    rng = random.Random(seed)
    for _ in range(draws):
        for _ in range(min(5 * len(rows) ** 2, 1000)):
            a, b = rng.sample(range(len(rows)), 2)
            common = rows[a] & rows[b]
            pool = list(rows[a] ^ rows[b])
            rng.shuffle(pool)
            only_a = len(rows[a]) - len(common)
            rows[a], rows[b] = common | set(pool[:only_a]), common | set(pool[only_a:])
        drawn = np.zeros_like(matched)
        for row, columns in zip(drawn, rows):
            row[list(columns)] = True
        yield drawn


def nearness(matched):
    """Mean kappa of neighbouring layers less that of all other pairs of layers."""
    agreement = kappa(matched)
    a, b = np.triu_indices(len(agreement), 1)
    pairs = agreement[a, b]
    near = b - a == 1
    return float(pairs[near].mean() - pairs[~near].mean())


def rank_correlation(x, y):
    """Spearman's rho; NaN where x or y is constant."""
    ranks = []
    for values in (np.asarray(x, float), np.asarray(y, float)):
        below = values[:, None] > values
        level = values[:, None] == values
        ranks.append(below.sum(1) + level.sum(1) / 2)  # ties get their mean
    if len(ranks[0]) < 2 or not all(np.ptp(rank) for rank in ranks):
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


# ---------------------------------------------------------------- the claims, a row each


def row_of(claim, statistic, values, verdict="no test", about_hierarchy=True, **more):
    """A row of claims.csv; values: one for each seed."""
    values = np.array(values, float)
    spread = float(values.std()) if len(values) > 1 else None
    row = {"claim": claim, "about_hierarchy": about_hierarchy, "verdict": verdict,
           "seeds": len(values), "value": float(values.mean()), "permuted": None, "spread": spread,
           "low": None, "high": None, "p_value": None, "statistic": statistic}
    return row | more


def is_there(claim, layer, column):
    """Is a score better than under permuted trees? layer: its records, one for each seed."""
    values = []
    permuted = []
    p = []
    opposite = []
    for record in layer:
        values.append(hierarchy_value(record, column))
        permuted.append(hierarchy_value(record, column, tree="permuted"))
        as_good, as_bad = p_values(record, column)
        p.append(as_good <= 0.05), opposite.append(as_bad <= 0.05)
    worst = max(p_values(record, column)[0] for record in layer)
    return row_of(claim, f"{SCORES[column][0]}, last layer", values, verdict(p, opposite),
                  permuted=float(np.mean(permuted)), p_value=worst)


def over_the_seeds(claim, statistic, values, first=True, last=True):
    """Is a difference above 0 in the mean over seeds? Only where the hierarchy is there, in the
    `last` layer; it is below 0 only where it is there in the `first`."""
    if len(values) < FEWEST_SEEDS:
        return row_of(claim, statistic, values, "needs --seeds 3")
    low, high = t_interval(values)
    return row_of(claim, statistic, values, verdict(low > 0 and last, high < 0 and first),
                  low=low, high=high)


def over_the_classes(claim, statistic, values, draws):
    """The same by a bootstrap over classes: draws, one array for each seed."""
    low, high = np.nanquantile(draws, [0.025, 0.975], axis=1)  # (seeds,) each
    return row_of(claim, statistic, values, verdict(low > 0, high < 0), about_hierarchy=False,
                  low=float(low.min()), high=float(high.max()))


def hierarchy_claims(layers):
    """layers: of every layer the records, one for each seed."""
    rows = []
    first = layers[0]
    last = layers[-1]
    for column, (name, _) in SCORES.items():
        by = "" if column == MAIN else f", by {name}"
        rows.append(is_there(f"the hierarchy is there{by}", last, column))
        in_last = rows[-1]["verdict"] == "holds"
        in_first = is_there("", first, column)["verdict"] == "holds"
        by_layer = np.array([[surplus(record, column) for record in layer] for layer in layers])
        rows.append(over_the_seeds(f"it grows with depth{by}", f"{name}: S, last third of layers "
                                   "less first", thirds(by_layer), in_first, in_last))
        if len(layers) < FEWEST_LAYERS:
            rows[-1]["verdict"] = "too few layers"
        if column == MAIN:
            untrained = [surplus(record, column, "untrained") for record in last]
            rows.append(over_the_seeds("training brings it", f"{name}: S, SAE less untrained SAE, "
                                       "last layer", by_layer[-1] - untrained, last=in_last))
    return rows


def layer_claims(layers, draws):
    """What the paper says of layers, whatever the hierarchy; draws (C, D) of the classes."""
    rows = []
    for column, (claim, above, below) in BY_CLASS.items():
        values = []
        drawn = []
        for layer in layers:
            values.append([record["layers"][column] for record in layer])
            sums = [record["by_class"] for record in layer]
            drawn.append([np.array(each[above]) @ draws / (np.array(each[below]) @ draws)
                          for each in sums])
        rows.append(over_the_classes(claim, f"{column}, last third of layers less first",
                                     thirds(np.array(values)), thirds(np.array(drawn))))
        if len(layers) < FEWEST_LAYERS:
            rows[-1]["verdict"] = "too few layers"
    return rows


def probe_claims(last):
    """Does one latent tell a hypernym better than one unit of the baselines?"""
    rows = []
    for other, name in (("untrained", "an untrained one"), ("neurons", "a neuron")):
        values = []
        draws = []
        for record in last:
            iou = {}
            for row in record["probes"]:
                if row["units"] == 1 and row["tree"] == "wordnet":
                    iou[row["dictionary"]] = row["iou"]
            values.append(iou["sae"] - iou[other])
            of_sae = record["iou_draws"]["sae"]
            of_other = record["iou_draws"][other]
            draws.append(np.array(of_sae, float) - np.array(of_other, float))
        rows.append(over_the_classes(f"a latent tells a hypernym better than {name}",
                                     "probe IoU with one unit, difference, last layer", values,
                                     draws))
    return rows


def consistency_claim(matched, draws=1000):
    """matched: for each seed (L, H) bool. Layers that match nothing, or all, are left out."""
    claim = "near layers agree more"
    statistic = "kappa, neighbouring layers less all others"
    values = []
    p = []
    opposite = []
    for sets in matched:
        sets = sets[sets.any(1) & ~sets.all(1)]
        if len(sets) < FEWEST_LAYERS:
            return row_of(claim, statistic, [np.nan] * len(matched), "too few layers", False)
        values.append(nearness(sets))
        drawn = np.array(list(map(nearness, curveball(sets, draws))))
        p.append((1 + (drawn >= values[-1] - 1e-9).sum()) / (1 + draws))
        opposite.append((1 + (drawn <= values[-1] + 1e-9).sum()) / (1 + draws))
    judged = verdict(np.array(p) <= 0.05, np.array(opposite) <= 0.05)
    return row_of(claim, statistic, values, judged, False, p_value=float(max(p)))


def described(last, hypernyms):
    """What no test can judge: hypernyms are nested, and what is matched fires by definition."""
    correlations = []
    shares = []
    expected = []
    for rows in hypernyms:
        emerged = [row for row in rows if row["emergence_layer"] is not None]
        correlations.append(rank_correlation([row["height"] for row in emerged],
                                             [-row["emergence_layer"] for row in emerged]))
    for record in last:
        for row in record["relations"]:
            if row["dictionary"] == "sae":
                shares.append(row["related"]), expected.append(row["expected"])
    return [
        row_of("general hypernyms emerge earlier", "Spearman's rho of height and earliness",
               correlations),
        row_of("general latents fire where specific ones do", "share of top images; for permuted: "
               "expected from class rates; last layer", shares,
               permuted=float(np.mean(np.array(expected, float))))]


def claims_of(records, hypernyms, tree):
    """Rows of claims.csv. records: by (layer, seed), as stage 3 makes them; hypernyms: the rows of
    hypernyms.csv by seed."""
    layers = []
    matched = []
    for layer in sorted({layer for layer, _ in records}):
        layers.append([records[layer, seed] for seed in hypernyms])
    for of_seed in zip(*layers):
        matched.append(matched_sets([record["hypernyms"] for record in of_seed], tree))
    rows = hierarchy_claims(layers)
    rows += layer_claims(layers, class_draws(len(tree.classes)).numpy())
    rows += probe_claims(layers[-1]) + [consistency_claim(matched)]
    if len(tree.classes) < FEWEST_CLASSES:
        for row in rows:
            row["verdict"] = "too few classes"
    return rows + described(layers[-1], list(hypernyms.values()))
