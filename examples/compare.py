"""The paper's ReLU SAE at three λ beside TopK at three K: what does either hold, at what error?

    python examples/compare.py --layers 6,11 --seeds 3 --data ... --backbone ... --out ...

Takes the arguments of reproduce.py and runs it once for each SAE; class tokens are recorded once.
Writes comparison.md and comparison.png into the output folder: means over seeds, beside permuted
trees.
"""
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import reproduce
from kit.inputs import where_to
from kit.tables import markdown, mean_and_spread, values_of

SAES = {"λ = 0.3": ["--l1", "0.3"], "λ = 0.1": ["--l1", "0.1"], "λ = 0.03": ["--l1", "0.03"]}
for count in ("8", "16", "32"):
    SAES[f"K = {count}"] = ["--activation", f"topk-{count}"]
COLUMNS = {  # heading: table, column, the rows of it
    "FVU": ("layers", "fvu", {}), "L0": ("layers", "l0", {}),
    "LCH height between classes ↓": ("hierarchy", "lch_height_between", {"dictionary": "sae"}),
    "hypernyms matched ↑": ("hierarchy", "hypernyms_matched", {"dictionary": "sae"}),
    "probe IoU, one latent ↑": ("probes", "iou", {"dictionary": "sae", "units": 1}),
}
DRAWN = list(COLUMNS)[2:]


def row_of(tables, layer, name):
    """The means over seeds of one SAE in one layer, as numbers."""
    row = {"layer": layer, "SAE": name}
    for heading, (table, column, where) in COLUMNS.items():
        trees = {heading: {}}
        if where:
            trees = {heading: {"tree": "wordnet"},
                     f"{heading[:-2]}, permuted": {"tree": "permuted"}}
        for title, tree in trees.items():
            row[title] = values_of(tables[table], column, layer=layer, **where, **tree)
    return row


def draw(path, rows):
    layers = sorted({row["layer"] for row in rows})
    figure = Figure((4.5 * len(layers), 9), layout="constrained")
    axes = figure.subplots(len(DRAWN), len(layers), squeeze=False)
    for i, layer in enumerate(layers):
        for axis, heading in zip(axes[:, i], DRAWN):
            for kind, colour in (("λ", "#0072B2"), ("K", "#D55E00")):
                mine = [row for row in rows if row["layer"] == layer and row["SAE"][0] == kind]
                x = [row["FVU"].mean() for row in mine]
                for title, style in ((heading, "-o"), (f"{heading[:-2]}, permuted", ":^")):
                    y = [row[title].mean() for row in mine]
                    axis.plot(x, y, style, color=colour)
                for row, fvu in zip(mine, x):
                    axis.annotate(row["SAE"], (fvu, row[heading].mean()), fontsize=8)
            axis.set(xlabel="FVU", ylabel=heading, title=f"layer {layer}, dotted: permuted trees")
    figure.savefig(path, dpi=130)


def main(arguments):
    rows = []
    out = where_to(reproduce.parse_settings(arguments))
    for name, options in SAES.items():
        if code := reproduce.main([*arguments, *options]):
            return code
        newest = max(out.glob("results/*/results.json"), key=lambda path: path.stat().st_mtime_ns)
        tables = json.loads(newest.read_text())
        for layer in sorted({row["layer"] for row in tables["layers"]}):
            rows.append(row_of(tables, layer, name))
    rows.sort(key=lambda row: row["layer"])
    draw(out / "comparison.png", rows)
    for row in rows:
        for title in list(row)[2:]:
            row[title] = mean_and_spread(row[title])
    (out / "comparison.md").write_text(markdown(rows) + "\n", encoding="utf-8")
    print(f"\n{markdown(rows)}\n\n{out / 'comparison.md'}, {out / 'comparison.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
