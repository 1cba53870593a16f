# %% [markdown]
# # Which latent knows what a dog is?
# From photographs to a named latent, on the kit's four modules: `dinov2_hooks`, `sae`, `taxonomy`,
# `metrics`. Ten minutes on a CPU. The exercises at the end have solutions in
# `docs/solutions.md`.

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

from dinov2_hooks import (HUB, finish, load_backbone, record, relevancy_maps, token_path,
                          transform_of)
from kit.data import Decoded, find_images
from metrics import Placed, profile_latents, reconstruct, responses_of
from sae import ActivationBuffer, Training, train_sae
from taxonomy import Taxonomy

# Settings. DATA: photographs, as for reproduce.py's --data; the README says how to get these.
DATA = os.environ.get("DATA", ROOT / "data/tiny-imagenet-200")
BACKBONE = os.environ.get("BACKBONE", "dinov2_vits14")
HUB = os.environ.get("HUB", HUB)
LAYER = 11  # a block of the backbone, from 0
IMAGES = 50  # of each class for training
STEPS = 1500  # of the SAE's training
OUT = ROOT / f"walkthrough/{Path(DATA).name}-{BACKBONE}-{IMAGES}"

# %% [markdown]
# ## 1. Class tokens
# A ViT summarises an image in one vector, the *class token*. A forward hook takes it after block
# LAYER: n numbers an image, in one file for each split. Rows have to be in random order.

# %%
model = load_backbone(BACKBONE, str(HUB))
transform = transform_of(model)
splits = {}
splits["train"], splits["val"], classes = find_images(DATA, IMAGES)
for name, split in splits.items():
    path = token_path(OUT / name, LAYER)
    if not path.exists():
        record(model, Decoded(split, transform), path.parent, [LAYER])
        finish(path.parent, [LAYER])
train, val = (ActivationBuffer(token_path(OUT / name, LAYER)) for name in splits)
labels = splits["val"].labels

# %% [markdown]
# ## 2. A sparse autoencoder
# It writes each token as a sum of few directions, its *latents*. The loss is the squared error
# plus λ times the sum of the latents' values, so that most of them are zero.

# %%
batch = max(16, min(256, train.rows // 8))
settings = Training(batch_size=batch, epochs=max(1, STEPS * batch // train.rows))
sae = train_sae(train, settings)
quality, _ = reconstruct(sae, val.batches(2048), labels, len(classes), lambda tokens: tokens)
print(f"\nFVU {quality.fvu:.2f}: the variance that is left; {quality.l0:.0f} latents fire an image")
if quality.fvu > 1:
    print("An FVU above 1 is worse than the mean token: train longer, or on more images")

# %% [markdown]
# ## 3. The latent of "dog"
# Which classes does each latent respond to, and which node of WordNet has those classes below
# it? The *match* is the Jaccard index of the two sets of classes. The latent is chosen on one
# half of the images, and its match is that of the other half.

# %%
tree = Taxonomy.from_wnids(classes)
profile = profile_latents(sae.encode, val.batches(2048), labels, len(classes))
responses = responses_of(profile)
placed = Placed(responses, tree)
names = [tree.names[v] for v in placed.hypernyms]
number = names.index("dog.n.01") if "dog.n.01" in names else placed.choice.latent_match.argmax()
assert placed.choice.latent[number] >= 0, "no latent shows it: take more images, or steps"
latent = placed.latents[placed.choice.latent[number]]
print(f"Latent {latent} matches {names[number]} by {placed.choice.latent_match[number]:.2f}")

# %% [markdown]
# ## 4. Is it the hierarchy?
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
# ## 5. Where the latent looks
# The gradient of its value by every attention weight, rolled out from the class token over all
# blocks up to LAYER.

# %%
top = profile.top_images[latent, :6].tolist()
photographs = Decoded(splits["val"], transform)
images = torch.stack([photographs[i][0] for i in top])
maps = relevancy_maps(model, images, LAYER, lambda tokens: sae.encode(tokens)[:, latent])
figure, axes = plt.subplots(2, 6, figsize=(12, 4.4), layout="constrained")
for i, (above, below) in enumerate(axes.T):
    picture = images[i].permute(1, 2, 0)
    above.imshow((picture - picture.min()) / (picture.max() - picture.min()))
    below.imshow(maps[i], cmap="inferno")
    above.set(title=tree.names[tree.classes[labels[top[i]]]])
figure.suptitle(f"layer {LAYER}, latent {latent}: {names[number]}")
figure.savefig(OUT / "latent.png", dpi=120)

# %% [markdown]
# ## Exercises
# 1. Another layer: which latents does LAYER = 2 have? Record both layers in one pass.
# 2. `Training(activation="topk-16")`: how do FVU and the matches change?
# 3. Why must the control permute the *tree* and not the labels? Shuffle the labels and score
# again: what else is destroyed?
# 4. Another tree: `Taxonomy.from_graph` takes any `{wnid: Synset(name, hypernyms)}` with one
# root, and `read_graph(SHIPPED)` is ImageNet's. Move the dogs below *machine*: what happens to
# the match?
