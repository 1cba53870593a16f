"""Class tokens of DINOv2, layer by layer: load a ViT from torch.hub, hook its blocks.

    model = load_backbone("dinov2_vits14")                       # or any ViT with .blocks
    images = torch.stack([eval_transform()(picture)])            # (B, 3, 224, 224), from PIL
    tokens = class_tokens(model, images, layers=range(12))       # (12, B, 384)
    maps = relevancy_maps(model, images, 11, lambda x: x[:, 0])  # (B, 16, 16): where it looks

Layer N is the output of blocks.N, counted from 0, before the final norm: to the bit DINOv2's own
`get_intermediate_layers(images, n=[N], return_class_token=True, norm=False)`. The same code serves
DINOv2 (with and without registers), DINOv3, DINO v1 and timm's ViTs: their class token is token 0.
"""
import hashlib
import math
import os
import re
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, softmax
from torch.overrides import TorchFunctionMode
from torchvision import transforms
from torchvision.transforms import InterpolationMode

# code pinned to a commit: a run next year is this run
HUB = "facebookresearch/dinov2:b8931f7bf91576930313be2c6d6af376033b35f0"


class BackboneError(ValueError):
    """A backbone that cannot be loaded or is no ViT; a layer it lacks; a token not finite."""


def load_backbone(name="dinov2_vitg14", hub=HUB, device="cpu", **options) -> nn.Module:
    """A ViT from a torch.hub repository ("owner/name:commit") or a folder with a hubconf.py.

    `options` go to its entry point, as pretrained=False. Raises BackboneError: no such folder or
    entry point, no network, a package missing, no ViT.
    """
    folder = Path(hub).expanduser()
    if (folder / "hubconf.py").is_file():
        repo, where = str(folder), {"source": "local"}
    elif not folder.exists() and re.fullmatch(r"[\w-]+/[\w.-]+(:[\w./-]+)?", hub):
        # skip_validation: torch.hub would ask GitHub's rate-limited API, which knows no commits
        repo, where = hub, {"source": "github", "skip_validation": True, "trust_repo": True}
    else:
        raise BackboneError(f"{hub} is no folder with a hubconf.py, and no owner/name:commit")
    os.environ["XFORMERS_DISABLED"] = "1"  # of DINOv2's code: other kernels, and so other tokens
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="xFormers")  # that it does without
            model = torch.hub.load(repo, name, verbose=False, **where, **options)
    except OSError as error:  # URLError and HTTPError among them
        raise BackboneError(
            f"{name} could not be fetched from {hub} ({error}); without internet, give a local copy"
            ", and have the weights in torch.hub's cache (README, 'Without internet')") from error
    except ImportError as error:
        raise BackboneError(f"{hub} needs a package: pip install {error.name}") from error
    except (Exception, SystemExit) as error:  # the repository's own code, which may raise anything
        raise BackboneError(f"{hub}: {name} failed with {type(error).__name__}: {error}") from error
    if not len(getattr(model, "blocks", ())) or getattr(model, "cls_token", None) is None:
        raise BackboneError(f"{name} is no vision transformer with a class token: it needs .blocks "
                            "and .cls_token")
    return model.eval().requires_grad_(False).to(device)


