"""Class tokens of DINOv2, layer by layer: load a ViT from torch.hub, hook its blocks.

    model = load_backbone("dinov2_vits14")                       # or any ViT with .blocks
    images = torch.stack([eval_transform()(picture)])            # (B, 3, 224, 224), from PIL
    tokens = class_tokens(model, images, layers=range(12))       # (12, B, 384)
    record(model, dataset, "tokens/train", layers=[11])          # of many images, on disk
    finish("tokens/train", [11])                                 # tokens/train/layer_11.npy
    maps = relevancy_maps(model, images, 11, lambda x: x[:, 0])  # (B, 16, 16): where it looks

Layer N is the output of blocks.N, counted from 0, before the final norm: to the bit DINOv2's own
`get_intermediate_layers(images, n=[N], return_class_token=True, norm=False)`. The same code serves
DINOv2 (with and without registers), DINOv3, DINO v1 and timm's ViTs: their class token is token 0.
"""
import json
import math
import os
import re
import warnings
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import dropout, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from tqdm import tqdm

# code pinned to a commit: a run next year is this run
HUB = "facebookresearch/dinov2:b8931f7bf91576930313be2c6d6af376033b35f0"
BATCH = 64  # images through the backbone at once
CHUNK = 32  # batches in a file while recording: what an interruption may lose


class BackboneError(ValueError):
    """A backbone that cannot be loaded or is not a ViT, or is in training mode; a layer it lacks; a
    token that is not finite."""


@contextmanager
def process_unchanged():
    """A repository's own code may change the folder, the default dtype and device, gradients."""
    folder = os.getcwd()
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    gradients = torch.is_grad_enabled()
    try:
        yield
    finally:
        os.chdir(folder)
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(device)
        torch.set_grad_enabled(gradients)


def load_backbone(name="dinov2_vitg14", hub=HUB, **options):
    """A ViT from a torch.hub repository ("owner/name:commit") or a folder with a hubconf.py.

    `options` go to its entry point, as pretrained=False. Without it, pretrained=True is asked for:
    timm's entry points would give random weights. Weights of any precision become float32.
    Raises BackboneError: no such folder or entry point, no network, a package missing, not a ViT.
    """
    folder = Path(hub).expanduser()
    where = {"repo_or_dir": str(folder), "source": "local"}
    if not (folder / "hubconf.py").is_file():
        if folder.exists() or not re.fullmatch(r"[\w-]+/[\w.-]+(:[\w./-]+)?", hub):
            raise BackboneError(f"{hub} is not a folder with a hubconf.py, nor owner/name:commit")
        # skip_validation: torch.hub would ask GitHub's rate-limited API, which knows no commits
        where = {"repo_or_dir": hub, "skip_validation": True, "trust_repo": True}
    os.environ["XFORMERS_DISABLED"] = "1"  # of DINOv2's code: other kernels, and so other tokens
    try:
        with warnings.catch_warnings(), process_unchanged():
            warnings.filterwarnings("ignore", message="xFormers")  # that it does without
            load = partial(torch.hub.load, model=name, verbose=False, **where)
            try:
                model = load(**{"pretrained": True, **options})
            except TypeError as error:
                if "pretrained" in options or "'pretrained'" not in str(error):
                    raise
                print(f"      {name} of {hub} does not take pretrained=True: whether its weights "
                      "are trained is up to it")
                model = load(**options)
    except OSError as error:  # URLError and HTTPError among them
        raise BackboneError(
            f"{name} could not be fetched from {hub} ({error}); give a local copy (README, Trouble)"
        ) from error
    except (Exception, SystemExit) as error:  # the repository's own code, which may raise anything
        raise BackboneError(f"{hub}: {name} failed with {type(error).__name__}: {error}; a package "
                            f"may be missing; or delete {torch.hub.get_dir()}'s copy") from error
    if not len(getattr(model, "blocks", ())) or getattr(model, "cls_token", None) is None:
        raise BackboneError(f"{name} is not a vision transformer with a class token: it needs "
                            ".blocks and .cls_token")
    if {parameter.dtype for parameter in model.parameters()} != {torch.float32}:
        model = model.float()
    return model.eval().requires_grad_(False)


