"""A plain ReLU sparse autoencoder (SAE) on the class tokens of one layer, and its training.

    buffer = ActivationBuffer("tokens/train/layer_11.npy")       # (N, n) on disk, rows shuffled
    sae = train_sae(buffer, Training(l1=0.1, batch_size=512))
    sae.save_pretrained("my_sae")                                # config.json, model.safetensors
    z = SparseAutoencoder.from_pretrained("my_sae").encode(x)    # raw tokens (B, n) -> (B, m)

    x̃ = (x - shift) / scale        z = ReLU(W_enc x̃ + b_enc)        x̃' = W_decᵀ z + b_dec
    loss = mean over the batch of ‖x̃ - x̃'‖² + λ‖z‖₁, each decoder row of unit norm

Shift and scale come from the training tokens, give x̃ a mean squared norm of one (so that λ means
the same in every layer and at every width), and are kept inside the SAE: raw tokens in and out.
"""
import itertools
import json
import math
import operator
import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

POOL = 4 * 2**30  # bytes of tokens that training has in memory
WINDOWS = 20  # of the steps of a training, each a row of its history
HISTORY = "step", "loss", "reconstruction", "sparsity", "l0", "dead"
PRECISIONS = "float32", "bfloat16"
SAE_FILES = ("config.json", "model.safetensors")  # what an SAE is, in its folder


class SAEError(ValueError):
    """Tokens or settings that no SAE can be trained with; no SAE if one was asked for."""


class Statistics(NamedTuple):
    mean: Tensor  # (n,) float64
    variance: Tensor  # (n,) float64, of each coordinate
    rms_norm: float  # root of the mean of ‖x‖²
    rms_deviation: float  # root of the mean of ‖x - mean‖²


