"""The figures of a run, each drawn from its tables to a PNG file."""
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

matplotlib.use("Agg")
plt.rcParams.update({"font.size": 11, "axes.grid": True, "grid.alpha": 0.3,
                     "figure.constrained_layout.use": True})
# Okabe and Ito's colours, which the colour-blind can tell apart, and a marker each
STYLES = {
    "sae": dict(color="#0072B2", marker="o", label="SAE"),
    "neurons": dict(color="#009E73", marker="s", label="raw neurons, at equal sparsity",
                    linestyle=":"),
    "untrained": dict(color="#CC79A7", marker="^", label="untrained SAE, at equal sparsity",
                      linestyle="-."),
}
DPI = 220  # twice what a screen shows
BLUE, ORANGE = "#0072B2", "#D55E00"


def display_name(synset: str) -> str:
    """dog.n.01 -> dog"""
    return synset.rsplit(".", 2)[0].replace("_", " ")


def _panel(axis, title, ylabel, **more):
    axis.set(title=title, xlabel="layer", ylabel=ylabel, **more)
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))


def _finish(figure, path: Path):
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def _line(axis, rows: list[dict], column: str, **style):
    """The mean over seeds by layer, and a band of one standard deviation."""
    by_layer = {}
    for row in rows:
        by_layer.setdefault(row["layer"], []).append(np.nan if row[column] is None else row[column])
    mean = np.array([np.mean(values) for values in by_layer.values()])
    spread = np.array([np.std(values) for values in by_layer.values()])
    (line,) = axis.plot(list(by_layer), mean, **style)
    if max(map(len, by_layer.values())) > 1:
        axis.fill_between(list(by_layer), mean - spread, mean + spread, alpha=0.2, linewidth=0,
                          color=line.get_color())
    return mean


def draw_layers(path: Path, layers: list[dict]) -> None:
    """Probe accuracy, reconstruction error and active latents by layer, and the three together."""
    figure, ((probe, error), (active, both)) = plt.subplots(2, 2, figsize=(8, 6.4))
    accuracy = _line(probe, layers, "probe_top1", color=BLUE, marker="o")
    _panel(probe, "Linear probe", "top-1 accuracy", ylim=(0, 1))
    nmse = _line(error, layers, "nmse", color=ORANGE, marker="s", label="NMSE")
    _line(error, layers, "fvu", color=BLUE, marker="o", label="FVU")
    _panel(error, "SAE reconstruction error", "share left", yscale="log")
    error.legend()
    l0 = _line(active, layers, "l0", color=BLUE, marker="o")
    _panel(active, "Active latents", "L0, mean per image", ylim=(0, None))
    area, depth = 20 + 180 * l0 / max(l0.max(), 1e-9), sorted({row["layer"] for row in layers})
    points = both.scatter(accuracy, nmse, c=depth, cmap="viridis", s=area)
    both.set(title="The two together (area: L0)", xlabel="probe accuracy", ylabel="NMSE",
             yscale="log")
    figure.colorbar(points, ax=both, label="layer")
    _finish(figure, path)


def draw_hierarchy(path: Path, tables: dict) -> None:
    """The main figure: LCH height between classes by layer, of the SAE and its baselines, and the
    band of permuted trees, two standard deviations to either side of their mean."""
    figure, axis = plt.subplots(figsize=(8, 5))
    for name, style in STYLES.items():
        rows = [row for row in tables["hierarchy"] if row["dictionary"] == name]
        _line(axis, [row for row in rows if row["tree"] == "wordnet"], "lch_height_between", **style)
        if name == "sae":
            permuted = [row for row in rows if row["tree"] == "permuted"]
    spread = [row for row in tables["permuted_sd"] if row["dictionary"] == "sae"]
    mean = _line(axis, permuted, "lch_height_between", color="0.4", linestyle="--",
                 label="SAE, permuted trees")
    depth = list(dict.fromkeys(row["layer"] for row in permuted))
    half = 2 * np.array([np.mean([row["lch_height_between"] for row in spread
                                  if row["layer"] == layer]) for layer in depth])
    axis.fill_between(depth, mean - half, mean + half, color="0.6", alpha=0.3, linewidth=0)
    _panel(axis, "How far up two top images of different classes meet",
           "LCH height, edges (↓ more specific)")
    figure.legend(loc="outside lower center", ncols=2)
    _finish(figure, path)


