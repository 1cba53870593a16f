"""The SAE against autograd, closed forms and a planted dictionary; its buffer against the array it reads."""
import copy
import json

import numpy as np
import pytest
import torch

import sae as sae_module
from conftest import copied, same_sae
from sae import (
    ActivationBuffer, SAEError, SparseAutoencoder, Statistics, Trainer, Training, fitting_batch_size, new_sae, schedule,
    together, train_sae, train_together,
)


def save(tmp_path, tokens):
    np.save(tmp_path / "tokens.npy", np.asarray(tokens, np.float16))
    return ActivationBuffer(tmp_path / "tokens.npy")


@pytest.fixture
def buffer(tmp_path):
    return save(tmp_path, torch.randn(700, 12, generator=torch.Generator().manual_seed(0)) * 2 + 5)


@pytest.mark.parametrize("precision, tolerance", [("float64", {}), ("float32", {"rtol": 1e-5, "atol": 1e-5})])
def test_gradients_equal_autograd(precision, tolerance):
    torch.manual_seed(0)
    saes = [SparseAutoencoder(12, 40).double() for _ in range(3)]
    for sae in saes:
        sae.b_enc.data += 0.1 * torch.randn(40)
        sae.b_dec.data += 0.1 * torch.randn(12)
    x, l1 = torch.randn(3, 50, 12, dtype=torch.float64), 0.07
    trained = [copy.deepcopy(sae).to(getattr(torch, precision)) for sae in saes]
    trainer = Trainer(trained, 50, precision)
    loss = trainer.loss_and_gradients(x.to(getattr(torch, precision)), l1)
    equal = lambda ours, autograds: torch.testing.assert_close(ours.double(), autograds, **tolerance)
    for i, (sae, its) in enumerate(zip(saes, x)):
        z = torch.relu(its @ sae.W_enc.T + sae.b_enc)
        x_hat = z @ sae.W_dec + sae.b_dec
        reconstruction = (its - x_hat).square().sum(1).mean()
        (reconstruction + l1 * z.abs().sum(1).mean()).backward()
        equal(loss.reconstruction[i], reconstruction.detach())
        equal(loss.sparsity[i], z.sum(1).mean().detach())
        for name, parameter in sae.named_parameters():
            equal(trainer.parameters[name].grad[i], parameter.grad)


def test_bfloat16_gradients_are_float32s_up_to_rounding():
    torch.manual_seed(0)
    sae, x = SparseAutoencoder(64, 256), torch.randn(1, 200, 64) / 8
    gradients = {}
    for precision in ("float32", "bfloat16"):
        trainer = Trainer([sae], 200, precision)
        loss = trainer.loss_and_gradients(x, 0.1)
        assert loss.reconstruction.dtype == loss.sparsity.dtype == torch.float32
        gradients[precision] = torch.cat([parameter.grad.flatten() for parameter in trainer.parameters.values()])
        assert gradients[precision].dtype == torch.float32
    assert (gradients["bfloat16"] - gradients["float32"]).norm() < 0.02 * gradients["float32"].norm()


def test_bfloat16_trains_as_well_as_float32(buffer):
    losses = {}
    for precision in ("float32", "bfloat16"):
        settings = Training(epochs=20, batch_size=100, precision=precision)
        train_sae(buffer, settings, progress=lambda step, steps, loss: losses.__setitem__(precision, loss))
    assert float(losses["bfloat16"].reconstruction) == pytest.approx(float(losses["float32"].reconstruction), rel=0.02)
    assert float(losses["bfloat16"].sparsity) == pytest.approx(float(losses["float32"].sparsity), rel=0.02)


def test_decoder_has_unit_norm_after_every_step(buffer, monkeypatch):
    off, steps, adams_step = [], [], torch.optim.Adam.step

    def watched(optimizer):
        W_dec = optimizer.param_groups[0]["params"][1]
        off.append(float((W_dec.norm(dim=-1) - 1).abs().max()))
        adams_step(optimizer)
        off.append(float((W_dec.norm(dim=-1) - 1).abs().max()))

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    sae = train_sae(buffer, Training(epochs=3, batch_size=100), progress=lambda step, total, loss: steps.append((step, total)))
    assert steps == [(i + 1, 21) for i in range(21)] and len(off) == 42
    assert max(off[::2]) < 1e-6 and float((sae.W_dec.norm(dim=-1) - 1).abs().max()) < 1e-6
    assert min(off[1::2]) > 1e-5  # Adam itself had broken it


