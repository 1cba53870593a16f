"""The built-in demo: drawn images of a hierarchy that is known, and a small ViT trained on them.

Every WordNet node above a class gives it one visual trait (a hue, a shape, a texture, a rim, a
mark). The hierarchy is planted, so it must be found: the positive control of the whole kit.
"""
import math

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from kit.runs import RANK, code_of, short_hash, write_aside
from taxonomy import Taxonomy

CLASSES = (  # 30 ImageNet classes from several branches of WordNet
    "n01531178 n01532829 n01534433 n01817953 n01818515 n01820546 "  # finches, parrots
    "n02101556 n02102318 n02102480 n02123045 n02123394 n02123597 "  # spaniels, cats
    "n03100240 n03594945 n03670208 n03345487 n03417042 n03930630 "  # cars, trucks
    "n02676566 n02787622 n02992211 n03110669 n03372029 n03394916 "  # string and wind instruments
    "n07747607 n07753113 n07753592 n12998815 n13037406 n13040303"  # fruit, fungi
).split()
NOTE = (
    "This is the built-in demo: drawn images with a planted hierarchy, and a small ViT trained on "
    "the spot. Its numbers check the pipeline and are not the paper's. The paper's job: "
    "python reproduce.py --layers all --data <ImageNet>"
)
KINDS = "hue", "shape", "texture", "rim", "mark"  # of traits
SHAPES = "disc", "square", "diamond", "cross"
TRAITS = {}  # wnid of a hypernym: its trait in words, once a demo is open
SIZE = 32  # pixels a side
IMAGES = {"train": 150, "val": 50}  # of each class
STEPS = 500  # of the ViT's training, on images drawn anew for each
BATCH = 64
HIDDEN = 0.05  # how often a texture, rim or mark is not drawn: then only the hypernym can be told


def class_traits(tree):
    """(C, KINDS) int: every node below the root gives all classes below it one trait; else -1.

    From the largest node to the smallest, each takes the first kind that its classes have none of
    yet, and in it a value of its own; a single class takes its number among its siblings. TRAITS
    says in words what each hypernym got.
    """
    sizes = tree.leaves.sum(1)
    distinct = np.flatnonzero(tree.lowest == np.arange(len(sizes)))
    nodes = sorted((v for v in distinct if sizes[v] < len(tree.classes)), key=lambda v: -sizes[v])
    traits = np.full((len(tree.classes), len(KINDS)), -1)
    values_used = [0] * len(KINDS)
    for v in nodes:
        below = tree.leaves[v]
        kind = next(kind for kind in range(len(KINDS)) if (traits[below, kind] == -1).all())
        if sizes[v] > 1:
            traits[below, kind] = value = values_used[kind]
            values_used[kind] += 1
            words = SHAPES[value] if kind == 1 else f"number {value + 1}"
            TRAITS[tree.wnids[v]] = f"Planted trait: {KINDS[kind]} {words}."
        else:
            above = [u for u in nodes if sizes[u] > 1 and (tree.leaves[u] & below).any()]
            siblings = np.flatnonzero(tree.leaves[min(above, key=lambda u: sizes[u])])
            traits[below, kind] = siblings.tolist().index(int(below.argmax()))
    return torch.from_numpy(traits)