def draw_probes(path: Path, probes: list[dict]) -> None:
    """Hypernym probes: IoU by the number of units in the last layer, and by layer."""
    figure, (few, depth) = plt.subplots(1, 2, figsize=(10, 4.6))
    last = max(row["layer"] for row in probes)
    token = dict(color="black", marker="D", label="class token, all of it")
    for tree in ("wordnet", "permuted"):
        more = {} if tree == "wordnet" else {"linestyle": "--", "alpha": 0.5, "label": None}
        rows = [row for row in probes if row["tree"] == tree]
        for name, style in STYLES.items():
            mine = [row for row in rows if row["dictionary"] == name]
            _line(few, [row | {"layer": row["units"]} for row in mine if row["layer"] == last],
                  "iou", **style | more)
            _line(depth, [row for row in mine if row["units"] == 1], "iou", **style | more)
        whole = [row for row in rows if row["dictionary"] == "token"]
        ends = np.mean([row["iou"] for row in whole if row["layer"] == last])
        few.axhline(ends, color="black", **{"linestyle": "-"} | {
            key: value for key, value in more.items() if key != "label"})
        _line(depth, whole, "iou", **token | more)
    few.set(title=f"Layer {last}", xlabel="units of the probe", ylabel="IoU with the hypernym",
            xscale="log", xticks=[1, 4, 16], xticklabels=["1", "4", "16"], ylim=(0, None))
    _panel(depth, "One unit, and the whole token", "IoU (dashed: permuted tree)", ylim=(0, None))
    figure.legend(*depth.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    _finish(figure, path)


def draw_consistency(path: Path, agreement: np.ndarray, depth: list[int]) -> None:
    """Heat map of kappa (L, L) of what every two layers match; grey where undefined."""
    figure, axis = plt.subplots(figsize=(6, 5))
    axis.grid(False)
    axis.set_facecolor("0.85")
    image = axis.imshow(agreement, vmin=-0.2, vmax=1, cmap="viridis", origin="lower")
    places = range(0, len(depth), -(-len(depth) // 12))
    names = [depth[i] for i in places]
    axis.set(xticks=places, xticklabels=names, yticks=places, yticklabels=names,
             xlabel="layer", ylabel="layer", title="Do two layers match the same hypernyms?")
    figure.colorbar(image, ax=axis, label="kappa: 0 by chance, 1 the same")
    _finish(figure, path)


def nested_boxes(nodes: list[int], leaves: np.ndarray) -> dict[int, tuple[int, int, int]]:
    """node -> (level, top, bottom) of its box, as tall as it has classes, inside its hypernym's.

    nodes come with the largest first; leaves is (V, C). Of several hypernyms the largest counts; a
    class is drawn once.
    """
    children, level, boxes = {}, {}, {}
    placed = np.zeros(leaves.shape[1], bool)

    def holds(u, v):
        return u != v and not (leaves[v] & ~leaves[u]).any()

    for i, v in enumerate(nodes):
        above = [u for u in nodes[:i] if holds(u, v)]
        parent = next((u for u in above if not any(holds(u, w) for w in above)), None)
        level[v] = 0 if parent is None else level[parent] + 1
        children.setdefault(parent, []).append(v)

    def place(v, top):
        bottom = top
        for child in children.get(v, []):
            bottom = place(child, bottom)
        bottom += (leaves[v] & ~placed).sum()
        placed[leaves[v]] = True
        boxes[v] = (level[v], top, bottom)
        return bottom

    end = 0
    for v in children.get(None, []):
        end = place(v, end)
    return boxes


def draw_emergence(path: Path, rows: list[dict], depth: list[int], tree) -> None:
    """The taxonomy from large hypernyms to small ones, coloured by the layer of emergence."""
    sizes, least = tree.leaves.sum(1), max(2, len(tree.classes) // 200)
    layers = {row["wnid"]: row["emergence_layer"] for row in rows}
    nodes = [v for v in tree.hypernyms if sizes[v] >= least and tree.wnids[v] in layers]
    nodes.sort(key=lambda v: (-sizes[v], -tree.height[v], v))
    boxes = nested_boxes(nodes, tree.leaves)
    end = max((bottom for _, _, bottom in boxes.values()), default=1)
    levels = 1 + max((level for level, _, _ in boxes.values()), default=3)
    inches, span = max(4.0, end * 0.11 / least), max(depth[-1] - depth[0], 1)
    colours = matplotlib.colormaps["viridis"]
    figure, axis = plt.subplots(figsize=(1.15 * levels, inches + 1))
    axis.grid(False)
    for v, (level, top, bottom) in boxes.items():
        if top == bottom:  # all its classes are drawn elsewhere
            continue
        layer = layers[tree.wnids[v]]
        shade = None if layer is None else (layer - depth[0]) / span
        axis.add_patch(plt.Rectangle(
            (level, top), 1, bottom - top, edgecolor="0.4", linewidth=0.6,
            facecolor="0.93" if shade is None else colours(shade)))
        if (bottom - top) * inches / end > 0.1:  # room for a line of text
            name = display_name(tree.names[v])
            axis.text(level + 0.04, (top + bottom) / 2, fontsize=7, va="center",
                      s=name if len(name) < 19 else name[:17] + "…",
                      color="white" if shade is not None and shade < 0.6 else "black")
    axis.set(xlim=(0, levels), ylim=(end, 0), yticks=[], xticks=[])
    norm = matplotlib.colors.Normalize(depth[0], depth[0] + span)
    figure.colorbar(matplotlib.cm.ScalarMappable(norm, colours), ax=axis, location="top",
                    label="emergence layer", aspect=60, pad=0.01,
                    ticks=matplotlib.ticker.MaxNLocator(integer=True))
    _finish(figure, path)
