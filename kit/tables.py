"""What a run found, in tables (CSV, Markdown, JSON) and in sentences made from its numbers."""
import csv
from pathlib import Path

import numpy as np

from kit.store import to_json

TABLES = {  # name: columns, for a table without a row
    "layers": [], "hierarchy": [], "relations": [], "hypernyms": ["wnid", "name"],
    "consistency": ["layer_a", "layer_b", "jaccard"], "claims": [], "readings": [],
}
MARKS = {"holds": "✓", "open": "○", "contradicted": "✗", "no test": "–"}
COMPARED = {"SAE": ("sae", "true"), "untrained": ("untrained", "true"),
            "neurons": ("neurons", "true"), "shuffled labels": ("sae", "shuffled")}


def cell(value) -> str:
    if value is None or value != value:
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def markdown(rows: list[dict]) -> str:
    if not rows:
        return "none"
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[cell(value) for value in row.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mean_and_spread(values) -> str:
    """mean ± standard deviation over seeds, None being no number; the mean where all agree."""
    values = np.array([np.nan if value is None else value for value in values], float)
    mean, spread = float(values.mean()), float(values.std())
    return f"{cell(mean)} ± {spread:.1g}" if spread > 1e-6 * abs(mean) else cell(mean)


def over_seeds(rows: list[dict]) -> list[dict]:
    """Rows that differ in their seed alone as one: of every number mean ± standard deviation."""
    groups = {}
    for row in rows:
        key = tuple(row[name] for name in ("layer", "dictionary", "labels") if name in row)
        groups.setdefault(key, []).append(row)
    if all(len(group) == 1 for group in groups.values()):
        return [{name: value for name, value in row.items() if name != "seed"} for row in rows]
    same = ("layer", "dictionary", "labels", "width")
    return [{name: group[0][name] if name in same else mean_and_spread(row[name] for row in group)
             for name in group[0] if name != "seed"} for group in groups.values()]


def values_of(record: dict, table: str, column: str, layer: int, of="SAE") -> np.ndarray:
    """One column in one layer, for one of COMPARED: a number a seed, NaN where there is none."""
    dictionary, labels = COMPARED[of]
    rows = [row for row in record[table] if row["layer"] == layer
            and row.get("dictionary", dictionary) == dictionary
            and row.get("labels", labels) == labels]
    return np.array([np.nan if row[column] is None else row[column] for row in rows], float)


def value_of(*where) -> str:
    """mean ± standard deviation over seeds of `values_of`."""
    return mean_and_spread(values_of(*where))


def by_layer(record: dict) -> list[dict]:
    """The numbers that matter most, a row a layer."""
    rows, both = [], ("SAE", "shuffled labels")
    for layer in sorted({row["layer"] for row in record["layers"]}):
        def values(table, column, of=("SAE",)):
            return ", ".join(value_of(record, table, column, layer, one) for one in of)

        rows.append({
            "layer": layer, **{name: values("layers", column) for name, column in (
                ("probe", "probe_top1"), ("FVU", "fvu"), ("L0", "l0"))},
            "LCH height, pairwise: SAE, shuffled": values("hierarchy", "lch_height_pairwise", both),
            **{f"{name}: SAE, untrained, neurons": values("hierarchy", column, list(COMPARED)[:3])
               for name, column in (("IoU", "iou"), ("LCHs", "hypernyms_lch"),
                                    ("matched", "hypernyms_matched"))},
            "fires on related, unrelated":
                f"{values('relations', 'related')}, {values('relations', 'unrelated')}",
        })
    return rows


def claims_in_short(claims: list[dict]) -> list[dict]:
    """Rows of claims.csv for reading: a mark and few columns."""
    rows = []
    for row in claims:
        value = cell(row["value"]) + (f" ± {row['spread']:.1g}" if row["spread"] else "")
        p, of = row["p_value"], "=" if (row["seeds"] or "").endswith("/1") else "≤"  # the worst
        sure = f"p {of} {p:.2g}" if p is not None and p == p else None
        if row["low"] is not None and row["low"] == row["low"]:
            sure = f"{row['low']:.2g} to {row['high']:.2g}"
        rows.append({
            "": MARKS[row["verdict"]], "claim": row["claim"], "verdict": row["verdict"],
            "seeds": row["seeds"], "readings": row["readings"],
            "value": "ρ = " * row["statistic"].startswith("rho") + value,
            "p, or 95% interval": sure})
    return rows


def findings(record: dict) -> list[str]:
    """What was found, in three sentences."""
    depth = sorted({row["layer"] for row in record["layers"]})
    first, last = depth[0], depth[-1]

    def compared(column, others=("untrained", "neurons", "shuffled labels")):
        names = {"untrained": "untrained SAE", "neurons": "raw neurons"}
        rest = [f"{names.get(of, of)} {value_of(record, 'hierarchy', column, last, of)}"
                for of in others]
        return value_of(record, "hierarchy", column, last), ", ".join(rest)

    def way(table, column, of="SAE", goes="goes from ", stays="is "):
        values = dict.fromkeys(value_of(record, table, column, n, of) for n in (first, last))
        return (goes if len(values) == 2 else stays) + " to ".join(values)

    lch, lch_rest = compared("hypernyms_lch")
    matched, matched_rest = compared("hypernyms_matched")
    iou, iou_rest = compared("iou", ("untrained", "neurons"))
    related, unrelated = (values_of(record, "relations", column, last)
                          for column in ("related", "unrelated"))
    height = way("hierarchy", "lch_height_pairwise")
    shuffled = way("hierarchy", "lch_height_pairwise", "shuffled labels", goes="", stays="")
    where, start = f"In layer {last}", "There"
    if first < last:
        where, start = f"{where}, the last,", f"From layer {first} to layer {last}"
    sentences = [
        f"{where} {lch} of {record['hypernyms_possible']} hypernyms are the lowest common hypernym "
        f"(LCH) of some latent's top images ({lch_rest}), and {matched} are matched by the classes "
        f"that some latent responds to ({matched_rest}).",
        f"{start} the accuracy of a linear probe {way('layers', 'probe_top1')}, and the mean "
        f"height of the LCH of two of a latent's top images {height} edges (shuffled labels: "
        f"{shuffled}).",
        f"Over images, a hypernym and the latent that fits it best overlap by an IoU of {iou} on "
        f"average ({iou_rest})"]
    if np.isfinite(related).all():
        related, unrelated = mean_and_spread(related), mean_and_spread(unrelated)
        sentences[2] += (f"; a general latent fires on {related} of the top images of the special "
                         f"latents below it, and on {unrelated} of those of unrelated latents")
    sentences[2] += "."
    return sentences


def write_tables(folder: Path, title: str, note: str, record: dict) -> tuple[list[str], dict]:
    """Every table as CSV, those for reading as tables.md, all as results.json.

    Returns the sentences of what was found, and the tables for reading by name.
    """
    for name, columns in TABLES.items():
        with open(folder / f"{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, record[name][0] if record[name] else columns)
            writer.writeheader()
            writer.writerows(record[name])
    shown = {"by layer": by_layer(record), "claims": claims_in_short(record["claims"])}
    shown |= {name: over_seeds(record[name]) for name in ("layers", "hierarchy", "relations")}
    shown["hypernyms"] = record["hypernyms"]
    found = findings(record)
    text = [f"# {title}", note, *found]
    text += [f"## {name.capitalize()}\n\n{markdown(rows)}" for name, rows in shown.items()]
    (folder / "tables.md").write_text("\n\n".join(text) + "\n", "utf-8", "backslashreplace")
    (folder / "results.json").write_text(to_json(record) + "\n")
    return found, shown
