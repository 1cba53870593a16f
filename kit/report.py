"""What a run leaves for people: report.html, one file that opens from disk; the answer in print."""
import base64
import io
import textwrap
from html import escape
from pathlib import Path
from string import Template

import torch
from matplotlib import colormaps
from torch.nn.functional import interpolate
from torchvision.transforms.functional import to_pil_image

from dinov2_hooks import layer_name, relevancy_maps
from kit import demo
from kit.claims import claimed
from kit.data import Decoded
from kit.figures import COLUMNS, HISTORIES
from kit.rows import terms_of
from kit.tables import MARKS, cell
from sae import SparseAutoencoder

OPEN = 12  # latents shown open
FEW = 4  # top images of each of the others
SIDE = 112  # of a tile, in pixels
MAIN_CLAIMS = ("the hierarchy is there", "it grows with depth", "training brings it",
               "category information grows with depth")


def data_uri(kind, data):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def picture_of(image):
    """(3, H, W) in 0 to 1 -> HTML."""
    file = io.BytesIO()
    to_pil_image(image.clamp(0, 1)).save(file, "WEBP", quality=70)
    return f'<img loading="lazy" alt="" src="{data_uri("webp", file.getvalue())}">'


def overlaid(images, maps):
    """images (B, 3, H, W) in 0 to 1, maps (B, h, w) -> the images, warm where the map is large."""
    heat = interpolate(maps[:, None], images.shape[2:], mode="bilinear")
    heat = heat / heat.amax((2, 3), keepdim=True).clamp(min=1e-30)
    colour = torch.from_numpy(colormaps["inferno"](heat[:, 0].numpy())[..., :3])
    return torch.lerp(images, colour.permute(0, 3, 1, 2).float(), 0.6 * heat)


class Latents:
    """The latents of hypernyms in words and pictures: top images, and where in them they look."""

    def __init__(self, inputs, k, sae_folder, ids):
        self.inputs = inputs
        self.k = k
        self.sae_folder = sae_folder
        self.images = torch.utils.data.Subset(Decoded(inputs.val, inputs.transform), ids)
        self.labels = inputs.val.labels[ids]
        self.names = terms_of([inputs.tree.names[v] for v in inputs.tree.classes])
        self.why_no_maps = ""

    def under(self, row):
        """(C,) bool, the classes of a row of hypernyms.csv."""
        return self.inputs.tree.leaves[self.inputs.tree.wnids.index(row["wnid"])]

    def count(self, row):
        """How many of a latent's top images are under the hypernym."""
        return int(self.under(row)[self.labels[row["top_images"][: self.k]]].sum())

    def section(self, rows, is_open):
        """HTML of a latent, of the rows of hypernyms.csv that it matches, the best one first."""
        row = rows[0]
        under = self.under(row)
        top = row["top_images"][: self.k]
        inside, outside = [], []
        for c in row["responds_to"]:
            (inside if under[c] else outside).append(self.names[c])
        anchors = "".join(f'<a id="{other["wnid"]}"></a>' for other in rows)
        also = ", ".join(f"{other['term']} ({other['match']:.2f})" for other in rows[1:])
        text = [
            demo.TRAITS.get(row["wnid"], ""),
            f"Latent {row['best_latent']} of layer {row['layer']}, match {row['match']:.2f}; first "
            f"matched in layer {row['emergence_layer']}.", also and f"Also matches: {also}.",
            f"Responds to: {', '.join(inside[:12]) or 'none'}. Outside {row['term']}: "
            f"{', '.join(outside[:12]) or 'none'}."]
        return (f"<section>{anchors}<h3>{escape(row['term'])}: {self.count(row)} of {len(top)} top "
                f"images</h3><p>{escape(' '.join(filter(None, text)))}</p><div class='tiles'>"
                f"{self.tiles(row, under, top if is_open else top[:FEW], is_open)}</div></section>")

    def tiles(self, row, under, top, is_open):
        """The top images that are counted, in their order; those shown open with their maps."""
        images = torch.stack([self.images[i][0] for i in top])
        normalise = self.inputs.transform.transforms[-1]
        mean, std = (torch.tensor(x)[:, None, None] for x in (normalise.mean, normalise.std))
        shown = interpolate(images * std + mean, (SIDE, SIDE), mode="bilinear", antialias=True)
        looks = shown
        if is_open and not self.why_no_maps:
            try:
                looks = overlaid(shown, self.maps(images, row))
            except Exception as error:  # the backbone's own code: results are worth more
                self.why_no_maps = f"No maps: {type(error).__name__}: {error}"
        html = ""
        for label, image, look in zip(self.labels[top], shown, looks):
            kind, mark = ("", "") if under[label] else (" outside", "✗ ")
            pictures = picture_of(image) + (picture_of(look) if look is not image else "")
            html += (f'<figure class="tile{kind}">{pictures}<figcaption>{mark}'
                     f"{escape(self.names[label])}</figcaption></figure>")
        return html

    def maps(self, images, row):
        model = self.inputs.model
        device = model.cls_token.device
        folder = self.sae_folder / layer_name(row["layer"])
        sae = SparseAutoencoder.from_pretrained(folder).to(device)
        parts = []
        for part in images.to(device).split(2):  # ViT-g's graph of two images takes 2 GB
            parts.append(relevancy_maps(model, part, row["layer"],
                                        lambda x: sae.encode(x)[:, row["best_latent"]]))
        return torch.cat(parts).cpu()


