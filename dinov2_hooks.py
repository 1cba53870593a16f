"""Class tokens of DINOv2, layer by layer: load a vision transformer from torch.hub and hook its blocks.

    model = load_backbone("dinov2_vits14")                          # or any ViT with .blocks and .cls_token
    images = torch.stack([eval_transform()(picture)])               # (B, 3, 224, 224), from PIL images
    tokens = class_tokens(model, images, layers=range(12))          # (12, B, 384)

Layer N is the output of blocks.N, 0-based, before the final norm: DINOv2's own
`get_intermediate_layers(images, n=[N], return_class_token=True, norm=False)`, to the bit. The same code serves DINOv2
(S, B, L, g; with and without registers), DINO v1 and timm's ViTs: in all of them the class token is token 0.
"""
import ast
import io
import math
import os
import re
import warnings
import zlib
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode

HUB = "facebookresearch/dinov2:b8931f7bf91576930313be2c6d6af376033b35f0"  # code pinned: a run next year is this run


class BackboneError(ValueError):
    """A backbone that cannot be loaded or is no ViT; a layer it lacks; a class token that is not finite."""


# ---------------------------------------------------------------------------------------------------------------------
# the model and its images


def load_backbone(name: str = "dinov2_vitg14", hub: str = HUB, device: str = "cpu", **options) -> nn.Module:
    """A ViT from a torch.hub repository ("owner/name:commit") or from a local folder with a hubconf.py; `options` go to
    its entry point, as pretrained=False.

    Raises BackboneError, in one sentence: no such folder or entry point, no network, a package missing, no ViT.
    """
    folder = Path(hub).expanduser()
    if folder.is_dir():
        if not (folder / "hubconf.py").is_file():
            raise BackboneError(f"--hub {hub}: the folder has no hubconf.py, which torch.hub loads models from")
        repo, source = str(folder), {"source": "local"}
    elif re.fullmatch(r"[\w-]+/[\w.-]+(:[\w./-]+)?", hub):
        # skip_validation: without it torch.hub asks GitHub's rate-limited API, which knows branches but no commits
        repo, source = hub, {"source": "github", "skip_validation": True, "trust_repo": True}
    else:
        raise BackboneError(f"--hub {hub}: no such folder, and not of the form owner/name:commit on GitHub")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="xFormers")  # DINOv2 warns three times that it does without
            model = torch.hub.load(repo, name, verbose=False, **source, **options)
    except OSError as error:  # URLError and HTTPError among them
        raise BackboneError(
            f"--hub {hub}: {name} could not be fetched ({error}); without internet, pass a local copy of the "
            "repository as --hub, with the weights in torch.hub's cache (README, 'Without internet')"
        ) from error
    except (Exception, SystemExit) as error:  # the repository's own code runs here, and may raise anything
        if "Cannot find callable" in str(error):
            raise BackboneError(f"--backbone {name}: {hub} has no such model; it has {_entry_points(repo)}") from error
        package = error.name if isinstance(error, ImportError) else str(error).partition("Missing dependencies: ")[2]
        if package:
            raise BackboneError(f"--hub {hub} needs a package that is missing: pip install {package}") from error
        raise BackboneError(f"--hub {hub}: {name} failed with {type(error).__name__}: {error}") from error
    if not (isinstance(model, nn.Module) and len(getattr(model, "blocks", ())) and hasattr(model, "cls_token")):
        raise BackboneError(f"--backbone {name} is no vision transformer: it needs .blocks and .cls_token")
    return model.eval().requires_grad_(False).to(device)


def _entry_points(repo: str) -> str:
    """The names of the models a torch.hub repository offers, read from its hubconf.py without running it."""
    folder = Path(repo) if Path(repo).is_dir() else next(Path(torch.hub.get_dir()).glob(re.sub("[/:]", "_", repo) + "*"))
    names = []
    for node in ast.parse((folder / "hubconf.py").read_text()).body:
        if isinstance(node, ast.FunctionDef):
            names.append(node.name)
        elif isinstance(node, ast.ImportFrom):
            names += [alias.asname or alias.name for alias in node.names]
    return ", ".join(sorted(name for name in names if name[0].islower()))


def eval_transform(resize: int = 256, crop: int = 224):
    """DINOv2's evaluation transform, PIL image -> (3, crop, crop): short side to `resize`, bicubic; centre crop."""
    return transforms.Compose([
        transforms.Resize(resize, interpolation=InterpolationMode.BICUBIC),
        transforms.CenterCrop(crop),
        transforms.ToTensor(),
        transforms.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    ])


# ---------------------------------------------------------------------------------------------------------------------
# hooks


