"""What a run found: tables (CSV, Markdown, JSON) and sentences made from their numbers."""
import csv
from pathlib import Path

import numpy as np

from kit.runs import to_json

TABLES = {  # name: columns, for a table without a row
    "layers": [], "hierarchy": [], "permuted_sd": [], "probes": [], "relations": [],
    "hypernyms": ["wnid", "name"], "latents": ["layer", "latent"],
    "consistency": ["layer_a", "layer_b", "kappa"], "claims": [], "readings": [],
}
MARKS = {"holds": "✓", "open": "○", "contradicted": "✗"}  # else –
NAMES = {"sae": "SAE", "untrained": "untrained SAE", "neurons": "raw neurons"}
SHOWN = {  # columns of hierarchy.csv: their heading, with an arrow to what is better
    "lch_height_between": "LCH height between classes ↓",
    "lch_height_pairwise": "LCH height, pairwise ↓",
    "coverage": "coverage ↑",
    "hypernyms_lch": "hypernyms that are an LCH ↑",
    "hypernyms_matched": "hypernyms matched ↑",
}


def cell(value):
    if value is None or value != value:
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def markdown(rows):
    if not rows:
        return "none"
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    for row in rows:
        lines.append([cell(value) for value in row.values()])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def values_of(rows, column, **where):
    """A column of the rows that agree with `where`, as numbers, NaN for None; with the layer and
    all other keys given one for each seed."""
    chosen = []
    for row in rows:
        if all(row[key] == value for key, value in where.items()):
            chosen.append(np.nan if row[column] is None else row[column])
    return np.array(chosen, float)


def mean_and_spread(values):
    """mean ± standard deviation over seeds; the mean alone where all agree."""
    mean, spread = float(np.mean(values)), float(np.std(values))
    if not spread > 1e-6 * abs(mean):
        return cell(mean)
    digits = max(0, 1 - int(np.floor(np.log10(spread)))) if spread < 10 else 0
    return f"{mean:.{min(digits, 4)}f} ± {spread:.{min(digits, 4)}f}"


def over_seeds(rows):
    """Rows that differ in their seed alone as one: of every number mean ± standard deviation."""
    same = ("layer", "dictionary", "units", "tree", "width")
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in same), []).append(row)
    shown = []
    for group in groups.values():
        values = {}
        for key in group[0]:
            if key != "seed":
                values[key] = group[0][key] if key in same else mean_and_spread(
                    values_of(group, key))
        shown.append(values)
    return shown


def by_layer(tables):
    """The scores that matter most: a row for each layer and dictionary, a number a cell."""
    rows = []
    for layer in sorted({row["layer"] for row in tables["layers"]}):
        for dictionary, name in NAMES.items():
            row, where = {"layer": layer, "": name}, {"layer": layer, "dictionary": dictionary}
            for column, heading in SHOWN.items():
                for tree, title in (("wordnet", heading), ("permuted", f"{heading[:-2]}, permuted")):
                    values = values_of(tables["hierarchy"], column, tree=tree, **where)
                    row[title] = mean_and_spread(values)
            for tree, title in (("wordnet", "probe IoU ↑"), ("permuted", "probe IoU, permuted")):
                values = values_of(tables["probes"], "iou", tree=tree, units=1, **where)
                row[title] = mean_and_spread(values)
            rows.append(row)
    return rows


def claims_in_short(claims):
    """Rows of claims.csv for reading: a mark and few columns."""
    rows = []
    for row in claims:
        value = cell(row["value"]) + (f" ± {row['spread']:.1g}" if row["spread"] else "")
        p, sure = row["p_value"], None
        if p is not None and p == p:
            sure = f"p {'≤' if row['seeds'] > 1 else '='} {p:.2g}"  # the worst of the seeds
        if row["low"] is not None:
            sure = f"{row['low']:.2g} to {row['high']:.2g}"
        rows.append({"": MARKS.get(row["verdict"], "–"), "claim": row["claim"],
                     "verdict": row["verdict"], "value": value, "permuted": row["permuted"],
                     "p, or 95% interval": sure, "of": row["statistic"]})
    return rows


