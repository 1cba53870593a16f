"""Your own images: what the latents of a run call them.

    python -m kit.look RUN IMAGE [IMAGE ...]        RUN: the output folder of a run

With the run's own model, transform and SAE (first seed, last layer): for each image the latents of
the largest values, with the general term that names each and how well it does (match, from 0 to 1).
"""
import csv
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from dinov2_hooks import BackboneError, class_tokens, layer_name
from kit.data import read_image
from kit.files import InputError, finished_results
from kit.inputs import find_model
from kit.made_of import read_json
from sae import SAEError, SparseAutoencoder

SHOWN = 5  # latents of an image


def names_in(path, layer):
    """latent -> what names it, and how well, of latents.csv."""
    names = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if int(row["layer"]) == layer:
                term = row["hypernym"] or f"no general term; classes: {row['classes'] or 'none'}"
                names[int(row["latent"])] = f"{term} (match {float(row['match'] or 0):.2f})"
    return names


def main(run, *images):
    out = Path(run).expanduser()
    paths = finished_results(out)
    if not paths or not images:
        raise InputError(f"{run} holds no results, or no image is given: python -m kit.look RUN "
                         "IMAGE, RUN being the output folder of a run")
    # the newest results say with what they were made
    results = read_json(paths[-1])
    settings = SimpleNamespace(**results["settings"])
    model, transform = find_model(settings, out)
    layer = results["layers"][-1]["layer"]
    sae = SparseAutoencoder.from_pretrained(Path(out, results["saes"], layer_name(layer)))
    names = names_in(paths[-1].with_name("latents.csv"), layer)
    # an image at a time: they may be of any number
    for name in images:
        try:
            image = transform(read_image(name))
        except Exception as error:  # Pillow raises anything
            raise InputError(f"{name} is not a readable image ({error})") from error
        with torch.inference_mode():
            z = sae.encode(class_tokens(model, image[None], [layer])[0])[0]  # (m,)
        print(f"{name}: layer {layer}, {int((z > 0).sum())} latents are active")
        for value, latent in zip(*(tensor.tolist() for tensor in z.topk(SHOWN))):
            if value > 0:
                print(f"   {value:8.3f}  latent {latent}: {names.get(latent, 'not alive')}")


if __name__ == "__main__":
    try:
        main(*(sys.argv[1:] or ["nothing"]))
    except (InputError, BackboneError, SAEError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
