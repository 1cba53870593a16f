"""The paper's qualitative claims, tested on a run's numbers: in every seed, and under every reading
of the metrics whose formulas are not known."""
import itertools
from typing import NamedTuple

import numpy as np

from metrics import consistency


class Trend(NamedTuple):
    rho: float  # Spearman's rank correlation
    p_value: float  # one-sided: the share of orderings of y whose rho is at least as large


def _ranks(values) -> np.ndarray:
    """Ranks from 0, ties getting their mean."""
    values = np.asarray(values, float)
    below, up_to = (values[:, None] > values).sum(1), (values[:, None] >= values).sum(1)
    return (below + up_to - 1) / 2


def rising_trend(x, y, permutations: int = 100_000, seed: int = 0) -> Trend:
    """Does y rise with x? Spearman's rho, its one-sided permutation p: exact for up to 8 points.

    Points with a NaN are left out. NaN for both where x or y is constant, or of under 3 points.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    there = np.isfinite(x) & np.isfinite(y)
    a, b = (_ranks(values[there]) - (there.sum() - 1) / 2 for values in (x, y))
    norm = float(np.sqrt((a @ a) * (b @ b)))
    if len(a) < 3 or norm == 0:
        return Trend(float("nan"), float("nan"))
    observed = a @ b - 1e-9
    if len(a) <= 8:
        orders = np.array(list(itertools.permutations(b)))
        return Trend(float(a @ b / norm), float((orders @ a >= observed).mean()))
    rng, larger, part = np.random.default_rng(seed), 0, permutations // 20  # in parts: the memory
    for _ in range(20):
        larger += (rng.permuted(np.tile(b, (part, 1)), axis=1) @ a >= observed).sum()
    return Trend(float(a @ b / norm), float((1 + larger) / (1 + 20 * part)))


def agreement_trend(agreement: np.ndarray, permutations: int = 10_000, seed: int = 0) -> Trend:
    """Do near layers agree more than far ones? agreement (L, L), symmetric, NaN where not defined.

    Mantel's test: Spearman's rho of agreement and nearness over pairs of layers, its one-sided p
    by permuting the layers, since pairs that share a layer are not independent of each other.
    """
    a, b = np.triu_indices(len(agreement), 1)
    there = np.isfinite(agreement[a, b])
    a, b = a[there], b[there]
    if len(a) < 3:
        return Trend(float("nan"), float("nan"))
    values, nearness = _ranks(agreement[a, b]), np.zeros(len(agreement))
    nearness[b - a] = _ranks(a - b)  # the rank of -distance, by distance
    values, nearness = values - values.mean(), nearness - nearness[b - a].mean()
    norm = float(np.sqrt((values @ values) * (nearness[b - a] @ nearness[b - a])))
    if norm == 0:
        return Trend(float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    observed = values @ nearness[b - a]
    orders = (rng.permutation(len(agreement)) for _ in range(permutations))
    larger = sum(values @ nearness[abs(order[b] - order[a])] >= observed - 1e-9 for order in orders)
    return Trend(float(observed / norm), float((1 + larger) / (1 + permutations)))


def verdict(holds: bool, opposite: bool) -> str:
    return "holds" if holds else "contradicted" if opposite else "open"


def result(claim: str, statistic: str, test, y, *x) -> dict:
    """One claim in one seed, by a one-sided test: "holds" where p < 0.05, "contradicted" where the
    opposite has p < 0.05, else "open", as with too few layers to tell."""
    trend, opposite = test(*x, np.asarray(y, float)), test(*x, -np.asarray(y, float))
    return {"claim": claim, "statistic": f"rho of {statistic}", "value": trend.rho, "low": None,
            "high": None, "p_value": trend.p_value,
            "verdict": verdict(trend.p_value < 0.05, opposite.p_value < 0.05)}


def claims_of_seed(records: list[dict], hypernyms: list[dict]) -> list[dict]:
    """All claims on the scores of one seed, a record a layer, and its rows of hypernyms.csv."""
    depth = [record["layers"]["layer"] for record in records]

    def column(name, labels="true"):
        return np.array([row[name] for record in records for row in record["hierarchy"]
                         if row["dictionary"] == "sae" and row["labels"] == labels], float)

    results = [
        result(claim, f"layer and {name}", rising_trend, [row["layers"][name] for row in records],
               depth)
        for claim, name in [("category information grows with depth", "probe_top1"),
                            ("early layers are easier to auto-encode", "nmse"),
                            ("early layers need fewer active latents", "l0")]
    ]
    for claim, name, sign in [
        ("latents grow more specific: LCH height falls", "lch_height_pairwise", -1),
        ("Ontological Coverage grows", "coverage", 1),
        ("more hypernyms are the LCH of some latent", "hypernyms_lch", 1),
        ("more hypernyms are matched by some latent", "hypernyms_matched", 1),
    ]:
        y, chance, said = sign * column(name), sign * column(name, "shuffled"), f"layer and {name}"
        said = said if sign > 0 else f"layer and -{name}"
        results += [result(claim, said, rising_trend, y, depth),
                    result(f"{claim.split(': ')[-1]}, by more than under shuffled labels",
                           f"{said}, true less shuffled", rising_trend, y - chance, depth)]
    agreement = consistency([record["hypernyms"] for record in records])
    results.append(result("near layers agree more than far ones", "nearness and Jaccard (Mantel)",
                          agreement_trend, agreement))
    emerged = [row for row in hypernyms if row["emergence_layer"] is not None]
    rho = rising_trend([row["height"] for row in emerged],
                       [-row["emergence_layer"] for row in emerged]).rho
    results.append({  # hypernyms are nested, so that no p can be trusted: no verdict
        "claim": "beyond the paper: general hypernyms emerge earlier", "verdict": "no test",
        "statistic": f"rho of height and -emergence_layer, {len(emerged)} hypernyms", "value": rho,
        "low": None, "high": None, "p_value": None})
    results.append(relation_claim(records))
    for name, said in (("neurons", "raw neurons"), ("untrained", "an untrained SAE")):
        for where, some in (("in the last layer", records[-1:]), ("over all layers", records)):
            pairs = [(record["iou_draws"]["sae"], record["iou_draws"][name]) for record in some]
            draws = np.mean([np.array(a, float) - np.array(b, float) for a, b in pairs], 0)
            known = draws[np.isfinite(draws)]
            low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
            ious = [[row["iou"] for row in record["hierarchy"] if row["labels"] == "true"
                     and row["dictionary"] == of] for of in ("sae", name) for record in some]
            better, other = np.array(ious, float).reshape(2, -1)
            results.append({
                "claim": f"latents hold hypernyms better than {said}, as sparse, {where}",
                "statistic": "IoU, mean difference over hypernyms, 95% bootstrap over classes",
                "value": float(np.mean(better - other)),
                "low": float(low), "high": float(high), "p_value": None,
                "verdict": verdict(low > 0, high < 0)})
    return results


def relation_claim(records: list[dict]) -> dict:
    """In the last layer that has related and unrelated pairs."""
    rows = [row for record in records for row in record["relations"]
            if row["dictionary"] == "sae" and row["p_value"] is not None]
    row = rows[-1] if rows else {"layer": "-", "related": np.nan, "unrelated": 0, "p_value": np.nan}
    return {"claim": "general latents fire where special ones do", "low": None, "high": None,
            "statistic": f"share, related less unrelated pairs, layer {row['layer']}",
            "value": row["related"] - row["unrelated"], "p_value": row["p_value"],
            "verdict": verdict(row["p_value"] < 0.05, row["p_value"] > 0.95)}


READ = {"height": "latents grow more specific: LCH height falls",
        "coverage": "Ontological Coverage grows"}


def reading_rows(records: list[dict], seed: int) -> list[dict]:
    """Rows of readings.csv: each claim on a metric under every reading that its words allow."""
    depth, rows = [record["layers"]["layer"] for record in records], []
    for key, claim in READ.items():
        sign = -1 if key == "height" else 1
        for reading in records[0]["readings"][key]:
            values = [record["readings"][key][reading] for record in records]
            values = sign * np.array([np.nan if value is None else value for value in values])
            found = result(claim, reading, rising_trend, values, depth)
            rows.append({"claim": claim, "reading": reading, "seed": seed, "value": found["value"],
                         "p_value": found["p_value"], "verdict": found["verdict"]})
    return rows


def combine(by_seed: list[list[dict]], readings: list[dict]) -> list[dict]:
    """Rows of claims.csv: mean and spread over seeds; what holds has to hold in every seed."""
    rows = []
    for results in zip(*by_seed):
        verdicts = [one["verdict"] for one in results]
        values = np.array([one["value"] for one in results], float)
        spread = float(values.std()) if len(values) > 1 else None
        row = {**results[0], "value": float(values.mean()), "spread": spread}
        for key, worst in (("low", min), ("high", max), ("p_value", max)):
            known = [one[key] for one in results if one[key] is not None]
            row[key] = worst(known) if known else None
        row["verdict"] = verdicts[0] if len(set(verdicts)) == 1 else "open"
        tested = verdicts[0] != "no test"
        row["seeds"] = f"{verdicts.count('holds')}/{len(verdicts)}" if tested else None
        read = {}  # a reading holds if it does in every seed
        for reading in readings:
            if reading["claim"] == row["claim"]:
                holds = reading["verdict"] == "holds"
                read[reading["reading"]] = read.get(reading["reading"], True) and holds
        row["readings"] = f"{sum(read.values())}/{len(read)}" if read else None
        keys = "claim verdict seeds readings value spread low high p_value statistic".split()
        rows.append({key: row[key] for key in keys})
    return rows
