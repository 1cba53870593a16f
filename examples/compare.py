"""The paper's ReLU SAE at three λ beside TopK at three K: what does either hold, at what error?

    python examples/compare.py --layers 1,6,11 --seeds 3 --data ... --backbone ...

Takes the arguments of reproduce.py, runs it once for each SAE (in one output folder, so that class
tokens are recorded once) and writes comparison.md and comparison.png there: mean ± standard
deviation over seeds, each beside permuted trees.
"""
import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import reproduce
from kit.tables import markdown, mean_and_spread, values_of

SAES = [("relu", "0.3"), ("relu", "0.1"), ("relu", "0.03"), ("topk-8", "0"), ("topk-16", "0"),
        ("topk-32", "0")]
SAE, PERMUTED = {"dictionary": "sae", "tree": "wordnet"}, {"tree": "permuted"}


def main(arguments: list[str]) -> int:
    out = Path(reproduce.parse_settings(arguments).out or "runs/comparison")
    rows, points = [], {}
    for activation, l1 in SAES:
        sae = ["--activation", activation, "--l1", l1]
        code = reproduce.main([*arguments, "--out", str(out), *sae])
        if code:
            return code
        name = f"ReLU, λ = {l1}" if activation == "relu" else f"TopK, K = {activation[5:]}"
        newest = max(out.glob("results/*/results.json"), key=lambda path: path.stat().st_mtime_ns)
        record = json.loads(newest.read_text())
        layers = list(dict.fromkeys(row["layer"] for row in record["layers"]))
        for layer in layers:
            row = {"layer": layer, "SAE": name}
            for title, table, column, where in [
                ("FVU", "layers", "fvu", {}), ("L0", "layers", "l0", {}),
                ("dead", "layers", "dead", {}),
                ("between ↓", "hierarchy", "lch_height_between", SAE),
                ("between, permuted", "hierarchy", "lch_height_between", SAE | PERMUTED),
                ("matched ↑", "hierarchy", "hypernyms_matched", SAE),
                ("matched, permuted", "hierarchy", "hypernyms_matched", SAE | PERMUTED),
                ("probe IoU ↑", "probes", "iou", SAE | {"units": 1}),
                ("probe IoU, permuted", "probes", "iou", SAE | PERMUTED | {"units": 1}),
            ]:
                values = values_of(record[table], column, layer=layer, **where)
                row[title] = mean_and_spread(values)
                points[name, layer, title] = float(np.mean(values)), float(np.std(values))
            rows.append(row)
    rows.sort(key=lambda row: row["layer"])
    (out / "comparison.md").write_text(markdown(rows) + "\n")
    figure = Figure((4 * len(layers), 6.4), layout="constrained")
    axes = figure.subplots(2, len(layers), squeeze=False)
    for i, layer in enumerate(layers):
        for axis, title in zip(axes[:, i], ("between ↓", "probe IoU ↑")):
            for kind, colour in (("ReLU", "#0072B2"), ("TopK", "#D55E00")):
                names = [name for name in dict.fromkeys(key[0] for key in points) if kind in name]
                x = [points[name, layer, "FVU"][0] for name in names]
                for whose, style in ((title, "-o"), (f"{title[:-2]}, permuted", ":^")):
                    y, spread = zip(*(points[name, layer, whose] for name in names))
                    axis.errorbar(x, y, spread, fmt=style, color=colour, capsize=2,
                                  label=kind + (", permuted trees" if ":" in style else ""))
            axis.set(xlabel="FVU", ylabel=title, title=f"layer {layer}")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(out / "comparison.png", dpi=130)
    print(f"\n{markdown(rows)}\n\n{out / 'comparison.md'}, {out / 'comparison.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
