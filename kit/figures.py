"""The figures of a run, each drawn from its tables to a PNG and, for talks, a PDF.

A dash means permuted trees, in every figure.
"""
import os

import numpy as np

from kit.claims import MAIN, claimed
from kit.probes import UNITS
from kit.rows import values_of

STYLES = {  # Okabe and Ito's colours for the colour-blind, and a marker each
    "sae": dict(color="#0072B2", marker="o", label="SAE"),
    "untrained": dict(color="#CC79A7", marker="^", label="untrained SAE, as sparse"),
    "neurons": dict(color="#009E73", marker="s", label="raw neurons, as sparse"),
    "token": dict(color="black", marker="D", label="class token, all of it"),
    "permuted": dict(color="0.4", linestyle="--", label="SAE, permuted trees")}
COLUMNS = {  # of layers.csv
    "probe_top1": "How much class information: accuracy of a linear probe",
    "nmse": "How easy to auto-encode: reconstruction error (NMSE)",
    "l0": "Active latents per image (L0)", "fvu": "Variance that the SAE leaves unexplained (FVU)"}
HISTORIES = {  # of training.csv
    "loss": "Loss by training step", "active": "Active latents (L0) by training step",
    "dead": "Share of silent latents by training step"}
MOST_ROWS = 60  # of the picture, on a slide
SQUARE = np.array([[-1, 1, 1, -1, -1], [-1, -1, 1, 1, -1]]) * 0.47  # a frame: its corners, x and y


