"""The built-in demo: drawn images of a hierarchy that is known, and a small ViT trained on them.

Every WordNet node above a class gives it one visual trait, the colour of one ring of a target. The
hierarchy is planted, so it must be found: the positive control of the whole kit.
"""
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from kit.files import RANK, InputError, write_aside
from kit.made_of import code_of
from taxonomy import Taxonomy

CLASSES = (  # 30 ImageNet classes from several branches of WordNet, siblings in threes
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
RINGS = 5
COLOURS = {  # of a ring, and last of one without a trait
    "red": "e61919", "yellow": "e6e619", "green": "19cc19", "cyan": "19e6e6", "blue": "1919e6",
    "magenta": "e619e6", "grey": "808080"}
TRAITS = {}  # wnid of a hypernym: its trait in words, once a demo is open
SIZE = 32  # pixels a side
IMAGES = {"train": 150, "val": 50}  # of each class
STEPS = 500  # of the ViT's training, on images drawn anew for each
BATCH = 64
HIDDEN = 0.05  # how often a ring is grey: if it is the class's own, only the hypernyms can be told


def class_traits(tree):
    """(C, RINGS + 1) int, the colour of each ring; -1 for none, and last for what is outside.

    From the most general hypernym to the most specific, each gives the first ring that its classes
    have no colour for a colour of its own; a class tells itself from its siblings by one more.
    """
    traits = torch.full((len(tree.classes), RINGS + 1), -1)
    used = [0] * RINGS
    for v in tree.hypernyms[-2::-1]:  # below the root
        below = torch.from_numpy(tree.leaves[v])
        ring = int((traits[below] >= 0).any(0).sum())
        traits[below, ring] = used[ring]
        TRAITS[tree.wnids[v]] = f"Planted trait: ring {ring + 1} is {list(COLOURS)[used[ring]]}."
        used[ring] += 1
    for c, rings in enumerate(traits):
        rings[int((rings >= 0).sum())] = c % 3
    return traits


def draw(traits, generator):
    """Traits (B, RINGS + 1) -> images (B, 3, S, S) uint8: a target of rings at a random place, of
    random size and brightness, on grey, under pixel noise."""
    B = len(traits)

    def uniform(low, high, *shape):
        return torch.rand(shape, generator=generator) * (high - low) + low

    colours = traits.masked_fill(uniform(0, 1, *traits.shape) < HIDDEN, -1)
    radius = uniform(10, 14, B, 1, 1, 1)
    centre = radius + uniform(0, 1, B, 2, 1, 1) * (SIZE - 2 * radius)
    along = torch.arange(SIZE) + 0.5
    grid = torch.stack(torch.meshgrid(along, along, indexing="ij"))  # (2, S, S)
    distance = ((grid - centre) / radius).norm(dim=1)  # (B, S, S), 1 at the edge
    ring = (distance * RINGS).long().clamp(max=RINGS)
    colour = colours.gather(1, ring.flatten(1)).view_as(ring)
    palette = torch.tensor([list(bytes.fromhex(text)) for text in COLOURS.values()]) / 255
    image = palette[colour].permute(0, 3, 1, 2)
    image = image * uniform(0.6, 1, B, 1, 1, 1)
    image = image + 0.1 * torch.randn(image.shape, generator=generator)
    return (image.clamp(0, 1) * 255).byte()


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(),
                                 nn.Linear(4 * width, width))

    def forward(self, x):  # (B, 1+P, n)
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(q, k, v)  # (B, heads, 1+P, n/heads)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class SmallViT(nn.Module):
    """A ViT with the parts that hooks need: images (B, 3, size, size) -> logits (B, classes)."""

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
    optimizer = torch.optim.AdamW(vit.parameters(), lr=5e-4, fused=True)
    for _ in tqdm(range(STEPS), "      the demo's ViT"):
        labels = torch.randint(len(traits), (BATCH,), generator=generator)
        images = normalise(draw(traits[labels], generator).float() / 255)
        loss = cross_entropy(vit(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return vit


def open_demo(out, normalise):
    """The ViT, and the folder of its images, {train,val}/<wnid>/000.png ...; made unless they are
    there. Raises InputError where they are damaged."""
    folder = out / f"demo-{code_of(Path(__file__).parent, 'demo.py')[:8]}"
    traits = class_traits(Taxonomy.from_wnids(CLASSES))
    if RANK == 0 and not folder.is_dir():
        with write_aside(folder) as part:
            for seed, (split, count) in enumerate(IMAGES.items()):
                generator = torch.Generator().manual_seed(seed)
                for wnid, rings in zip(CLASSES, traits):
                    class_folder = part / "images" / split / wnid
                    class_folder.mkdir(parents=True)
                    for i, image in enumerate(draw(rings.expand(count, -1), generator)):
                        to_pil_image(image).save(class_folder / f"{i:03d}.png")
            torch.save(train_vit(traits, normalise).state_dict(), part / "vit.pt")
    vit = SmallViT().eval().requires_grad_(False)
    try:
        vit.load_state_dict(torch.load(folder / "vit.pt"))
    except (OSError, EOFError, RuntimeError, UnpicklingError) as error:
        raise InputError(f"{folder / 'vit.pt'} is damaged: delete {folder}, and the same command "
                         "makes it again") from error
    return vit, folder / "images"