def test_inputs_have_mean_squared_norm_one(buffer):
    tokens = torch.from_numpy(np.array(buffer.tokens)).double()
    statistics = buffer.statistics()
    torch.testing.assert_close(statistics.mean, tokens.mean(0))
    assert statistics.rms_norm == pytest.approx(float(tokens.square().sum(1).mean().sqrt()))
    deviation = float((tokens - tokens.mean(0)).square().sum(1).mean().sqrt())
    assert statistics.rms_deviation == pytest.approx(deviation)
    assert statistics.gamma == pytest.approx(float(tokens.mean(0).norm()) / deviation)
    for inputs, mean in [("centred", torch.zeros(12)), ("raw", statistics.mean.float() / statistics.rms_norm)]:
        sae = new_sae(statistics, Training(inputs=inputs))
        x = sae.normalise(tokens.float())
        assert float(x.square().sum(1).mean()) == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(x.mean(0), mean, atol=1e-5, rtol=0)
        torch.testing.assert_close(sae.b_dec.detach(), mean, atol=1e-5, rtol=0)  # starts at the mean
        assert torch.equal(sae.W_enc, sae.W_dec)


def test_forward_undoes_the_normalisation():
    sae = SparseAutoencoder(4, 8)
    with torch.no_grad():  # identity: x = relu(x) - relu(-x)
        sae.W_enc.copy_(torch.cat([torch.eye(4), -torch.eye(4)]))
        sae.W_dec.copy_(sae.W_enc)
        sae.shift.copy_(torch.tensor([1.0, 2, 3, 4]))
        sae.scale.fill_(7)
    x = torch.randn(5, 4) * 10
    torch.testing.assert_close(sae(x)[0], x)
    assert (sae(x)[1] > 0).sum(1).tolist() == [4] * 5