def draw(traits, generator):
    """Traits (B, KINDS) -> images (B, 3, S, S) uint8, and where the object lies (B, S, S) bool.

    One object at a random place and size on a ground of random hue, under pixel noise. Its hue is
    told from the ground's, its rim's and mark's from its own: no single patch gives a class away.
    """
    B = len(traits)
    S = SIZE
    may_hide = torch.tensor([False, False, True, True, True])
    hidden = (torch.rand(traits.shape, generator=generator) < HIDDEN) & may_hide
    hue, shape, texture, rim, mark = torch.where(hidden, -1, traits).T[:, :, None, None]

    def uniform(low, high):  # (B, 1, 1)
        return torch.rand(B, 1, 1, generator=generator) * (high - low) + low

    def colour(hue):  # (B, 1, 1) in turns -> (B, 3, 1, 1)
        phase = torch.tensor([0, 1 / 3, 2 / 3])[:, None, None]
        return 0.5 + 0.5 * torch.cos(2 * math.pi * (hue[:, None] - phase))

    radius = uniform(8, 10.5)
    along = torch.arange(S) + 0.5
    left, top = (radius + uniform(0, 1) * (S - 2 * radius) for _ in range(2))
    x = ((along[None, None, :] - left) / radius).expand(B, S, S)
    y = ((along[None, :, None] - top) / radius).expand(B, S, S)
    ax = x.abs()
    ay = y.abs()
    shapes = torch.stack([  # distance from the centre, 1 at the edge, of each shape
        (x * x + y * y).sqrt(),  # disc
        torch.maximum(ax, ay) * 1.15,  # square
        (ax + ay) * 0.85,  # diamond
        torch.maximum(torch.minimum(ax, ay) * 2.6, torch.maximum(ax, ay)),  # cross
    ])
    distance = shapes[shape.flatten(), torch.arange(B)]  # (B, S, S)
    inside = distance < 1
    on_rim = (distance >= 0.75) & inside & (rim >= 0)
    on_mark = (x * x + y * y < 0.1) & (mark >= 0)

    angle = (texture % 4) * math.pi / 4
    cycles = torch.where(texture < 4, 1.0, 2.0)
    across = x * angle.cos() + y * angle.sin()
    stripes = torch.sin(2 * math.pi * cycles * across + uniform(0, 2 * math.pi))
    shade = 0.65 + 0.35 * torch.where(texture >= 0, stripes, 0)
    ground_hue = uniform(0, 1)
    body_hue = ground_hue + 1 / 6 + hue / 3 + uniform(-0.05, 0.05)
    image = 0.325 + 0.35 * colour(ground_hue) + uniform(-0.15, 0.15)[:, None]
    image = torch.where(inside[:, None], colour(body_hue) * shade[:, None], image)
    image = torch.where(on_rim[:, None], colour(body_hue + (rim + 1) / 7), image)
    image = torch.where(on_mark[:, None], colour(body_hue + (mark + 1) / 4), image)
    image = image + 0.05 * torch.randn(B, 3, S, S, generator=generator)
    return (image.clamp(0, 1) * 255).byte(), inside


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.heads = heads

    def forward(self, x):  # (B, 1+P, n)
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = scaled_dot_product_attention(q, k, v)  # (B, heads, 1+P, n/heads)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        wide = nn.Linear(width, 4 * width)
        narrow = nn.Linear(4 * width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(wide, nn.GELU(), narrow)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SmallViT(nn.Module):
    """A ViT with DINOv2's module names: images (B, 3, size, size) -> logits (B, classes)."""

    def __init__(self, classes=len(CLASSES), size=SIZE, patch=4, width=96, depth=6, heads=2):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (size // patch) ** 2, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images):
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)  # (B, P, n)
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1)
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def train_vit(traits, normalise):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(2)
    vit = SmallViT()
    optimizer = torch.optim.AdamW(vit.parameters(), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, STEPS, pct_start=0.15)
    for _ in (bar := tqdm(range(STEPS), "      the demo's ViT", unit="step")):
        labels = torch.randint(len(traits), (BATCH,), generator=generator)
        images = normalise(draw(traits[labels], generator)[0].float() / 255)
        loss = cross_entropy(vit(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    return vit


def draw_images(folder):
    """folder/{train,val}/<wnid>/000.png ..., so many of each class."""
    tree = Taxonomy.from_wnids(CLASSES)
    traits = class_traits(tree)
    for seed, (split, count) in enumerate(IMAGES.items()):
        generator = torch.Generator().manual_seed(seed)
        for label, node in enumerate(tree.classes):
            class_folder = folder / split / tree.wnids[node]
            class_folder.mkdir(parents=True)
            for i, image in enumerate(draw(traits[label].expand(count, -1), generator)[0]):
                to_pil_image(image).save(class_folder / f"{i:03d}.png")


def open_demo(out, normalise):
    """The ViT, and the folder of its images; made unless they are there."""
    folder = out / f"demo-{short_hash(code_of(__file__))}"
    weights = folder / "vit.safetensors"
    if RANK == 0 and not folder.is_dir():
        with write_aside(folder) as part:
            draw_images(part / "images")
            vit = train_vit(class_traits(Taxonomy.from_wnids(CLASSES)), normalise)
            (part / weights.name).write_bytes(save(vit.state_dict()))
    class_traits(Taxonomy.from_wnids(CLASSES))
    vit = SmallViT().eval().requires_grad_(False)
    vit.load_state_dict(load_file(weights))
    return vit, folder / "images"
