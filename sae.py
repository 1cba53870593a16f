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
SMALL_STEP = {"cpu": 2e8, "cuda": 1e11}  # FLOP of an SAE's step, up to which several are trained in one; cuda: a guess
# PyTorch multiplies float32 with MKL, on an AMD CPU much slower than with oneDNN, to which this is torch.compile's own way
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
SAE_FILES = ("config.json", "model.safetensors")  # what an SAE is, in its folder


class SAEError(ValueError):
    """Tokens or a setting that no SAE can be trained with, or a loss that is no longer finite."""


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


def pool_bytes(device: str) -> int:
    """Of tokens in memory at once; on a GPU a quarter of its own."""
    return POOL_BYTES if device == "cpu" else max(POOL_BYTES, torch.cuda.mem_get_info()[1] // 4)


class ActivationBuffer:
    """The tokens of one layer, an .npy file of shape (N, n) that is memory-mapped and read in large pieces.

    The file's rows are taken to be in random order, as reproduce.py records them: a pool of consecutive rows is then
    as good as a random one, and the disk is read from end to end.
    """

    def __init__(self, path, device: str = "cpu"):
        self.tokens, self.device = np.load(path, mmap_mode="r"), device
        self.rows, self.width = self.tokens.shape
        self.pool_rows = max(1, pool_bytes(device) // (self.tokens.itemsize * self.width))
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
        """Mean and spread of the tokens, summed in float64. Raises SAEError where they are not finite or all the same."""
        total, squares = torch.zeros(self.width, dtype=torch.float64), 0.0
        for batch in self.batches(8192):
            batch = batch.double()
            total += batch.sum(0).cpu()
            squares += float(batch.square().sum())
        mean, squares = total / self.rows, squares / self.rows
        statistics = Statistics(mean, squares**0.5, max(squares - float(mean.square().sum()), 0.0) ** 0.5)
        if not np.isfinite(squares):
            raise SAEError(f"{self.tokens.filename}: the class tokens are not finite")
        if statistics.rms_deviation <= 1e-6 * statistics.rms_norm:
            raise SAEError(f"{self.tokens.filename}: all class tokens are the same, there is nothing to encode")
        return statistics


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
    reconstruction: torch.Tensor  # (L,) mean of ‖x̃ - x̃'‖²
    sparsity: torch.Tensor  # (L,) mean of ‖z‖₁, before λ


def multiply(a: torch.Tensor, b: torch.Tensor, bias=None, out=None) -> torch.Tensor:
    """a (L, i, k) @ b (L, k, j), plus bias (L, j) -> (L, i, j)"""
    if not (ONEDNN and a.device.type == "cpu" and a.dtype == torch.float32):
        return torch.bmm(a, b, out=out) if bias is None else torch.baddbmm(bias[:, None], a, b, out=out)
    linear = lambda x, weight, bias: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # x weightᵀ + bias
    if bias is None:  # for a gradient: a is a large transpose, of which a copy would be made; so (bᵀ aᵀ)ᵀ, of the small one
        products = [linear(right.T, left, None).T for left, right in zip(a, b)]
    else:
        products = [linear(left, right.T, added) for left, right, added in zip(a, b, bias)]
    return torch.stack(products, out=out)


class Trainer:
    """Training steps of L SAEs of one size, each on tokens of its own: five matrix products, and little around them.

    With e = x̃' - x̃ and everything a mean over the batch of B:
    dW_dec = zᵀ 2e    db_dec = Σ 2e    dz = (2e W_decᵀ + λ) where z > 0    dW_enc = dzᵀ x̃    db_enc = Σ dz

    What makes it fast, all of it here: gradients by hand, into memory that is kept from step to step (no graph; new
    memory of this size is paid for page by page); in bfloat16 the products run on copies of weights that stay in
    float32, as Adam does; in float32 they are oneDNN's (`multiply`); the mask is one pass of ReLU's own backward (a
    Boolean mask takes 15 times as long in bfloat16 on a CPU), and a sum over the batch is a product with ones (20
    times). A small SAE's step is mostly the starting of its twenty operations: L in one step start them once (`together`).
    """

    def __init__(self, saes: list[SparseAutoencoder], batch_size: int, precision: str = "float32"):
        self.dtype, self.parameters = getattr(torch, precision), {}
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            self.parameters[name] = torch.stack([getattr(sae, name).detach() for sae in saes])  # (L, ...)
            for sae, its in zip(saes, self.parameters[name]):
                getattr(sae, name).data = its  # a view: the SAE is trained where it lies
        for parameter in self.parameters.values():
            parameter.grad = torch.empty_like(parameter)
        self.weights = [parameter.to(self.dtype) for parameter in self.parameters.values()]  # in float32 the very same
        self.gradients = [parameter.grad.to(self.dtype) for parameter in self.parameters.values()]
        L, m, device = *self.parameters["b_enc"].shape, saes[0].b_enc.device
        new = functools.partial(torch.empty, dtype=self.dtype, device=device)
        self.z, self.dz, self.ones = new(L, batch_size, m), new(L, batch_size, m), new(L, 1, batch_size).fill_(1)
        self.optimizer = torch.optim.Adam(self.parameters.values(), fused=True)

    def loss_and_gradients(self, x: torch.Tensor, l1: float) -> Loss:
        """Loss on normalised tokens x̃ (L, B, n) in float32, its gradients left in the parameters' .grad."""
        low = self.dtype != x.dtype
        if low:
            for weight, parameter in zip(self.weights, self.parameters.values()):
                weight.copy_(parameter)
        W_enc, W_dec, b_enc, b_dec = self.weights
        dW_enc, dW_dec, db_enc, db_dec = self.gradients
        x_low, B = x.to(self.dtype), x.shape[1]
        z = multiply(x_low, W_enc.mT, b_enc, out=self.z).relu_()  # (L, B, m)
        error = multiply(z, W_dec, b_dec).to(x.dtype).sub_(x)  # (L, B, n), in full: a small difference
        loss = Loss(error.square().sum((1, 2)) / B, (self.ones @ z).sum((1, 2), dtype=x.dtype) / B)
        error = error.mul_(2 / B).to(self.dtype)
        multiply(z.mT, error, out=dW_dec)
        dz = multiply(error, W_dec.mT, torch.full_like(b_enc, l1 / B), out=self.dz)  # (L, B, m)
        torch.ops.aten.threshold_backward.grad_input(dz, z, 0, grad_input=dz)  # zero where z is
        multiply(dz.mT, x_low, out=dW_enc)
        torch.bmm(self.ones, dz, out=db_enc[:, None])
        torch.bmm(self.ones, error, out=db_dec[:, None])
        if low:
            for gradient, parameter in zip(self.gradients, self.parameters.values()):
                parameter.grad.copy_(gradient)
        return loss

    def step(self, x: torch.Tensor, l1: float, lr: float) -> Loss:
        """One step on normalised tokens x̃ (L, B, n), decoder rows of unit norm after it."""
        loss = self.loss_and_gradients(x, l1)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        W_dec = self.parameters["W_dec"]
        W_dec /= W_dec.norm(dim=-1, keepdim=True)  # or λ‖z‖₁ could be had for nothing by a longer row
        return loss

    def state(self) -> dict[str, torch.Tensor]:
        """All that the next step depends on, by name, each (L, ...): weights and Adam's moments; not copied."""
        moments = {
            f"{name}.{key}": self.optimizer.state[parameter][key]
            for name, parameter in self.parameters.items() for key in ("exp_avg", "exp_avg_sq")
        }
        return {**self.parameters, **moments}

    def resume(self, state: dict[str, torch.Tensor], step: int) -> None:
        """Go on from the `state` after a step, to the very steps that would have come."""
        for name, parameter in self.parameters.items():
            parameter.copy_(state[name])
            moments = {key: state[f"{name}.{key}"].to(parameter, copy=True) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(step), device=parameter.device), **moments}


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


def step_flop(width: int, settings: Training) -> int:
    """Of an SAE's training step: five products of 2 · batch · width · latents."""
    return 10 * settings.batch_size * settings.expansion * width**2


def together(rows: int, width: int, settings: Training, device: str) -> int:
    """How many SAEs, each on a buffer (rows, width), to train in one step: where steps are small, what one pool holds.

    Only at widths that are a multiple of 16, where Adam's vectors end where an SAE ends, and so round as for one alone.
    """
    small = step_flop(width, settings) <= SMALL_STEP[device] and width % 16 == 0
    return max(1, pool_bytes(device) // (2 * width * rows)) if small else 1


def new_sae(statistics: Statistics, settings: Training, about: dict | None = None) -> SparseAutoencoder:
    """An untrained SAE of unit-norm random directions, W_enc = W_dec and b_dec at the mean, which `inputs` sets apart."""
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


def train_sae(buffer: ActivationBuffer, settings: Training, about: dict | None = None, **more) -> SparseAutoencoder:
    """Train one SAE on a buffer of tokens; all else as in train_together."""
    return train_together([buffer], settings, [about], **more)[0]


def train_together(
    buffers: list[ActivationBuffer], settings: Training, abouts: list[dict | None], progress=None, checkpoint=None, resume=None
) -> list[SparseAutoencoder]:
    """Train one SAE on each of L buffers of one shape, to the SAEs that each would come to alone.

    On a CPU they are those to the bit, if the width is a multiple of 16.

    progress    called as progress(step, steps, loss) after every step
    checkpoint  called after every epoch but the last with the state of the training, tensors (L, ...) by name (not copied)
    resume      such a state, on any device: the training goes on from it to the SAEs that it would have come to

    Raises SAEError where the batch is larger than the data, all tokens are the same or not finite, or the loss or the
    weights are not finite.
    """
    L, B, rows, pool_rows = len(buffers), settings.batch_size, buffers[0].rows, buffers[0].pool_rows
    if B > min(rows, pool_rows):
        raise SAEError(f"--batch-size {B} is larger than the {rows} training images")
    saes = [new_sae(buffer.statistics(), settings, about).to(buffer.device) for buffer, about in zip(buffers, abouts)]
    trainer = Trainer(saes, B, settings.precision)
    generators = [torch.Generator().manual_seed(settings.seed) for _ in buffers]
    steps = settings.epochs * sum(min(pool_rows, rows - start) // B for start in range(0, rows, pool_rows))  # whole batches
    step = 0
    if resume is not None:
        step = int(resume["steps_done"][0])
        trainer.resume(resume, step)
        for generator, state in zip(generators, resume["generator"]):
            generator.set_state(state.clone())  # of a view PyTorch reads elsewhere
    finite = torch.full((L,), step, device=buffers[0].device)  # steps with a finite loss; counted there, as asking takes time
    while step < steps:
        for batches in zip(*(buffer.batches(B, generator) for buffer, generator in zip(buffers, generators))):
            x = torch.stack([sae.normalise(batch) for sae, batch in zip(saes, batches)])  # (L, B, n)
            lr_factor, l1_factor = schedule(step, steps)
            loss = trainer.step(x, settings.l1 * l1_factor, settings.lr * lr_factor)
            finite += loss.reconstruction.isfinite()
            step += 1
            if progress is not None:
                progress(step, steps, loss)
        for buffer, sae, count in zip(buffers, saes, finite.tolist()):
            if count < step or not all(parameter.isfinite().all() for parameter in sae.parameters()):
                raise SAEError(f"{buffer.tokens.filename}: the loss or a weight is not finite at step {min(count + 1, step)} of "
                               f"{steps}: lower --lr")
        if checkpoint is not None and step < steps:
            states = torch.stack([generator.get_state() for generator in generators])
            checkpoint({**trainer.state(), "generator": states, "steps_done": torch.full((L,), step)})
    return [sae.eval().requires_grad_(False) for sae in saes]