def test_training_finds_a_planted_dictionary(tmp_path):
    generator = torch.Generator().manual_seed(123)  # not the SAE's, or it would start at the answer
    directions = torch.randn(24, 32, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    on = torch.rand(6000, 24, generator=generator) < 0.06
    tokens = (on * (1 + torch.rand(6000, 24, generator=generator))) @ directions
    sae = train_sae(save(tmp_path, tokens), Training(expansion=2, l1=0.1, epochs=40, batch_size=128, lr=2e-3))
    assert ((directions @ sae.W_dec.T).max(1).values > 0.95).all()
    untrained = new_sae(Statistics(tokens.mean(0).double(), 1.0, 1.0), Training(expansion=2))
    assert ((directions @ untrained.W_dec.T).max(1).values < 0.95).all()


def test_same_seed_same_weights(buffer):
    settings = Training(epochs=2, batch_size=64, seed=3)
    first, second = train_sae(buffer, settings), train_sae(buffer, settings)
    other = train_sae(buffer, Training(epochs=2, batch_size=64, seed=4))
    assert same_sae(first, second)
    assert not torch.equal(first.W_dec, other.W_dec)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_resumed_training_comes_to_the_same_weights(buffer, precision, monkeypatch):
    monkeypatch.setattr(sae_module, "POOL_BYTES", 300 * 2 * 12)  # three pools, in another order each epoch
    buffer = ActivationBuffer(buffer.tokens.filename)
    settings, states = Training(epochs=4, batch_size=64, seed=3, precision=precision), []
    at_once = train_sae(buffer, settings, checkpoint=lambda state: states.append(copied(state)))
    assert len(states) == 3
    for state in states:
        steps = []
        again = train_sae(buffer, settings, resume=state, progress=lambda step, total, loss: steps.append((step, total)))
        assert same_sae(at_once, again)
        assert steps[0] == (int(state["steps_done"]) + 1, steps[-1][0]) and steps[-1][0] == steps[-1][1]
    assert not torch.equal(states[-1]["W_dec"][0], at_once.W_dec)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_together_to_the_bit_as_alone(tmp_path, precision):
    rng, settings, states = np.random.default_rng(0), Training(epochs=4, batch_size=50, precision=precision), []
    for layer in range(3):
        np.save(tmp_path / f"{layer}.npy", (rng.normal(size=(300, 32)) * (layer + 1) + layer).astype(np.float16))
    buffers = [ActivationBuffer(tmp_path / f"{layer}.npy") for layer in range(3)]

    alone = [train_sae(buffer, settings, {"layer": layer}) for layer, buffer in enumerate(buffers)]
    abouts = [{"layer": layer} for layer in range(3)]
    at_once = train_together(buffers, settings, abouts, checkpoint=lambda state: states.append(copied(state)))
    assert all(map(same_sae, at_once, alone)) and [sae.about["layer"] for sae in at_once] == [0, 1, 2]
    two = {name: tensor[1:] for name, tensor in states[1].items()}  # the first is done, and the others go on
    assert all(map(same_sae, train_together(buffers[1:], settings, [None] * 2, resume=two), alone[1:]))


def test_how_many_together(monkeypatch):
    monkeypatch.setattr(sae_module, "POOL_BYTES", 1_000_000)
    settings = Training(batch_size=128)
    assert together(rows=1000, width=96, settings=settings, device="cpu") == 5  # buffers of 192,000 bytes
    assert together(rows=10**5, width=96, settings=settings, device="cpu") == 1
    assert together(rows=1000, width=1536, settings=settings, device="cpu") == 1  # a large step
    assert together(rows=1000, width=90, settings=settings, device="cpu") == 1


@pytest.mark.parametrize("pool_rows", [700, 256, 90])
def test_buffer_batches(buffer, pool_rows, monkeypatch):
    monkeypatch.setattr(sae_module, "POOL_BYTES", pool_rows * 2 * 12)
    small = ActivationBuffer(buffer.tokens.filename)
    assert small.pool_rows == pool_rows
    torch.testing.assert_close(torch.cat(list(small.batches(64))), torch.from_numpy(np.array(buffer.tokens)).float())
    epochs = [torch.cat(list(small.batches(32, torch.Generator().manual_seed(seed)))) for seed in (0, 1)]
    rows = {row.tobytes() for row in np.array(buffer.tokens, np.float32)}
    for epoch in epochs:
        drawn = [row.tobytes() for row in epoch.numpy()]
        assert len(drawn) == len(set(drawn)) >= 0.7 * 700 and set(drawn) <= rows
    assert not torch.equal(*epochs)
    assert torch.equal(epochs[0], torch.cat(list(small.batches(32, torch.Generator().manual_seed(0)))))


def test_schedule():
    factors = [schedule(step, 1000) for step in range(1000)]
    lr, l1 = zip(*factors)
    assert lr[24] == l1[24] == pytest.approx(0.5) and lr[49] == l1[49] == 1
    assert set(lr[49:801]) == {1} and set(l1[49:]) == {1}
    assert lr[900] == pytest.approx(0.5) and lr[999] == pytest.approx(1 / 200)
    assert schedule(0, 1) == (1, 1)


def test_fitting_batch_size():
    assert fitting_batch_size(1_281_167, 50) == 4096
    assert fitting_batch_size(20_000, 50) == 512
    for rows in (5, 100, 3000, 10**5):
        batch_size = fitting_batch_size(rows, 50)
        assert batch_size <= rows or rows < 16


def test_saved_without_pickle_and_loaded_the_same(buffer, tmp_path, capsys):
    sae = train_sae(buffer, Training(epochs=1, batch_size=64), about={"layer": 3, "l1": 0.1})
    sae.save_pretrained(tmp_path / "layer_03")
    assert {path.name for path in (tmp_path / "layer_03").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    loaded = SparseAutoencoder.from_pretrained(tmp_path / "layer_03")
    x = torch.from_numpy(np.array(buffer.tokens[:9])).float()
    assert torch.equal(sae.encode(x), loaded.encode(x)) and torch.equal(sae(x)[0], loaded(x)[0])
    assert loaded.about == {"layer": 3, "l1": 0.1}
    assert json.loads((tmp_path / "layer_03/config.json").read_text())["latents"] == 96


def test_what_cannot_be_trained(tmp_path):
    with pytest.raises(SAEError, match="--batch-size 64 is larger than the 50"):
        train_sae(save(tmp_path, np.random.default_rng(0).normal(size=(50, 4))), Training(batch_size=64))
    with pytest.raises(SAEError, match="tokens.npy: all class tokens are the same"):
        train_sae(save(tmp_path, np.ones((50, 4))), Training(batch_size=16))
    with pytest.raises(SAEError, match="tokens.npy: the class tokens are not finite"):
        train_sae(save(tmp_path, np.full((50, 4), np.nan)), Training(batch_size=16))
    losses = []
    with pytest.raises(SAEError, match="tokens.npy: the loss or a weight is not finite at step") as error:
        train_sae(save(tmp_path, np.random.default_rng(0).normal(size=(64, 4))), Training(batch_size=16, lr=1e30, epochs=9),
                  progress=lambda step, steps, loss: losses.append(float(loss.reconstruction)))
    first = 1 + next(i for i, loss in enumerate(losses) if not np.isfinite(loss))
    assert f"at step {first} of 36" in str(error.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_trains_as_well_as_the_cpu(buffer):
    settings = Training(epochs=20, batch_size=100)
    losses = {}
    for device in ("cpu", "cuda"):
        on_device = ActivationBuffer(buffer.tokens.filename, device)
        train_sae(on_device, settings, progress=lambda step, steps, loss: losses.__setitem__(device, float(loss.reconstruction)))
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.02)
