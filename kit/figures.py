"""The figures of a run, each drawn from its tables to a PNG and, for talks, a PDF."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from kit.tables import values_of

# Okabe and Ito's colours, which the colour-blind can tell apart; a marker and a dash each
STYLES = {
    "sae": dict(color="#0072B2", marker="o", label="SAE"),
    "untrained": dict(color="#CC79A7", marker="^", linestyle="-.",
                      label="untrained SAE, at equal sparsity"),
    "neurons": dict(color="#009E73", marker="s", linestyle=":",
                    label="raw neurons, at equal sparsity"),
    "token": dict(color="black", marker="D", label="class token, all of it"),
}
PERMUTED = dict(color="0.4", linestyle="--", label="SAE, permuted trees")
DPI = 160


def save(figure, path):
    for ending in (".png", ".pdf"):
        figure.savefig(path.with_suffix(ending), dpi=DPI)


def panel(axis, title, ylabel, layers):
    step = -(-len(layers) // 12)  # ticks at layers that were run
    axis.set(title=title, xlabel="layer", ylabel=ylabel, xticks=layers[::step])
    axis.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
    axis.grid(alpha=0.3)


def line(axis, rows, column, layers, style, **where):
    """(L,) the mean over seeds by layer, drawn with a band of one standard deviation."""
    values = [values_of(rows, column, layer=layer, **where) for layer in layers]
    mean = np.array([value.mean() for value in values])
    spread = np.array([value.std() for value in values])
    axis.plot(layers, mean, **style)
    axis.fill_between(layers, mean - spread, mean + spread, alpha=0.2, color=style["color"],
                      linewidth=0)
    return mean


def draw_hierarchy(path, tables, layers):
    """The main figure: LCH height between classes by layer. The band of permuted trees is two
    standard deviations wide to either side."""
    figure = Figure((8, 5), layout="constrained")
    axis = figure.subplots()
    column = "lch_height_between"
    for name in ("sae", "untrained", "neurons"):
        line(axis, tables["hierarchy"], column, layers, STYLES[name], dictionary=name,
             tree="wordnet")
    mean = line(axis, tables["hierarchy"], column, layers, PERMUTED, dictionary="sae",
                tree="permuted")
    half = 2 * np.array([values_of(tables["permuted_sd"], column, layer=layer,
                                   dictionary="sae").mean() for layer in layers])
    axis.fill_between(layers, mean - half, mean + half, color="0.6", alpha=0.3, linewidth=0)
    panel(axis, "How far up two top images of different classes meet",
          "edges (↓ more specific)", layers)
    axis.legend(fontsize=9)
    save(figure, path)


def draw_probes(path, probes, layers):
    """Hypernym probes: IoU by the number of units in the last layer, and by layer."""
    figure = Figure((10, 4.6), layout="constrained")
    (few, depth), counts = figure.subplots(1, 2), sorted({
        row["units"] for row in probes if row["dictionary"] == "sae"})
    for tree, more in (("wordnet", {}), ("permuted", {"linestyle": "--", "alpha": 0.5})):
        for name, style in STYLES.items():
            style = style | more | ({"label": None} if more else {})
            where = {"dictionary": name, "tree": tree, "layer": layers[-1]}
            if name == "token":
                mean = line(depth, probes, "iou", layers, style, dictionary=name, tree=tree)
                few.axhline(mean[-1], color="black", linestyle="--" if more else "-")
                continue
            few.plot(counts, [values_of(probes, "iou", units=count, **where).mean()
                              for count in counts], **style)
            line(depth, probes, "iou", layers, style, dictionary=name, tree=tree, units=1)
    few.set(title=f"Layer {layers[-1]}", xlabel="units of the probe", xscale="log", xticks=counts,
            xticklabels=counts, ylabel="IoU with the hypernym", ylim=(0, None))
    panel(depth, "One unit, and the whole token", "IoU (dashed: a permuted tree)", layers)
    depth.legend(fontsize=9)
    save(figure, path)


def draw_layers(path, tables, layers):
    """Probe accuracy, reconstruction error and active latents by layer, and the three together."""
    figure = Figure((9, 6.4), layout="constrained")
    blue = STYLES["sae"] | {"label": "SAE"}
    ((probe, error), (active, together)), rows = figure.subplots(2, 2), tables["layers"]
    accuracy = line(probe, rows, "probe_top1", layers, blue)
    nmse = line(error, rows, "nmse", layers, STYLES["untrained"] | {"label": "NMSE"})
    line(error, rows, "fvu", layers, blue | {"label": "FVU"})
    l0 = line(active, rows, "l0", layers, blue)
    panel(probe, "Linear probe", "top-1 accuracy", layers)
    panel(error, "SAE reconstruction error", "share left", layers)
    panel(active, "Active latents", "L0, mean per image", layers)
    error.set_yscale("log"), error.legend(fontsize=9)
    points = together.scatter(accuracy, nmse, c=layers, s=20 + 180 * l0 / max(l0.max(), 1e-9))
    together.set(title="The three together (area: L0)", xlabel="probe accuracy", ylabel="NMSE",
                 yscale="log")
    figure.colorbar(points, ax=together, label="layer", ticks=layers[:: -(-len(layers) // 8)])
    save(figure, path)


def draw_consistency(path, rows, layers):
    """Heat map of the kappa of what every two layers match; grey where undefined."""
    kappa = np.eye(len(layers))
    position = {layer: i for i, layer in enumerate(layers)}
    for row in rows:
        a = position[row["layer_a"]]
        b = position[row["layer_b"]]
        kappa[a, b] = kappa[b, a] = row["kappa"]
    figure = Figure((6, 5), layout="constrained")
    axis = figure.subplots()
    ticks = range(0, len(layers), -(-len(layers) // 12))
    axis.set_facecolor("0.85")
    image = axis.imshow(kappa, vmin=-0.2, vmax=1, cmap="viridis", origin="lower")
    axis.set(xticks=ticks, yticks=ticks, xticklabels=layers[:: ticks.step],
             yticklabels=layers[:: ticks.step], xlabel="layer", ylabel="layer",
             title="Do two layers match the same hypernyms?")
    figure.colorbar(image, ax=axis, label="kappa (0: by chance)")
    save(figure, path)


def layer_colour(layer, layers):
    """A colour for a layer among those that were run; pale for none."""
    if layer is None:
        return "#eeeeee"
    shade = 0.4 + 0.6 * layers.index(layer) / max(len(layers) - 1, 1)  # black text on all
    return matplotlib.colors.to_hex(matplotlib.colormaps["YlGnBu_r"](shade))
