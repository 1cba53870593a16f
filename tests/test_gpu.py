"""A GPU that is only pretended: every stage on its device, and nothing that waits where it matters;
and the paper's sizes on tensors without values: devices and memory."""

import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import metrics
from conftest import small_run
from dinov2_hooks import class_tokens, relevancy_maps
from paper_cost import load_vit_g, train_three_steps
from pretend_cuda import OnGPU, log, pretend_cuda
from reproduce import main
from sae import POOL_BYTES, ActivationBuffer, Training, train_sae


@pytest.fixture(autouse=True)
def no_pinning(monkeypatch):
    """Pinned memory is the driver's."""
    loader = torch.utils.data.DataLoader
    monkeypatch.setattr(
        "dinov2_hooks.DataLoader", lambda *of, pin_memory, **more: loader(*of, **more)
    )
    log.clear()


def waits(function: str) -> dict:
    """What waited for the GPU in one function of the project: {what: how often}."""
    return {what: count for (what, where), count in log.items() if where == function}


def test_the_pretended_gpu_raises_where_a_real_one_would():
    with pretend_cuda():
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        assert isinstance(here.to("cuda"), OnGPU) and there.device.type == "cuda"
        copy, arrived = there.to("cpu", non_blocking=True), torch.cuda.Event()
        arrived.record()
        assert copy.isnan().all()
        arrived.synchronize()
        assert torch.equal(copy, here)
        assert not isinstance(there.cpu(), OnGPU) and isinstance(there + 1, OnGPU)
        for wrong in (
            lambda: here + there,
            lambda: there.numpy(),
            lambda: torch.cat([here, there]),
        ):
            with pytest.raises((RuntimeError, TypeError), match="cuda:0"):
                wrong()


@pytest.mark.parametrize("more", [["--seeds", "2"], ["--activation", "topk-9"]])
def test_a_whole_run_on_a_gpu(data, hub, work, more):
    run = small_run(data, hub, *more)
    with pretend_cuda():
        assert main([*run, "--device", "cuda"]) == 0
    (path,) = Path("out/results").glob("*/results.json")
    record = json.loads(path.read_text())
    assert record["made_of"]["precision"] == "float16"
    assert record["settings"]["device"] == "cuda" and len(record["layers"]) >= 3
    assert main([*run, "--device", "cpu"]) == 0  # tokens keep their precision, whoever scores them


def test_a_training_step_does_not_wait(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(200, 8)).astype(np.float16))
    counts = []
    for epochs in (1, 3):  # ten steps each
        log.clear()
        with pretend_cuda():
            buffer = ActivationBuffer(tmp_path / "x.npy", "cuda")
            assert buffer.pool_rows == ActivationBuffer(tmp_path / "x.npy").pool_rows  # or others
            train_sae(buffer, Training(epochs=epochs, batch_size=20), buffer.statistics())
        counts.append(
            sum(waits("train_sae").values())
            + sum(waits("loss_of").values())
            + sum(waits("batches").values())
        )
    # an epoch asks once whether each of four parameters is finite, and its order goes to the GPU
    assert counts[1] - counts[0] == 2 * (4 + 1)


def test_a_probe_step_does_not_wait():
    counts = []
    for rows in (2560, 5120):
        log.clear()
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(rows, 4, generator=generator), torch.arange(rows) % 3
        with pretend_cuda():
            mean, variance = torch.zeros(4).to("cuda"), torch.ones(4).to("cuda")
            metrics.linear_probe(x.numpy(), y, 3, mean, variance, least_steps=rows // 128)
        waited = waits("linear_probe")
        assert waited.pop("to the GPU") >= rows // 256  # the batches
        counts.append(sum(waited.values()))
    assert counts[0] == counts[1] < 20


class Memory(TorchDispatchMode):
    """`peak`: bytes of all tensors made in it that live at once, at most."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for storage in [
            t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)
        ]:
            if storage not in self.seen:
                self.seen.add(storage)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return out

    def add(self, count: int) -> None:
        self.now += count
        self.peak = max(self.peak, self.now)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_papers_sae_trains_in_little_memory(precision):
    with FakeTensorMode(), Memory() as memory:
        with pytest.raises(DataDependentOutputException):  # after the last step
            train_three_steps(POOL_BYTES // (2 * 1536), precision)
    weights = 4 * 2 * 12288 * 1536  # themselves, their gradients, two moments of Adam
    assert POOL_BYTES + 4 * weights < memory.peak < 1.5 * (POOL_BYTES + 4 * weights)


@pytest.mark.filterwarnings("ignore:xFormers")
def test_vit_g_records_in_little_memory(dinov2):
    with FakeTensorMode(), Memory() as memory, torch.inference_mode():
        model, batch = load_vit_g(str(dinov2)), torch.empty(64, 3, 224, 224, device="cuda")
        tokens = class_tokens(model, batch, range(40))  # autocast needs a GPU
    assert tokens.device.type == "cuda" and tokens.shape == (40, 64, 1536)
    assert 4 * 1.1e9 < memory.peak < 8e9, memory.peak


@pytest.mark.filterwarnings("ignore:xFormers")
def test_maps_of_vit_g_take_little_memory(dinov2):
    """Two images at once, in the last layer, as the report draws them. On a fake CPU, as backward
    on a fake GPU wants a real one."""
    with FakeTensorMode(), Memory() as memory:
        model, images = load_vit_g(str(dinov2), "cpu"), torch.empty(2, 3, 224, 224)
        maps = relevancy_maps(model, images, 39, lambda x: x[:, 0])
    assert maps.shape == (2, 16, 16)
    assert 4 * 1.1e9 < memory.peak < 8e9, memory.peak