def weights_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def eval_transform(resize: int = 256, crop: int = 224, interpolation="bicubic",
                   mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    """DINOv2's evaluation transform, PIL image -> (3, crop, crop)."""
    return transforms.Compose([
        transforms.Resize(resize, InterpolationMode(interpolation)),  # the short side
        transforms.CenterCrop(crop),
        transforms.ToTensor(),
        transforms.Normalize(mean, std),
    ])


def transform_of(model: nn.Module):
    """The transform that the model asks for in `pretrained_cfg`, a dict as timm's models have it;
    DINOv2's where it says nothing.

    timm's dict describes timm's weights: a model with other weights in it may need another.
    """
    asked = getattr(model, "pretrained_cfg", None) or {}
    crop = asked.get("input_size", (3, 224, 224))[-1]
    resize = math.floor(crop / asked.get("crop_pct", 224 / 256))
    known = {name: asked[name] for name in ("interpolation", "mean", "std") if name in asked}
    return eval_transform(resize, crop, **known)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks in order, also of a DINOv2 that is built in chunks, as its training leaves it."""
    chunks = [chunk if isinstance(chunk, nn.ModuleList) else [chunk] for chunk in model.blocks]
    return [block for chunk in chunks for block in chunk if not isinstance(block, nn.Identity)]


def class_token_of(output) -> torch.Tensor:
    """A block's output (B, 1+R+P, n), or a list that begins with it as in DINOv3, -> (B, n)"""
    return (output[0] if isinstance(output, (list, tuple)) else output)[:, 0]


def class_tokens(model: nn.Module, images: torch.Tensor, layers, precision="float32"):
    """images (B, 3, H, W) -> the class token after each asked-for block, (L, B, n), in one pass.

    precision  of the matrix products: float32, or under autocast float16 or bfloat16
    Raises BackboneError for a layer the model lacks, and for a model that fails on these images.
    """
    layers, blocks = list(layers), blocks_of(model)
    for layer in layers:
        if not 0 <= layer < len(blocks):
            raise BackboneError(f"no layer {layer}: the backbone has 0 to {len(blocks) - 1}")
    tokens = images.new_empty(len(layers), len(images), model.cls_token.shape[-1])

    def keep(place, block, inputs, output):
        tokens[place] = class_token_of(output)  # copied: a view would keep all of it alive

    handles = [blocks[n].register_forward_hook(partial(keep, i)) for i, n in enumerate(layers)]
    low = precision != "float32"
    try:
        with torch.autocast(images.device.type, getattr(torch, precision), enabled=low):
            model(images)
    except (RuntimeError, TypeError, AssertionError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "CUDA error" in str(error):
            raise  # which may be of an earlier operation
        size = " x ".join(map(str, images.shape[1:]))
        raise BackboneError(f"the backbone fails on images of {size} ({error})") from error
    finally:
        for handle in handles:
            handle.remove()
    return tokens


class TokenFiles:
    """One .npy file (images, n) in fp16 a layer, of full size from the start, written in place: on
    a full disk a write is an OSError, where a store to a memory map is a crash.

    One batch is always under way: a GPU computes it while the one before is written.
    """

    def __init__(self, folder, layers, images: int, width: int, precision: str = "float32"):
        self.layers, self.width, self.precision = list(layers), width, precision
        self.under_way = None
        self.paths = [Path(folder, f"layer_{layer:02d}.npy") for layer in self.layers]
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.made = False  # whether any file had to be made: then none of its rows is there yet
        for path in self.paths:
            size = path.stat().st_size if path.is_file() else 0
            if size <= 2 * images * width or np.load(path, mmap_mode="r").shape != (images, width):
                self.made = True
                np.lib.format.open_memmap(path, "w+", np.float16, (images, width))
        self.start = np.load(self.paths[0], mmap_mode="r").offset  # of the first row in a file
        self.files = [open(path, "r+b") for path in self.paths]

    @torch.inference_mode()
    def record(self, model: nn.Module, images: torch.Tensor, first_row: int, names=None) -> None:
        """Begin with images (B, 3, H, W), whose class tokens belong in the rows from `first_row`
        on; then write the batch before.

        Raises BackboneError for a token of that batch that is not finite in fp16: `names` are of
        the images.
        """
        images = images.to(model.cls_token.device, non_blocking=True)
        tokens = class_tokens(model, images, self.layers, self.precision).half()
        arrived = torch.cuda.Event() if tokens.is_cuda else None
        tokens = tokens.to("cpu", non_blocking=True)
        if arrived:
            arrived.record()
        self.write_under_way()
        self.under_way = tokens, arrived, first_row, names

    def write_under_way(self) -> None:
        if self.under_way is None:
            return
        (tokens, arrived, first_row, names), self.under_way = self.under_way, None
        if arrived:
            arrived.synchronize()
        tokens = tokens.numpy()
        finite = np.isfinite(tokens).all(-1)  # (L, B)
        if not finite.all():
            place, image = np.argwhere(~finite)[0]
            name = names[image] if names is not None else first_row + image
            raise BackboneError(f"layer {self.layers[place]}, image {name}: "
                                "the class token is not finite in fp16")
        for file, rows in zip(self.files, tokens):
            file.seek(self.start + 2 * self.width * first_row)
            file.write(rows.tobytes())

    def sync(self) -> None:
        """Wait until all rows so far are on disk for good."""
        self.write_under_way()
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())


class _Reached(Exception):
    """Ends a forward pass after the block that it was needed for."""


class _KeepAttention(TorchFunctionMode):
    """Computes attention step by step, and keeps each softmax(q kᵀ · scale), (B, heads, N, N)."""

    def __init__(self):
        super().__init__()
        self.maps = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is scaled_dot_product_attention:
            return self.attend(*args, **kwargs)
        output = function(*args, **kwargs)
        if function in (torch.softmax, torch.Tensor.softmax, softmax):
            if output.ndim == 4 and output.shape[-1] == output.shape[-2]:
                output = self.keep(output)
        return output

    def attend(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **more):
        if attn_mask is not None or dropout_p or is_causal:
            raise BackboneError("no relevancy map: the attention of this backbone has a mask")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return self.keep((q @ k.mT * scale).softmax(-1)) @ v

    def keep(self, attention):
        if not attention.requires_grad:  # of the first block, where all parameters are frozen
            attention.requires_grad_()
        self.maps.append(attention)
        return attention


def relevancy_maps(model: nn.Module, images: torch.Tensor, layer: int, score) -> torch.Tensor:
    """Where a function of the class token looks: images (B, 3, H, W) -> (B, h, w), one per patch.

    score  class tokens (B, n) after block `layer` -> (B,), as lambda x: sae.encode(x)[:, latent]

    Gradient-weighted attention rollout (Chefer, Gur, Wolf 2021, "Generic Attention-model
    Explainability", eqs. 5 and 6): R = I, and for every block from 0 to `layer`
    R += mean over heads of relu(dscore/dA * A) @ R, with A (B, heads, N, N) the block's attention.
    The map is the class token's row of R over the patches: at least 0, all 0 where score is flat.
    Raises BackboneError where there is not one plain softmax attention a block.
    """
    tokens = []

    def stop(block, inputs, output):
        tokens.append(class_token_of(output))
        raise _Reached

    handle = blocks_of(model)[layer].register_forward_hook(stop)
    try:
        with torch.enable_grad(), _KeepAttention() as attention:
            model(images)
    except _Reached:
        pass
    finally:
        handle.remove()
    if len(attention.maps) != layer + 1:
        found = f"there are {len(attention.maps)} softmax attentions in {layer + 1} blocks"
        raise BackboneError(f"no relevancy map: {found} of this backbone")
    with torch.enable_grad():  # images do not mix, so that each gets its own gradient
        gradients = torch.autograd.grad(score(tokens[0]).sum(), attention.maps)
    N = attention.maps[0].shape[-1]
    R = torch.eye(N, dtype=images.dtype, device=images.device).expand(len(images), N, N)
    for A, gradient in zip(attention.maps, gradients):
        R = R + (A.detach() * gradient).relu().mean(1) @ R
    convolutions = (m for m in model.patch_embed.modules() if isinstance(m, nn.Conv2d))
    stride = next(convolutions).stride
    h, w = images.shape[2] // stride[0], images.shape[3] // stride[1]
    return R[:, 0, N - h * w :].unflatten(1, (h, w))  # patches come last, after any registers
