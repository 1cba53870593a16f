"""Are the relevancy maps right? Two checks on a finished run, by its own settings; a plain script, not for pytest.

    python tests/relevancy.py runs/demo                  pointing game: is the most relevant patch on the drawn object?
    python tests/relevancy.py runs/tiny-imagenet-vit     deletion: does hiding relevant patches silence the latent?

The latents are the best match of every hypernym matched in the run, in its best layer. Intervals are 95% bootstrap
intervals over latents.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import reproduce
from dinov2_hooks import class_tokens, relevancy_maps
from reproduce import DEMO_CLASSES, demo_traits, draw, find_images, load_sae, open_backbone, read_image
from taxonomy import Taxonomy


def interval(values, rng=np.random.default_rng(0)):
    values = np.asarray(values)
    means = [rng.choice(values, len(values)).mean() for _ in range(2000)]
    return f"{values.mean():.3f} [{np.quantile(means, 0.025):.3f}, {np.quantile(means, 0.975):.3f}]"


def pointing(model, transform, saes, rows, images_per_latent=32):
    """Share of images whose most relevant patch lies on the object (its majority does), and the object's share of patches."""
    traits = demo_traits(Taxonomy.from_wnids(DEMO_CLASSES))
    generator = torch.Generator().manual_seed(99)  # images that neither the ViT nor the SAE has seen
    hits, chances = [], []
    for row in rows:
        sae = load_sae(saes, row["best_layer"], "cpu")
        score = lambda x: sae.encode(x)[:, row["best_latent"]]
        images, inside = draw(traits[torch.randint(len(traits), (400,), generator=generator)], generator)
        images = transform.transforms[-1](images.float() / 255)
        fires = (score(class_tokens(model, images, [row["best_layer"]])[0]) > 0).nonzero()[:images_per_latent, 0]
        maps = relevancy_maps(model, images[fires], row["best_layer"], score)
        on_object = torch.nn.functional.avg_pool2d(inside[fires, None].float(), 32 // maps.shape[1])[:, 0] > 0.5
        best = maps.flatten(1).argmax(1)
        hits.append(on_object.flatten(1)[torch.arange(len(best)), best].float().mean().item())
        chances.append(on_object.float().mean().item())
    print(f"pointing game, {len(rows)} latents, up to {images_per_latent} new images each on which they fire:")
    print(f"  most relevant patch on the object  {interval(hits)}")
    print(f"  the object's share of the patches  {interval(chances)}")


def deletion(model, transform, out, saes, rows, val, share=0.2, draws=8):
    """Share of a latent's activation left when patches of its top images are hidden (grey): relevant against random."""
    results = json.loads((out / "results/results.json").read_text())
    ids = np.load(out / "tokens/val/ids.npy")
    generator = torch.Generator().manual_seed(0)
    left = {"relevant": [], "random": []}
    for row in rows:
        layer, latent = row["best_layer"], row["best_latent"]
        sae = load_sae(saes, layer, "cpu")
        score = lambda x: sae.encode(x)[:, latent]
        scores = json.loads((saes / f"layer_{layer:02d}/scores.json").read_text())
        top = scores["hypernyms"]["true"][row["wnid"]]["top_images"][:8]
        images = torch.stack([transform(read_image(val.root / val.names[ids[i]])) for i in top])
        maps = relevancy_maps(model, images, layer, score)
        patches = maps[0].numel()
        hide = round(share * patches)

        def hidden(order):  # order (B, P): the patches to hide come first
            mask = torch.ones(len(images), patches).scatter(1, order[:, :hide], 0).view(len(images), 1, *maps.shape[1:])
            mask = torch.nn.functional.interpolate(mask, images.shape[2:], mode="nearest")
            return score(class_tokens(model, images * mask, [layer])[0])  # 0 is the mean colour

        with torch.inference_mode():
            full = score(class_tokens(model, images, [layer])[0])
            relevant = hidden(maps.flatten(1).argsort(1, descending=True))
            random = torch.stack([hidden(torch.rand(len(images), patches, generator=generator).argsort(1)) for _ in range(draws)])
        left["relevant"].append((relevant / full).mean().item())
        left["random"].append((random.mean(0) / full).mean().item())
    print(f"deletion, {len(rows)} latents of {results['settings']['backbone']}, 8 top images each, {share:.0%} of the patches hidden:")
    print(f"  activation left, most relevant hidden  {interval(left['relevant'])}")
    print(f"  activation left, random ones hidden    {interval(left['random'])}")
    print(f"  difference                             {interval(np.subtract(left['random'], left['relevant']))}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of a finished run")
    out = parser.parse_args().run
    results = json.loads((out / "results/results.json").read_text())
    settings = reproduce.argparse.Namespace(**{**results["settings"], "device": "cpu"})
    demo = settings.backbone == "demo"
    model, transform = open_backbone(settings, out, demo)
    rows = [row for row in results["hypernyms"] if row["emergence_layer"] is not None]
    rows = list({(row["best_layer"], row["best_latent"]): row for row in rows}.values())  # one latent may match two hypernyms
    saes = out / results["saes"]
    if demo:
        pointing(model, transform, saes, rows)
    else:
        deletion(model, transform, out, saes, rows, find_images(settings.data, settings.images_per_class)[1])
