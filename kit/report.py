"""What a run leaves for people: report.html, one file that opens from disk, and its pictures."""
import base64
import io
import itertools
import textwrap
from html import escape

import matplotlib
import numpy as np
import torch
from torch.nn.functional import interpolate
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from dinov2_hooks import BackboneError, relevancy_maps
from kit import demo
from kit.data import Decoded
from kit.figures import draw_consistency, draw_hierarchy, draw_layers, draw_probes, layer_colour
from kit.tables import MARKS, cell, findings, write_tables
from sae import SparseAutoencoder

OPEN = 12  # latents shown open
TILES = 16  # of each of these
FEW = 4  # of each of the others
LARGE = 112
SMALL = 72  # pixels a tile's side
PAPER = "https://arxiv.org/abs/2505.15970"
FIGURES = {  # name: (alt text, caption), in the order in which to read them
    "hierarchy": (
        "Plot by layer of the LCH height between classes: SAE, baselines, permuted trees.",
        "If the hierarchy is there, the blue line lies below the grey band: the same latents, with "
        "the classes randomly reassigned to the leaves of the tree. Raw neurons and the untrained "
        "SAE fire as often as the SAE's latents; what training adds is the way from them to the "
        "blue line."),
    "probes": (
        "Plots of the IoU of hypernym probes, by the number of units and by layer.",
        "How well few units tell the images under a hypernym, beside the whole token. Dashed: the "
        "same under a permuted tree, which is what class information alone gives."),
    "layers": (
        "Plots by layer: linear probe accuracy, reconstruction error, active latents.",
        "How much class information the token holds, and how easy it is to auto-encode. NMSE "
        "counts the token's constant part, FVU does not: where NMSE is far below FVU, the token "
        "hardly changes from image to image."),
    "consistency": (
        "Heat map of the kappa of the hypernyms matched in every two layers.",
        "Agreement beyond what sets of these sizes have by chance. Grey: a layer matches none."),
}
GLOSSARY = {
    "class token": "the vector in which a ViT summarises an image; here after each block (layer)",
    "SAE, latent": "a sparse autoencoder writes each token as a sum of few directions, its latents",
    "hypernym": "a more general term above a class in WordNet: dog, carnivore, animal",
    "LCH": "lowest common hypernym: the most specific node above several classes",
    "LCH height": "edges from the LCH of a latent's top images down to the classes; between "
                  "classes: over pairs of images of two classes",
    "matched": "a latent responds to the hypernym's classes and few others (Jaccard above 0.5), "
               "chosen on one half of the images and confirmed on the other",
    "permuted trees": "the control: the same tree, its classes randomly reassigned to its leaves",
    "FVU": "fraction of variance unexplained by the SAE; above 1 is worse than the mean",
}


def display_name(tree, wnid):
    """dog.n.01 -> dog; with its number where two nodes share the name."""
    name, _, number = tree.names[tree.wnids.index(wnid)].rsplit(".", 2)
    twins = sum(other.rsplit(".", 2)[0] == name for other in tree.names)
    return name.replace("_", " ") + (f" ({int(number)})" if twins > 1 else "")


def picture(image):
    """(3, H, W) in 0 to 1 -> a data URI."""
    data = io.BytesIO()
    to_pil_image(image.clamp(0, 1)).save(data, "WEBP", quality=70)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"


def overlay(images, maps):
    """images (B, 3, H, W) in grey, under their maps (B, h, w) in colour where these are high."""
    heat = interpolate(maps[:, None], images.shape[2:], mode="bicubic").clamp(min=0)
    heat = (heat / heat.amax((1, 2, 3), keepdim=True).clamp(min=1e-30)) ** 0.7  # they are peaked
    colour = matplotlib.colormaps["inferno"](heat[:, 0].numpy())[..., :3]  # (B, H, W, 3)
    colour = torch.from_numpy(colour).float().permute(0, 3, 1, 2)
    grey = images.mean(1, keepdim=True)
    return grey + (1.6 * heat).clamp(max=0.8) * (colour - grey)


