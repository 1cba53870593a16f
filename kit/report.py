"""What a run leaves for people: report.html, one file that opens from disk; the answer in print."""
import base64
import io
import textwrap
from html import escape
from pathlib import Path
from string import Template

import torch
from torch.nn.functional import interpolate
from torchvision.transforms.functional import to_pil_image

from dinov2_hooks import layer_name, relevancy_maps
from kit import demo
from kit.data import Decoded
from kit.figures import FIGURES
from kit.tables import MARKS, cell
from sae import SparseAutoencoder

OPEN = 12  # latents shown open
TILES = 16  # of each of these
FEW = 4  # of each of the others
SIDE = 112  # of a tile, in pixels


def display_name(synset):
    """dog.n.01 -> dog; of a further sense with its number, as crane (4)."""
    name, _, number = synset.rsplit(".", 2)
    return escape(name.replace("_", " ") + (f" ({int(number)})" if number != "01" else ""))


def data_uri(kind, data):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def picture(image):
    """(3, H, W) in 0 to 1 -> HTML."""
    file = io.BytesIO()
    to_pil_image(image.clamp(0, 1)).save(file, "WEBP", quality=70)
    return f'<img loading="lazy" alt="" src="{data_uri("webp", file.getvalue())}">'


class Latents:
    """The latents of hypernyms in words and pictures: top images, and where in them they look."""

    def __init__(self, inputs, k, sae_folder, ids):
        self.inputs = inputs
        self.k = k
        self.sae_folder = sae_folder
        self.images = torch.utils.data.Subset(Decoded(inputs.val, inputs.transform), ids)
        self.labels = inputs.val.labels[ids]
        self.names = [display_name(inputs.tree.names[v]) for v in inputs.tree.classes]
        self.why_no_maps = ""

    def section(self, row, count):
        """HTML of a row of hypernyms.csv: its best latent in any layer."""
        name = display_name(row["name"])
        under = self.inputs.tree.leaves[self.inputs.tree.wnids.index(row["wnid"])]  # (C,) bool
        top = self.labels[row["top_images"][: self.k]]
        inside = []
        outside = []
        for c in row["responds_to"]:
            (inside if under[c] else outside).append(self.names[c])
        return (
            f'<section id="{row["wnid"]}"><h3>{name}: {under[top].sum()} of {len(top)} top images'
            f'</h3><p>{demo.TRAITS.get(row["wnid"], "")} {row["classes"]} classes, height '
            f'{row["height"]}. Latent {row["best_latent"]} of layer {row["best_layer"]}, match '
            f'{row["match"]:.2f}; first matched in layer {row["emergence_layer"]}.<br>Responds to: '
            f'{", ".join(inside[:12]) or "none"}. Outside {name}: '
            f'{", ".join(outside[:12]) or "none"}.</p><div class="tiles">'
            f"{self.tiles(row, under, count)}</div></section>")

    def tiles(self, row, under, count):
        """Top images, at most two of a class; with their maps where there are many."""
        chosen = []
        labels = []
        for i in row["top_images"]:
            if labels.count(self.labels[i]) < 2 and len(chosen) < count:
                chosen.append(self.images[i][0])
                labels.append(self.labels[i])
        images = torch.stack(chosen)
        normalise = self.inputs.transform.transforms[-1]
        mean, std = (torch.tensor(x)[:, None, None] for x in (normalise.mean, normalise.std))
        shown = interpolate(images * std + mean, (SIDE, SIDE), mode="bilinear", antialias=True)
        if count == TILES and not self.why_no_maps:
            try:
                heat = interpolate(self.maps(images, row)[:, None], (SIDE, SIDE), mode="bilinear")
                heat = heat / heat.amax((2, 3), keepdim=True).clamp(min=1e-30)
                shown = torch.cat([shown, shown * (0.15 + 0.85 * heat**0.7)], dim=2)
            except Exception as error:  # the backbone's own code: results are worth more
                self.why_no_maps = f"No maps: {type(error).__name__}: {error}"
        html = ""
        for label, image in zip(labels, shown):
            kind, mark = ("", "") if under[label] else (" outside", "✗ ")
            html += (f'<figure class="tile{kind}">{picture(image)}<figcaption>{mark}'
                     f"{self.names[label]}</figcaption></figure>")
        return html

    def maps(self, images, row):
        model = self.inputs.model
        device = model.cls_token.device
        folder = self.sae_folder / layer_name(row["best_layer"])
        sae = SparseAutoencoder.from_pretrained(folder).to(device)
        parts = []
        for part in images.to(device).split(2):  # ViT-g's graph of two images takes 2 GB
            parts.append(relevancy_maps(model, part, row["best_layer"],
                                        lambda x: sae.encode(x)[:, row["best_latent"]]))
        return torch.cat(parts).cpu()


