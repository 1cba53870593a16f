"""Class tokens of DINOv2, layer by layer: load a ViT from torch.hub, hook its blocks.

    model = load_backbone("dinov2_vits14")                       # or any ViT with .blocks
    images = torch.stack([eval_transform()(picture)])            # (B, 3, 224, 224), from PIL
    tokens = class_tokens(model, images, layers=range(12))       # (12, B, 384)
    record(model, dataset, "tokens/train", layers=[11])          # of many images, on disk
    finish("tokens/train", [11], len(dataset), 384)              # tokens/train/layer_11.npy
    maps = relevancy_maps(model, images, 11, lambda x: x[:, 0])  # (B, 16, 16): where it looks

Layer N is the output of blocks.N, counted from 0, before the final norm: to the bit DINOv2's own
`get_intermediate_layers(images, n=[N], return_class_token=True, norm=False)`. The same code serves
DINOv2 (with and without registers), DINOv3, DINO v1 and timm's ViTs: their class token is token 0.
"""
import hashlib
import json
import math
import os
import re
import time
import warnings
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, softmax
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from tqdm import tqdm

# code pinned to a commit: a run next year is this run
HUB = "facebookresearch/dinov2:b8931f7bf91576930313be2c6d6af376033b35f0"
BATCH = 64  # images through the backbone at once
SAVE_SECONDS = 30  # how often the rows so far are put on disk for good
HEADER = 128  # bytes before the first row of an .npy file


class BackboneError(ValueError):
    """A backbone that cannot be loaded or is no ViT; a layer it lacks; a token not finite."""


def load_backbone(name="dinov2_vitg14", hub=HUB, device="cpu", **options) -> nn.Module:
    """A ViT from a torch.hub repository ("owner/name:commit") or a folder with a hubconf.py.

    `options` go to its entry point, as pretrained=False. Raises BackboneError: no such folder or
    entry point, no network, a package missing, no ViT.
    """
    folder = Path(hub).expanduser()
    if (folder / "hubconf.py").is_file():
        repo = str(folder)
        where = {"source": "local"}
    elif not folder.exists() and re.fullmatch(r"[\w-]+/[\w.-]+(:[\w./-]+)?", hub):
        # skip_validation: torch.hub would ask GitHub's rate-limited API, which knows no commits
        repo = hub
        where = {"source": "github", "skip_validation": True, "trust_repo": True}
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
    except (Exception, SystemExit) as error:  # the repository's own code, which may raise anything
        raise BackboneError(f"{hub}: {name} failed with {type(error).__name__}: {error}; a package "
                            f"may be missing, or the copy in {torch.hub.get_dir()} be incomplete: "
                            "then delete it") from error
    if not len(getattr(model, "blocks", ())) or getattr(model, "cls_token", None) is None:
        raise BackboneError(f"{name} is no vision transformer with a class token: it needs .blocks "
                            "and .cls_token")
    return model.eval().requires_grad_(False).to(device)


