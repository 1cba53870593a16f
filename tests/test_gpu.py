"""A GPU that is only pretended: every stage on its device, and nothing that waits where it matters."""
import json
from pathlib import Path

import pytest
import torch

from conftest import small_run
from kit import images, recording
from pretend_cuda import OnGPU, log, pretend_cuda
from reproduce import main
from sae import ActivationBuffer, Training, train_sae


@pytest.fixture(autouse=True)
def no_pinning(monkeypatch):
    """Pinned memory is the driver's."""
    loader = torch.utils.data.DataLoader
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda *of, pin_memory, **more: loader(
        *of, **more))
    log.clear()


def waits(function: str) -> dict:
    """What waited for the GPU in one function of the project: {what: how often}."""
    return {what: count for (what, where), count in log.items() if where.endswith(f":{function}")}


def test_the_pretended_gpu_raises_where_a_real_one_would():
    with pretend_cuda():
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        assert isinstance(here.to("cuda"), OnGPU) and there.device.type == "cuda"
        assert not isinstance(there.cpu(), OnGPU) and isinstance(there + 1, OnGPU)
        for wrong in (lambda: here + there, lambda: there.numpy(), lambda: torch.cat([here, there])):
            with pytest.raises((RuntimeError, TypeError), match="cuda:0"):
                wrong()


@pytest.mark.parametrize("more", [["--plan"], ["--seeds", "2"], ["--activation", "topk-9"]])
def test_a_whole_run_on_a_gpu(data, hub, work, more):
    with pretend_cuda():
        assert main(small_run(data, hub, "--device", "cuda", *more)) == 0
    if "--plan" not in more:
        record = json.loads(Path("out/results/results.json").read_text())
        assert record["made_from"]["precision"] == "float16"
        assert record["settings"]["device"] == "cuda" and len(record["layers"]) >= 3


def test_tokens_of_a_gpu_and_of_a_cpu_do_not_mix(data, hub, work, capsys):
    run = small_run(data, hub, "--layers", "1")
    assert main(run) == 0
    with pretend_cuda():
        assert main([*run, "--device", "cuda"]) == 2
    said = capsys.readouterr().err
    assert "precision was float32 and is now float16" in said and "another --out" in said


def test_a_training_step_does_not_wait(tmp_path):
    import numpy as np

    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(200, 8)).astype(np.float16))
    counts = []
    for epochs in (1, 3):  # ten steps each
        log.clear()
        with pretend_cuda():
            buffer = ActivationBuffer(tmp_path / "x.npy", "cuda")
            train_sae(buffer, Training(epochs=epochs, batch_size=20), buffer.statistics())
        counts.append(sum(waits("train_sae").values()) + sum(waits("loss_of").values())
                      + sum(waits("batches").values()))
    # an epoch asks once whether each of four parameters is finite, and its order goes to the GPU
    assert counts[1] - counts[0] == 2 * (4 + 1)


def test_a_probe_step_does_not_wait():
    from metrics import linear_probe

    counts = []
    for rows in (2560, 5120):  # 3,000 steps are the least: 300 epochs of 10 steps, 150 of 20
        log.clear()
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(rows, 4, generator=generator), torch.arange(rows) % 3
        with pretend_cuda():
            x, y = x.to("cuda"), y.to("cuda")
            linear_probe(x, y, x[:100], y[:100])
        counts.append(sum(waits("linear_probe").values()))
    assert counts[0] == counts[1] < 20


def test_a_recorded_batch_waits_for_its_tokens_and_whether_they_are_finite(data, hub, work, monkeypatch):
    monkeypatch.setattr(images, "BATCH", 8)
    monkeypatch.setattr(recording, "COMMIT_SECONDS", 1000)
    with pretend_cuda():
        assert main(small_run(data, hub, "--device", "cuda", "--layers", "1")) == 0
    batches = 48 // 8 + -(-20 // 8)
    assert waits("record") == {"to the GPU": batches, "__bool__": batches, "to the host": batches}
