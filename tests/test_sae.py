"""The SAE against closed forms and a planted dictionary; its buffer against the array it reads."""

import json

import numpy as np
import pytest
import torch
from conftest import same_sae
from safetensors.torch import load_file, save_file

import sae as sae_module
from sae import (
    ActivationBuffer,
    SAEError,
    SparseAutoencoder,
    Statistics,
    Training,
    learning_rate,
    loss_of,
    new_sae,
    schedule,
    train_sae,
)


def save(tmp_path, tokens):
    np.save(tmp_path / "tokens.npy", np.asarray(tokens, np.float16))
    return ActivationBuffer(tmp_path / "tokens.npy")


@pytest.fixture
def buffer(tmp_path):
    return save(tmp_path, torch.randn(700, 12, generator=torch.Generator().manual_seed(0)) * 2 + 5)


def test_loss_by_its_formula():
    torch.manual_seed(0)
    sae, x = SparseAutoencoder(6, 20), torch.randn(9, 6) * 3 + 5
    sae.shift += 5
    sae.scale.fill_(3)
    sae.b_enc.data.normal_(), sae.b_dec.data.normal_()
    W_enc, W_dec, b_enc, b_dec = (
        p.detach().double().numpy() for p in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec)
    )
    inputs = (x.double().numpy() - 5) / 3
    z = np.maximum(inputs @ W_enc.T + b_enc, 0)
    error = ((inputs - z @ W_dec - b_dec) ** 2).sum(1).mean()
    loss = sae_module.Loss(*(part.detach() for part in loss_of(sae, sae.normalise(x), 0.07)))
    assert float(loss.reconstruction) == pytest.approx(error, rel=1e-4)
    assert float(loss.sparsity) == pytest.approx(z.sum(1).mean(), rel=1e-4)
    assert float(loss.total) == pytest.approx(error + 0.07 * z.sum(1).mean(), rel=1e-4)


def loss_after_training(buffer, **settings):
    """On all tokens."""
    sae = train_sae(buffer, Training(epochs=20, batch_size=100, **settings), title=None)
    x = buffer.rows_at(slice(None))
    return loss_of(sae, sae.normalise(x), 0.1).total.item()


