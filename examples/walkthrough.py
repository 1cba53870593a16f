# %% [markdown]
# # Which latent knows what a cat is?
# From photographs to a named latent, on the kit's four modules: `dinov2_hooks`, `sae`, `taxonomy`,
# `metrics` (and `kit.data`, which finds and decodes images in folders). Ten minutes on a CPU. The
# exercises at the end have solutions in `docs/solutions.md`. The outputs shown are of a ViT-Ti
# trained with labels, not of DINOv2.

# %%
import os
import sys
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # else it crawls beside another program
HERE = Path(globals().get("__file__", "walkthrough.ipynb")).resolve()  # a notebook has no __file__
ROOT = HERE.parent.parent  # where the modules are
sys.path.insert(0, str(ROOT))
import numpy as np
import torch
from matplotlib import pyplot as plt

from dinov2_hooks import (HUB, eval_transform, finish, load_backbone, record, relevancy_maps,
                          token_path, transform_of)
from kit.data import Decoded, find_images
from metrics import Placed, profile_latents, reconstruct, responses_of
from sae import ActivationBuffer, Training, train_sae
from taxonomy import Taxonomy

# Settings. DATA: photographs, as for reproduce.py's --data; the README says how to get these.
DATA = os.environ.get("DATA", ROOT / "data/tiny-imagenet-200")
BACKBONE = os.environ.get("BACKBONE", "dinov2_vits14")
HUB = os.environ.get("HUB", HUB)
LAYER = 11  # a block of the backbone, from 0
IMAGES = {"train": 40, "val": 10}  # of each class: more make better latents, and take longer
STEPS = 3000  # of the SAE's training
WANTED = "domestic_cat.n.01"  # a hypernym, in WordNet's words
OUT = ROOT / f"walkthrough/{Path(DATA).name}-{BACKBONE}"
device = "cuda" if torch.cuda.is_available() else "cpu"

# %% [markdown]
# ## 1. Photographs, and what they are of
# Each class is a noun of WordNet, named by its *wnid*; a *hypernym* is a more general noun above.

# %%
splits = {}
splits["train"], splits["val"], classes = find_images(DATA, IMAGES["train"])
chosen = []
for c in range(len(classes)):
    chosen += np.flatnonzero(splits["val"].labels == c)[: IMAGES["val"]].tolist()
names = [splits["val"].names[i] for i in chosen]
splits["val"] = splits["val"]._replace(names=names, labels=splits["val"].labels[chosen])
labels = splits["val"].labels
tree = Taxonomy.from_wnids(classes)


def show(images, titles, file):
    """Images (B, 3, H, W) of any range beside one another."""
    figure, axes = plt.subplots(1, len(images), figsize=(2 * len(images), 2.5))
    for axis, image, title in zip(axes, images, titles):
        low, high = image.min(), image.max()
        axis.imshow(((image - low) / (high - low)).permute(1, 2, 0))
        axis.set_title(title, fontsize=8)
        axis.axis("off")
    OUT.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUT / file, dpi=120)


examples = np.linspace(0, len(labels) - 1, 6).astype(int)
small = Decoded(splits["val"], eval_transform(112, 112))
show([small[i][0] for i in examples],
     [tree.names[tree.classes[labels[i]]] for i in examples], "photographs.png")

# %% [markdown]
# ## 2. Class tokens
# A ViT summarises an image in one vector, the *class token*. A forward hook takes it after block
# LAYER: n numbers per image, in one file for each split. Rows have to be in random order.

# %%
model = load_backbone(BACKBONE, str(HUB)).to(device)
transform = transform_of(model) if "TRANSFORM" not in os.environ else eval_transform()
for name, split in splits.items():
    path = token_path(OUT / name, LAYER)
    if not path.exists():
        record(model, Decoded(split, transform), path.parent, [LAYER])
        finish(path.parent, [LAYER])
train, val = (ActivationBuffer(token_path(OUT / name, LAYER), device) for name in splits)

# %% [markdown]
# ## 3. A sparse autoencoder
# It writes each token as a sum of few directions, its *latents*. The loss is the squared error
# plus λ times the sum of the latents' values, so that most of them are zero.

