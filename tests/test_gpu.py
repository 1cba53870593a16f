"""The paper's sizes on tensors without values: what they take of a card's memory; a GPU."""

import weakref

import pytest
import torch
from pytest import approx
from test_recording import Images
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinov2_hooks import class_tokens, finish, load_backbone, record, relevancy_maps
from metrics import profile_latents
from sae import ActivationBuffer, Statistics, Training, train_sae

ROWS = 1_281_167  # of ImageNet-1k's training images


class Memory(TorchDispatchMode):
    """`peak`: bytes of all tensors made in it that live at once, at most."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return out

    def add(self, count):
        self.now += count
        self.peak = max(self.peak, self.now)


class Pool:
    """A buffer of ImageNet's tokens, without values."""

    device = "cpu"
    rows = ROWS

    def batches_of_an_epoch(self, batch_size):
        return 3

    def batches(self, batch_size, generator):
        pool = torch.empty(ROWS, 1536, dtype=torch.float16)
        for _ in range(3):
            yield pool[:batch_size].float()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_papers_sae_trains_in_little_memory(precision, monkeypatch):
    monkeypatch.setattr("torch.nn.Module.to", lambda module, device: module)
    with FakeTensorMode(), Memory() as memory:
        statistics = Statistics(*torch.zeros(2, 1536, dtype=torch.float64), 1.0, 1.0)
        with pytest.raises(DataDependentOutputException):  # at the first row of its history
            train_sae(Pool(), Training(epochs=1, precision=precision), statistics)
    tokens = 2 * 1536 * ROWS
    weights = 4 * 2 * 12288 * 1536  # themselves, their gradients, two moments of Adam
    assert tokens + 4 * weights < memory.peak < 1.5 * (tokens + 4 * weights) < 8.5e9


@pytest.mark.filterwarnings("ignore:xFormers")
@pytest.mark.parametrize("images", [64, 2], ids=["recorded", "maps of the last layer"])
def test_vit_g_takes_little_memory(dinov2, images, monkeypatch):
    """With DINOv2's own code; two images at once are in the report's maps."""
    monkeypatch.setattr("torch.nn.init._no_grad_trunc_normal_", lambda tensor, *_, **more: tensor)
    monkeypatch.setattr("torch.nn.Module.float", lambda module: module)  # which it is
    with FakeTensorMode(), Memory() as memory:
        vit = load_backbone("dinov2_vitg14", str(dinov2), pretrained=False)
        x = torch.empty(images, 3, 224, 224)
        if images == 2:
            assert relevancy_maps(vit, x, 39, lambda x: x[:, 0]).shape == (2, 16, 16)
        else:
            with torch.inference_mode():
                assert class_tokens(vit, x, range(40)).shape == (40, 64, 1536)
    assert 4 * 1.1e9 < memory.peak < 8e9, memory.peak


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_records_trains_and_scores_as_the_cpu_does(vit, tmp_path):
    """Up to autocast, up to rounding, and alike."""
    images, tokens, losses, counts = Images(torch.randn(300, 3, 16, 16)), [], [], []
    for device, precision in (("cpu", "float32"), ("cuda", "float16")):
        record(vit.to(device), images, tmp_path / device, [2], precision)
        finish(tmp_path / device, [2])
        tokens.append(ActivationBuffer(tmp_path / device / "layer_02.npy").rows_at(slice(None)))
        buffer = ActivationBuffer(tmp_path / "cpu/layer_02.npy", device)
        losses.append(train_sae(buffer, Training(epochs=20, batch_size=50)).history[-1]["loss"])
        profile = profile_latents(torch.relu, buffer.batches(64), torch.arange(300) % 7, 7)
        counts.append(profile.counts.cpu())
    cpu, gpu = tokens
    assert (gpu - cpu).norm() < 0.02 * cpu.norm() and losses[0] == approx(losses[1], rel=0.02)
    assert torch.equal(*counts)
