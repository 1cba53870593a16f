"""Are the relevancy maps right? Two checks on a finished run, by its own settings.

    python tests/relevancy.py runs/demo                pointing game: is the most relevant patch on
                                                       the object that was drawn?
    python tests/relevancy.py runs/tiny-imagenet-...   deletion: does hiding relevant patches
                                                       silence the latent?

The latents are the best match of every hypernym matched in the run, in its best layer. Intervals
are 95% bootstrap intervals over latents.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dinov2_hooks import (class_tokens, eval_transform, load_backbone, relevancy_maps,
                          transform_of)
from kit import demo
from kit.images import find_images, read_image
from sae import SparseAutoencoder
from taxonomy import Taxonomy


def interval(values, rng=np.random.default_rng(0)):
    values = np.asarray(values)
    means = [rng.choice(values, len(values)).mean() for _ in range(2000)]
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def pointing(model, latents, images_per_latent=32):
    """Share of images whose most relevant patch lies on the object, and the object's share."""
    traits = demo.class_traits(Taxonomy.from_wnids(demo.CLASSES))
    normalise = eval_transform(demo.SIZE, demo.SIZE).transforms[-1]
    generator = torch.Generator().manual_seed(99)  # images that neither ViT nor SAE has seen
    hits, chances = [], []
    for layer, score, _ in latents:
        drawn = torch.randint(len(traits), (400,), generator=generator)
        images, inside = demo.draw(traits[drawn], generator)
        images = normalise(images.float() / 255)
        tokens = class_tokens(model, images, [layer])[0]
        fires = (score(tokens) > 0).nonzero()[:images_per_latent, 0]
        maps = relevancy_maps(model, images[fires], layer, score)
        covered = torch.nn.functional.avg_pool2d(inside[fires, None].float(), 32 // maps.shape[1])
        on_object = covered[:, 0] > 0.5
        best = maps.flatten(1).argmax(1)
        hits.append(on_object.flatten(1)[torch.arange(len(best)), best].float().mean().item())
        chances.append(on_object.float().mean().item())
    print(f"pointing game, {len(latents)} latents, up to {images_per_latent} new images each")
    print(f"  most relevant patch on the object  {interval(hits)}")
    print(f"  the object's share of the patches  {interval(chances)}")


def deletion(model, latents, read, share=0.2, draws=8):
    """Share of a latent's activation left when patches of its top images are hidden (grey)."""
    generator = torch.Generator().manual_seed(0)
    left = {"relevant": [], "random": []}
    for layer, score, top in latents:
        images = torch.stack([read(i) for i in top[:8]])
        maps = relevancy_maps(model, images, layer, score)
        patches = maps[0].numel()
        hide = round(share * patches)

        def hidden(order):  # order (B, P): the patches to hide come first
            mask = torch.ones(len(images), patches).scatter(1, order[:, :hide], 0)
            mask = mask.view(len(images), 1, *maps.shape[1:])
            mask = torch.nn.functional.interpolate(mask, images.shape[2:], mode="nearest")
            return score(class_tokens(model, images * mask, [layer])[0])  # 0 is the mean colour

        with torch.inference_mode():
            full = score(class_tokens(model, images, [layer])[0])
            relevant = hidden(maps.flatten(1).argsort(1, descending=True))
            orders = torch.rand(draws, len(images), patches, generator=generator).argsort(2)
            random = torch.stack([hidden(order) for order in orders]).mean(0)
        left["relevant"].append((relevant / full).mean().item())
        left["random"].append((random / full).mean().item())
    print(f"deletion, {len(latents)} latents, 8 top images each, {share:.0%} of the patches hidden")
    print(f"  activation left, most relevant hidden  {interval(left['relevant'])}")
    print(f"  activation left, random ones hidden    {interval(left['random'])}")
    difference = np.subtract(left["random"], left["relevant"])
    print(f"  difference                             {interval(difference)}")


def main(out: Path) -> None:
    record = json.loads((out / "results/results.json").read_text())
    settings, scores = record["settings"], {}
    latents = {}  # one latent may match two hypernyms
    for row in record["hypernyms"]:
        if row["emergence_layer"] is None:
            continue
        layer, latent = row["best_layer"], row["best_latent"]
        sae = SparseAutoencoder.from_pretrained(record["saes"], subfolder=f"layer_{layer:02d}")
        if layer not in scores:
            (path,) = out.glob(f"scores/{Path(record['saes']).name}/layer_{layer:02d}.json")
            scores[layer] = json.loads(path.read_text())["hypernyms"]
        top = scores[layer][row["wnid"]]["top_images"]
        latents[layer, latent] = layer, lambda x, sae=sae, i=latent: sae.encode(x)[:, i], top
    if settings["backbone"] == "demo":
        model, _ = demo.open_demo(out, None, plan=False)
        return pointing(model, list(latents.values()))
    model = load_backbone(settings["backbone"], settings["hub"])
    transform = transform_of(model) if settings["transform"] == "model" else eval_transform()
    val, ids = find_images(settings["data"])[1], np.load(out / "tokens/val/ids.npy")
    deletion(model, list(latents.values()),
             lambda i: transform(read_image(val.root / val.names[ids[i]])))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of a finished run")
    main(parser.parse_args().run)