def findings(tables):
    """What was found, in sentences: each number beside its value under permuted trees."""
    depth = sorted({row["layer"] for row in tables["layers"]})
    first, last = depth[0], depth[-1]
    claims = {row["claim"]: row for row in tables["claims"]}

    def mean(column, layer=last, dictionary="sae", tree="wordnet"):
        return float(values_of(tables["hierarchy"], column, layer=layer, dictionary=dictionary,
                               tree=tree).mean())

    def beside(column, layer=last, dictionary="sae"):
        permuted = mean(column, layer, dictionary, "permuted")
        return f"{cell(mean(column, layer, dictionary))} (permuted {cell(permuted)})"

    def iou(dictionary, units=None, layer=last):
        values = []
        for tree in ("wordnet", "permuted"):
            where = {"layer": layer, "dictionary": dictionary, "tree": tree}
            if units:
                where["units"] = units
            values.append(cell(float(values_of(tables["probes"], "iou", **where).mean())))
        return f"{values[0]} (permuted {values[1]})"

    main, grows = claims["the hierarchy is there"], claims["it grows with depth"]
    is_there = {"holds": "the hierarchy is there", "contradicted": "kin classes are further apart "
                "than chance has them"}.get(main["verdict"], "no hierarchy can be told from chance")
    p = "" if main["p_value"] is None else f" (p = {main['p_value']:.2g})"
    height = [cell(mean("lch_height_between", tree=tree)) for tree in ("wordnet", "permuted")]
    sentences = [
        f"Two of a latent's top images, of different classes, meet {height[0]} edges up in the last "
        f"layer, {height[1]} under permuted trees{p}: {is_there}. The untrained SAE has "
        f"{beside('lch_height_between', dictionary='untrained')}, raw neurons "
        f"{beside('lch_height_between', dictionary='neurons')}."]
    if first < last:
        fall = [mean("lch_height_pairwise", first, tree=tree) - mean("lch_height_pairwise", tree=tree)
                for tree in ("wordnet", "permuted")]
        ends = [cell(mean("lch_height_pairwise", layer)) for layer in (first, last)]
        sure = "" if grows["low"] is None else (
            f" (95% interval {cell(grows['low'])} to {cell(grows['high'])})")
        sentences += [
            f"In the first layer it is {beside('lch_height_between', first)}. From the first third "
            f"of the layers to the last, the hierarchy's part grows by {cell(grows['value'])} edges"
            f"{sure}: {grows['verdict']}.",
            f"Pairwise LCH height goes from {ends[0]} to {ends[1]}, by {cell(fall[0])} edges; under "
            f"permuted trees by {cell(fall[1])}: that part is latents becoming class-specific."]
    count = len(tables["hypernyms"])
    sentences += [
        f"In the last layer, of {count} hypernyms {beside('hypernyms_lch')} are the lowest common "
        f"hypernym (LCH) of some latent's top images, and {beside('hypernyms_matched')} are matched "
        "by a latent on images that it was not chosen on.",
        f"One latent tells the images under a hypernym by an IoU of {iou('sae', 1)}, one untrained "
        f"latent by {iou('untrained', 1)}, one raw neuron by {iou('neurons', 1)}, the class token "
        f"as a whole by {iou('token')}."]
    return sentences


def write_tables(folder, title, note, tables):
    """Every table as CSV, those for reading as tables.md, all as results.json. Returns the tables
    for reading, by name."""
    for name, columns in TABLES.items():
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, tables[name][0] if tables[name] else columns)
            writer.writeheader()
            writer.writerows(tables[name])
    shown = {"claims": claims_in_short(tables["claims"]), "by layer": by_layer(tables)}
    for name in ("layers", "hierarchy", "probes", "relations"):
        shown[name] = over_seeds(tables[name])
    shown["hypernyms"] = tables["hypernyms"]
    text = [f"# {title}", note, *findings(tables)]
    for name, rows in shown.items():
        text.append(f"## {name.capitalize()}\n\n{markdown(rows)}")
    (folder / "tables.md").write_text("\n\n".join(text) + "\n", "utf-8", "backslashreplace")
    (folder / "results.json").write_text(to_json(tables) + "\n")
    return shown
