"""The built-in demo: drawn images of a hierarchy that is known, and a small ViT trained on them.

An image is a board of letters. Every WordNet node above a class gives it one letter, and the class
has one of its own; the ViT learns to name the letters it sees. They lie off the middle of their
cells, this way and that, so that it takes several layers to read them. The hierarchy is planted, so
it must be found: the positive control of the whole kit.
"""
from itertools import product
from pathlib import Path
from pickle import UnpicklingError

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.functional import (binary_cross_entropy_with_logits, fold,
                                 scaled_dot_product_attention)
from torchvision.transforms.functional import to_pil_image, to_tensor
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
SEED = 0  # of images, boards and the ViT
CELLS = 3  # a board has so many rows and columns of cells
CELL = 14  # pixels a side
OFF = range(-2, 3)  # how far a letter is off the middle of its cell, each way
SIZE = CELLS * CELL  # of an image
LETTERS = "ABDEFGHIJKLMNPQRTYabcdeghijkmnopqrstuvwxyz234678"  # none looks like another
SHOWN = 0.8  # how often a hypernym's letter is on the board
OWN_SHOWN = 0.5  # and a class's own: rarer, else latents see it and a hypernym's as one
TRAITS = {}  # wnid of a hypernym: its trait in words, once a demo is open
IMAGES = {"train": 150, "val": 50}  # of each class
STEPS = 1200  # of the ViT's training, on boards drawn anew for each
BATCH = 128
LR = 2e-3  # at its highest


def class_letters(tree):
    """(C, LETTERS) the chance that an image of a class shows a letter: one for each hypernym of the
    class below the root, a capital, and one of its own."""
    hypernyms = tree.hypernyms[-2::-1]  # from the most general on
    for v, letter in zip(hypernyms, LETTERS):
        TRAITS[tree.wnids[v]] = f"Planted trait: the letter {letter}."
    chance = torch.tensor([SHOWN] * len(hypernyms) + [OWN_SHOWN] * len(CLASSES))
    return torch.from_numpy(tree.leaves[[*hypernyms, *tree.classes]].T) * chance


def letter_bitmaps():
    """(25, LETTERS + 1, CELL, CELL) 1 where a letter is, by how it lies off the middle; the last
    letter is an empty cell."""
    font = ImageFont.load_default(size=11)
    bitmaps = []
    for letter in LETTERS + " ":
        picture = Image.new("L", (CELL, CELL))
        ImageDraw.Draw(picture).text((CELL / 2, 10), letter, 255, font, anchor="ms")
        bitmaps.append(to_tensor(picture))
    return torch.stack([torch.cat(bitmaps).roll(off, (1, 2)) for off in product(OFF, OFF)])


def draw(chance, bitmaps):
    """The chance of each letter (B, LETTERS) -> images (B, 3, S, S), and which letters they show:
    each in a random cell of its own, light on grey, under pixel noise."""
    B, L = chance.shape
    shown = torch.rand(B, L) < chance
    # a board's letters, then L for an empty cell; then shuffled over the cells
    letter = torch.where(shown, torch.arange(L), L).sort(1).values
    letter = letter.gather(1, torch.rand(B, CELLS**2).argsort(1))
    board = bitmaps[torch.randint(len(bitmaps), letter.shape), letter]  # (B, cells, CELL, CELL)
    image = fold(board.flatten(2).mT, SIZE, CELL, stride=CELL)  # (B, 1, S, S)
    image = 0.5 + 0.4 * image + 0.05 * torch.randn_like(image)
    return image.clamp(0, 1).repeat(1, 3, 1, 1), shown


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

    def __init__(self, classes=len(LETTERS), size=SIZE, patch=CELL, width=32, depth=6, heads=4):
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


def train_vit(chance, bitmaps, normalise):
    """(C, LETTERS) the chance of each letter -> a ViT that names those on a board"""
    vit = SmallViT()
    optimizer = torch.optim.AdamW(vit.parameters(), fused=True)
    for step in tqdm(range(STEPS), "      the demo's ViT"):
        images, shown = draw(chance[torch.randint(len(chance), (BATCH,))], bitmaps)
        loss = binary_cross_entropy_with_logits(vit(normalise(images)), shown.float())
        optimizer.zero_grad()
        loss.backward()
        # up over the first tenth of the steps, down to zero over the last 30%
        optimizer.param_groups[0]["lr"] = LR * min(
            1, (step + 1) / (0.1 * STEPS), (STEPS - step) / (0.3 * STEPS))
        optimizer.step()
    return vit


def folder_of(out):
    return out / f"demo-{code_of(Path(__file__).parent, 'demo.py')[:8]}"


def open_demo(out, normalise):
    """The ViT, and beside it images/{train,val}/<wnid>/000.png ...; made unless they are there.
    Raises InputError if it is damaged."""
    folder = folder_of(out)
    chance = class_letters(Taxonomy.from_wnids(CLASSES))
    bitmaps = letter_bitmaps()
    if RANK == 0 and not folder.is_dir():
        torch.manual_seed(SEED)
        with write_aside(folder) as part:
            for (split, count), (wnid, its) in product(IMAGES.items(), zip(CLASSES, chance)):
                class_folder = part / "images" / split / wnid
                class_folder.mkdir(parents=True)
                for i, image in enumerate(draw(its.repeat(count, 1), bitmaps)[0]):
                    to_pil_image(image).save(class_folder / f"{i:03d}.png")
            torch.save(train_vit(chance, bitmaps, normalise).state_dict(), part / "vit.pt")
    vit = SmallViT().eval().requires_grad_(False)
    try:
        vit.load_state_dict(torch.load(folder / "vit.pt"))
    except (OSError, EOFError, RuntimeError, UnpicklingError) as error:
        raise InputError(f"{folder / 'vit.pt'} is damaged: delete {folder}, and the same command "
                         "makes it again") from error
    return vit
