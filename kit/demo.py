"""The built-in demo: drawn images of a hierarchy that is known, and a small ViT trained on them.

An image is a board of letters. Every WordNet node above a class gives it one letter, and the class
has one of its own; the ViT learns to name the letters it sees. The hierarchy is planted, so it must
be found: the positive control of the whole kit.
"""
from pathlib import Path
from pickle import UnpicklingError

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, scaled_dot_product_attention
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
CELLS = 4  # a board has so many rows and columns of cells
CELL = 12  # pixels a side
SIZE = CELLS * CELL  # of an image
LETTERS = "ABDEFGHIJKLMNPQRTYabcdefghijkmnopqrstuvwxyz23478"  # none looks like another
SHOWN = 0.8  # how often a hypernym's letter is on the board
OWN_SHOWN = 0.5  # and a class's own: rarer, else latents see it and a hypernym's as one
TRAITS = {}  # wnid of a hypernym: its trait in words, once a demo is open
IMAGES = {"train": 150, "val": 50}  # of each class
STEPS = 800  # of the ViT's training, on boards drawn anew for each
BATCH = 128
LR = 4e-3  # at its highest


def class_letters(tree):
    """(C, LETTERS) bool, which letters a class may have: one for each hypernym of it below the
    root, a capital, and one of its own."""
    hypernyms = tree.hypernyms[-2::-1]  # from the most general on
    for v, letter in zip(hypernyms, LETTERS):
        TRAITS[tree.wnids[v]] = f"Planted trait: the letter {letter}."
    nodes = [*hypernyms, *tree.classes]
    return torch.from_numpy(tree.leaves[nodes].T)


def letter_bitmaps():
    """(LETTERS + 1, CELL, CELL) float, 1 where a letter is; the last is an empty cell."""
    font = ImageFont.load_default(size=11)
    bitmaps = torch.zeros(len(LETTERS) + 1, CELL, CELL)
    for bitmap, letter in zip(bitmaps, LETTERS):
        picture = Image.new("L", (CELL, CELL))
        ImageDraw.Draw(picture).text((CELL / 2, 9), letter, 255, font, anchor="ms")
        bitmap.copy_(to_tensor(picture)[0])
    return bitmaps


def draw(letters, bitmaps, generator):
    """Letters that may be there (B, LETTERS) bool -> images (B, 3, S, S) uint8, and the letters
    that are: each in a random cell of its own, light on grey, under pixel noise."""
    B, L = letters.shape
    chance = torch.full((L,), SHOWN)
    chance[-len(CLASSES) :] = OWN_SHOWN
    shown = letters & (torch.rand(B, L, generator=generator) < chance)
    # a board's letters, then L for an empty cell; then shuffled over the cells
    letter = torch.where(shown, torch.arange(L), L).sort(1).values[:, : CELLS**2]
    cells = torch.rand(B, CELLS**2, generator=generator).argsort(1)
    board = bitmaps[letter.gather(1, cells)]  # (B, cells, CELL, CELL)
    image = board.unflatten(1, (CELLS, CELLS)).transpose(2, 3).reshape(B, 1, SIZE, SIZE)
    image = 0.5 + 0.4 * image + 0.1 * torch.randn(image.shape, generator=generator)
    return (image.clamp(0, 1) * 255).byte().expand(-1, 3, -1, -1), shown


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


def train_vit(letters, bitmaps, normalise):
    """letters (C, LETTERS) -> a ViT that names those on a board"""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(2)
    vit = SmallViT()
    optimizer = torch.optim.AdamW(vit.parameters(), fused=True)
    for step in tqdm(range(STEPS), "      the demo's ViT"):
        labels = torch.randint(len(letters), (BATCH,), generator=generator)
        images, shown = draw(letters[labels], bitmaps, generator)
        loss = binary_cross_entropy_with_logits(vit(normalise(images.float() / 255)), shown.float())
        optimizer.zero_grad()
        loss.backward()
        # up over the first tenth of the steps, down to zero over the last 30%
        factor = min(1, (step + 1) / (0.1 * STEPS), (STEPS - step) / (0.3 * STEPS))
        optimizer.param_groups[0]["lr"] = LR * factor
        optimizer.step()
    return vit


def folder_of(out):
    return out / f"demo-{code_of(Path(__file__).parent, 'demo.py')[:8]}"


def open_demo(out, normalise):
    """The ViT, and beside it images/{train,val}/<wnid>/000.png ...; made unless they are there.
    Raises InputError if they are damaged."""
    folder = folder_of(out)
    letters = class_letters(Taxonomy.from_wnids(CLASSES))
    bitmaps = letter_bitmaps()
    if RANK == 0 and not folder.is_dir():
        with write_aside(folder) as part:
            for seed, (split, count) in enumerate(IMAGES.items()):
                generator = torch.Generator().manual_seed(seed)
                for wnid, its in zip(CLASSES, letters):
                    class_folder = part / "images" / split / wnid
                    class_folder.mkdir(parents=True)
                    images, _ = draw(its.expand(count, -1), bitmaps, generator)
                    for i, image in enumerate(images):
                        to_pil_image(image).save(class_folder / f"{i:03d}.png")
            torch.save(train_vit(letters, bitmaps, normalise).state_dict(), part / "vit.pt")
    vit = SmallViT().eval().requires_grad_(False)
    try:
        vit.load_state_dict(torch.load(folder / "vit.pt"))
    except (OSError, EOFError, RuntimeError, UnpicklingError) as error:
        raise InputError(f"{folder / 'vit.pt'} is damaged: delete {folder}, and the same command "
                         "makes it again") from error
    return vit