def weights_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def eval_transform(resize=256, crop=224, interpolation="bicubic", mean=(0.485, 0.456, 0.406),
                   std=(0.229, 0.224, 0.225)):
    """DINOv2's evaluation transform, PIL image -> (3, crop, crop). resize: the short side, or both
    as (height, width)."""
    return transforms.Compose([
        transforms.Resize(resize, InterpolationMode(interpolation)),
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
    if asked.get("crop_mode") == "squash":  # without keeping the shape
        resize = (resize, resize)
    known = {name: asked[name] for name in ("interpolation", "mean", "std") if name in asked}
    return eval_transform(resize, crop, **known)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks in order, also of a DINOv2 that is built in chunks, as its training leaves it."""
    chunks = [chunk if isinstance(chunk, nn.ModuleList) else [chunk] for chunk in model.blocks]
    return [block for chunk in chunks for block in chunk if not isinstance(block, nn.Identity)]


def class_token_of(output) -> torch.Tensor:
    """A block's output (B, 1+R+P, n), or a list that begins with it as in DINOv3, -> (B, n)"""
    return (output[0] if isinstance(output, (list, tuple)) else output)[:, 0]


@torch.inference_mode()
def check_class_token(model: nn.Module, image: torch.Tensor, layers) -> None:
    """Raises BackboneError where token 0 of a layer does not follow the model's `cls_token`: in
    CaiT and XCiT, say, the class token joins later, and token 0 is a patch."""
    layers = list(layers)
    before = model.cls_token.detach().clone()
    expected = class_tokens(model, image[None], layers)
    model.cls_token += 1 + before.abs().mean()
    moved = (class_tokens(model, image[None], layers) != expected).flatten(1).any(1)
    model.cls_token.copy_(before)
    if not moved.all():
        still = [str(layer) for layer, moves in zip(layers, moved.tolist()) if not moves]
        raise BackboneError(f"token 0 is not the class token in layers {', '.join(still)} of this "
                            "backbone: leave them out with --layers, or choose another backbone")


def class_tokens(model: nn.Module, images: torch.Tensor, layers, precision="float32"):
    """images (B, 3, H, W) -> the class token after each asked-for block, (L, B, n), in one pass.

    precision  of the matrix products: float32, or under autocast float16 or bfloat16
    Raises BackboneError for a layer the model lacks, and for images of a size it does not take.
    """
    layers = list(layers)
    blocks = blocks_of(model)
    for layer in layers:
        if not 0 <= layer < len(blocks):
            raise BackboneError(f"no layer {layer}: the backbone has 0 to {len(blocks) - 1}")
    if getattr(model, "cls_token", None) is None:
        raise BackboneError("the model has no cls_token, and so no class token")
    tokens = images.new_empty(len(layers), len(images), model.cls_token.shape[-1])
    entered = []

    def keep(position, block, inputs, output):
        tokens[position] = class_token_of(output)  # copied: a view would keep all of it alive

    handles = [blocks[0].register_forward_pre_hook(lambda *given: entered.append(True))]
    for position, layer in enumerate(layers):
        handles.append(blocks[layer].register_forward_hook(partial(keep, position)))
    low = precision != "float32"
    try:
        with torch.autocast(images.device.type, getattr(torch, precision), enabled=low):
            model(images)
    except (RuntimeError, AssertionError) as error:
        if entered or isinstance(error, torch.OutOfMemoryError) or "CUDA error" in str(error):
            raise  # a bug inside a block, or of the device, is no matter of the images
        size = " x ".join(map(str, images.shape[1:]))
        raise BackboneError(f"the backbone takes no images of {size} ({error}); another "
                            "--transform makes others") from error
    finally:
        for handle in handles:
            handle.remove()
    return tokens


def token_path(folder, layer: int) -> Path:
    return Path(folder, f"layer_{layer:02d}.npy")


class ImageError(ValueError):
    """An image that cannot be read: an item of a dataset in place of its tensor."""


def _collate(items):
    """Items of a dataset -> images (B, 3, H, W), blank where there is none, and {place: error}."""
    errors = {i: item for i, item in enumerate(items) if isinstance(item, Exception)}
    images = [item for item in items if isinstance(item, torch.Tensor)]
    for i in errors:
        items[i] = torch.zeros_like(images[0]) if images else torch.zeros(3, 1, 1)
    return torch.stack(items), errors


@torch.inference_mode()
def record(model: nn.Module, images, folder, layers, precision="float32", workers=0, rank=0,
           ranks=1, skip_bad=False) -> None:
    """Write the class tokens of a dataset to folder/layer_NN.part, in fp16; `finish` makes
    layer_NN.npy of them. Goes on where it was interrupted.

    images  items are tensors (3, H, W), or exceptions, which are raised; with skip_bad an
            ImageError is noted instead
    rank    number of this process among `ranks`, each of which writes its share of the rows

    Raises BackboneError for a token that is not finite in fp16.
    """
    N = len(images)
    width = model.cls_token.shape[-1]
    device = model.cls_token.device
    layers = list(layers)
    steps = -(-N // BATCH)  # shares are whole batches
    first, end = (min(N, part * steps // ranks * BATCH) for part in (rank, rank + 1))
    Path(folder).mkdir(parents=True, exist_ok=True)
    notes = Path(folder, f"progress_{rank}_of_{ranks}.json")
    row, bad = first, {}
    paths = [token_path(folder, layer).with_suffix(".part") for layer in layers]
    if notes.exists() and all(path.exists() for path in paths):
        noted = json.loads(notes.read_text())
        if set(layers) <= set(noted["layers"]):
            row, bad = noted["row"], noted["bad"]
    loader = DataLoader(images, BATCH, sampler=range(row, end), num_workers=workers,
                        collate_fn=_collate, pin_memory=device.type == "cuda",
                        timeout=600 if workers else 0)
    bar = tqdm(total=end - first, initial=row - first, unit="image", disable=rank > 0,
               desc=f"      {Path(folder).name}")
    saved = time.monotonic()
    with bar, ExitStack() as stack:
        for path in paths:
            path.touch()
        files = [stack.enter_context(open(path, "r+b")) for path in paths]
        for batch, errors in loader:
            for i, error in errors.items():
                if not (skip_bad and isinstance(error, ImageError)):
                    raise error
                bad[str(row + i)] = str(error)
            tokens = np.zeros((len(layers), len(batch), width), np.float16)
            if len(errors) < len(batch):
                batch = batch.to(device, non_blocking=True)
                tokens = class_tokens(model, batch, layers, precision).half().cpu().numpy()
            for layer, file, rows in zip(layers, files, tokens):
                if not np.isfinite(rows).all():
                    image = row + int(np.argmin(np.isfinite(rows).all(1)))
                    raise BackboneError(
                        f"layer {layer}, image {image}: the class token is not finite in fp16; try "
                        "--precision float32, or leave this layer out with --layers")
                file.seek(HEADER + 2 * width * row)
                file.write(rows.tobytes())
            row += len(batch)
            bar.update(len(batch))
            if row == end or time.monotonic() - saved > SAVE_SECONDS:
                for file in files:  # on disk for good, before it is noted
                    file.flush()
                    os.fsync(file.fileno())
                _write_json(notes, {"layers": layers, "row": row, "bad": bad})
                saved = time.monotonic()


def _write_json(path: Path, content) -> None:
    """Written aside and renamed: the old or the new is there, whenever the process is killed."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content))
    new.replace(path)


def finish(folder, layers, rows: int, width: int) -> None:
    """After all ranks: layer_NN.part -> layer_NN.npy, without the rows of unreadable images, which
    left_out.json lists with the reasons. Raises ImageError where no image could be read, or others
    than when earlier layers were recorded."""
    bad = {}
    about = {"descr": "<f2", "fortran_order": False, "shape": (rows, width)}
    notes = sorted(Path(folder).glob("progress_*.json"))
    left_out = Path(folder, "left_out.json")
    for path in notes:
        bad |= json.loads(path.read_text())["bad"]
    if len(bad) == rows:
        raise ImageError(f"none of the {rows} images can be read; {bad['0']}")
    if left_out.exists() and json.loads(left_out.read_text()).keys() != bad.keys():
        raise ImageError(f"other images could be read when earlier layers of {folder} were "
                         "recorded: delete that folder")
    _write_json(left_out, bad)
    for layer in layers:
        path = token_path(folder, layer)
        part = path.with_suffix(".part")
        if path.exists():
            continue
        with open(part, "r+b") as file:
            np.lib.format.write_array_header_1_0(file, about)
        if bad:
            tokens = np.delete(np.load(part), list(map(int, bad)), axis=0)
            np.save(path.with_suffix(".new.npy"), tokens)
            path.with_suffix(".new.npy").replace(path)
            part.unlink()
        else:
            part.replace(path)
    for path in notes:
        path.unlink()


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
    if not 0 <= layer < len(blocks_of(model)):
        raise BackboneError(f"no layer {layer}: the backbone has 0 to {len(blocks_of(model)) - 1}")
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
        raise BackboneError(f"no relevancy map: there are {len(attention.maps)} softmax attentions "
                            f"in {layer + 1} blocks of this backbone")
    with torch.enable_grad():  # images do not mix, so that each gets its own gradient
        gradients = torch.autograd.grad(score(tokens[0]).sum(), attention.maps)
    N = attention.maps[0].shape[-1]
    R = torch.eye(N, dtype=images.dtype, device=images.device).expand(len(images), N, N)
    for A, gradient in zip(attention.maps, gradients):
        R = R + (A.detach() * gradient).relu().mean(1) @ R
    modules = getattr(model, "patch_embed", nn.Identity()).modules()
    stride = next((module.stride for module in modules if isinstance(module, nn.Conv2d)), None)
    if stride is None:
        raise BackboneError("no relevancy map: patch_embed of this backbone has no convolution")
    h = images.shape[2] // stride[0]
    w = images.shape[3] // stride[1]
    return R[:, 0, N - h * w :].unflatten(1, (h, w))  # patches come last, after any registers
