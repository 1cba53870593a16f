"""What a run found: tables (CSV, Markdown, JSON) and sentences made from their numbers."""
import csv

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


MAIN = "lch_height_between"
ANSWERS = {"holds": "the hierarchy is there",
           "contradicted": "related classes lie further apart than chance would have them"}


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
    return plus_minus(float(np.mean(values)), float(np.std(values)))


def plus_minus(mean, spread):
    """Both with as many decimals as two digits of the spread need, at most four."""
    if mean is None or not spread > 1e-6 * abs(mean):
        return cell(mean)
    decimals = 1 - int(np.floor(np.log10(spread))) if spread < 10 else 0
    decimals = min(decimals, 4)
    return f"{mean:.{decimals}f} ± {spread:.{decimals}f}"


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
    trees = {"wordnet": "{}", "permuted": "{}, permuted"}
    for layer in sorted({row["layer"] for row in tables["layers"]}):
        for dictionary, name in NAMES.items():
            row = {"layer": layer, "": name}
            where = {"layer": layer, "dictionary": dictionary}
            for column, heading in SHOWN.items():
                for tree, title in trees.items():
                    values = values_of(tables["hierarchy"], column, tree=tree, **where)
                    row[title.format(heading)] = mean_and_spread(values)
            for tree, title in trees.items():
                values = values_of(tables["probes"], "iou", tree=tree, units=1, **where)
                row[title.format("probe IoU ↑")] = mean_and_spread(values)
            rows.append(row)
    return rows


def claims_in_short(claims):
    """Rows of claims.csv for reading: a mark and few columns."""
    rows = []
    for row in claims:
        value = plus_minus(row["value"], row["spread"] or 0)
        p = row["p_value"]
        sure = None
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
    layers = sorted({row["layer"] for row in tables["layers"]})
    first = layers[0]
    last = layers[-1]

    def mean(column, layer=last, dictionary="sae", tree="wordnet", table="hierarchy", **where):
        where |= {"layer": layer, "dictionary": dictionary, "tree": tree}
        return float(values_of(tables[table], column, **where).mean())

    def beside(column, *where, **more):
        permuted = mean(column, *where, tree="permuted", **more)
        return f"{cell(mean(column, *where, **more))} (permuted {cell(permuted)})"

    def iou(dictionary, **units):
        return beside("iou", last, dictionary, table="probes", **units)

    claims = {row["claim"]: row for row in tables["claims"]}
    main = claims["the hierarchy is there"]
    grows = claims["it grows with depth"]
    answer = ANSWERS.get(main["verdict"], "no hierarchy can be told from chance")
    sentences = [
        f"Two of a latent's top images, of different classes, meet {cell(mean(MAIN))} edges up in "
        f"the last layer, {cell(mean(MAIN, tree='permuted'))} under permuted trees (p = "
        f"{main['p_value']:.2g}): {answer}. The untrained SAE has "
        f"{beside(MAIN, last, 'untrained')}, raw neurons {beside(MAIN, last, 'neurons')}."]
    if first < last:
        sure = "" if grows["low"] is None else (
            f" (95% interval {cell(grows['low'])} to {cell(grows['high'])})")
        ends, controls = ([mean("lch_height_pairwise", layer, tree=tree) for layer in (first, last)]
                          for tree in ("wordnet", "permuted"))
        sentences += [
            f"In the first layer it is {beside(MAIN, first)}. From the first third of the layers "
            f"to the last, the hierarchy's part grows by {cell(grows['value'])} edges{sure}: "
            f"{grows['verdict']}.",
            f"Pairwise LCH height goes from {cell(ends[0])} to {cell(ends[1])}, by "
            f"{cell(ends[0] - ends[1])} edges; under permuted trees by "
            f"{cell(controls[0] - controls[1])}: that part is latents becoming class-specific."]
    sentences += [
        f"In the last layer, of {len(tables['hypernyms'])} hypernyms {beside('hypernyms_lch')} are "
        "the lowest common hypernym (LCH) of some latent's top images, and "
        f"{beside('hypernyms_matched')} are matched by a latent on images that it was not chosen "
        "on.",
        f"One latent tells the images under a hypernym by an IoU of {iou('sae', units=1)}, one "
        f"untrained latent by {iou('untrained', units=1)}, one raw neuron by "
        f"{iou('neurons', units=1)}, the class token as a whole by {iou('token')}."]
    poor = sorted({row["layer"] for row in tables["layers"] if row["fvu"] and row["fvu"] > 1})
    if poor:
        sentences.append(f"Beware: in layers {', '.join(map(str, poor))} the SAE reconstructs "
                         "worse than the mean does (FVU above 1): train longer, or on more images.")
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