class ActivationBuffer:
    """The tokens of one layer: an .npy file (N, n), mapped, its rows in random order.

    Training takes a pool of consecutive rows into memory at a time, at most POOL bytes of them:
    all of ImageNet-1k at width 1536, which is 3.9 GB.
    """

    def __init__(self, path, device="cpu"):
        self.tokens = np.load(path, mmap_mode="r")
        self.device = device
        self.rows, self.width = self.tokens.shape
        count = -(-self.tokens.nbytes // POOL)
        self.pools = np.linspace(0, self.rows, count + 1).astype(int)  # where each begins and ends
        self.pool = None  # of rows, on the device
        self.pool_start = None

    def _read(self, rows):
        piece = np.array(self.tokens[rows], order="C")  # also of a file stored column by column
        return torch.from_numpy(piece).to(self.device)

    def batches(self, batch_size, generator=None):
        """One epoch of batches (B, n) in float32: without a torch.Generator all rows in order, with
        one shuffled within each pool, and only whole batches."""
        if generator is None:
            for start in range(0, self.rows, batch_size):
                yield self.rows_at(slice(start, start + batch_size))
            return
        for start, stop in itertools.pairwise(self.pools.tolist()):
            if self.pool_start != start:
                self.pool = None  # two at a time would take twice the memory
                self.pool = self._read(slice(start, stop))
                self.pool_start = start
            order = torch.randperm(stop - start, generator=generator).to(self.device)
            for rows in order.split(batch_size)[: (stop - start) // batch_size]:
                yield self.pool[rows].float()

    def batches_of_an_epoch(self, batch_size):
        """How many whole batches there are."""
        return int((np.diff(self.pools) // batch_size).sum())

    def rows_at(self, rows):
        """The tokens (B, n) of some rows, in float32."""
        return self._read(rows).float()

    def statistics(self):
        """Mean and variance of every coordinate over all rows, summed in float64, on the device."""
        total = squares = 0
        for batch in self.batches(8192):
            batch = batch.double()
            total = total + batch.sum(0)
            squares = squares + batch.square().sum(0)
        mean = total / self.rows
        squares = squares / self.rows
        variance = (squares - mean.square()).clamp(min=0)
        return Statistics(mean, variance, float(squares.sum().sqrt()), float(variance.sum().sqrt()))


class SparseAutoencoder(nn.Module, PyTorchModelHubMixin, license="mit"):
    """width n, latents m; W_enc and W_dec are (m, n): row i is latent i's direction. Tokens may
    have more dimensions in front: (L, B, n) -> (L, B, m).

    top_k    at most so many latents are active, the largest; None: all, as in the paper
    about    anything worth keeping in config.json: the layer, the settings of its training
    history  of one that was trained here: what became of the loss, in rows (`train_sae`)
    """

    def __init__(self, width, latents, about=None, top_k=None):
        super().__init__()
        self.about = about
        self.history = []
        self.top_k = None if top_k is None else operator.index(top_k)
        if self.top_k is not None and not 1 <= self.top_k <= latents:
            raise SAEError(f"top_k={top_k}: give a number from 1 to the {latents} latents")
        self.W_dec = nn.Parameter(nn.functional.normalize(torch.randn(latents, width)))
        self.W_enc = nn.Parameter(self.W_dec.detach().clone())
        self.b_enc = nn.Parameter(torch.zeros(latents))
        self.b_dec = nn.Parameter(torch.zeros(width))
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))

    def normalise(self, x):
        """raw tokens (B, n) -> x̃ (B, n)"""
        return (x - self.shift) / self.scale

    def latents(self, x):
        """x̃ (B, n) -> z (B, m), at least 0"""
        z = torch.relu(nn.functional.linear(x, self.W_enc, self.b_enc))
        if self.top_k is not None:
            largest = z.topk(self.top_k)
            z = torch.zeros_like(z).scatter(-1, largest.indices, largest.values)
        return z

    def encode(self, x):
        """raw tokens (B, n) -> latents z (B, m)"""
        return self.latents(self.normalise(x))

    def decode(self, z):
        """latents z (B, m) -> raw tokens (B, n)"""
        return (z @ self.W_dec + self.b_dec) * self.scale + self.shift

    def forward(self, x):
        """raw tokens (B, n) -> their reconstruction (B, n), latents (B, m)"""
        z = self.encode(x)
        return self.decode(z), z

    def save_pretrained(self, folder, **options):
        """As the mixin's; its own config.json leaves out what JSON cannot hold, this raises."""
        latents, width = self.W_dec.shape
        config = {"width": width, "latents": latents, "top_k": self.top_k, "about": self.about}
        return super().save_pretrained(folder, config=config, **options)

    @classmethod
    def from_pretrained(cls, name, *, subfolder="", **options):
        """An SAE ready to use, from a folder or the Hub's USER/NAME; no pickle is read.

        options  of huggingface_hub's snapshot_download: revision, token, cache_dir ...
        Raises SAEError if there is none or a damaged one, and huggingface_hub's errors.
        """
        if not Path(name).is_dir():
            wanted = [f"{subfolder}/{file}".lstrip("/") for file in SAE_FILES]
            name = snapshot_download(str(name), allow_patterns=wanted, **options)
        folder = Path(name, subfolder)
        if not all((folder / file).is_file() for file in SAE_FILES):
            raise SAEError(f"there is no SAE in {folder}: it needs {' and '.join(SAE_FILES)}; if a "
                           "run made it: delete this folder, and the same command makes it again")
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            unknown = config.keys() - {"width", "latents", "top_k", "about"}
            if unknown:
                raise ValueError(f"its config.json has {', '.join(sorted(unknown))}")
            with redirect_stdout(None):  # the mixin prints
                sae = super().from_pretrained(folder, strict=True)
            z = sae.encode(sae.b_dec[None])
            finite = all(tensor.isfinite().all() for tensor in sae.state_dict().values())
            if not finite or sae.scale <= 0 or z.shape != sae.b_enc[None].shape:
                raise ValueError("its numbers are not those of an SAE: NaN, or a scale of 0")
        except (OSError, ValueError, TypeError, AttributeError, RuntimeError,
                SafetensorError) as error:
            raise SAEError(f"the SAE in {folder} is damaged, or of another kind ({error}); if a "
                           "run made it: delete this folder, and the same command makes it again"
                           ) from error
        return sae.eval().requires_grad_(False)


@dataclass(frozen=True)
class Training:
    """The settings of an SAE's training. Raises SAEError for what none can be trained with."""

    expansion: int = 8
    """latents per dimension of the token"""
    activation: str = "relu"
    """"relu", the paper's, or "topk-K": of it the K largest; λ is then not used"""
    l1: float = 0.1
    """λ, reached after a linear warm-up over the first 5% of steps"""
    inputs: str = "centred"
    """"centred": minus the train mean, over one scalar; "raw": over one scalar only"""
    epochs: int = 50
    batch_size: int = 4096
    lr: float | None = None
    """Adam's (None: `learning_rate`); warm-up over 5% of steps, decay to zero over the last 20%"""
    seed: int = 0
    precision: str = "float32"
    """of the matrix products: "float32" or "bfloat16", as `fast_precision` finds it in hardware"""

    def __post_init__(self):
        for name, least in (("expansion", 1), ("epochs", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if not hasattr(value, "__index__") or value < least:
                raise SAEError(f"{name}={value!r}: give a whole number from {least} on")
            object.__setattr__(self, name, operator.index(value))  # NumPy's are not JSON's
        for name, in_range in (("l1", self.l1 >= 0), ("lr", self.lr is None or self.lr > 0)):
            value = getattr(self, name)
            if not in_range or value == math.inf:
                raise SAEError(f"{name}={value!r}: give a positive number")
        for name, values in (("inputs", ("centred", "raw")), ("precision", PRECISIONS)):
            if getattr(self, name) not in values:
                raise SAEError(f"{name}={getattr(self, name)!r}: give {' or '.join(values)}")


class Loss(NamedTuple):
    total: Tensor  # reconstruction + λ sparsity: what is minimised
    reconstruction: Tensor  # mean over the batch of ‖x̃ - x̃'‖²
    sparsity: Tensor  # mean over the batch of ‖z‖₁
    active: Tensor  # (B, m) bool, which latents fire


def loss_of(sae, x, l1):
    """x̃ (B, n) -> its loss, with λ = l1"""
    z = sae.latents(x)  # (B, m)
    reconstruction = (z @ sae.W_dec + sae.b_dec - x).square().sum(1).mean()
    sparsity = (z @ z.new_ones(z.shape[1])).float().mean()  # a plain sum is slow in bfloat16
    return Loss(reconstruction + l1 * sparsity, reconstruction, sparsity, z > 0)


def top_k_of(activation, latents):
    """"relu" -> None, "topk-32" -> 32. Raises SAEError for others, and above the latents."""
    if activation == "relu":
        return None
    if not re.fullmatch(r"topk-[1-9]\d*", activation) or int(activation[5:]) > latents:
        raise SAEError(f"activation {activation!r}: give relu, or topk-K as topk-32, with K at "
                       f"most the number of latents, {latents}")
    return int(activation[5:])


def new_sae(statistics, settings, about=None):
    """An untrained SAE: random unit directions, W_enc = W_dec, b_dec at the mean.

    What a random direction reads from x̃ has a deviation of 1/√n. The ReLU's b_enc starts that far
    below zero, so that a latent fires on a sixth of the tokens instead of on half of them: it takes
    several times fewer steps to a sparse code (docs/is_my_sae_good.md).
    """
    if not np.isfinite(statistics.rms_norm):
        raise SAEError("the class tokens are not finite")
    if statistics.rms_deviation <= 1e-6 * statistics.rms_norm:
        raise SAEError("all class tokens are the same, there is nothing to encode")
    n = len(statistics.mean)
    latents = settings.expansion * n
    top_k = top_k_of(settings.activation, latents)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        sae = SparseAutoencoder(n, latents, about, top_k)
    if top_k is None:
        sae.b_enc.data.fill_(-(n**-0.5))
    if settings.inputs == "centred":  # then x̃ has mean zero, as b_dec is
        sae.shift.copy_(statistics.mean)
        sae.scale.fill_(statistics.rms_deviation)
    else:
        sae.scale.fill_(statistics.rms_norm)
        sae.b_dec.data.copy_(statistics.mean / statistics.rms_norm)
    return sae


def train_sae(buffer, settings, statistics=None, about=None, title="SAE"):
    """Train one SAE; the same buffer and settings give the same weights. title: of the progress
    bar; None shows none.

    Its `history` has some twenty rows, each over a window of steps: step (the window's last), loss,
    reconstruction and sparsity (as in `Loss`, with λ as it is after the warm-up), l0 (active
    latents per token), dead (share of latents that fire on none of the window's tokens).

    Raises SAEError if a batch is larger than the data, tokens are not finite or all the same,
    training diverges.
    """
    sae = new_sae(statistics or buffer.statistics(), settings, about).to(buffer.device)
    optimizer = torch.optim.Adam(sae.parameters(), fused=True)
    generator = torch.Generator().manual_seed(settings.seed)
    B = settings.batch_size
    low = settings.precision == "bfloat16"
    steps = settings.epochs * buffer.batches_of_an_epoch(B)
    if steps == 0:
        raise SAEError(f"a batch of {B} is larger than the {buffer.rows} training tokens")
    lr = settings.lr or learning_rate(len(sae.b_enc), steps, sae.top_k)
    final_l1 = settings.l1 if sae.top_k is None else 0
    window = -(-steps // WINDOWS)
    sums = torch.zeros(3, device=buffer.device)  # there, so that no step has to wait
    fired = torch.zeros(len(sae.b_enc), dtype=torch.bool, device=buffer.device)
    step = 0
    bar = tqdm(total=steps, desc=title, unit="step", mininterval=1, disable=title is None)
    for epoch in range(settings.epochs):
        for x in buffer.batches(B, generator):
            # forward: λ and the learning rate rise over the first steps
            lr_factor, l1_factor = schedule(step, steps)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=low):
                loss = loss_of(sae, sae.normalise(x), final_l1 * l1_factor)
            # backward, and back to decoder rows of norm one: longer ones would lower λ‖z‖₁ for free
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.param_groups[0]["lr"] = lr * lr_factor
            optimizer.step()
            with torch.no_grad():
                sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
            # what the steps of a window were like becomes a row of the history
            l0 = loss.active.sum(1).float().mean()
            sums += torch.stack([loss.reconstruction.detach(), loss.sparsity.detach(), l0])
            fired |= loss.active.any(0)
            step += 1
            bar.update()
            if step % window == 0 or step == steps:
                sums /= (step - 1) % window + 1
                dead = 1 - fired.float().mean()
                row = [sums[0] + final_l1 * sums[1], *sums, dead]
                sae.history.append(dict(zip(HISTORY, [step, *map(float, row)])))
                sums.zero_()
                fired.zero_()
        bar.set_postfix(loss=f"{loss.total.item():.3f}", refresh=False)
        if not all(parameter.isfinite().all() for parameter in sae.parameters()):
            raise SAEError(f"weights not finite after epoch {epoch + 1}: lower the learning rate")
    bar.close()
    return sae.eval().requires_grad_(False)


def learning_rate(latents, steps, top_k=None):
    """The default: its loss is within 4% of the best rate's in what was tried
    (docs/is_my_sae_good.md). More steps, or more latents to move at once, want smaller ones."""
    rate = 3.5 / (latents * steps) ** 0.5
    return min(0.01, rate if top_k is None else 2 * rate)


def schedule(step, steps):
    """(factor of the learning rate, factor of λ) at a step, counted from 0."""
    warm = min(1.0, (step + 1) / max(1, 0.05 * steps))
    return min(warm, (steps - step) / max(1, 0.2 * steps)), warm


def fast_precision(device):
    """"bfloat16" on a GPU that multiplies it in hardware, else "float32"."""
    fast = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if fast else "float32"