def label_layers(axis, layers, **labels):
    axis.set_xticks(layers[:: -(-len(layers) // 12)])  # at layers that were run
    axis.set(xlabel="layer", **labels)


def line(axis, rows, column, style, points, key="layer", **where):
    """The mean over seeds by layer, or another key of the rows, drawn with a band of one standard
    deviation. Returns the means."""
    values = [values_of(rows, column, **where, **{key: point}) for point in points]
    mean = np.array([of_seeds.mean() for of_seeds in values])
    axis.plot(points, mean, **style)
    band(axis, points, mean, [of_seeds.std() for of_seeds in values], style["color"])
    return mean


def band(axis, points, mean, half, colour):
    axis.fill_between(points, mean - half, mean + half, alpha=0.2, color=colour, linewidth=0)


def draw_metric(axis, tables, layers, column):
    """A metric by layer. The band of permuted trees is two standard deviations to either side."""
    rows = tables["hierarchy"]
    for name in ("sae", "untrained", "neurons"):
        line(axis, rows, column, STYLES[name], layers, dictionary=name, tree="wordnet")
    where = {"dictionary": "sae", "tree": "permuted"}
    mean = line(axis, rows, column, STYLES["permuted"], layers, **where)
    where["tree"] = "permuted_sd"
    spread = [values_of(rows, column, layer=layer, **where).mean() for layer in layers]
    band(axis, layers, mean, 2 * np.array(spread), "0.4")
    label_layers(axis, layers)
    axis.legend(fontsize=8)


def draw_main(axis, tables, layers, column):
    """On the right, how far apart two classes of such a height are."""
    draw_metric(axis, tables, layers, column)
    axis.set(ylabel="edges (lower: closer kin share a latent)")
    low, high = axis.get_ylim()
    known = [row for row in tables["heights"] if low <= row["height"] <= high]
    right = axis.twinx()
    right.set(ylim=(low, high), yticks=[row["height"] for row in known])
    right.set_yticklabels([f"as {row['a']}, {row['b']}" for row in known], fontsize=7)


def draw_probes(axis, tables, layers, key):
    """IoU of hypernym probes: in the last layer by the number of units; or of one unit, by layer,
    beside the whole token."""
    points, fixed = (UNITS, {"layer": layers[-1]}) if key == "units" else (layers, {"units": 1})
    for tree, dash in (("wordnet", {}), ("permuted", {"linestyle": "--", "label": None})):
        for name in ("sae", "untrained", "neurons"):
            where = {"dictionary": name, "tree": tree, **fixed}
            line(axis, tables["probes"], "iou", STYLES[name] | dash, points, key, **where)
        if key == "layer":
            where = {"dictionary": "token", "tree": tree}
            line(axis, tables["probes"], "iou", STYLES["token"] | dash, layers, **where)
    axis.set(xlabel=key, xticks=points, xticklabels=points, ylabel="IoU with the hypernym")
    axis.legend(fontsize=8)


def draw_column(axis, tables, layers, column):
    line(axis, tables["layers"], column, STYLES["sae"], layers)
    label_layers(axis, layers)


def draw_history(axis, tables, layers, column):
    """Of the first seed, layers from light to dark."""
    rows = tables["training"]
    seed = values_of(rows, "seed").min(initial=np.inf)  # of published SAEs there are no rows
    for layer, alpha in zip(layers, np.linspace(0.2, 1, len(layers))):
        where = {"layer": layer, "seed": seed}
        axis.plot(values_of(rows, "step", **where), values_of(rows, column, **where),
                  color=STYLES["sae"]["color"], alpha=alpha, label=f"layer {layer}")
    axis.set(xlabel="training step", ylim=(0, None))
    axis.legend(handles=axis.lines[:: max(1, len(layers) - 1)], fontsize=8)


def draw_agreement(axis, tables, layers):
    """Kappa of the hypernyms matched in every two layers, the mean over seeds."""
    kappa = np.full((len(layers), len(layers)), np.nan)
    for row in tables["consistency"]:
        a, b = layers.index(row["layer_a"]), layers.index(row["layer_b"])
        where = {"layer_a": row["layer_a"], "layer_b": row["layer_b"]}
        kappa[a, b] = kappa[b, a] = values_of(tables["consistency"], "kappa", **where).mean()
    shown = axis.imshow(kappa, vmin=0, vmax=1)
    axis.figure.colorbar(shown, label="Cohen's kappa")
    ticks = range(0, len(layers), -(-len(layers) // 12))
    labels = [layers[i] for i in ticks]
    axis.set(xlabel="layer", ylabel="layer", xticks=ticks, xticklabels=labels, yticks=ticks,
             yticklabels=labels)


def draw_picture(axis, tables, layers):
    """Hypernyms in the tree's order by layers: how well a latent matches each; framed: matched."""
    rows = tables["hypernyms"]
    names = [row for row in rows if row["layer"] == layers[0] and row["shown"]][:MOST_ROWS]
    match = [values_of(rows, "match", wnid=row["wnid"]) for row in names]
    axis.figure.set_size_inches(4 + len(layers) / 4, 2 + len(names) / 6)
    if names:
        shown = axis.imshow(match, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axis.figure.colorbar(shown, label="match on held-out images")
    for y, row in enumerate(names):
        for x in np.flatnonzero(values_of(rows, "matched", wnid=row["wnid"])):
            axis.plot(x + SQUARE[0], y + SQUARE[1], color="#D55E00", linewidth=1)
    labels = ["   " * row["indent"] + row["term"] for row in names]
    axis.set_yticks(range(len(names)), labels, fontsize=7, ha="left")
    axis.tick_params(axis="y", pad=max(map(len, labels), default=0) * 4)
    axis.set(xlabel="layer", xticks=range(len(layers)), xticklabels=layers)


def all_figures():
    """{name: (title, what draws it on an axis, and with what besides tables and layers)}"""
    figures = {
        "hierarchy": ("How closely related the classes of a latent are", draw_main, MAIN),
        "picture": ("General terms that have a latent, by layer", draw_picture)}
    for column, (title, better, _) in claimed()[1:]:
        arrow = "↑" if better > 0 else "↓"
        figures[column] = (f"{title[0].upper()}{title[1:]} {arrow}", draw_metric, column)
    figures["by_units"] = ("How few units tell the images under a hypernym", draw_probes, "units")
    figures["by_layer"] = ("How well one unit tells them, by layer", draw_probes, "layer")
    for column, title in COLUMNS.items():
        figures[column] = (title, draw_column, column)
    for column, title in HISTORIES.items():
        figures[column] = (title, draw_history, column.replace("active", "l0"))
    figures["agreement"] = ("Do two layers match the same hypernyms?", draw_agreement)
    return figures


def save(path, title, action, *shown):
    """action(axis, *shown) to path.pdf and path.png, whatever the user's settings of matplotlib.
    Returns the path of the PNG."""
    os.environ.pop("MPLBACKEND", None)  # a notebook's
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context("default"):
        figure = Figure((6, 4), layout="constrained")
        axis = figure.subplots()
        action(axis, *shown)
        axis.set_title(title, fontsize=11)
        for ending in (".pdf", ".png"):
            file = path.with_suffix(ending)
            figure.savefig(file, dpi=130)
    return file


def draw(folder, tables, layers):
    """{name: path of the PNG} in the folder. One that fails is said: the tables are worth more."""
    folder.mkdir()
    paths = {}
    for name, (title, action, *more) in all_figures().items():
        try:
            paths[name] = save(folder / name, title, action, tables, layers, *more)
        except Exception as error:
            print(f"      no figure of {name}: {type(error).__name__}: {error}")
    return paths
