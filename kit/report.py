"""What a run leaves for people: pictures of latents, and report.html."""
import base64
import itertools
from html import escape
from pathlib import Path

import matplotlib
import torch
from torch.nn.functional import interpolate
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

from dinov2_hooks import relevancy_maps
from kit.figures import (display_name, draw_consistency, draw_emergence, draw_hierarchy,
                         draw_layers, draw_probes)
from kit.tables import cell, write_tables
from sae import SparseAutoencoder

TILE = 224  # pixels of a picture's side, twice those on screen


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
    return [{**row, "picture": f"latent_{row['wnid']}.webp",
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
                     "picture": f"latent_chain_{len(rows)}_{wnid}.webp"})
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
        images = interpolate(images * std + mean, (TILE, TILE), mode="bilinear", antialias=True)
        grid = make_grid(torch.cat([images, overlay(images, maps.cpu())]).clamp(0, 1),
                         nrow=len(images), padding=4, pad_value=1)
        to_pil_image(grid).save(folder / row["picture"], quality=75)


def overlay(images: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """images (B, 3, H, W) in grey, under their maps (B, h, w) in colour where these are high."""
    heat = interpolate(maps[:, None], images.shape[2:], mode="bicubic").clamp(min=0)
    heat = (heat / heat.amax((1, 2, 3), keepdim=True).clamp(min=1e-30)) ** 0.7  # they are peaked
    colour = matplotlib.colormaps["inferno"](heat[:, 0].numpy())[..., :3]  # (B, H, W, 3)
    colour = torch.from_numpy(colour).float().permute(0, 3, 1, 2)
    grey = images.mean(1, keepdim=True)
    return grey + (1.6 * heat).clamp(max=0.8) * (colour - grey)


FIGURES = {  # name: (alt text, caption), in the order in which to read them
    "layers": (
        "Plots by layer: linear probe accuracy, reconstruction error, active latents.",
        "How much class information the token holds, and how easy it is to auto-encode. NMSE "
        "counts the token's constant part, FVU does not: where NMSE is far below FVU, the token "
        "hardly changes from image to image."),
    "hierarchy": (
        "Plot by layer of the LCH height between classes, for the SAE, baselines, permuted trees.",
        "If the hierarchy is there, the blue line lies below the grey band: the same latents, the "
        "classes dealt anew to the leaves of the tree. Raw neurons and the untrained SAE have the "
        "SAE's own firing rates: what training adds is the way from them to the blue line."),
    "probes": (
        "Plots of the IoU of hypernym probes, by the number of units and by layer.",
        "How well few units tell the images under a hypernym, beside all of the token. Dashed: the "
        "same under a permuted tree, which shows what class information alone gives."),
    "consistency": (
        "Heat map of the kappa of the hypernyms matched in every pair of layers.",
        "Agreement beyond what sets of these sizes have by chance (0). Grey: a layer matches none."),
    "emergence": (
        "The taxonomy from large hypernyms to small ones, coloured by the layer of emergence.",
        "Each box is a hypernym, as tall as it has classes, its own hypernyms to its left; the "
        "colour is the first layer in which some latent matches it. Pale boxes are matched in no "
        "layer. Hypernyms of more than half of all classes are left out."),
}


def write_results(folder: Path, title: str, note: str, record: dict, latents, chain, tree):
    """Tables (CSV, Markdown, JSON), figures and the report; returns what write_tables does."""
    depth = sorted({row["layer"] for row in record["layers"]})
    figures = folder / "figures"
    draw_layers(figures / "layers.png", record["layers"])
    draw_hierarchy(figures / "hierarchy.png", record)
    draw_probes(figures / "probes.png", record["probes"])
    draw_consistency(figures / "consistency.png", record.pop("agreement"), depth)
    draw_emergence(figures / "emergence.png", record["hypernyms"], depth, tree)
    found, shown = write_tables(folder, title, note, record)
    write_report(folder, title, note, record, found, shown, latents, chain)
    return found, shown


def html_table(rows: list[dict], kind="") -> str:
    if not rows:
        return "<p>none</p>"
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    lines = ["".join(f"<td>{escape(cell(value))}</td>" for value in row.values()) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return (f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>")


def write_report(folder: Path, title: str, note: str, record: dict, found: list[str], shown: dict,
                 latents, chain) -> None:
    """report.html: one file that opens from disk, with every figure of `folder` inside."""
    def figure(name, alt, caption, kind):
        data = base64.b64encode((folder / "figures" / name).read_bytes()).decode()
        source = f"data:image/{name.rsplit('.')[-1]};base64,{data}"
        return (f'<figure class="{kind}"><div class="wide"><img alt="{escape(alt)}" src="{source}">'
                f"</div><figcaption>{caption}</figcaption></figure>")

    run = record["settings"] | record["made_from"] | record["versions"]
    run |= {f"seconds, {stage}": seconds for stage, seconds in record["seconds"].items()}
    parts = [
        f"<h1>{escape(title)}</h1><p>{escape(note)}</p>",
        "<h2>What was found</h2>", *(f"<p>{escape(text)}</p>" for text in found),
        "<h2>Claims</h2><p>✓ holds, ○ open, ✗ contradicted: each is judged on this run's numbers, "
        "beside permuted trees; of several seeds all must agree.</p>",
        html_table(shown["claims"], "claims"),
        "<h2>Figures</h2>",
        *(figure(f"{name}.png", alt, escape(text), f"plot {name}")
          for name, (alt, text) in FIGURES.items()),
        "<h2>A chain of latents</h2><p>From general to special, in one late layer: the top images "
        "of each latent, and where in them it looks.</p>",
    ]
    for row in chain:
        name, share = escape(display_name(row["name"])), row["share"]
        above = "" if share is None else f"; the latent above fires on {share:.0%} of these"
        text = f"<b>{name}</b>: latent {row['best_latent']} of layer {row['best_layer']}{above}"
        parts.append(figure(row["picture"], f"Top images of the latent for {name}", text, "latent"))
    parts.append(
        "<h2>Named latents</h2><p>For hypernyms of all heights, the latent of any layer that "
        "matches each best: its top validation images, and the same in grey with the places where "
        "the latent looks in colour (gradient-weighted attention rollout; bright: most).</p>")
    for row in latents:
        name, lch = (escape(display_name(row[key])) for key in ("name", "lch"))
        parts.append(figure(
            row["picture"],
            f"Top images of the latent for {display_name(row['name'])}, and where it looks in them",
            f"<b>{name}</b> ({row['classes']} classes, height {row['height']}): latent "
            f"{row['best_latent']} of layer {row['best_layer']}, match {row['match']:.2f}, LCH "
            f"{lch}; {name} emerges in layer {row['emergence_layer']}", "latent"))
    parts.append("<h2>Tables</h2>")
    for name in ("by layer", "layers", "hierarchy", "probes", "relations", "hypernyms"):
        parts.append(f"<details{' open' * (name == 'by layer')}><summary>{name.capitalize()}"
                     f"</summary>{html_table(shown[name])}</details>")
    settings = html_table([{"setting": key, "value": value} for key, value in run.items()], "run")
    parts.append(f"<details><summary>Settings and versions</summary>{settings}"
                 "<p>A stage of 0 seconds found its work done.</p></details>")
    page = ('<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width">'
            f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
            f"<body>{''.join(parts)}</body></html>\n")
    (folder / "report.html").write_text(page, encoding="utf-8", errors="backslashreplace")


STYLE = """
:root { color-scheme: light dark; --text: #111; --back: #fff; --soft: #555; --line: #ccc }
@media (prefers-color-scheme: dark) {
  :root { --text: #ddd; --back: #16181c; --soft: #aaa; --line: #444 } img { filter: brightness(.9) }
}
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 57rem; margin: 1rem auto; padding: 0 1rem }
body { color: var(--text); background: var(--back) }
h1 { font-size: 1.5rem; line-height: 1.2; overflow-wrap: anywhere }
h2 { margin-top: 2.5rem; break-after: avoid; border-bottom: 1px solid var(--line) }
figure { margin: 1.5rem 0; break-inside: avoid } figcaption { color: var(--soft) }
img { display: block; width: 100%; border-radius: 4px } .plot img { max-width: 50rem }
.consistency img { max-width: 32rem }
.wide { overflow-x: auto } .latent img, .emergence img { min-width: 45rem; max-width: none }
table { border-collapse: collapse; font-size: .85rem; margin: .5rem 0 }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: left }
td { font-variant-numeric: tabular-nums; white-space: nowrap }
.claims td:nth-child(2), .run td { white-space: normal; min-width: 12rem }
summary { font-weight: bold; cursor: pointer; padding: .3rem 0 }
@media print {
  body { max-width: none } .wide { overflow: visible } .plot img { max-width: 34rem }
  table { font-size: .6rem }
  .latent img, .emergence img { min-width: 0 } td { white-space: normal; padding: .1rem .25rem }
}
"""