class Pictures:
    """Tiles of the validation images, and where in them a latent looks."""

    def __init__(self, inputs, sae_folders, ids):
        self.inputs = inputs
        self.folders = sae_folders
        self.ids = ids
        self.images = Decoded(inputs.val, inputs.transform)
        self.labels = inputs.val.labels[ids]
        self.why_no_maps = ""
        normalise = inputs.transform.transforms[-1]
        self.mean, self.std = (torch.tensor(x)[:, None, None]
                               for x in (normalise.mean, normalise.std))

    def tiles(self, node, best, layer, count):
        """HTML of the top images of a latent, at most two of a class."""
        tree = self.inputs.tree
        used = {}
        rows = []
        for row in best["top_images"]:
            label = int(self.labels[row])
            used[label] = used.get(label, 0) + 1
            if used[label] <= 2 and len(rows) < count:
                rows.append(row)
        images = torch.stack([self.images[self.ids[row]] for row in rows])
        side = LARGE if count == TILES else SMALL
        shown = interpolate(images * self.std + self.mean, (side, side), mode="bilinear",
                            antialias=True)
        if count == TILES and not self.why_no_maps:
            try:
                maps = self.maps(images, layer, best["latent"])
                shown = torch.cat([shown, overlay(shown, maps)], dim=2)
            except BackboneError as error:
                self.why_no_maps = str(error)
        parts = []
        for row, image in zip(rows, shown):
            label = self.labels[row]
            name = display_name(tree, tree.wnids[tree.classes[label]])
            inside = bool(tree.leaves[node, label])
            parts.append(f'<figure class="tile{"" if inside else " outside"}"><img loading="lazy" '
                         f'alt="{escape(name)}" src="{picture(image)}"><figcaption>'
                         f'{"" if inside else "✗ "}{escape(name)}</figcaption></figure>')
        return f'<div class="tiles">{"".join(parts)}</div>'

    def maps(self, images, layer, latent):
        sae = SparseAutoencoder.from_pretrained(self.folders[layer])
        parts = []
        device = self.inputs.model.cls_token.device
        sae.to(device)
        for part in images.split(2):  # ViT-g's graph of two images takes 2 GB
            parts.append(relevancy_maps(self.inputs.model, part.to(device), layer,
                                        lambda x: sae.encode(x)[:, latent]).cpu())
        return torch.cat(parts)


def latent_section(row, scores, pictures, count, names):
    """A hypernym that is matched: its best latent, in words and tiles."""
    tree = pictures.inputs.tree
    layer = row["best_layer"]
    node = tree.wnids.index(row["wnid"])
    best = scores[layer]["hypernyms"][row["wnid"]]
    top = pictures.labels[best["top_images"][: best["k"]]]
    shown = int(tree.leaves[node, top].sum())
    name = names[row["wnid"]]
    classes = {True: [], False: []}
    for c in best["responds"]:
        classes[bool(tree.leaves[node, c])].append(
            display_name(tree, tree.wnids[tree.classes[c]]))
    inside, outside = (", ".join(classes[key][:12]) or "none" for key in (True, False))
    trait = demo.TRAITS.get(row["wnid"], "")
    return (f'<section id="{row["wnid"]}"><h3>{escape(name)}: {shown} of {len(top)} top images</h3>'
            f'<p>{escape(trait)} {row["classes"]} classes, height {row["height"]}. Latent '
            f'{row["best_latent"]} of layer {layer}, match {row["match"]:.2f}; first matched in '
            f'layer {row["emergence_layer"]}.<br>Responds to: {escape(inside)}. '
            f'Outside {escape(name)}: {escape(outside)}.</p>'
            f"{pictures.tiles(node, best, layer, count)}</section>")


