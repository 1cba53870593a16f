"""Runs side by side: the answer over sparsity, and the main score by layer.

    python -m kit.compare RUN [RUN ...]     RUN: the output folder of a run, with all its results

A setting is a run: a shell loop over --l1 and --activation makes the sweep. A line is of an output
folder and of ReLU or TopK, so give runs that differ in more a folder (--out) each. Writes into
compare/ of the first RUN a table of the last layer (CSV, Markdown) and figures (PNG, PDF), which
the first RUN's page shows from then on.
"""
import sys
from pathlib import Path

from kit.claims import MAIN, claimed
from kit.figures import line, save
from kit.files import RESULTS, InputError
from kit.made_of import read_json
from kit.rows import values_of
from kit.tables import by_layer, markdown, write_csv

SAE = {"dictionary": "sae", "tree": "wordnet"}
PERMUTED = SAE | {"tree": "permuted"}
PART = {"tree": "part"}
PANELS = {  # name of the file: title, table, column, which of its rows, and those drawn beside
    "fvu": ("Variance unexplained by sparsity", "layers", "fvu", {}),
    "height": ("The hierarchy's part of the height by sparsity (dotted: untrained)", "hierarchy",
               MAIN, PART | {"dictionary": "sae"}, PART | {"dictionary": "untrained"}),
    "matched": ("Hypernyms matched by sparsity", "hierarchy", "hypernyms_matched", SAE, PERMUTED),
    "one_unit": ("Probe IoU of one unit by sparsity", "probes", "iou", SAE | {"units": 1},
                 PERMUTED | {"units": 1}),
    "layers": ("LCH height between classes by layer", "hierarchy", MAIN, SAE, PERMUTED)}


def draw(axis, rows, name, key, column, *kinds):
    """A line over `key` for each `name` in the rows, and kind of row; permuted trees are dashed."""
    for i, value in enumerate(sorted({row[name] for row in rows})):
        points = sorted({row[key] for row in rows if row[name] == value})
        for kind in kinds:
            dash = "--" if kind.get("tree") == "permuted" else "-"
            dash = ":" if kind.get("dictionary") == "untrained" else dash
            label = value if kind is kinds[0] else None
            style = {"color": f"C{i}", "ls": dash, "marker": ".", "label": label}
            line(axis, rows, column, style, points, key, **{name: value}, **kind)
    axis.set(xlabel=key, xscale="log" if key == "L0" else "linear")
    axis.legend(fontsize=6)


def main(*runs):
    rows = {"layers": [], "hierarchy": [], "probes": []}
    shown = []
    columns = {column for column, _ in claimed()}
    for path in sorted(path for run in runs for path in Path(run).resolve().glob(RESULTS)):
        tables = read_json(path)
        *_, run, _, name, _ = path.parts
        if name.endswith(".part") or not columns <= tables["hierarchy"][0].keys():
            print(f"      ignored: {path.parent} is unfinished, or of other metrics")
            continue
        last = tables["layers"][-1]["layer"]
        activation, l1 = (tables["settings"][key] for key in ("activation", "l1"))
        l0, fvu = (values_of(tables["layers"], key, layer=last).mean() for key in ("l0", "fvu"))
        more = {"line": f"{run}, {activation.partition('-')[0]}", "setting": f"{run}, {name}",
                "L0": l0, "last": last}
        for table in rows:
            rows[table] += [row | more for row in tables[table]]
        shown.append({"run": run, "activation": activation, "λ": l1, "L0": l0, "FVU": fvu,
                      **by_layer(tables, [last])[0],
                      **{claim["claim"]: claim["verdict"] for claim in tables["claims"]}})
    if not shown:
        print(f"error: no results in {' '.join(runs) or 'nothing'}: give output folders of runs")
        return 2
    folder = Path(runs[0], "compare")
    folder.mkdir(exist_ok=True)
    write_csv(folder / "sparsity.csv", shown)
    (folder / "sparsity.md").write_text(markdown(shown), encoding="utf-8")
    for name, (title, table, column, *kinds) in PANELS.items():
        drawn, line_of, key = rows[table], "setting", "layer"
        if name != "layers":
            drawn = [row for row in drawn if row["layer"] == row["last"]]
            line_of, key = "line", "L0"
        save(folder / name, title, draw, drawn, line_of, key, column, *kinds)


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except InputError as error:
        print(f"error: {error}")
        sys.exit(2)