def eval_transform(resize=None, crop=224, interpolation="bicubic", mean=(0.485, 0.456, 0.406),
                   std=(0.229, 0.224, 0.225)):
    """DINOv2's evaluation transform, PIL image -> (3, crop, crop). resize: the short side, or both
    as (height, width); None: as much larger than the crop as 256 is than 224. Raises BackboneError
    if it is smaller: the crop would be padded."""
    resize = crop * 256 // 224 if resize is None else resize
    if np.min(resize) < crop:
        raise BackboneError(f"images are resized to {resize} and cropped to {crop}, which would "
                            "pad them: give a smaller crop, or --transform dinov2")
    return transforms.Compose([
        transforms.Resize(resize, InterpolationMode(interpolation)),
        transforms.CenterCrop(crop),
        transforms.ToTensor(),
        transforms.Normalize(mean, std),
    ])


def transform_of(model):
    """The transform that the model asks for in `pretrained_cfg`, a dict as timm's models have it;
    DINOv2's if it says nothing.

    timm's dict describes timm's weights: a model with other weights in it may need another.
    """
    asked = getattr(model, "pretrained_cfg", None) or {}
    crop = asked.get("input_size", [224])[-1]
    resize = math.floor(crop / asked.get("crop_pct", 224 / 256))
    if asked.get("crop_mode") == "squash":  # without keeping the shape
        resize = (resize, resize)
    known = {name: asked[name] for name in ("interpolation", "mean", "std") if name in asked}
    return eval_transform(resize, crop, **known)


def blocks_of(model):
    """The blocks in order, also of a DINOv2 that is built in chunks, as its training leaves it."""
    blocks = []
    for block in model.blocks:
        blocks += block if isinstance(block, nn.ModuleList) else [block]
    return [block for block in blocks if not isinstance(block, nn.Identity)]


def check_mode(model):
    """Raises BackboneError for a model in training mode, or one whose dropout is."""
    for module in model.modules():
        kind = type(module).__name__
        chance = getattr(module, "p", getattr(module, "drop_prob", 1))  # of dropout, of DropPath
        if module is model or chance and re.search("Drop|Stochastic|BatchNorm", kind):
            if module.training:
                raise BackboneError(f"{kind} is in training mode, in which dropout makes tokens "
                                    "random: call model.eval()")


def refuse_chance(tokens, again):
    """Raises BackboneError if two passes over the same images differ by more than rounding."""
    if (tokens - again).norm() > 0.005 * tokens.norm():
        raise BackboneError("the backbone gives the same images other tokens each time: turn off "
                            "its dropout, or whatever else is random in it")


def _checked_blocks(model, layers):
    blocks = blocks_of(model)
    for layer in layers:
        if not 0 <= layer < len(blocks):
            raise BackboneError(f"no layer {layer}: the backbone has 0 to {len(blocks) - 1}")
    if getattr(model, "cls_token", None) is None:
        raise BackboneError("the model has no cls_token, and so no class token")
    return blocks


def class_token_of(output):
    """A block's output (B, 1+R+P, n), or a list that begins with it as in DINOv3, -> (B, n)"""
    return (output[0] if isinstance(output, (list, tuple)) else output)[:, 0]


@torch.inference_mode()
def check_class_token(model, image, layers):
    """Raises BackboneError if token 0 of a layer does not follow the model's `cls_token`: in
    CaiT and XCiT, say, the class token joins later, and token 0 is a patch."""
    before = model.cls_token.clone()
    tokens = class_tokens(model, image[None], layers)
    try:
        model.cls_token += 1 + before.abs().mean()
        moved = class_tokens(model, image[None], layers)
    finally:
        model.cls_token.copy_(before)
    still = [layer for layer, a, b in zip(layers, tokens, moved) if a.equal(b)]
    if still:
        raise BackboneError(f"token 0 is not the class token in layers {still} of this backbone: "
                            "leave them out with --layers, or choose another backbone")