def choose_open(rows):
    """Rows to show open: of all heights in turn, the best match of a height first, each latent
    once."""
    by_height = {}
    latents = {}
    for row in sorted(rows, key=lambda row: (-row["height"], -row["match"])):
        by_height.setdefault(row["height"], []).append(row)
    for turn in itertools.zip_longest(*by_height.values()):
        for row in filter(None, turn):
            latents.setdefault((row["best_layer"], row["best_latent"]), row)
    return list(latents.values())[:OPEN]


def nested_boxes(nodes, leaves):
    """node -> (level, top, bottom) of its box, as tall as it has classes, inside its hypernym's.

    nodes come with the largest first; leaves is (V, C). Of several hypernyms the largest counts; a
    class is drawn once.
    """
    children = {}
    level = {}
    boxes = {}
    placed = np.zeros(leaves.shape[1], bool)
    for i, v in enumerate(nodes):
        above = [u for u in nodes[:i] if not (leaves[v] & ~leaves[u]).any()]
        parent = min(above, key=lambda u: (leaves[u].sum(), -level[u]), default=None)
        level[v] = 0 if parent is None else level[parent] + 1
        children.setdefault(parent, []).append(v)

    def lay_out(v, top):
        bottom = top
        for child in children.get(v, []):
            bottom = lay_out(child, bottom)
        bottom += int((leaves[v] & ~placed).sum())
        placed[leaves[v]] = True
        boxes[v] = (level[v], top, bottom)
        return bottom

    end = 0
    for v in children.get(None, []):
        end = lay_out(v, end)
    return boxes