# %%
batch = max(16, min(256, train.rows // 8))
settings = Training(batch_size=batch, epochs=max(1, STEPS * batch // train.rows))
sae = train_sae(train, settings)
quality, _ = reconstruct(sae, val.batches(2048), labels, len(classes), lambda tokens: tokens)
print(f"\nFVU {quality.fvu:.2f}: the variance left; {quality.l0:.0f} latents fire per image")
if quality.fvu > 1:
    print("An FVU above 1 is worse than the mean token: train longer, or on more images")

# %% [markdown]
# ## 4. The latent of "domestic cat"
# Which classes does each latent respond to, and which node of WordNet has those classes below
# it? The *match* is the Jaccard index of the two sets of classes. The latent is chosen on one
# half of the images, and its match is that of the other half.

# %%
profile = profile_latents(sae.encode, val.batches(2048), labels, len(classes))
responses = responses_of(profile)
placed = Placed(responses, tree)
names = [tree.names[v] for v in placed.hypernyms]
matched = [names[h] for h in np.flatnonzero(placed.choice.matched)]
print(f"{len(matched)} of {len(names)} hypernyms are matched: {', '.join(matched)}")
best = placed.choice.latent_match.argmax()
number = names.index(WANTED) if WANTED in matched else best
latent = placed.latents[placed.choice.latent[number]]
print(f"Latent {latent} matches {names[number]} by {placed.choice.latent_match[number]:.2f}")

# %% [markdown]
# ## 5. Is it the hierarchy?
# Two of a latent's top images, of different classes, meet at a node of WordNet, their *lowest
# common hypernym*. Its *height* is the number of edges down to the classes: low means that kin
# classes share latents. The control is the same tree, its classes reassigned to its leaves:
# the images, the classes and the latents stay, and only which classes are kin is left to
# chance.

# %%
order = np.random.default_rng(0).permutation(len(classes))
control = Placed(responses, tree.permuted(order))
for name, each in (("WordNet's tree", placed), ("a permuted tree", control)):
    print(f"Under {name}: height between classes {each.summary()['lch_height_between']:.2f}, "
          f"hypernyms matched {each.choice.matched.sum()} of {len(names)}")

# %% [markdown]
# ## 6. Where the latent looks
# The gradient of its value by every attention weight, rolled out from the class token over all
# blocks up to LAYER.

# %%
top = []
for i in profile.top_images[latent].tolist():
    if list(labels[top]).count(labels[i]) < 2 and len(top) < 6:  # two of a class at most
        top.append(i)
photographs = Decoded(splits["val"], transform)
images = torch.stack([photographs[i][0] for i in top])
maps = relevancy_maps(model, images.to(device), LAYER,
                      lambda tokens: sae.encode(tokens)[:, latent]).cpu()
maps = torch.nn.functional.interpolate(maps[:, None], images.shape[2:], mode="bilinear")
maps = maps / maps.amax((1, 2, 3), keepdim=True)
low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
images = (images - low) / (high - low)
orange = torch.tensor([1, 0.5, 0])[:, None, None]
show(torch.lerp(images, orange.expand_as(images), 0.6 * maps),
     [tree.names[tree.classes[labels[i]]] for i in top], "latent.png")

# %% [markdown]
# ## Exercises
# 1. Another layer: which latents does LAYER = 2 have? Record both layers in one pass.
# 2. `Training(activation="topk-16")`: how do FVU and the matches change?
# 3. Why must the control permute the *tree* and not the labels? Shuffle the labels and score
# again: what else is destroyed?
# 4. Another tree: `Taxonomy.from_graph` takes any `{wnid: Synset(name, hypernyms)}` with one
# root, and `read_graph(SHIPPED)` is ImageNet's. Move the dogs below *machine*: what happens to
# the match of *dog*, and of *carnivore*?
# 5. Sparsity: train at λ = 0.03, 0.1 and 0.3 (`Training(l1=...)`), and draw the hypernyms matched
# and the FVU over L0, as `python -m kit.compare RUN` does for runs of reproduce.py. Why is no one
# λ the answer?