def picture(rows, layers):
    """HTML: hypernyms in the tree's order by layers, darker the better a latent matches them,
    framed if matched. A click on a name leads to its latent."""
    by_name = {}
    for row in rows:
        if row["shown"]:
            by_name.setdefault(row["wnid"], []).append(row)
    html = "<tr><th>" + "".join(f"<th>{layer}" for layer in layers)
    for wnid, of_layers in by_name.items():
        row = of_layers[0]
        name = escape(row["term"])
        if row["emergence_layer"] is not None:
            name = f'<a href="#{wnid}">{name}</a>'
        html += f'<tr><td style="padding-left:{row["indent"]}em">{name}'
        for each in of_layers:
            level = "" if each["match"] is None else round(9 * each["match"])
            html += f'<td class="c{level}{" m" if each["matched"] else ""}">'
        html += "\n"
    return f'<div class="wide"><table class="picture">{html}</table></div>'


def latents_of(rows, latents):
    """Rows of hypernyms.csv by latent: [[rows that it matches, the best first]]. Each hypernym is
    shown in the layer that matches it best; latents of most counted images come first."""
    best = {}
    for row in rows:
        if row["matched"] and row["match"] > best.get(row["wnid"], {"match": 0})["match"]:
            best[row["wnid"]] = row
    by_latent = {}
    for row in sorted(best.values(), key=lambda row: -row["match"]):
        by_latent.setdefault((row["layer"], row["best_latent"]), []).append(row)
    return sorted(by_latent.values(),
                  key=lambda rows: (-latents.count(rows[0]), -rows[0]["classes"]))


def plots(pictures, names):
    """HTML of some figures, by name; those that failed are not there."""
    html = ""
    for name in names:
        if name in pictures:
            uri = data_uri("png", pictures[name].read_bytes())
            html += f'<figure class="plot"><img alt="Figure: {name}" src="{uri}"></figure>'
    return f'<div class="plots">{html}</div>'


def html_table(rows):
    lines = ["<th>".join(["", *map(escape, rows[0])])]
    for row in rows:
        lines.append("<td>".join(["", *(escape(cell(value)) for value in row.values())]))
    return f'<div class="wide"><table><tr>{"<tr>".join(lines)}</table></div>'


def sentence_of_claim(row):
    value = cell(row["value"])
    if row["permuted"] is not None:
        value += f", permuted {cell(row['permuted'])}"
    if row["low"] is not None:
        value += f", {cell(row['low'])} to {cell(row['high'])}"
    return f"{MARKS.get(row['verdict'], '–')} {row['claim']}: {row['verdict']} ({value})"


def write_page(folder, title, inputs, record, sae_folder, ids, sentences, pictures):
    """report.html; the SAEs are the first seed's. sentences: of `write_tables`; pictures: {name:
    path} of the figures."""
    whose = record["settings"]["backbone"]
    latents = Latents(inputs, record["settings"]["top_k"], sae_folder, ids)
    sections = []
    for i, rows in enumerate(latents_of(record["hypernyms"], latents)):
        sections.append(latents.section(rows, i < OPEN))
    main = [row for row in record["claims"] if row["claim"] in MAIN_CLAIMS]
    others = [row for row in record["claims"] if row["claim"] not in MAIN_CLAIMS]
    columns = "claim", "verdict", "value", "permuted", "low", "high", "p_value"
    compared = {path.stem: path for path in (folder.parent.parent / "compare").glob("*.png")}
    parts = {
        "title": escape(title), "note": inputs.note,
        "whose": "this demo's small ViT" if whose == "demo" else escape(whose),
        "answer": "".join(f"<p>{escape(text)}</p>" for text in sentences),
        "picture": picture(record["hypernyms"], inputs.layers),
        "latents": "".join(sections[:OPEN]), "folded": "".join(sections[OPEN:]),
        "why_no_maps": escape(latents.why_no_maps),
        "main": plots(pictures, ["hierarchy"]),
        "good": plots(pictures, [*HISTORIES, *COLUMNS]) + plots(compared, sorted(compared)),
        "claims": "".join(f"<p>{escape(sentence_of_claim(row))}</p>" for row in main),
        "other_claims": html_table([{key: row[key] for key in columns} for row in others]),
        "others": plots(pictures, sorted(column for column, _ in claimed())),
        "probes": plots(pictures, ["by_units", "by_layer"]),
        "agreement": plots(pictures, ["agreement"]),
        "settings": escape(", ".join(f"{key} {value}" for key, value in record["settings"].items()
                                     if value is not None))}
    page = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    (folder / "report.html").write_text(page.substitute(parts), "utf-8", "backslashreplace")


def printed(sentences, claims):
    """The answer for a terminal of 80 columns."""
    lines = [textwrap.fill(text, 79) + "\n" for text in sentences]
    lines.append("✓ holds  ○ open  ✗ contradicted  – not tested")
    return "\n".join(["", *lines, *map(sentence_of_claim, claims)])
