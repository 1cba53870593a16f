"""What a run found: tables (CSV, Markdown, JSON) and sentences made from their numbers."""
import csv
import itertools
import json

import numpy as np

from kit.claims import MAIN, SCORES
from kit.rows import values_of
from kit.runs import to_json

MARKS = {"holds": "✓", "open": "○", "contradicted": "✗"}  # else –


def cell(value):
    if value is None or value != value:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown(rows):
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    for row in rows:
        lines.append(map(cell, row.values()))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def over_seeds(values):
    """mean ± standard deviation; the mean alone where all agree."""
    spread = np.std(values)
    text = cell(np.mean(values))
    return f"{text} ± {spread:.3g}" if spread > 1e-6 else text


def by_layer(tables, layers):
    """The scores that matter most: a row for each layer and dictionary, a number a cell."""
    rows = []
    for layer, dictionary in itertools.product(layers, ("sae", "untrained", "neurons")):
        where = {"layer": layer, "dictionary": dictionary}
        row = where.copy()
        for column, (name, sign) in SCORES.items():
            for tree in ("wordnet", "permuted"):
                values = values_of(tables["hierarchy"], column, tree=tree, **where)
                row[f"{name} {'↑' if sign > 0 else '↓'}, {tree}"] = over_seeds(values)
        for tree in ("wordnet", "permuted"):
            values = values_of(tables["probes"], "iou", units=1, tree=tree, **where)
            row[f"probe IoU ↑, {tree}"] = over_seeds(values)
        rows.append(row)
    return rows


def findings(tables, layers):
    """What was found, in sentences: each number beside its value under permuted trees."""
    first = layers[0]
    last = layers[-1]

    def mean(column, layer=last, dictionary="sae", tree="wordnet"):
        where = {"layer": layer, "dictionary": dictionary, "tree": tree}
        return values_of(tables["hierarchy"], column, **where).mean()

    def beside(*where):
        return f"{mean(MAIN, *where):.3g} (permuted {mean(MAIN, *where, tree='permuted'):.3g})"

    main, grows = tables["claims"][:2]
    answer = {"holds": "the hierarchy is there", "open": "it cannot be told from chance",
              "contradicted": "related classes lie further apart than by chance"}
    answer = answer.get(main["verdict"], main["verdict"])
    sentences = [
        f"Two of a latent's top images, of different classes, meet {main['value']:.3g} edges up in "
        f"the last layer, {main['permuted']:.3g} under permuted trees (p = {main['p_value']:.2g}): "
        f"{answer}. The untrained SAE has {beside(last, 'untrained')}, raw neurons "
        f"{beside(last, 'neurons')}."]
    if first < last:
        pairwise = "lch_height_pairwise"
        fall = mean(pairwise, first) - mean(pairwise)
        by_chance = mean(pairwise, first, tree="permuted") - mean(pairwise, tree="permuted")
        sentences += [
            f"In the first layer it is {beside(first)}. From the first third of the "
            f"layers to the last, the hierarchy's part grows by {grows['value']:.3g} edges: "
            f"{grows['verdict']}.",
            f"Over all pairs of top images LCH height falls by {fall:.3g} edges, under permuted "
            f"trees by {by_chance:.3g}: that part is latents becoming class-specific."]
    poor = sorted({str(row["layer"]) for row in tables["layers"] if (row["fvu"] or 0) > 1})
    if poor:
        sentences.append(f"Beware: in layers {', '.join(poor)} the SAE reconstructs worse than the "
                         "mean does (FVU above 1): train longer, or on more images.")
    return sentences


def write_tables(folder, title, note, tables, layers):
    """Every table as CSV, those for reading as tables.md, all as results.json. Returns the tables
    for reading, by name, and the findings."""
    for name, rows in json.loads(to_json(tables)).items():
        if rows and isinstance(rows, list):
            with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
    shown = {"claims": tables["claims"], "by_layer": by_layer(tables, layers)}
    sentences = findings(tables, layers)
    text = [f"# {title}", note, *sentences]
    for name, rows in shown.items():
        text.append(f"## {name.replace('_', ' ').capitalize()}\n\n{markdown(rows)}")
    (folder / "tables.md").write_text("\n\n".join(text) + "\n", "utf-8", "backslashreplace")
    (folder / "results.json").write_text(to_json(tables) + "\n")
    return shown, sentences
