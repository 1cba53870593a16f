"""The figures of a run, each drawn from its tables to a PNG and, for talks, a PDF."""
import os

import numpy as np

from kit.claims import MAIN, claimed
from kit.probes import UNITS
from kit.rows import values_of

STYLES = {  # Okabe and Ito's colours for the colour-blind, a marker and a dash each
    "sae": dict(color="#0072B2", marker="o", label="SAE"),
    "untrained": dict(color="#CC79A7", marker="^", linestyle="-.",
                      label="untrained SAE, at equal sparsity"),
    "neurons": dict(color="#009E73", marker="s", linestyle=":",
                    label="raw neurons, at equal sparsity"),
    "token": dict(color="black", marker="D", label="class token, all of it"),
    "permuted": dict(color="0.4", linestyle="--", label="SAE, permuted trees")}
PANELS = {  # columns of layers.csv
    "probe_top1": "accuracy of a linear probe", "l0": "active latents an image (L0)",
    "nmse": "reconstruction error (NMSE)", "fvu": "variance unexplained (FVU)"}


def label_layers(axis, ylabel, layers):
    axis.set_xticks(layers[:: -(-len(layers) // 12)])  # at layers that were run
    axis.set(xlabel="layer", ylabel=ylabel)


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


def draw_hierarchy(figure, tables, layers):
    """The main figure: LCH height between classes by layer."""
    axis = figure.subplots()
    draw_metric(axis, tables, layers, MAIN)
    label_layers(axis, "LCH height between classes, edges (↓ more specific)", layers)
    axis.legend(fontsize=9)


def draw_metrics(figure, tables, layers):
    """Every other metric of which a claim is made."""
    _, *others = claimed()
    for axis, (column, metric) in zip(figure.subplots(1, len(others)), others):
        draw_metric(axis, tables, layers, column)
        label_layers(axis, f"{metric.title} {'↑' if metric.better > 0 else '↓'}", layers)


def draw_probes(figure, tables, layers):
    """Hypernym probes: IoU by the number of units in the last layer, and by layer."""
    few, depth = figure.subplots(1, 2)
    rows = tables["probes"]
    for tree, dash in (("wordnet", {}), ("permuted", {"linestyle": "--", "label": None})):
        for name in ("sae", "untrained", "neurons"):
            style = STYLES[name] | dash
            where = {"dictionary": name, "tree": tree}
            line(few, rows, "iou", style, UNITS, "units", layer=layers[-1], **where)
            line(depth, rows, "iou", style, layers, units=1, **where)
        style = STYLES["token"] | dash
        token = line(depth, rows, "iou", style, layers, dictionary="token", tree=tree)
        few.axhline(token[-1], color="black", linestyle=dash.get("linestyle"))
    few.set(xlabel=f"units of the probe, layer {layers[-1]}", ylabel="IoU with the hypernym",
            xscale="log", xticks=UNITS, xticklabels=UNITS, ylim=(0, None))
    label_layers(depth, "IoU of one unit, and of the token (dashed: permuted)", layers)
    depth.legend(fontsize=8)


def draw_layers(figure, tables, layers):
    """How much class information the token holds, and how easy it is to auto-encode."""
    for axis, column in zip(figure.subplots(2, 2).flat, PANELS):
        line(axis, tables["layers"], column, STYLES["sae"], layers)
        label_layers(axis, PANELS[column], layers)


def draw_training(figure, tables, layers):
    """What became of the loss, L0 and silent latents; the first seed, layers from light to dark."""
    rows = tables["training"]
    seed = values_of(rows, "seed").min(initial=np.inf)  # of published SAEs there are no rows
    for axis, column in zip(figure.subplots(1, 3), ("loss", "l0", "dead")):
        for layer, alpha in zip(layers, np.linspace(0.2, 1, len(layers))):
            where = {"layer": layer, "seed": seed}
            axis.plot(values_of(rows, "step", **where), values_of(rows, column, **where),
                      color=STYLES["sae"]["color"], alpha=alpha)
        axis.set(xlabel="training step", title=column, ylim=(0, None))


def save(action, path, *shown, size=(10, 5.5)):
    """action(figure, *shown) to path.pdf and path.png, whatever the user's settings of matplotlib.
    Returns the path of the PNG."""
    os.environ.pop("MPLBACKEND", None)  # a notebook's
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context("default"):
        figure = Figure(size, layout="constrained")
        action(figure, *shown)
        for ending in (".pdf", ".png"):
            file = path.with_suffix(ending)
            figure.savefig(file, dpi=160)
    return file


def draw(folder, tables, layers):
    """{name: path of the PNG} in the folder. One that fails is said: the tables are worth more."""
    folder.mkdir()
    paths = {}
    for action in FIGURES:
        name = action.__name__.removeprefix("draw_")
        try:
            paths[name] = save(action, folder / name, tables, layers)
        except Exception as error:
            print(f"      no figure of {name}: {type(error).__name__}: {error}")
    return paths


FIGURES = draw_hierarchy, draw_metrics, draw_probes, draw_layers, draw_training