def class_tokens(model: nn.Module, images: torch.Tensor, layers) -> torch.Tensor:
    """Class token of each image after each asked-for block, in one forward pass: images (B, 3, H, W) -> (L, B, n).

    Raises BackboneError for a layer the model lacks, and for a model that fails on these images.
    """
    layers = list(layers)
    check_layers(model, layers)
    tokens = torch.empty(len(layers), len(images), model.cls_token.shape[-1], device=images.device)

    def keep(place):
        def hook(block, inputs, output):
            tokens[place] = output[:, 0]  # copied: a view would keep the block's whole output, (B, 1+R+P, n), alive
        return hook

    blocks = blocks_of(model)
    handles = [blocks[layer].register_forward_hook(keep(place)) for place, layer in enumerate(layers)]
    try:
        model(images)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, AssertionError) as error:
        shape = " x ".join(map(str, images.shape[1:]))
        raise BackboneError(f"the backbone fails on images of {shape} ({type(error).__name__}: {error})") from error
    finally:
        for handle in handles:
            handle.remove()
    return tokens


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks in order, also of a DINOv2 model built in chunks, as its training code leaves it."""
    chunks = [chunk if isinstance(chunk, nn.ModuleList) else [chunk] for chunk in model.blocks]
    return [block for chunk in chunks for block in chunk if not isinstance(block, nn.Identity)]


def check_layers(model: nn.Module, layers) -> None:
    """Raises BackboneError for a layer the model lacks."""
    depth = len(blocks_of(model))
    wrong = [layer for layer in layers if not 0 <= layer < depth]
    if wrong:
        raise BackboneError(f"--layers: layer {wrong[0]} is out of range, the backbone has layers 0 to {depth - 1}")


@torch.inference_mode()
def record_class_tokens(model: nn.Module, batches, layers, folder, names=None, commit=None, resume=None) -> dict[str, int]:
    """Write the class tokens of all images after all asked-for blocks to disk, in one pass.

    batches  yields (images (B, 3, H, W), labels (B,), ids (B,)); an id is the image's number, for `names`
    folder   gets layer_00.npy ... of shape (N, n) in fp16, and labels.npy and ids.npy of shape (N,) in int64
    names    file names by id, for the message
    commit   called after every batch with a function: that puts all so far on disk for good, in FILE.part, and returns
             {file: (rows, CRC-32)}
    resume   what such a function returned: rows after those are dropped, and batches starts behind them

    Returns the `checksum` of each file. On a GPU under autocast, in bf16 where it can.
    Raises BackboneError for a model that fails on these images, for a token that is not finite in fp16, and for a .part
    file shorter than `resume` says.
    """
    folder, layers = Path(folder), list(layers)
    folder.mkdir(parents=True, exist_ok=True)
    device = next(model.parameters()).device
    fast = nullcontext()
    if device.type == "cuda":
        fast = torch.autocast("cuda", torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16)
    kinds = {f"layer_{layer:02d}.npy": (np.float16, (model.cls_token.shape[-1],)) for layer in layers}
    kinds |= {name: (np.int64, ()) for name in ("labels.npy", "ids.npy")}
    files = {name: GrowingArray(folder / name, *kind, *(resume or {}).get(name, ())) for name, kind in kinds.items()}
    sync = lambda: {name: file.sync() for name, file in files.items()}
    try:
        for images, labels, ids in batches:
            with fast:
                tokens = class_tokens(model, images.to(device, non_blocking=True), layers).half()  # (L, B, n)
            if not tokens.isfinite().all():  # asked where they are: on the host it takes as long as writing them
                place, image = (~tokens.isfinite()).any(-1).nonzero()[0].tolist()
                name = names[int(ids[image])] if names is not None else int(ids[image])
                raise BackboneError(f"layer {layers[place]}, image {name}: the class token is not finite in fp16")
            for file, rows in zip(files.values(), [*tokens.cpu(), labels, ids]):
                file.append(rows.numpy())
            if commit is not None:
                commit(sync)
        sync()
    finally:
        for file in files.values():
            file.file.close()
    return {name: file.finish() for name, file in files.items()}  # only now: a file that bears its name is whole


class GrowingArray:
    """A .npy file of rows that are appended, PATH.part until it is whole.

    With `rows` and `crc`, as `sync` returned them, goes on behind the first `rows` of the .part file that is there.
    Written, not memory-mapped: on a full disk a write is an error, a store to a mapped page ends the process.
    """

    def __init__(self, path, dtype, row_shape: tuple, rows: int = 0, crc: int = 0):
        self.path, self.part = Path(path), Path(f"{path}.part")
        self.dtype, self.row_shape, self.rows, self.crc = np.dtype(dtype), row_shape, rows, crc
        end = HEADER + rows * math.prod(row_shape) * self.dtype.itemsize
        if rows and self.path.is_file() and not self.part.is_file():  # stopped while files were given their names
            self.path.replace(self.part)
        if rows and not (self.part.is_file() and self.part.stat().st_size >= end):
            raise BackboneError(f"{self.part} is shorter than was recorded: delete it, and its rows are recorded anew")
        self.file = open(self.part, "r+b" if rows else "wb")
        self.file.truncate(end)
        self.file.seek(end)

    def append(self, rows: np.ndarray) -> None:
        """rows (B, *row_shape)"""
        piece = np.ascontiguousarray(rows, self.dtype).tobytes()
        self.file.write(piece)
        self.rows, self.crc = self.rows + len(rows), zlib.crc32(piece, self.crc)

    def sync(self) -> tuple[int, int]:
        """Wait until all rows, and a header for as many, are on disk; returns their number and CRC-32."""
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {
            "descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.rows, *self.row_shape),
        })
        self.header = header.getvalue()  # numpy pads it to one length for any number of rows
        assert len(self.header) == HEADER
        self.file.seek(0)
        self.file.write(self.header)
        self.file.seek(0, 2)
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.rows, self.crc

    def finish(self) -> int:
        """Give the file its name, after a `sync`; returns its `checksum`."""
        self.file.close()
        self.part.replace(self.path)
        return zlib.crc32(self.header, self.crc)


HEADER = 128  # bytes of an .npy file before its rows


def checksum(path) -> int:
    """CRC-32 of a file with its first 128 bytes taken last: of an .npy file that grows, the header is known last."""
    with open(path, "rb") as file:
        header, crc = file.read(HEADER), 0
        while piece := file.read(1 << 24):
            crc = zlib.crc32(piece, crc)
    return zlib.crc32(header, crc)


# ---------------------------------------------------------------------------------------------------------------------
# relevancy maps


class _Reached(Exception):
    """Ends a forward pass after the block it was needed for."""


def relevancy_maps(model: nn.Module, images: torch.Tensor, layer: int, score) -> torch.Tensor:
    """Where in each image a function of the class token looks: (B, 3, H, W) -> (B, h, w), a value of at least 0 a patch.

    score  class tokens (B, n) after block `layer` -> (B,), as lambda x: sae.encode(x)[:, latent]

    Gradient-weighted attention rollout (Chefer, Gur, Wolf 2021, "Generic Attention-model Explainability", eqs. 5, 6):
    R = I, and for every block from 0 to `layer`  R += mean over heads of relu(dscore/dA * A) @ R, with A (B, heads, N, N)
    the block's attention; the map is the class token's row of R over the patches. All zero where the score is flat.

    The models fuse their attention, so that no A reaches a hook: while the map is made, hooks on blocks.N.attn replace
    its output by an explicit computation, which is checked against it. The model is left as it was.
    Raises BackboneError where a model's attention is not softmax(q kᵀ / √d) v on .qkv and .proj.
    """
    check_layers(model, [layer])
    blocks, attentions, tokens = blocks_of(model)[: layer + 1], [], []

    def explicit(attn, inputs, output):
        fused = (output[0] if isinstance(output, tuple) else output).detach()  # DINO v1 returns its attention beside it
        mixed, attention = _explicit_attention(attn, inputs[0])
        if not torch.allclose(mixed, fused, rtol=1e-3, atol=1e-3 * float(fused.abs().max())):
            raise BackboneError(f"no relevancy map: {type(attn).__name__} of this backbone is no plain softmax attention")
        attentions.append(attention)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    def stop(block, inputs, output):
        tokens.append(output[:, 0])
        raise _Reached

    handles = [block.attn.register_forward_hook(explicit) for block in blocks] + [blocks[-1].register_forward_hook(stop)]
    try:
        with torch.enable_grad():
            model(images)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    with torch.enable_grad():
        gradients = torch.autograd.grad(score(tokens[0]).sum(), attentions)  # images do not mix: each gets its own
    N = attentions[0].shape[-1]
    R = torch.eye(N, dtype=images.dtype, device=images.device).expand(len(images), N, N)
    for attention, gradient in zip(attentions, gradients):
        R = R + (attention.detach() * gradient).relu().mean(1) @ R
    stride = next(module.stride for module in model.patch_embed.modules() if isinstance(module, nn.Conv2d))
    h, w = images.shape[2] // stride[0], images.shape[3] // stride[1]
    return R[:, 0, N - h * w :].unflatten(1, (h, w))  # patches come last, after the class token and any registers


def _explicit_attention(attn: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A block's self-attention step by step: tokens (B, N, n) -> mixed tokens (B, N, n), attention (B, heads, N, N)."""
    q, k, v = attn.qkv(x).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, n/heads) each
    if hasattr(attn, "q_norm"):  # timm
        q, k = attn.q_norm(q), attn.k_norm(k)
    attention = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    if not attention.requires_grad:  # of the first block, where all parameters are frozen
        attention.requires_grad_()
    return attn.proj((attention @ v).transpose(1, 2).flatten(2)), attention


# ---------------------------------------------------------------------------------------------------------------------
# a small ViT with DINOv2's module names, for the demo and the tests


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):  # (B, 1+P, n)
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, 1+P, n/heads)
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SmallViT(nn.Module):
    """images (B, 3, size, size) -> logits (B, classes)"""

    def __init__(self, classes: int, size: int = 32, patch: int = 4, width: int = 96, depth: int = 6, heads: int = 2):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (size // patch) ** 2, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images):
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)  # (B, P, n)
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])