def class_tokens(model, images, layers, precision="float32"):
    """images (B, 3, H, W) -> the class token after each asked-for block, (L, B, n), in one pass.

    precision  of the matrix products: float32, or under autocast float16 or bfloat16
    Raises BackboneError for a layer the model lacks, and for images of a size it does not take.
    """
    blocks = _checked_blocks(model, layers)
    images = images.to(model.cls_token.dtype)
    tokens = images.new_empty(len(layers), len(images), model.cls_token.shape[-1])
    entered = []

    def keep(position, block, inputs, output):
        tokens[position] = class_token_of(output)  # copied: a view would keep all of it alive

    handles = [blocks[0].register_forward_pre_hook(lambda *given: entered.append(True))]
    for position, layer in enumerate(layers):
        handles.append(blocks[layer].register_forward_hook(partial(keep, position)))
    dtype = getattr(torch, precision)
    try:
        with torch.autocast(images.device.type, dtype, enabled=precision != "float32"):
            model(images)
    except (RuntimeError, AssertionError) as error:
        if entered or isinstance(error, torch.OutOfMemoryError) or "CUDA error" in str(error):
            raise  # a bug inside a block, or of the device, is not a matter of the images
        raise BackboneError(f"the backbone does not take images of {tuple(images.shape)}, "
                            f"{images.dtype} ({error}); another --transform makes others"
                            ) from error
    finally:
        for handle in handles:
            handle.remove()
    return tokens


def layer_name(layer):
    return f"layer_{layer:02d}"


def token_path(folder, layer):
    return Path(folder, f"{layer_name(layer)}.npy")


class ImageError(ValueError):
    """An image that cannot be read; others than before; a damaged file of class tokens."""


# While a layer is recorded, layer_NN.part is all of layer_NN.npy, its rows still zeros or in their
# places, and behind them a byte for each row that says what became of it, written after the row.
TO_DO, RECORDED, UNREADABLE = range(3)


def part_path(folder, layer):
    return token_path(folder, layer).with_suffix(".part")


def read_part(path):
    """(tokens, mapped (rows, width); marks (rows,)), of which there are none in a file that is
    finished but for its name. Raises ImageError if it is damaged."""
    try:
        tokens = np.load(path, mmap_mode="r")
        marks = np.fromfile(path, np.uint8, offset=tokens.offset + tokens.nbytes)
    except (ValueError, EOFError):
        tokens, marks = (), np.zeros(1)
    if len(marks) and (len(marks) != len(tokens) or marks.max() > UNREADABLE):
        raise ImageError(f"{path} is damaged: delete this one file, and the same command records "
                         "its layer again")
    return tokens, marks


def rows_to_do(folder, layer, rows):
    """How many of a layer's rows are not recorded yet."""
    path = part_path(folder, layer)
    return int((read_part(path)[1] == TO_DO).sum()) if path.exists() else rows


def allocate(path, rows, width, marks):
    """An .npy file of zeros with so many bytes behind it, by another name. Returns that and where
    its rows begin."""
    aside = path.with_suffix(".new")
    offset = np.lib.format.open_memmap(aside, "w+", np.float16, (rows, width)).offset
    os.truncate(aside, offset + 2 * rows * width + marks)
    return aside, offset


def write_rows(path, rows, tokens, marks):
    """Write some rows (B,), rising, of tokens (B, n) in fp16, and then their marks (B,)."""
    known = np.load(path, mmap_mode="r")
    behind = known.offset + known.nbytes
    runs = np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows) != 1) + 1)
    with open(path, "r+b") as file:  # a full disk would kill a process that writes to a memory map
        for start, values in ((known.offset, tokens), (behind, marks)):
            for run in runs:  # of consecutive rows
                file.seek(start + rows[run[0]] * values[0].nbytes)
                file.write(values[run].tobytes())
            file.flush()
            os.fsync(file.fileno())  # no mark reaches the disk before its row


def rows_pending(paths, shape, skip_bad):
    """((N,) bool, which rows are to be recorded, {position: path} of the files that are not
    finished). Without skip_bad, images that could not be read are tried again."""
    pending = np.zeros(shape[0], bool)
    unfinished = {}
    for position, path in enumerate(paths):
        tokens, marks = read_part(path)
        if len(marks):
            if tokens.shape != shape:
                raise ImageError(f"{path} is of {len(tokens)} images and tokens of width "
                                 f"{tokens.shape[1]}, not {shape[0]} and {shape[1]}: delete this "
                                 "file")
            unfinished[position] = path
            pending |= marks == TO_DO if skip_bad else marks != RECORDED
    return pending, unfinished


