"""The paper's sizes on tensors without values: what they take of a card's memory."""

import weakref
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinov2_hooks import class_tokens, load_backbone, relevancy_maps
from sae import Statistics, Training, train_sae

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


@pytest.fixture
def vit_g(dinov2):
    """ViT-g with DINOv2's own code, in a FakeTensorMode, without filling in its weights."""

    def load():
        with (
            mock.patch("torch.nn.init._no_grad_trunc_normal_", lambda tensor, *_, **more: tensor),
        ):
            return load_backbone("dinov2_vitg14", str(dinov2), pretrained=False)

    return load


@pytest.mark.filterwarnings("ignore:xFormers")
def test_vit_g_records_in_little_memory(vit_g):
    with FakeTensorMode(), Memory() as memory, torch.inference_mode():
        tokens = class_tokens(vit_g(), torch.empty(64, 3, 224, 224), range(40))
    assert tokens.shape == (40, 64, 1536)
    assert 4 * 1.1e9 < memory.peak < 8e9, memory.peak


@pytest.mark.filterwarnings("ignore:xFormers")
def test_maps_of_vit_g_take_little_memory(vit_g):
    """Two images at once, in the last layer, as the report draws them."""
    with FakeTensorMode(), Memory() as memory:
        images = torch.empty(2, 3, 224, 224)
        maps = relevancy_maps(vit_g(), images, 39, lambda x: x[:, 0])
    assert maps.shape == (2, 16, 16)
    assert 4 * 1.1e9 < memory.peak < 8e9, memory.peak
