"""A plain ReLU sparse autoencoder (SAE) on the class tokens of one layer, its activation buffer and its training.

    buffer = ActivationBuffer("tokens/train/layer_11.npy")           # (N, n), on disk
    sae = train_sae(buffer, Training(l1=0.1, batch_size=512))
    sae.save_pretrained("saes/layer_11")                             # config.json and model.safetensors
    z = SparseAutoencoder.from_pretrained("saes/layer_11").encode(x) # raw tokens (B, n) -> latents (B, m)

    x̃ = (x - shift) / scale        z = ReLU(W_enc x̃ + b_enc)        x̃' = W_decᵀ z + b_dec
    loss = mean over the batch of ‖x̃ - x̃'‖² + λ‖z‖₁, each latent's decoder row of unit norm

Shift and scale are the training tokens' and make the mean squared norm of x̃ one, so that λ means the same in every
layer and at every width. They are kept inside the SAE: it takes raw tokens and returns raw tokens.
"""
from dataclasses import dataclass
from typing import Iterator, NamedTuple

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

POOL_BYTES = 1 << 30  # fp16 tokens shuffled together in memory; a layer of ImageNet-1k at width 1536 is four such pools


class SAEError(ValueError):
    """A buffer or setting that no SAE can be trained with, or a loss that is no longer finite."""


# ---------------------------------------------------------------------------------------------------------------------
# the activation buffer


class Statistics(NamedTuple):
    mean: torch.Tensor  # (n,) float64
    rms_norm: float  # root of the mean of ‖x‖²
    rms_deviation: float  # root of the mean of ‖x - mean‖²

    @property
    def gamma(self) -> float:
        """‖mean‖ / rms deviation: how far the constant part of the token outweighs what tells images apart."""
        return float(self.mean.norm() / self.rms_deviation)