@torch.inference_mode()
def record(model, images, folder, layers, precision="float32", workers=0, rank=0, ranks=1,
           skip_bad=False, ready=lambda: None):
    """Write the class tokens of a dataset in fp16, a file for each layer that `finish` makes into
    layer_NN.npy. Goes on where it was interrupted, by any number of processes.

    images  each item is a pair: the image (3, H, W), and why it could not be read; "", or what is
            not text, as an ImageFolder's labels, if it could.
            Raises ImageError for one that could not; with skip_bad `finish` leaves its row out
    rank    number of this process, of `ranks`
    ready   called once the files are there: several processes wait here for the first

    Raises BackboneError for a token that is not finite in fp16, for a model in training mode, and
    for one that gives the same image other tokens each time.
    """
    check_mode(model)
    paths = [part_path(folder, layer) for layer in layers]
    N = len(images)
    width, device = model.cls_token.shape[-1], model.cls_token.device
    # the first process makes the files, in their full size and with all rows to do
    if rank == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for path in paths:
            if not path.exists():
                allocate(path, N, width, N)[0].replace(path)
    ready()
    # of the rows that any layer lacks, this process takes every ranks-th chunk
    pending, unfinished = rows_pending(paths, (N, width), skip_bad)
    rows = np.flatnonzero(pending & (np.arange(N) // (CHUNK * BATCH) % ranks == rank))
    loader = DataLoader(images, BATCH, sampler=rows.tolist(), num_workers=workers,
                        pin_memory=device.type == "cuda", timeout=600 if workers else 0)
    recorded, marks = [], []
    loader = tqdm(loader, f"      {folder}", unit="batch", disable=rank > 0)
    for n, (batch, reasons) in enumerate(loader, 1):
        # all layers in one pass; a token that fp16 cannot hold stops the run
        batch = batch.to(device, non_blocking=True)
        tokens = class_tokens(model, batch, layers, precision)
        if n == 1:
            refuse_chance(tokens, class_tokens(model, batch, layers, precision))
        tokens = tokens.half().cpu()
        for position, i in (~tokens.isfinite().all(2)).nonzero().tolist():
            raise BackboneError(
                f"layer {layers[position]}, image {rows[(n - 1) * BATCH + i]}: the class token is "
                "not finite in fp16; try --precision float32, or leave out this layer (--layers)")
        # what could not be read stops it too, or is said and marked
        for reason in reasons:
            reason = reason if isinstance(reason, str) else ""
            if reason and not skip_bad:
                raise ImageError(reason)
            if reason:
                print(f"      left out: {' '.join(reason.split())}", file=sys.stderr)
            marks.append(UNREADABLE if reason else RECORDED)
        # to the disk, rows first: an interruption loses a chunk of batches at most
        recorded.append(tokens)
        if n % CHUNK == 0 or n == len(loader):
            chunk = torch.cat(recorded, dim=1).numpy()  # (L, B, n)
            stop = (n - 1) * BATCH + len(batch)
            chunk_rows = rows[stop - len(marks) : stop]
            for position, path in unfinished.items():
                write_rows(path, chunk_rows, chunk[position], np.array(marks, np.uint8))
            recorded, marks = [], []


def finish(folder, layers):
    """After all processes: layer_NN.part -> layer_NN.npy, without the rows of unreadable images,
    whose numbers are in left_out.json. Raises ImageError if a row is missing, no image could be
    read, or others than for earlier layers."""
    noted = Path(folder, "left_out.json")
    for layer in layers:
        path = part_path(folder, layer)
        tokens, marks = read_part(path)
        end = tokens.offset + tokens.nbytes
        if len(marks):
            # every row has to be recorded, and the same images in all layers
            if TO_DO in marks:
                raise ImageError(f"{(marks == TO_DO).sum()} rows of {path} are not recorded yet")
            readable = np.flatnonzero(marks == RECORDED)
            if len(readable) == 0:
                raise ImageError(f"none of the {len(marks)} images can be read")
            left_out = json.dumps(np.flatnonzero(marks == UNREADABLE).tolist())
            if noted.exists() and noted.read_text() != left_out:
                raise ImageError(f"other images could be read when earlier layers of {folder} were "
                                 "recorded: put these images back, or delete that folder")
            noted.with_suffix(".new").write_text(left_out)
            noted.with_suffix(".new").replace(noted)
            # without the marks, and without the rows that are left out, in pieces
            if len(readable) < len(marks):
                aside, offset = allocate(path, len(readable), tokens.shape[1], 0)
                with open(aside, "r+b") as file:
                    file.seek(offset)
                    for piece in np.array_split(readable, 1 + len(readable) // 65_536):
                        file.write(tokens[piece].tobytes())
                del tokens  # Windows replaces and cuts no file that is mapped
                aside.replace(path)
            else:
                del tokens
                os.truncate(path, end)
        tokens = None
        path.replace(token_path(folder, layer))


class _KeepAttention(TorchFunctionMode):
    """Computes PyTorch's attention step by step, and keeps softmax(q kᵀ · scale), (B, heads, N, N),
    of each block."""

    def __init__(self):
        super().__init__()
        self.maps = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is scaled_dot_product_attention:
            function = self.attend
        elif function is dropout and kwargs["training"] and kwargs["p"] > 0:
            raise BackboneError("no relevancy map: this backbone has dropout that model.eval() "
                                "does not turn off")
        return function(*args, **kwargs or {})

    def attend(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **more):
        if attn_mask is not None or dropout_p or is_causal:
            raise BackboneError("no relevancy map: the attention of this backbone has a mask or "
                                "dropout")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        self.maps.append((q @ k.mT * scale).softmax(-1))
        return self.maps[-1] @ v


def relevancy_maps(model, images, layer, score):
    """Where a function of the class token looks: images (B, 3, H, W) -> (B, h, w), one per patch.

    score  class tokens (B, n) after block `layer` -> (B,), as lambda x: sae.encode(x)[:, latent]

    Gradient-weighted attention rollout (Chefer, Gur, Wolf 2021, "Generic Attention-model
    Explainability", eqs. 5 and 6): R = I, and for every block from 0 to `layer`
    R += mean over heads of relu(dscore/dA * A) @ R, with A (B, heads, N, N) the block's attention.
    The map is the class token's row of R over the patches: at least 0, all 0 if the score is flat.
    Raises BackboneError unless there is one plain softmax attention per block, and one token per
    output of the convolution in the model's patch_embed, after all others.
    """
    check_mode(model)
    blocks = _checked_blocks(model, [layer])
    scores = []
    grids = []

    def keep(block, inputs, output):  # images do not mix, so that each gets its own gradient
        scores.append(score(class_token_of(output)).sum())

    handles = [blocks[layer].register_forward_hook(keep)]
    for module in getattr(model, "patch_embed", nn.Identity()).modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(
                lambda convolution, inputs, output: grids.append(output.shape[-2:])))
    images = images.detach().to(model.cls_token.dtype)
    try:
        with torch.enable_grad(), _KeepAttention() as attention:
            model(images.requires_grad_())  # all parameters may be frozen
    finally:
        for handle in handles:
            handle.remove()
    maps = attention.maps
    if len(maps) != len(blocks):
        raise BackboneError(f"no relevancy map: there are {len(maps)} softmax attentions in "
                            f"{len(blocks)} blocks of this backbone")
    R = torch.eye(maps[0].shape[-1], dtype=images.dtype, device=images.device)
    for A, gradient in zip(maps, torch.autograd.grad(scores[0], maps[: layer + 1])):
        R = R + (A.detach() * gradient).relu().mean(1) @ R  # (B, N, N)
    patches = math.prod(grids[-1]) if grids else 0
    if not 0 < patches < R.shape[-1]:
        raise BackboneError(f"no relevancy map: the convolution in patch_embed of this backbone "
                            f"makes {patches} patches, and there are {R.shape[-1]} tokens")
    return R[:, 0, -patches:].unflatten(1, grids[-1])  # they come last, after any registers