def test_bfloat16_trains_as_well_as_float32(buffer):
    losses = [loss_after_training(buffer, precision=name) for name in ("bfloat16", "float32")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_decoder_has_unit_norm_after_every_step(buffer, monkeypatch):
    before, after, adams_step = [], [], torch.optim.Adam.step

    def watched(optimizer):
        W_dec = optimizer.param_groups[0]["params"][0].detach()
        assert W_dec.shape == (96, 12)
        before.append(float((W_dec.norm(dim=1) - 1).abs().max()))
        adams_step(optimizer)
        after.append(float((W_dec.norm(dim=1) - 1).abs().max()))

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    sae = train_sae(buffer, Training(epochs=3, batch_size=100))
    assert len(before) == 21
    assert max(before) < 1e-6 and float((sae.W_dec.norm(dim=1) - 1).abs().max()) < 1e-6
    assert min(after) > 1e-5  # Adam itself had broken it


def test_history_of_training(buffer):
    """Of 14 steps each is a row; the first by hand. Of 700 there are 20 rows, in which the loss
    falls, and the SAE of a learning rate of nearly zero stays where it was."""
    settings = Training(epochs=2, batch_size=100, l1=0.3)
    first, *rows = train_sae(buffer, settings, title=None).history
    assert [row["step"] for row in rows] == list(range(2, 15))
    sae = new_sae(buffer.statistics(), settings)
    x = next(buffer.batches(100, torch.Generator().manual_seed(0)))
    x_hat, z = sae(x)
    error = ((x - x_hat) / sae.scale).square().sum(1).mean().item()
    sparsity = z.sum(1).mean().item()
    assert first["reconstruction"] == pytest.approx(error, rel=1e-4)
    assert first["sparsity"] == pytest.approx(sparsity, rel=1e-4)
    assert first["loss"] == pytest.approx(error + 0.3 * sparsity, rel=1e-4)
    assert first["l0"] == pytest.approx((z > 0).sum().item() / 100)
    assert first["dead"] == pytest.approx((~(z > 0).any(0)).float().mean().item())
    long = train_sae(buffer, Training(epochs=100, batch_size=100), title=None).history
    frozen = train_sae(buffer, Training(epochs=100, batch_size=100, lr=1e-12), title=None).history
    assert len(long) == len(frozen) == 20 and long[-1]["loss"] < 0.5 * long[0]["loss"]
    assert frozen[-1]["loss"] == pytest.approx(frozen[0]["loss"], rel=0.05)
    one = Training(activation="topk-1", epochs=1, batch_size=10)  # of 70 steps, 4 are a row
    assert all(row["dead"] >= 1 - 40 / 96 for row in train_sae(buffer, one, title=None).history)


def test_learning_rate_of_the_default(buffer):
    """An SAE of the default rate is that of the rule, to the bit."""
    default = Training(epochs=2, batch_size=100)
    rate = learning_rate(96, 14)
    assert learning_rate(1536, 3900) == pytest.approx(3.5 / np.sqrt(1536 * 3900))
    assert learning_rate(1536, 3900, 32) == pytest.approx(7 / np.sqrt(1536 * 3900))
    assert same_sae(
        train_sae(buffer, default), train_sae(buffer, Training(epochs=2, batch_size=100, lr=rate))
    )


def test_inputs_have_mean_squared_norm_one(buffer):
    tokens = torch.from_numpy(np.array(buffer.tokens)).double()
    statistics = buffer.statistics()
    torch.testing.assert_close(statistics.mean, tokens.mean(0))
    assert statistics.rms_norm == pytest.approx(float(tokens.square().sum(1).mean().sqrt()))
    deviation = float((tokens - tokens.mean(0)).square().sum(1).mean().sqrt())
    assert statistics.rms_deviation == pytest.approx(deviation)
    torch.testing.assert_close(statistics.variance, tokens.var(0, correction=0))
    for inputs, mean in [
        ("centred", torch.zeros(12)),
        ("raw", statistics.mean.float() / statistics.rms_norm),
    ]:
        sae = new_sae(statistics, Training(inputs=inputs))
        x = (tokens.float() - sae.shift) / sae.scale
        assert float(x.square().sum(1).mean()) == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(x.mean(0), mean, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            sae.b_dec.detach(), mean, atol=1e-5, rtol=0
        )  # starts at the mean
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


def test_top_k_keeps_the_largest(buffer):
    sae = train_sae(buffer, Training(activation="topk-5", epochs=2, batch_size=100))
    x = torch.from_numpy(np.array(buffer.tokens[:50])).float()
    z = sae.encode(x)
    sae.top_k = None
    dense = sae.encode(x)
    assert ((z > 0).sum(1) == 5).all()
    for kept, of in zip(z, dense):
        assert sorted(kept[kept > 0].tolist()) == sorted(of.tolist())[-5:]
        assert (of[kept > 0] == kept[kept > 0]).all()
    other = train_sae(buffer, Training(activation="topk-5", epochs=2, batch_size=100, l1=7.0))
    assert torch.equal(other.W_enc, sae.W_enc)  # λ is not used


def test_training_finds_a_planted_dictionary(tmp_path):
    generator = torch.Generator().manual_seed(123)  # not the SAE's, or it would start at the answer
    directions = torch.randn(24, 32, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    on = torch.rand(6000, 24, generator=generator) < 0.06
    tokens = (on * (1 + torch.rand(6000, 24, generator=generator))) @ directions
    sae = train_sae(
        save(tmp_path, tokens), Training(expansion=2, l1=0.1, epochs=40, batch_size=128, lr=2e-3)
    )
    assert ((directions @ sae.W_dec.T).max(1).values > 0.95).all()
    untrained = new_sae(
        Statistics(tokens.mean(0).double(), tokens.var(0).double(), 1.0, 1.0), Training(expansion=2)
    )
    assert ((directions @ untrained.W_dec.T).max(1).values < 0.95).all()


def test_same_seed_same_weights(buffer):
    settings = Training(epochs=2, batch_size=64, seed=3)
    first, second = train_sae(buffer, settings), train_sae(buffer, settings)
    other = train_sae(buffer, Training(epochs=2, batch_size=64, seed=4))
    assert same_sae(first, second)
    assert not torch.equal(first.W_dec, other.W_dec)


@pytest.mark.parametrize("pools", [1, 3])
def test_buffer_batches(buffer, tmp_path, monkeypatch, pools):
    monkeypatch.setattr(sae_module, "POOL", buffer.tokens.nbytes // pools + 1)
    buffer = ActivationBuffer(tmp_path / "tokens.npy")
    tokens = torch.from_numpy(np.array(buffer.tokens)).float()
    assert torch.equal(torch.cat(list(buffer.batches(64))), tokens)
    epochs = []
    for seed in (0, 1, 0):
        batches = list(buffer.batches(32, torch.Generator().manual_seed(seed)))
        assert len(batches) == buffer.batches_of_an_epoch(32)
        epochs.append(torch.cat(batches))
    rows = {row.tobytes(): i for i, row in enumerate(tokens.numpy())}
    for epoch in epochs:
        drawn = [rows[row.tobytes()] for row in epoch.numpy()]
        assert len(drawn) == len(set(drawn)) == 672  # whole batches
        # pool after pool, each shuffled
        pool = np.searchsorted(buffer.pools, drawn, side="right") - 1
        assert (np.diff(pool) >= 0).all() and pool[-1] == pools - 1 and drawn != sorted(drawn)
    assert not torch.equal(*epochs[:2]) and torch.equal(epochs[0], epochs[2])


def test_tokens_stored_column_by_column(buffer, tmp_path):
    np.save(tmp_path / "fortran.npy", np.asfortranarray(buffer.tokens))
    columns = ActivationBuffer(tmp_path / "fortran.npy")
    assert torch.equal(torch.cat(list(columns.batches(64))), torch.cat(list(buffer.batches(64))))
    assert torch.equal(columns.rows_at([3, 1]), buffer.rows_at([3, 1]))


def test_schedule():
    factors = [schedule(step, 1000) for step in range(1000)]
    lr, l1 = zip(*factors)
    assert lr[24] == l1[24] == pytest.approx(0.5) and lr[49] == l1[49] == 1
    assert set(lr[49:801]) == {1} and set(l1[49:]) == {1}
    assert lr[900] == pytest.approx(0.5) and lr[999] == pytest.approx(1 / 200)
    assert schedule(0, 1) == (1, 1)


def test_saved_without_pickle_and_loaded_the_same(buffer, tmp_path, capsys):
    sae = train_sae(buffer, Training(epochs=1, batch_size=64), about={"layer": 3, "l1": 0.1})
    sae.save_pretrained(tmp_path / "layer_03")
    assert {path.name for path in (tmp_path / "layer_03").iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    loaded = SparseAutoencoder.from_pretrained(tmp_path / "layer_03")
    assert not loaded.training
    assert loaded.encode(torch.randn(2, 12)).numpy().shape == (2, 96)  # asks for no gradients
    x = torch.from_numpy(np.array(buffer.tokens[:9])).float()
    assert torch.equal(sae.encode(x), loaded.encode(x)) and torch.equal(sae(x)[0], loaded(x)[0])
    assert loaded.about == {"layer": 3, "l1": 0.1}
    assert json.loads((tmp_path / "layer_03/config.json").read_text())["latents"] == 96


def test_an_sae_that_lacks_a_tensor_or_has_another_is_refused(tmp_path):
    SparseAutoencoder(4, 8).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in list(weights):
        save_file(
            {key: weights[key] for key in weights if key != name}, tmp_path / "model.safetensors"
        )
        with pytest.raises(SAEError, match=f"(?s)is damaged, or of another kind .*{name}"):
            SparseAutoencoder.from_pretrained(tmp_path)
    save_file(weights | {"W": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(SAEError, match="of another kind"):
        SparseAutoencoder.from_pretrained(tmp_path)


def test_an_sae_of_other_settings_or_numbers_is_refused(tmp_path):
    def load(change=lambda sae: None, **config):
        sae = SparseAutoencoder(4, 8, about={"layer": 3})
        change(sae)
        sae.save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return SparseAutoencoder.from_pretrained(tmp_path)

    assert load(top_k=2).top_k == 2
    for config in ({"activation": "topk", "k": 4}, {"top_k": 0}, {"top_k": "2"}, {"width": 5}):
        with pytest.raises(SAEError, match="is damaged, or of another kind"):
            load(**config)
    for change in (
        lambda sae: sae.b_enc.data.fill_(float("nan")),
        lambda sae: sae.scale.fill_(0),
    ):
        with pytest.raises(SAEError, match="not those of an SAE"):
            load(change)


def test_numbers_of_numpy_are_saved_and_what_json_lacks_is_not_dropped(tmp_path):
    SparseAutoencoder(np.int64(4), np.int64(8), top_k=np.int64(2)).save_pretrained(tmp_path)
    assert SparseAutoencoder.from_pretrained(tmp_path).top_k == 2
    assert type(Training(expansion=np.int64(2), seed=np.int32(1)).expansion) is int
    with pytest.raises(TypeError, match="not JSON serializable"):
        SparseAutoencoder(4, 8, about={"layer": np.int64(3)}).save_pretrained(tmp_path)


def test_tokens_of_many_layers_at_once():
    sae = SparseAutoencoder(6, 20, top_k=3)
    x = torch.randn(5, 9, 6)
    x_hat, z = sae(x)
    for layer in range(5):
        assert torch.equal(z[layer], sae.encode(x[layer])) and (z[layer] > 0).sum(1).max() <= 3
        torch.testing.assert_close(x_hat[layer], sae(x[layer])[0])


@pytest.mark.parametrize(
    "settings",
    [
        {"inputs": "centered"},
        {"precision": "bf16"},
        *({name: value} for name in ("expansion", "epochs", "batch_size") for value in (0, 2.5)),
        *({"lr": value} for value in (0, -1, float("nan"))),
        *({"l1": value} for value in (-1, float("nan"), float("inf"))),
        {"seed": -1},
    ],
)
def test_settings_that_are_none(settings):
    ((name, value),) = settings.items()
    with pytest.raises(SAEError, match=f"{name}={value!r}: give"):
        Training(**settings)


def test_what_cannot_be_trained(tmp_path):
    noise = np.random.default_rng(0).normal(size=(50, 4))
    for tokens, training, words in [
        (noise, Training(batch_size=64), "a batch of 64 is larger than the 50 training tokens"),
        (np.ones((50, 4)), Training(batch_size=16), "all class tokens are the same"),
        (np.full((50, 4), np.nan), Training(batch_size=16), "the class tokens are not finite"),
        (noise, Training(batch_size=16, lr=1e30), "weights not finite after epoch 1: lower the"),
    ]:
        with pytest.raises(SAEError, match=words):
            train_sae(save(tmp_path, tokens), training)
    for activation in ("gelu", "topk-0", "topk-33", "topk-"):
        with pytest.raises(SAEError, match="give relu, or topk-K .* number of latents, 32"):
            train_sae(save(tmp_path, noise), Training(activation=activation, batch_size=16))
    with pytest.raises(SAEError, match="there is no SAE in"):
        SparseAutoencoder.from_pretrained(tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_trains_as_well_as_the_cpu(buffer):
    on_gpu = ActivationBuffer(buffer.tokens.filename, "cuda")
    assert loss_after_training(on_gpu) == pytest.approx(loss_after_training(buffer), rel=0.02)