class ActivationBuffer:
    """The tokens of one layer, an .npy file of shape (N, n) that is memory-mapped and read in large pieces.

    The file's rows are taken to be in random order, as reproduce.py records them: a pool of consecutive rows is then
    as good as a random one, and the disk is read from end to end.
    """

    def __init__(self, path, device: str = "cpu"):
        self.tokens, self.device = np.load(path, mmap_mode="r"), device
        self.rows, self.width = self.tokens.shape
        self.pool_rows = max(1, POOL_BYTES // (2 * self.width))
        self.resident = self._read(0) if self.rows <= self.pool_rows else None  # small enough: read once, kept

    def _read(self, start: int) -> torch.Tensor:
        return torch.from_numpy(np.array(self.tokens[start : start + self.pool_rows])).to(self.device)

    def pools(self, generator: torch.Generator | None = None) -> Iterator[torch.Tensor]:
        """All rows once, as a few large tensors (rows, n) of the file's dtype; in random order if a generator is given."""
        starts = torch.arange(0, self.rows, self.pool_rows)
        if generator is not None:
            starts = starts[torch.randperm(len(starts), generator=generator)]
        for start in starts.tolist():
            yield self.resident if self.resident is not None else self._read(start)

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator[torch.Tensor]:
        """One epoch of batches (B, n) in float32.

        With a generator shuffled, and only whole batches: a pool's rows left over sit out this epoch. Without, in
        the order of the file, to the last row.
        """
        for pool in self.pools(generator):
            if generator is None:
                yield from (batch.float() for batch in pool.split(batch_size))
            else:
                order = torch.randperm(len(pool), generator=generator).to(pool.device)
                yield from (pool[rows].float() for rows in order.split(batch_size) if len(rows) == batch_size)

    def statistics(self) -> Statistics:
        """Mean and spread of the tokens, summed in float64."""
        total, squares = torch.zeros(self.width, dtype=torch.float64), 0.0
        for batch in self.batches(8192):
            batch = batch.double()
            total += batch.sum(0).cpu()
            squares += float(batch.square().sum())
        mean, squares = total / self.rows, squares / self.rows
        return Statistics(mean, squares**0.5, max(squares - float(mean.square().sum()), 0.0) ** 0.5)


# ---------------------------------------------------------------------------------------------------------------------
# the SAE


class Loss(NamedTuple):
    reconstruction: torch.Tensor  # mean of ‖x̃ - x̃'‖²
    sparsity: torch.Tensor  # mean of ‖z‖₁, before λ
    l0: torch.Tensor  # mean number of active latents


class SparseAutoencoder(nn.Module, PyTorchModelHubMixin, tags=["sparse-autoencoder", "dinov2"], license="mit"):
    """z = ReLU(W_enc x̃ + b_enc), x̃' = W_decᵀ z + b_dec, on x̃ = (x - shift) / scale.

    width n, latents m; W_enc and W_dec are (m, n): row i is latent i's direction in the encoder, in the decoder.
    `about` is anything worth keeping in config.json: the layer, the settings of its training.
    """

    def __init__(self, width: int, latents: int, about: dict | None = None):
        super().__init__()
        self.about = about
        decoder = torch.randn(latents, width)
        decoder /= decoder.norm(dim=1, keepdim=True)
        self.W_dec = nn.Parameter(decoder)
        self.W_enc = nn.Parameter(decoder.clone())
        self.b_enc = nn.Parameter(torch.zeros(latents))
        self.b_dec = nn.Parameter(torch.zeros(width))
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        """raw tokens (B, n) -> x̃ (B, n)"""
        return (x - self.shift) / self.scale

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """raw tokens (B, n) -> latents z (B, m), at least 0"""
        return torch.relu(nn.functional.linear(self.normalise(x), self.W_enc, self.b_enc))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """latents z (B, m) -> raw tokens (B, n)"""
        return (z @ self.W_dec + self.b_dec) * self.scale + self.shift

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """raw tokens (B, n) -> their reconstruction (B, n), latents (B, m)"""
        z = self.encode(x)
        return self.decode(z), z

    @torch.no_grad()
    def loss_and_gradients(self, x: torch.Tensor, l1: float) -> Loss:
        """Loss on a batch x̃ (B, n) of normalised tokens, its gradients left in .grad: five matrix products, by hand.

        With e = x̃' - x̃ and everything a mean over the batch:
        dW_dec = zᵀ 2e    db_dec = Σ 2e    dz = (2e W_decᵀ + λ) where z > 0    dW_enc = dzᵀ x̃    db_enc = Σ dz
        """
        z = torch.addmm(self.b_enc, x, self.W_enc.T).relu_()  # (B, m)
        error = torch.addmm(self.b_dec, z, self.W_dec).sub_(x)  # (B, n)
        active = z > 0
        loss = Loss(error.square().sum() / len(x), z.sum() / len(x), active.sum() / len(x))
        error *= 2 / len(x)
        self.W_dec.grad, self.b_dec.grad = z.T @ error, error.sum(0)
        dz = (error @ self.W_dec.T).add_(l1 / len(x)).mul_(active)  # (B, m)
        self.W_enc.grad, self.b_enc.grad = dz.T @ x, dz.sum(0)
        return loss

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Make every decoder row of unit norm, without which λ‖z‖₁ could be had for nothing by a longer row."""
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)


# ---------------------------------------------------------------------------------------------------------------------
# training


@dataclass(frozen=True)
class Training:
    expansion: int = 8
    """latents per dimension of the token"""
    l1: float = 0.1
    """λ, reached after a linear warm-up over the first 5% of steps"""
    inputs: str = "centred"
    """"centred": minus the train mean, over one scalar; "raw": over one scalar only"""
    epochs: int = 50
    batch_size: int = 4096
    lr: float = 4e-4
    """Adam's; warm-up over the first 5% of steps, linear decay to zero over the last 20%"""
    seed: int = 0


def schedule(step: int, steps: int) -> tuple[float, float]:
    """(factor of the learning rate, factor of λ) at a step, counted from 0."""
    warm = min(1.0, (step + 1) / max(1, 0.05 * steps))
    return min(warm, (steps - step) / max(1, 0.2 * steps)), warm


def fitting_batch_size(rows: int, epochs: int, steps: int = 1500, largest: int = 4096) -> int:
    """The largest power of two up to `largest` that leaves `steps` steps; small data needs small batches."""
    batch_size = largest
    while batch_size > 16 and rows * epochs // batch_size < steps:
        batch_size //= 2
    return batch_size


def new_sae(statistics: Statistics, settings: Training, about: dict | None = None) -> SparseAutoencoder:
    """An untrained SAE of unit-norm random directions, W_enc = W_dec and b_dec at the mean, which `inputs` sets apart."""
    if statistics.rms_deviation <= 1e-6 * statistics.rms_norm:
        raise SAEError("all class tokens are the same: there is nothing to encode")
    width = len(statistics.mean)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        sae = SparseAutoencoder(width, settings.expansion * width, about=about)
    with torch.no_grad():
        if settings.inputs == "centred":  # then the mean of x̃ is zero, and so is b_dec
            sae.shift.copy_(statistics.mean)
            sae.scale.fill_(statistics.rms_deviation)
        else:
            sae.scale.fill_(statistics.rms_norm)
            sae.b_dec.copy_(statistics.mean / statistics.rms_norm)
    return sae


def train_sae(buffer: ActivationBuffer, settings: Training, about: dict | None = None, progress=None) -> SparseAutoencoder:
    """Train one SAE on a buffer of tokens; `progress(step, steps, loss)` is called after every step.

    Raises SAEError where the batch is larger than the data, all tokens are the same, or the loss is not finite.
    """
    if settings.batch_size > min(buffer.rows, buffer.pool_rows):
        raise SAEError(f"--batch-size {settings.batch_size} is larger than the {buffer.rows} training images")
    sae = new_sae(buffer.statistics(), settings, about).to(buffer.device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=settings.lr, fused=True)
    generator = torch.Generator().manual_seed(settings.seed)
    pools = [len(range(start, min(start + buffer.pool_rows, buffer.rows))) for start in range(0, buffer.rows, buffer.pool_rows)]
    steps = settings.epochs * sum(rows // settings.batch_size for rows in pools)
    step = 0
    for _ in range(settings.epochs):
        for batch in buffer.batches(settings.batch_size, generator):
            lr_factor, l1_factor = schedule(step, steps)
            loss = sae.loss_and_gradients(sae.normalise(batch), settings.l1 * l1_factor)
            optimizer.param_groups[0]["lr"] = settings.lr * lr_factor
            optimizer.step()
            sae.normalise_decoder()
            step += 1
            if progress is not None:
                progress(step, steps, loss)
        if not torch.isfinite(loss.reconstruction):
            raise SAEError(f"the loss is not finite at step {step} of {steps}: lower --lr")
    return sae.eval()
