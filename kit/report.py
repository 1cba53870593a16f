"""What a run leaves for people: tables, pictures of latents, report.html."""
import base64
import csv
import itertools
from html import escape
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

from dinov2_hooks import relevancy_maps
from kit.figures import (display_name, draw_consistency, draw_emergence, draw_hierarchy,
                         draw_layers)
from kit.store import to_json
from sae import SparseAutoencoder


def cell(value) -> str:
    if value is None or value != value:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown(rows: list[dict]) -> str:
    if not rows:
        return "none"
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[cell(value) for value in row.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def html_table(rows: list[dict]) -> str:
    if not rows:
        return "<p>none</p>"
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    lines = ["".join(f"<td>{escape(cell(value))}</td>" for value in row.values()) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return (f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>")


def over_seeds(rows: list[dict]) -> list[dict]:
    """Rows that differ in their seed alone as one: of every number mean ± standard deviation."""
    groups = {}
    for row in rows:
        key = tuple(row[name] for name in ("layer", "dictionary", "labels") if name in row)
        groups.setdefault(key, []).append(row)
    if all(len(group) == 1 for group in groups.values()):
        return [{name: value for name, value in row.items() if name != "seed"} for row in rows]
    merged = []
    for group in groups.values():
        row = {}
        for name in group[0]:
            if name in ("layer", "dictionary", "labels", "width"):
                row[name] = group[0][name]
            elif name != "seed":
                row[name] = mean_and_spread([one[name] for one in group])
        merged.append(row)
    return merged


def mean_and_spread(values) -> str:
    """mean ± standard deviation, None being no number."""
    values = np.array([np.nan if value is None else value for value in values], float)
    mean, spread = float(values.mean()), float(values.std())
    return f"{cell(mean)} ± {cell(spread if spread > 1e-9 * abs(mean) else 0)}"


def named_latents(rows: list[dict], records: dict[int, dict], count: int = 12) -> list[dict]:
    """The rows of hypernyms.csv to show: matched ones of all heights, in turn from the most general
    on, the best match of a height first; each latent once. records: what stage 3 kept, by layer."""
    by_height = {}
    for row in sorted(rows, key=lambda row: (-row["height"], -row["match"])):
        if row["emergence_layer"] is not None:
            by_height.setdefault(row["height"], []).append(row)
    latents = {}
    for turn in itertools.zip_longest(*by_height.values()):
        for row in filter(None, turn):
            latents.setdefault((row["best_layer"], row["best_latent"]), row)
    chosen = sorted(list(latents.values())[:count], key=lambda row: (-row["height"], -row["match"]))
    return [{**row, "picture": f"latent_{row['wnid']}.jpg",
             "top_images": records[row["best_layer"]]["hypernyms"][row["wnid"]]["top_images"]}
            for row in chosen]


def chain_to_show(records: dict[int, dict], tree) -> list[dict]:
    """Of the later half of the layers the longest chain of latents, general to special, as rows."""
    late = list(records)[len(records) // 2 :]
    layer = max(late, key=lambda layer: (len(records[layer]["chain"]), layer))
    rows = []
    for wnid, share in records[layer]["chain"]:
        best = records[layer]["hypernyms"][wnid]
        name = tree.names[tree.wnids.index(wnid)]
        rows.append({"name": name, "share": share, "best_layer": layer,
                     "best_latent": best["latent"], "top_images": best["top_images"],
                     "picture": f"latent_chain_{len(rows)}_{wnid}.jpg"})
    return rows if len(rows) > 1 else []


def draw_latents(folder: Path, rows, saes: dict, model, decoded, ids) -> None:
    """For every row the top images of its best latent, and where in them it looks.

    saes          by layer: the folder of the SAE
    decoded, ids  the validation images, as normalised tensors, and which one each row of tokens is
    """
    device, normalise = model.cls_token.device, decoded.transform.transforms[-1]
    mean, std = (torch.tensor(x)[:, None, None] for x in (normalise.mean, normalise.std))
    for row in tqdm(rows, "      latents", unit="latent"):
        layer, latent = row["best_layer"], row["best_latent"]
        sae = SparseAutoencoder.from_pretrained(saes[layer]).to(device)
        images = torch.stack([decoded[ids[i]][0] for i in row["top_images"][:8]])
        maps = relevancy_maps(model, images.to(device), layer, lambda x: sae.encode(x)[:, latent])
        images = interpolate(images * std + mean, (112, 112), mode="bilinear", antialias=True)
        heat = interpolate(maps.cpu()[:, None], (112, 112), mode="bilinear")
        heat = heat / heat.amax((1, 2, 3), keepdim=True).clamp(min=1e-30)
        lit = images * (0.2 + 0.8 * heat.sqrt())  # relevancy is peaked: its root shows more of it
        grid = make_grid(torch.cat([images, lit]).clamp(0, 1), nrow=len(images), pad_value=1)
        to_pil_image(grid).save(folder / row["picture"], quality=85)


TABLES = {  # name: columns, for a table without a row
    "layers": [], "hierarchy": [], "relations": [], "hypernyms": ["wnid", "name"],
    "consistency": ["layer_a", "layer_b", "jaccard"], "claims": [], "readings": [],
}
FIGURES = {  # name: (alt text, caption), in the order in which to read them
    "layers": (
        "Plots by layer: linear probe accuracy, reconstruction error, active latents.",
        "How much class information the token holds, and how easy it is to auto-encode. NMSE "
        "counts the token's constant part, FVU does not: where NMSE is far below FVU, the token "
        "hardly changes from image to image."),
    "hierarchy": (
        "Plots by layer of LCH height, IoU and hypernyms found, for the SAE and baselines.",
        "If the hierarchy is there, the blue line leaves the orange one (shuffled labels). Raw "
        "neurons and the untrained SAE fire as seldom as the SAE's latents: what training adds is "
        "the way from them to the blue line. Bands: standard deviation over seeds."),
    "consistency": (
        "Heat map of the Jaccard similarity of the hypernyms matched in every pair of layers.",
        "Bright near the diagonal: neighbouring layers match the same hypernyms. Grey: neither "
        "layer matches any."),
    "emergence": (
        "The taxonomy from large hypernyms to small ones, coloured by the layer of emergence.",
        "Each box is a hypernym, as tall as it has classes, its own hypernyms to its left; the "
        "colour is the first layer in which some latent matches it. Pale boxes are matched in no "
        "layer. Hypernyms of more than half of all classes are left out."),
}


def write_results(folder: Path, title: str, note: str, record: dict, latents, chain, tree) -> str:
    """Tables (CSV, Markdown, JSON), figures and the report; returns the shorter tables."""
    depth = sorted({row["layer"] for row in record["layers"]})
    figures = folder / "figures"
    draw_layers(figures / "layers.png", record["layers"])
    draw_hierarchy(figures / "hierarchy.png", record["hierarchy"], record["hypernyms_possible"])
    draw_consistency(figures / "consistency.png", record.pop("agreement"), depth)
    draw_emergence(figures / "emergence.png", record.pop("all_hypernyms"), depth, tree)
    for name, columns in TABLES.items():
        with open(folder / f"{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, record[name][0] if record[name] else columns)
            writer.writeheader()
            writer.writerows(record[name])
    shown = {name: over_seeds(record[name]) for name in ("layers", "hierarchy", "relations")}
    shown |= {name: record[name] for name in ("claims", "hypernyms")}
    sections = {name: f"## {name.capitalize()}\n\n{markdown(rows)}" for name, rows in shown.items()}
    tables = f"# {title}\n\n{note}\n\n" + "\n\n".join(sections.values()) + "\n"
    (folder / "tables.md").write_text(tables, encoding="utf-8", errors="backslashreplace")
    (folder / "results.json").write_text(to_json(record) + "\n")
    write_report(folder, title, note, record, shown, latents, chain)
    return "\n\n".join(sections[name] for name in ("layers", "hierarchy", "claims"))


def write_report(folder: Path, title: str, note: str, record: dict, shown: dict, latents, chain):
    """report.html: one file that opens from disk, with every figure of `folder` inside."""
    def figure(name, alt, caption):
        data = base64.b64encode((folder / "figures" / name).read_bytes()).decode()
        kind = "jpeg" if name.endswith("jpg") else "png"
        picture = f'<img alt="{escape(alt)}" src="data:image/{kind};base64,{data}">'
        if name == "emergence.png":
            picture = f'<div class="wide">{picture}</div>'
        return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"

    run = record["settings"] | record["made_from"] | record["versions"]
    run |= {f"seconds, {stage}": seconds for stage, seconds in record["seconds"].items()}
    parts = [
        f"<h1>{escape(title)}</h1><p>{escape(note)}</p>",
        "<h2>Claims</h2><p>Each is tested on this run's numbers; the README says how.</p>",
        html_table(record["claims"]),
        "<h2>Figures</h2>",
        *(figure(f"{name}.png", alt, escape(text)) for name, (alt, text) in FIGURES.items()),
        "<h2>A chain of latents</h2><p>From general to special, in one late layer: the top images "
        "of each latent, and the share of them on which the one above it fires too.</p>",
    ]
    for row in chain:
        name, share = escape(display_name(row["name"])), row["share"]
        above = "" if share is None else f"; the latent above fires on {share:.0%} of these"
        text = f"<b>{name}</b>: latent {row['best_latent']} of layer {row['best_layer']}{above}"
        parts.append(figure(row["picture"], f"Top images of the latent for {name}", text))
    parts.append(
        "<h2>Named latents</h2><p>For hypernyms of all heights, the latent of any layer that "
        "matches each best: its top validation images, and below them the same lit where the "
        "latent looks (gradient-weighted attention rollout).</p>")
    for row in latents:
        name, lch = (escape(display_name(row[key])) for key in ("name", "lch"))
        parts.append(figure(
            row["picture"],
            f"Top images of the latent for {display_name(row['name'])}, and where it looks in them",
            f"<b>{name}</b> ({row['classes']} classes, height {row['height']}): latent "
            f"{row['best_latent']} of layer {row['best_layer']}, match {row['match']:.2f}, LCH "
            f"{lch}; {name} emerges in layer {row['emergence_layer']}"))
    for name in ("layers", "hierarchy", "relations", "hypernyms"):
        parts.append(f"<h2>{name.capitalize()}</h2>{html_table(shown[name])}")
    settings = html_table([{"setting": key, "value": value} for key, value in run.items()])
    parts.append(f"<h2>Settings</h2><details><summary>What was run</summary>{settings}"
                 "<p>A stage of 0 seconds found its work done.</p></details>")
    page = ('<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width">'
            f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
            f"<body>{''.join(parts)}</body></html>\n")
    (folder / "report.html").write_text(page, encoding="utf-8", errors="backslashreplace")


STYLE = """
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 56rem; margin: 1rem auto; padding: 0 1rem }
body { color: #111; background: #fff }
h1 { font-size: 1.5rem; line-height: 1.2 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc }
figure { margin: 1.5rem 0; break-inside: avoid } figcaption { color: #444; font-size: .9rem }
img { max-width: 100%; height: auto } .wide { overflow-x: auto }
.wide img { max-width: none; width: 56rem } table { border-collapse: collapse; font-size: .85rem }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: left }
td { font-variant-numeric: tabular-nums } td:first-child { min-width: 7rem }
th { background: #f3f3f3 } summary { font-weight: bold }
@media print { body { max-width: none } .wide { overflow: visible } .wide img { width: 100% } }
"""
