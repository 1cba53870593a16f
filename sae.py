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
import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np
import safetensors.torch
import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from torch import nn

POOL_BYTES = 4 << 30  # tokens shuffled together in memory: ImageNet-1k's at width 1536 are one pool
ORDERED_ROWS = 65_536  # read at once where order is kept
SAE_FILES = ("config.json", "model.safetensors")  # what an SAE is, in its folder


class SAEError(ValueError):
    """Tokens or settings that no SAE can be trained with; no SAE where one was asked for."""


class Statistics(NamedTuple):
    mean: torch.Tensor  # (n,) float64
    variance: torch.Tensor  # (n,) float64, of each coordinate
    rms_norm: float  # root of the mean of ‖x‖²
    rms_deviation: float  # root of the mean of ‖x - mean‖²


class ActivationBuffer:
    """The tokens of one layer: an .npy file (N, n), read in pools of up to POOL_BYTES.

    Its rows have to be in random order: then a pool of consecutive rows is as good as a random one.
    """

    def __init__(self, path, device: str = "cpu"):
        self.tokens = np.load(path, mmap_mode="r")
        self.device = device
        self.rows, self.width = self.tokens.shape
        self.pool_rows = max(1, POOL_BYTES // (self.tokens.itemsize * self.width))
        self.kept = None  # the pool, where it is all rows

    def _read(self, start: int, count: int) -> torch.Tensor:
        file = self.tokens
        count = min(count, self.rows - start)
        if file.flags.c_contiguous:  # mapped pages would count towards this process's memory
            offset = file.offset + start * self.width * file.itemsize
            piece = np.fromfile(file.filename, file.dtype, count * self.width, offset=offset)
        else:  # stored column by column
            piece = np.array(file[start : start + count], order="C")
        return torch.from_numpy(piece).view(-1, self.width).to(self.device)

    def batches(self, batch_size: int, generator=None) -> Iterator[torch.Tensor]:
        """One epoch of batches (B, n) in float32: without a torch.Generator all rows in order, with
        one shuffled, and only whole batches."""
        if generator is None:
            step = -(-ORDERED_ROWS // batch_size) * batch_size  # few at once: no need for more
            for start in range(0, self.rows, step):
                for batch in self._read(start, step).split(batch_size):
                    yield batch.float()
            return
        starts = torch.arange(0, self.rows, self.pool_rows)
        for start in starts[torch.randperm(len(starts), generator=generator)].tolist():
            pool = self._read(start, self.pool_rows) if self.kept is None else self.kept
            if len(pool) == self.rows:  # reading it anew would take longer than training on it
                self.kept = pool
            order = torch.randperm(len(pool), generator=generator)
            order = order[: len(pool) // batch_size * batch_size]
            for rows in order.to(pool.device).split(batch_size):
                yield pool[rows].float()
            del pool  # before the next is read

    def rows_at(self, rows) -> torch.Tensor:
        """The tokens (B, n) of some rows, in float32."""
        return torch.from_numpy(np.array(self.tokens[rows])).to(self.device).float()

    def statistics(self) -> Statistics:
        """Mean and variance of every coordinate over all rows, summed in float64."""
        total = squares = torch.zeros(self.width, dtype=torch.float64)
        for batch in self.batches(8192):
            batch = batch.double()
            total = total + batch.sum(0).cpu()
            squares = squares + batch.square().sum(0).cpu()
        mean = total / self.rows
        squares = squares / self.rows
        variance = (squares - mean.square()).clamp(min=0)
        return Statistics(mean, variance, *(float(x.sum().sqrt()) for x in (squares, variance)))


class SparseAutoencoder(nn.Module, PyTorchModelHubMixin, license="mit"):
    """width n, latents m; W_enc and W_dec are (m, n): row i is latent i's direction.

    top_k  at most so many latents are active, the largest; None: all, as in the paper
    about  anything worth keeping in config.json: the layer, the settings of its training
    """

    def __init__(self, width: int, latents: int, about: dict | None = None, top_k=None):
        super().__init__()
        self.about = about
        self.top_k = top_k
        self.W_dec = nn.Parameter(nn.functional.normalize(torch.randn(latents, width)))
        self.W_enc = nn.Parameter(self.W_dec.detach().clone())
        self.b_enc = nn.Parameter(torch.zeros(latents))
        self.b_dec = nn.Parameter(torch.zeros(width))
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        """raw tokens (B, n) -> x̃ (B, n)"""
        return (x - self.shift) / self.scale

    def latents(self, x: torch.Tensor) -> torch.Tensor:
        """x̃ (B, n) -> z (B, m), at least 0"""
        z = torch.relu(nn.functional.linear(x, self.W_enc, self.b_enc))
        if self.top_k is not None:
            largest = z.topk(self.top_k, dim=1)
            z = torch.zeros_like(z).scatter(1, largest.indices, largest.values)
        return z

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """raw tokens (B, n) -> latents z (B, m)"""
        return self.latents(self.normalise(x))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """latents z (B, m) -> raw tokens (B, n)"""
        return (z @ self.W_dec + self.b_dec) * self.scale + self.shift

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """raw tokens (B, n) -> their reconstruction (B, n), latents (B, m)"""
        z = self.encode(x)
        return self.decode(z), z

    @classmethod
    def from_pretrained(cls, name, *, subfolder="", **options) -> "SparseAutoencoder":
        """An SAE ready to use, from a folder or the Hub's USER/NAME; no pickle is read.

        options  of huggingface_hub's snapshot_download: revision, token, cache_dir ...
        Raises SAEError where there is none, and huggingface_hub's errors.
        """
        if not Path(name).is_dir():
            wanted = [f"{subfolder}/{file}".lstrip("/") for file in SAE_FILES]
            name = snapshot_download(str(name), allow_patterns=wanted, **options)
        if not all(Path(name, subfolder, file).is_file() for file in SAE_FILES):
            raise SAEError(f"there is no SAE in {Path(name, subfolder)}")
        with redirect_stdout(None):  # the mixin prints
            sae = super().from_pretrained(Path(name, subfolder))
        return sae.eval().requires_grad_(False)

    def _save_pretrained(self, folder: Path) -> None:  # the mixin's: a full disk is no OSError
        weights = safetensors.torch.save(self.state_dict(), {"format": "pt"})
        (folder / "model.safetensors").write_bytes(weights)


@dataclass(frozen=True)
class Training:
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
    lr: float = 4e-4
    """Adam's; warm-up over the first 5% of steps, linear decay to zero over the last 20%"""
    seed: int = 0
    precision: str = "float32"
    """of the matrix products: "float32" or "bfloat16", as `fast_precision` finds it in hardware"""


class Loss(NamedTuple):
    total: torch.Tensor  # reconstruction + λ sparsity: what is minimised
    reconstruction: torch.Tensor  # mean over the batch of ‖x̃ - x̃'‖²
    sparsity: torch.Tensor  # mean over the batch of ‖z‖₁


def loss_of(sae: SparseAutoencoder, x: torch.Tensor, l1: float) -> Loss:
    """x̃ (B, n) -> its loss, with λ = l1"""
    z = sae.latents(x)  # (B, m)
    reconstruction = (z @ sae.W_dec + sae.b_dec - x).square().sum(1).mean()
    sparsity = (z @ z.new_ones(z.shape[1])).float().mean()  # a plain sum is slow in bfloat16
    return Loss(reconstruction + l1 * sparsity, reconstruction, sparsity)


def new_sae(statistics: Statistics, settings: Training, about=None) -> SparseAutoencoder:
    """An untrained SAE: random unit directions, W_enc = W_dec, b_dec at the mean."""
    if not np.isfinite(statistics.rms_norm):
        raise SAEError("the class tokens are not finite")
    if statistics.rms_deviation <= 1e-6 * statistics.rms_norm:
        raise SAEError("all class tokens are the same, there is nothing to encode")
    n = len(statistics.mean)
    kind = settings.activation
    top_k = None if kind == "relu" else int(kind[5:] if re.fullmatch(r"topk-\d+", kind) else 0)
    if top_k is not None and not 0 < top_k <= settings.expansion * n:
        raise SAEError(f"activation {kind!r}: give relu, or topk-K with K from 1 to the number of "
                       f"latents, {settings.expansion * n}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        sae = SparseAutoencoder(n, settings.expansion * n, about, top_k)
    if settings.inputs == "centred":  # then x̃ has mean zero, as b_dec is
        sae.shift.copy_(statistics.mean)
        sae.scale.fill_(statistics.rms_deviation)
    else:
        sae.scale.fill_(statistics.rms_norm)
        sae.b_dec.data.copy_(statistics.mean / statistics.rms_norm)
    return sae


def train_sae(buffer: ActivationBuffer, settings: Training, statistics: Statistics | None = None,
              about: dict | None = None, progress=None) -> SparseAutoencoder:
    """Train one SAE; the same buffer and settings give the same weights.

    progress, if given, is called as progress(step, steps, loss) after every step. Raises SAEError
    where a batch is larger than the data, tokens are not finite or all the same, training diverges.
    """
    sae = new_sae(statistics or buffer.statistics(), settings, about).to(buffer.device)
    optimizer = torch.optim.Adam(sae.parameters(), fused=True)
    generator = torch.Generator().manual_seed(settings.seed)
    B = settings.batch_size
    step = 0
    low = settings.precision == "bfloat16"
    pools = range(0, buffer.rows, buffer.pool_rows)
    epoch_steps = sum(min(buffer.pool_rows, buffer.rows - start) // B for start in pools)
    if epoch_steps == 0:
        raise SAEError(f"a batch of {B} is larger than the {buffer.rows} training tokens")
    steps = settings.epochs * epoch_steps
    for epoch in range(settings.epochs):
        for x in buffer.batches(B, generator):
            lr_factor, l1_factor = schedule(step, steps)
            l1 = settings.l1 * l1_factor if sae.top_k is None else 0
            with torch.autocast(x.device.type, torch.bfloat16, enabled=low):
                loss = loss_of(sae, sae.normalise(x), l1)
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.param_groups[0]["lr"] = settings.lr * lr_factor
            optimizer.step()
            with torch.no_grad():  # or λ‖z‖₁ could be had for nothing by longer rows
                sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
            step += 1
            if progress is not None:
                progress(step, steps, loss)
        if not all(parameter.isfinite().all() for parameter in sae.parameters()):
            raise SAEError(f"weights not finite after epoch {epoch + 1}: lower the learning rate")
    return sae.eval().requires_grad_(False)


def schedule(step: int, steps: int) -> tuple[float, float]:
    """(factor of the learning rate, factor of λ) at a step, counted from 0."""
    warm = min(1.0, (step + 1) / max(1, 0.05 * steps))
    return min(warm, (steps - step) / max(1, 0.2 * steps)), warm


def fast_precision(device: str) -> str:
    """"bfloat16" where the device multiplies it faster than float32, else "float32"."""
    if device == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        path = Path("/proc/cpuinfo")
        text = path.read_text() if path.is_file() else ""
        # Intel's avx512_bf16 without AMX takes longer than float32, AMD's a quarter of its time
        fast = "amx_bf16" in text or ("AuthenticAMD" in text and "avx512_bf16" in text)
    return "bfloat16" if fast else "float32"