def emergence_map(rows, tree, layers, names):
    """SVG: the taxonomy from large hypernyms to small ones, coloured by the layer of emergence. A
    click leads to the hypernym's latent."""
    by_node = {tree.wnids.index(row["wnid"]): row for row in rows}
    nodes = sorted(by_node, key=lambda v: (-tree.leaves[v].sum(), -tree.height[v], v))
    boxes = nested_boxes(nodes, tree.leaves)
    scale = 14 / max(2, len(tree.classes) // 200)  # pixels a class: room for a line of text
    width = 120
    parts = []
    bottom = max((box[2] for box in boxes.values()), default=1)
    for v, (level, top, end) in boxes.items():
        if (end - top) * scale < 13:  # no room for a name
            continue
        row = by_node[v]
        name = names[tree.wnids[v]]
        fill = layer_colour(row["emergence_layer"], layers)
        short = name if len(name) < 20 else name[:18] + "…"
        layer = "in no layer" if row["emergence_layer"] is None else (
            f"first in layer {row['emergence_layer']}")
        x = level * width
        y = top * scale + 40
        high = (end - top) * scale
        box = (f'<g><title>{escape(name)}: matched {layer}</title><rect x="{x}" y="{y:.1f}" '
               f'width="{width}" height="{high:.1f}" fill="{fill}"/>'
               f'<text x="{x + 4}" y="{y + high / 2 + 4:.1f}">{escape(short)}</text></g>')
        matched = row["emergence_layer"] is not None
        parts.append(f'<a href="#{row["wnid"]}">{box}</a>' if matched else box)
    for i, layer in enumerate([*layers, None]):
        parts.append(f'<rect x="{i * 46}" y="0" width="46" height="18" '
                     f'fill="{layer_colour(layer, layers)}"/><text x="{i * 46 + 4}" y="13">'
                     f'{"none" if layer is None else layer}</text>')
    levels = 1 + max((box[0] for box in boxes.values()), default=0)
    size = max(levels * width, 46 * (len(layers) + 1)), bottom * scale + 44
    return (f'<div class="wide"><svg width="{size[0]:.0f}" height="{size[1]:.0f}" role="img" '
            f'aria-label="Map of the hypernyms by the layer in which they are first matched">'
            f'{"".join(parts)}</svg></div>')


def html_table(rows):
    if not rows:
        return "<p>none</p>"
    lines = []
    for row in rows:
        lines.append("".join(f"<td>{escape(cell(value))}</td>" for value in row.values()))
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return (f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
            "</div>")


def latent_parts(record, scores, pictures, names):
    """The named latents: some open, the others folded."""
    matched = [row for row in record["hypernyms"] if row["emergence_layer"] is not None]
    chosen = choose_open(matched)
    parts = []
    for row in tqdm(chosen, "      latents", unit="latent"):
        parts.append(latent_section(row, scores, pictures, TILES, names))
    folded = []
    for row in matched:
        if row not in chosen:
            folded.append(latent_section(row, scores, pictures, FEW, names))
    if folded:
        parts.append(f"<details><summary>{len(folded)} more hypernyms that are matched</summary>"
                     f'{"".join(folded)}</details>')
    return "".join(parts) or "<p>No hypernym is matched.</p>"


def write(folder, title, inputs, record, scores, sae_folders, ids):
    """Tables, figures and report.html in `folder`; scores and SAEs are the first seed's, by layer.
    Returns what to print."""
    figures = folder / "figures"
    layers = inputs.layers
    figures.mkdir(parents=True)
    draw_hierarchy(figures / "hierarchy", record, layers)
    draw_probes(figures / "probes", record["probes"], layers)
    draw_layers(figures / "layers", record, layers)
    draw_consistency(figures / "consistency", record["consistency"], layers)
    shown = write_tables(folder, title, inputs.note, record)
    sentences = findings(record)
    names = {row["wnid"]: display_name(inputs.tree, row["wnid"]) for row in record["hypernyms"]}
    pictures = Pictures(inputs, sae_folders, ids)
    backbone = record["settings"]["backbone"]
    is_demo = backbone == "demo"
    passed = record["claims"][0]["verdict"] == "holds"
    matched = sum(row["emergence_layer"] is not None for row in record["hypernyms"])
    check = (f"Check {'passed' if passed else 'FAILED'}: the planted hierarchy "
             f"{'was' if passed else 'was not'} found, {matched} of {len(names)} planted hypernyms "
             "in some layer.") if is_demo else ""
    latents = latent_parts(record, scores, pictures, names)
    run = {**record["settings"], **record["made_of"], **record["versions"],
           **{f"seconds, {stage}": value for stage, value in record["seconds"].items()}}
    glossary = "".join(f"<dt>{term}</dt><dd>{text}</dd>" for term, text in GLOSSARY.items())
    parts = {
        "Answer": "".join(f"<p>{escape(text)}</p>" for text in filter(None, [check, *sentences])),
        "Claims": "<p>✓ holds, ○ open, ✗ contradicted, – not tested: judged beside permuted trees; "
                  f"of several seeds all must agree.</p>{html_table(shown.pop('claims'))}",
        "Figures": "".join(map(figure_html, itertools.repeat(figures), FIGURES)),
        "Map": "<p>Where each hypernym emerges: a box is as tall as it has classes, and lies to "
               "the right of its hypernym; of several hypernyms, of the closest. The colour is the "
               "first layer in which a latent matches it. A click shows that latent.</p>"
               + emergence_map(record["hypernyms"], inputs.tree, layers, names),
        "Latents": "<p>The latent that matches a hypernym best, in any layer: its top validation "
                   "images, at most two of a class, and below each where the latent looks "
                   "(gradient-weighted attention rollout). ✗: outside the hypernym."
                   f" {escape(pictures.why_no_maps)}</p>{latents}",
        "Tables": "".join(map(folded, shown, shown.values())),
        "Settings": html_table([{"setting": key, "value": value} for key, value in run.items()]),
    }
    contents = " · ".join(f'<a href="#{name}">{name}</a>' for name in parts)
    body = "".join(f'<h2 id="{name}">{name}</h2>{html}' for name, html in parts.items())
    whose = "this demo's small ViT" if is_demo else backbone
    page = (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width"><title>{escape(title)}</title><style>{STYLE}</style>'
            f"</head><body><h1>Does {escape(whose)}’s class token hold the ImageNet hierarchy?</h1>"
            f'<p>{escape(title)}: {escape(inputs.note)} After '
            f'<a href="{PAPER}">arXiv 2505.15970</a>'
            f"; not the paper's numbers.</p><p>{contents}</p><details><summary>Glossary</summary>"
            f"<dl>{glossary}</dl></details>{body}</body></html>\n")
    (folder / "report.html").write_text(page, encoding="utf-8", errors="backslashreplace")
    return printed([check, *sentences], record["claims"])


def folded(name, rows):
    return (f"<details{' open' * (name == 'by layer')}><summary>{name.capitalize()}</summary>"
            f"{html_table(rows)}</details>")


def figure_html(folder, name):
    data = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
    alt, caption = FIGURES[name]
    return (f'<figure class="plot {name}"><img alt="{escape(alt)}" '
            f'src="data:image/png;base64,{data}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>")


def printed(sentences, claims):
    """The answer for a terminal of 80 columns."""
    lines = [textwrap.fill(text, 79) + "\n" for text in filter(None, sentences)]
    lines.append("✓ holds  ○ open  ✗ contradicted  – not tested")
    for row in claims:
        text = f"{MARKS.get(row['verdict'], '–')} {row['claim']}: {cell(row['value'])}"
        if row["permuted"] is not None:
            text += f" (permuted {cell(row['permuted'])})"
        if row["verdict"] not in MARKS:
            text += f", {row['verdict']}"
        lines.append(textwrap.fill(text, 79, subsequent_indent="  "))
    return "\n" + "\n".join(lines)


STYLE = """
:root { color-scheme: light dark; --text: #111; --back: #fff; --soft: #555; --line: #ccc }
@media (prefers-color-scheme: dark) {
  :root { --text: #ddd; --back: #16181c; --soft: #aaa; --line: #444 } img { filter: brightness(.9) }
}
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 1rem auto; padding: 0 1rem }
body { color: var(--text); background: var(--back) } a { color: inherit }
h1 { font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere } h3 { margin-bottom: .2rem }
h2 { margin-top: 2.5rem; break-after: avoid; border-bottom: 1px solid var(--line) }
figure { margin: 1.5rem 0; break-inside: avoid } figcaption { color: var(--soft) }
.plot img { display: block; width: 100%; max-width: 50rem; border-radius: 4px }
.consistency img { max-width: 30rem } section { break-inside: avoid } p { overflow-wrap: anywhere }
.tiles { display: flex; flex-wrap: wrap; gap: .4rem } .tile { margin: 0; width: 7rem }
.tile img { width: 100%; border-radius: 3px }
.tile figcaption { font-size: .7rem; line-height: 1.1 }
details .tile { width: 4.5rem } .outside figcaption { color: #c33 }
.wide { overflow-x: auto } svg text { font-size: 11px; fill: #111 }
svg rect { stroke: #888; stroke-width: .6 } svg a:hover rect { stroke: #000; stroke-width: 2 }
:target h3 { text-decoration: underline }
table { border-collapse: collapse; font-size: .8rem; margin: .5rem 0 }
th, td { padding: .2rem .5rem; border-bottom: 1px solid var(--line); text-align: left }
td { font-variant-numeric: tabular-nums; max-width: 22rem; overflow-wrap: break-word }
th { vertical-align: bottom; min-width: 3rem } dt { font-weight: bold }
summary { font-weight: bold; cursor: pointer; padding: .3rem 0 }
@media print {
  details::details-content { content-visibility: visible; block-size: auto }
  body { max-width: none } .wide { overflow: visible } .plot img { max-width: 34rem }
  table { font-size: .5rem } th, td { padding: .05rem .15rem; min-width: 0 } svg { max-width: 100% }
}
"""