def emergence_map(rows, layers):
    """HTML: hypernyms in the colour of the layer in which each emerges; a click leads to its
    latent."""
    html = ""
    for row in rows:
        layer = row["emergence_layer"]
        hue = 240 - 190 * layers.index(layer) / len(layers)
        html += (f'<a style="background:hsl({hue:.0f} 60% 75%)" href="#{row["wnid"]}">'
                 f"{display_name(row['name'])}: {layer}</a>\n")
    return html


def html_table(rows):
    lines = ["<th>".join(["", *map(escape, rows[0])])]
    for row in rows:
        lines.append("<td>".join(["", *(escape(cell(value)) for value in row.values())]))
    return f'<div class="wide"><table><tr>{"<tr>".join(lines)}</table></div>'


def write_page(folder, title, inputs, record, sae_folder, ids, shown, sentences, pictures):
    """report.html; the SAEs are the first seed's. shown, sentences: of `write_tables`; pictures:
    {name: path} of the figures."""
    matched = [row for row in record["hypernyms"] if row["emergence_layer"] is not None]
    whose = record["settings"]["backbone"]
    latents = Latents(inputs, record["settings"]["top_k"], sae_folder, ids)
    # the best matched are shown open, each latent once
    best = {}
    for row in sorted(matched, key=lambda row: -row["match"]):
        best.setdefault((row["best_layer"], row["best_latent"]), row)
    opened = list(best.values())[:OPEN]
    others = [row for row in matched if row not in opened]
    parts = {
        "title": escape(title), "note": inputs.note,
        "whose": "this demo's small ViT" if whose == "demo" else escape(whose),
        "answer": "".join(f"<p>{escape(text)}</p>" for text in sentences),
        "map": emergence_map(matched, inputs.layers),
        "latents": "".join(latents.section(row, TILES) for row in opened),
        "folded": "".join(latents.section(row, FEW) for row in others),
        "why_no_maps": escape(latents.why_no_maps),
        "no_training": "" if record["training"] else " hidden"}
    for name, table in shown.items():
        parts[name] = html_table(table)
    for action in FIGURES:
        name = action.__name__.removeprefix("draw_")
        drawn = name in pictures
        parts[f"{name}_figure"] = data_uri("png", pictures[name].read_bytes()) if drawn else ""
    page = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    (folder / "report.html").write_text(page.substitute(parts), "utf-8", "backslashreplace")


def printed(sentences, claims):
    """The answer for a terminal of 80 columns."""
    lines = [textwrap.fill(text, 79) + "\n" for text in sentences]
    lines.append("✓ holds  ○ open  ✗ contradicted  – not tested")
    for row in claims:
        beside = "" if row["permuted"] is None else f" (permuted {cell(row['permuted'])})"
        mark = MARKS.get(row["verdict"], "–")
        lines.append(f"{mark} {row['claim']}: {cell(row['value'])}{beside}, {row['verdict']}")
    return "\n".join(["", *lines])
