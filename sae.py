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
import functools
import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Iterator, NamedTuple

import numpy as np
import safetensors.torch
import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from torch import nn

POOL_BYTES = 1 << 30  # tokens shuffled together in memory; a layer of ImageNet-1k at width 1536 is four such pools
SAE_FILES = ("config.json", "model.safetensors")  # what an SAE is, in its folder


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
        pool_bytes = POOL_BYTES if device == "cpu" else max(POOL_BYTES, torch.cuda.mem_get_info()[1] // 4)
        self.pool_rows = max(1, pool_bytes // (self.tokens.itemsize * self.width))
        self.resident = self._read(0) if self.rows <= self.pool_rows else None  # small enough: read once, kept

    def _read(self, start: int) -> torch.Tensor:
        # read, not copied from the map, whose pages would count as this process's memory
        rows, file = min(self.pool_rows, self.rows - start), self.tokens
        offset = file.offset + start * self.width * file.itemsize
        piece = np.fromfile(file.filename, file.dtype, rows * self.width, offset=offset)
        return torch.from_numpy(piece).view(rows, self.width).to(self.device)

    def pools(self, generator: torch.Generator | None = None) -> Iterator[torch.Tensor]:
        """All rows once, as a few large tensors (rows, n) of the file's dtype; in random order if a generator is given."""
        starts = torch.arange(0, self.rows, self.pool_rows)
        if generator is not None:
            starts = starts[torch.randperm(len(starts), generator=generator)]
        for start in starts.tolist():
            yield self.resident if self.resident is not None else self._read(start)  # not kept here: one pool at a time

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
            del pool  # before the next is read

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

    @classmethod
    def from_pretrained(cls, name, *, subfolder: str = "", revision: str | None = None, **more) -> "SparseAutoencoder":
        """From a folder, or from the Hub's USER/NAME: from_pretrained("USER/NAME", subfolder="layer_11").

        Raises SAEError where there is no SAE, and what huggingface_hub raises where the Hub cannot be reached.
        """
        folder = Path(name, subfolder)
        if not Path(name).is_dir():  # only the files that are needed, and no pickle
            wanted = [str(PurePosixPath(subfolder, file)) for file in SAE_FILES]
            folder = Path(snapshot_download(str(name), revision=revision, allow_patterns=wanted), subfolder)
        if not (folder / "model.safetensors").is_file():
            raise SAEError(f"there is no SAE at {PurePosixPath(str(name), subfolder)}")
        with redirect_stdout(None):  # the mixin prints
            return super().from_pretrained(folder, **more)

    def _save_pretrained(self, save_directory: Path) -> None:
        # in place of the mixin's own, whose full disk is a SafetensorError and no OSError
        (save_directory / "model.safetensors").write_bytes(safetensors.torch.save(self.state_dict(), {"format": "pt"}))

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
    precision: str = "float32"
    """of the matrix products: "float32", or "bfloat16" where `fast_precision` says that the device has it"""


class Loss(NamedTuple):
    reconstruction: torch.Tensor  # mean of ‖x̃ - x̃'‖²
    sparsity: torch.Tensor  # mean of ‖z‖₁, before λ


class Trainer:
    """Training steps of one SAE: five matrix products, and as little as can be around them.

    With e = x̃' - x̃ and everything a mean over the batch of B:
    dW_dec = zᵀ 2e    db_dec = Σ 2e    dz = (2e W_decᵀ + λ) where z > 0    dW_enc = dzᵀ x̃    db_enc = Σ dz

    What makes it fast, all of it here: gradients by hand, into memory that is kept from step to step (no graph; new
    memory of this size is paid for page by page); in bfloat16 the products run on copies of weights that stay in
    float32, as Adam does; the mask is one pass of ReLU's own backward (a Boolean mask takes 15 times as long in
    bfloat16 on a CPU), and a sum over the batch is a product with ones (20 times).
    """

    def __init__(self, sae: SparseAutoencoder, batch_size: int, precision: str = "float32"):
        self.sae, self.dtype = sae, getattr(torch, precision)
        self.parameters = [sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec]
        for parameter in self.parameters:
            parameter.grad = torch.empty_like(parameter)
        self.weights = [parameter.detach().to(self.dtype) for parameter in self.parameters]  # in float32 the very same
        self.gradients = [parameter.grad.to(self.dtype) for parameter in self.parameters]
        new = functools.partial(torch.empty, dtype=self.dtype, device=sae.W_enc.device)
        self.z, self.dz = new(batch_size, len(sae.b_enc)), new(batch_size, len(sae.b_enc))
        self.ones = new(1, batch_size).fill_(1)
        self.optimizer = torch.optim.Adam(self.parameters, fused=True)

    @torch.no_grad()
    def loss_and_gradients(self, x: torch.Tensor, l1: float) -> Loss:
        """Loss on normalised tokens x̃ (B, n) in float32, its gradients left in the parameters' .grad."""
        low = self.weights[0].dtype != self.parameters[0].dtype
        if low:
            for weight, parameter in zip(self.weights, self.parameters):
                weight.copy_(parameter)
        W_enc, W_dec, b_enc, b_dec = self.weights
        dW_enc, dW_dec, db_enc, db_dec = self.gradients
        x_low, B = x.to(self.dtype), len(x)
        z = torch.addmm(b_enc, x_low, W_enc.T, out=self.z).relu_()  # (B, m)
        error = torch.addmm(b_dec, z, W_dec).to(x.dtype).sub_(x)  # (B, n), in full: a difference of numbers close together
        loss = Loss(error.square().sum() / B, (self.ones @ z).sum(dtype=x.dtype) / B)
        error = error.mul_(2 / B).to(self.dtype)
        torch.mm(z.T, error, out=dW_dec)
        dz = torch.addmm(torch.full_like(b_enc[:1], l1 / B), error, W_dec.T, out=self.dz)  # (B, m)
        torch.ops.aten.threshold_backward.grad_input(dz, z, 0, grad_input=dz)  # zero where z is
        torch.mm(dz.T, x_low, out=dW_enc)
        db_enc.copy_((self.ones @ dz)[0])
        db_dec.copy_((self.ones @ error)[0])
        if low:
            for gradient, parameter in zip(self.gradients, self.parameters):
                parameter.grad.copy_(gradient)
        return loss

    def step(self, x: torch.Tensor, l1: float, lr: float) -> Loss:
        """One step on normalised tokens x̃ (B, n)."""
        loss = self.loss_and_gradients(x, l1)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.sae.normalise_decoder()
        return loss

    def state(self) -> dict[str, torch.Tensor]:
        """All that the next step depends on, by name: the SAE and Adam's moments; not copied."""
        moments = self.optimizer.state_dict()["state"]  # of parameter 0, 1, ...
        return {**self.sae.state_dict(), **{f"{key}.{i}": value for i in moments for key, value in moments[i].items()}}

    def resume(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from a `state`, to the very steps that would have come."""
        self.sae.load_state_dict({name: state[name] for name in self.sae.state_dict()})
        names = ("step", "exp_avg", "exp_avg_sq")
        moments = {i: {name: state[f"{name}.{i}"].clone() for name in names} for i in range(len(self.parameters))}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})


def fast_precision(device: str) -> str:
    """"bfloat16" where the device multiplies it in hardware, several times as fast as float32; else "float32"."""
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    capabilities = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    return "bfloat16" if re.search(r"\b(avx512_bf16|amx_bf16)\b", capabilities) else "float32"


def schedule(step: int, steps: int) -> tuple[float, float]:
    """(factor of the learning rate, factor of λ) at a step, counted from 0."""
    warm = min(1.0, (step + 1) / max(1, 0.05 * steps))
    return min(warm, (steps - step) / max(1, 0.2 * steps)), warm


def fitting_batch_size(rows: int, epochs: int, steps: int = 1500, largest: int = 4096) -> int:
    """The largest power of two up to `largest` that leaves `steps` steps; small data needs small batches."""
    batch_size = largest
    while batch_size > 16 and rows * epochs // batch_size < steps:
        batch_size //= 2
    return min(batch_size, rows)


def new_sae(statistics: Statistics, settings: Training, about: dict | None = None) -> SparseAutoencoder:
    """An untrained SAE of unit-norm random directions, W_enc = W_dec and b_dec at the mean, which `inputs` sets apart."""
    if not np.isfinite(statistics.rms_norm):
        raise SAEError("the class tokens are not finite")
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


def train_sae(
    buffer: ActivationBuffer, settings: Training, about: dict | None = None, progress=None, checkpoint=None, resume=None
) -> SparseAutoencoder:
    """Train one SAE on a buffer of tokens.

    progress    called as progress(step, steps, loss) after every step
    checkpoint  called after every epoch but the last with the state of the training, tensors by name (not copied)
    resume      such a state, on any device: the training goes on from it to the SAE that it would have come to

    Raises SAEError where the batch is larger than the data, all tokens are the same or not finite, or the loss or the
    weights are not finite.
    """
    if settings.batch_size > min(buffer.rows, buffer.pool_rows):
        raise SAEError(f"--batch-size {settings.batch_size} is larger than the {buffer.rows} training images")
    sae = new_sae(buffer.statistics(), settings, about).to(buffer.device)
    trainer = Trainer(sae, settings.batch_size, settings.precision)
    generator = torch.Generator().manual_seed(settings.seed)
    pools = [min(buffer.pool_rows, buffer.rows - start) for start in range(0, buffer.rows, buffer.pool_rows)]
    steps_per_epoch = sum(rows // settings.batch_size for rows in pools)  # whole batches only
    step, steps = 0, settings.epochs * steps_per_epoch
    if resume is not None:
        trainer.resume(resume)
        generator.set_state(resume["generator"])
        step = int(resume["steps_done"])
    finite = torch.full((), step, device=buffer.device)  # steps with a finite loss; counted there, as asking takes time
    while step < steps:
        for batch in buffer.batches(settings.batch_size, generator):
            lr_factor, l1_factor = schedule(step, steps)
            loss = trainer.step(sae.normalise(batch), settings.l1 * l1_factor, settings.lr * lr_factor)
            finite += loss.reconstruction.isfinite()
            step += 1
            if progress is not None:
                progress(step, steps, loss)
        if finite < step or not all(parameter.isfinite().all() for parameter in trainer.parameters):
            raise SAEError(f"the loss or a weight is not finite at step {min(int(finite) + 1, step)} of {steps}: lower --lr")
        if checkpoint is not None and step < steps:
            checkpoint({**trainer.state(), "generator": generator.get_state(), "steps_done": torch.tensor(step)})
    return sae.eval().requires_grad_(False)
