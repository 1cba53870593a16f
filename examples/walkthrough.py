"""From photographs to a latent that knows what a dog is, on the kit's four modules alone.

    python examples/walkthrough.py [DATA BACKBONE HUB]      or cell by cell in an editor

DATA: a folder of photographs for each class, named by its wnid; the README says how to fetch some.
"""
# %% Settings
import sys
from pathlib import Path

HERE = globals().get("__file__", "examples/walkthrough.py")  # in a notebook there is none
sys.path.insert(0, str(Path(HERE).resolve().parent.parent))  # where the modules are
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from dinov2_hooks import HUB, TokenFiles, load_backbone, relevancy_maps, transform_of
from metrics import profile_latents, responses_of, score_hierarchy
from sae import ActivationBuffer, Training, fast_precision, train_sae
from taxonomy import Taxonomy

GIVEN = [] if hasattr(sys, "ps1") else sys.argv[1:]  # a notebook has no arguments of ours
DATA, BACKBONE, HUB = GIVEN + ["data/tiny-imagenet-200/train", "dinov2_vits14", HUB][len(GIVEN) :]
LAYER, IMAGES, OUT = 11, 50, Path("walkthrough")  # a block; images a class, twice; where files go

# %% 1. Class tokens. A ViT sums an image up in one vector, the class token. A forward hook takes it
# after block LAYER: n numbers an image, in one file a split. Rows have to be in random order.
model = load_backbone(BACKBONE, HUB)
transform, classes = transform_of(model), sorted(path.name for path in Path(DATA).glob("n*"))
assert classes, f"no wnid folders in {DATA}: the README says how to fetch some"
for split, some in (("train", slice(IMAGES)), ("val", slice(IMAGES, 2 * IMAGES))):
    paths = [(path, c) for c, wnid in enumerate(classes)
             for path in sorted(Path(DATA, wnid).rglob("*.[JjPp]*"))[some]]
    paths = [paths[i] for i in np.random.default_rng(0).permutation(len(paths))]
    width, precision = model.cls_token.shape[-1], fast_precision("cpu")
    files = TokenFiles(OUT / split, [LAYER], len(paths), width, precision)
    for start in range(0, len(paths), 64):
        pictures = [Image.open(path).convert("RGB") for path, _ in paths[start : start + 64]]
        files.record(model, torch.stack([transform(picture) for picture in pictures]), start)
    files.sync()
labels = np.array([c for _, c in paths])  # of val, the last of the two
train, val = (ActivationBuffer(OUT / split / files.paths[0].name) for split in ("train", "val"))

# %% 2. A sparse autoencoder writes each token as a sum of few directions, its latents: the loss is
# the squared error plus λ times the sum of the latents' values, so that most of them are zero.
sae = train_sae(train, Training(batch_size=256, epochs=50))

# %% 3. The latent of "dog". Which classes does each latent respond to, and which node of WordNet
# has those classes below it? The match is the Jaccard index of the two sets of classes.
tree = Taxonomy.from_wnids(classes)
profile = profile_latents(sae.encode, val.batches(2048), labels, len(classes))
responses = responses_of(profile)
scores = score_hierarchy(responses, tree)
names = [tree.names[v] for v in scores.hypernyms]
place = names.index("dog.n.01") if "dog.n.01" in names else scores.hypernym_match.argmax()
latent = scores.hypernym_latent[place]
print(f"latent {latent} matches {names[place]} by {scores.hypernym_match[place]:.2f}")

# %% 4. LCH height. The lowest common hypernym (LCH) of two of a latent's top images says how
# general the latent is: its height is the number of edges down to the classes. The mean is over
# pairs: the LCH of all top images at once is near the root as soon as one of them is a stray.
order = np.random.default_rng(0).permutation(len(classes))
control = score_hierarchy(responses, tree.permuted(order)).summary()["lch_height_between"]
print(f"between classes {scores.summary()['lch_height_between']:.1f}, {control:.1f} where classes are "
      f"dealt anew to the leaves of the tree; hypernyms matched: "
      + ", ".join(n for n, matched in zip(names, scores.hypernym_matched) if matched))

# %% 5. Where the latent looks: the gradient of its value by every attention weight, rolled out from
# the class token over all blocks up to LAYER. One plot: its top images, and these maps over them.
top = profile.top_images[latent, :6]
images = torch.stack([transform(Image.open(paths[int(i)][0]).convert("RGB")) for i in top])
maps = relevancy_maps(model, images, LAYER, lambda tokens: sae.encode(tokens)[:, latent]).numpy()
figure, axes = plt.subplots(2, 6, figsize=(12, 4.4), layout="constrained")
for i, (above, below) in enumerate(axes.T):
    picture = images[i].permute(1, 2, 0).numpy()
    picture = (picture - picture.min()) / (picture.max() - picture.min())
    above.imshow(picture), below.imshow(picture.mean(2), cmap="gray")
    below.imshow(maps[i] ** 0.7, cmap="inferno", alpha=0.6, extent=(0, *picture.shape[:2], 0))
    above.set(title=tree.names[tree.classes[labels[top[i]]]][:-5])
    above.axis("off"), below.axis("off")
figure.suptitle(f"layer {LAYER}, latent {latent}: {names[place]}")
figure.savefig(OUT / "latent.png", dpi=150)

# %% Exercises
# 1. LAYER = 2: what do its latents respond to? Is "dog" still among the hypernyms matched?
# 2. Training(activation="topk-16", ...): how do the variance left and the matches change?
# 3. Another tree: Taxonomy.from_graph takes any {wnid: Synset(name, hypernyms)} with one root.
#    Shuffle which class lies where: how many hypernyms are matched now, and why not none?
