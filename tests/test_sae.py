"""The SAE against closed forms and a planted dictionary; its buffer against the array it reads."""

import json

import numpy as np
import pytest
import torch
from conftest import same_sae
from pytest import approx, raises
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import sae as sae_module
from sae import (
    HISTORY,
    ActivationBuffer,
    SAEError,
    SparseAutoencoder,
    Training,
    learning_rate,
    loss_of,
    new_sae,
    train_sae,
)


def save(tmp_path, tokens):
    np.save(tmp_path / "tokens.npy", np.asarray(tokens, np.float16))
    return ActivationBuffer(tmp_path / "tokens.npy")


def quick(**settings):
    return Training(**{"epochs": 2, "batch_size": 100, **settings})


@pytest.fixture
def buffer(tmp_path):
    return save(tmp_path, torch.randn(700, 12, generator=torch.Generator().manual_seed(0)) * 2 + 5)


def test_loss_and_reconstruction_by_their_formula():
    """With tokens of two layers at once."""
    torch.manual_seed(0)
    sae, x = SparseAutoencoder(6, 20), torch.randn(2, 9, 6) * 3 + 5
    sae.shift += 5
    sae.scale.fill_(3)
    sae.b_enc.data.normal_(), sae.b_dec.data.normal_()
    W_enc, W_dec, b_enc, b_dec = (
        p.detach().double().numpy() for p in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec)
    )
    inputs = (x.double().numpy() - 5) / 3
    z = np.maximum(inputs @ W_enc.T + b_enc, 0)
    x_hat = z @ W_dec + b_dec
    for ours, expected in zip(sae.requires_grad_(False)(x), (3 * x_hat + 5, z)):
        np.testing.assert_allclose(ours, expected, atol=1e-4)
    error, sparsity = ((inputs - x_hat) ** 2).sum(2)[0].mean(), z.sum(2)[0].mean()
    loss = loss_of(sae, sae.normalise(x[0]), 0.07)
    expected = error + 0.07 * sparsity, error, sparsity
    assert list(map(float, loss[:3])) == approx(expected, rel=1e-4)
    sae.top_k = 3
    for layer in (0, 1):
        z = sae.encode(x)[layer]
        assert torch.equal(z, sae.encode(x[layer])) and (z > 0).sum(1).max() == 3


def test_history_of_training(buffer):
    """Of 14 steps each is a row; the first by hand. Of 700 there are 20 rows, in which the loss
    falls, and the SAE of a learning rate of nearly zero stays where it was."""
    first, *rows = train_sae(buffer, quick(l1=0.3), title=None).history
    assert [row["step"] for row in rows] == list(range(2, 15))
    sae = new_sae(buffer.statistics(), quick())
    x = next(buffer.batches(100, torch.Generator().manual_seed(0)))
    x_hat, z = sae(x)
    error = ((x - x_hat) / sae.scale).square().sum(1).mean().item()
    sparsity = z.sum(1).mean().item()
    l0, dead = (z > 0).sum().item() / 100, (z == 0).all(0).float().mean().item()
    by_hand = 1, error + 0.3 * sparsity, error, sparsity, l0, dead
    assert first == approx(dict(zip(HISTORY, by_hand)), rel=1e-4)
    long, frozen = (
        [row["loss"] for row in train_sae(buffer, quick(epochs=100, lr=lr), title=None).history]
        for lr in (None, 1e-12)
    )
    assert len(long) == len(frozen) == 20 and long[-1] < 0.5 * long[0]
    assert frozen[-1] == approx(frozen[0], rel=0.05)
    one = Training(activation="topk-1", epochs=1, batch_size=10)  # of 70 steps, 4 are a row
    assert all(row["dead"] >= 1 - 40 / 96 for row in train_sae(buffer, one, title=None).history)


def test_learning_rate_of_the_default(buffer):
    """An SAE of the default rate is that of the rule, to the bit."""
    assert learning_rate(1536, 3900) == approx(3.5 / np.sqrt(1536 * 3900))
    assert learning_rate(1536, 3900, 32) == approx(7 / np.sqrt(1536 * 3900))
    by_rule = train_sae(buffer, quick(lr=learning_rate(96, 14)))
    assert same_sae(train_sae(buffer, quick()), by_rule)


def test_inputs_have_mean_squared_norm_one(buffer):
    tokens = torch.from_numpy(np.array(buffer.tokens)).double()
    statistics = buffer.statistics()
    assert_close(statistics.mean, tokens.mean(0))
    assert_close(statistics.variance, tokens.var(0, correction=0))
    start = torch.zeros(12), statistics.mean / tokens.square().sum(1).mean().sqrt()
    for inputs, mean in zip(("centred", "raw"), start):
        sae = new_sae(statistics, Training(inputs=inputs))
        x = sae.normalise(tokens)
        assert float(x.square().sum(1).mean()) == approx(1, abs=1e-5)
        for each in (x.mean(0), sae.b_dec.detach()):  # b_dec starts at the mean
            assert_close(each.float(), mean.float(), atol=1e-5, rtol=0)
        assert torch.equal(sae.W_enc, sae.W_dec)


def test_top_k_keeps_the_largest(buffer):
    sae = train_sae(buffer, quick(activation="topk-5"))
    z = sae.encode(buffer.rows_at(slice(50)))
    sae.top_k = None
    dense = sae.encode(buffer.rows_at(slice(50)))
    assert ((z > 0).sum(1) == 5).all()
    assert torch.equal(z, torch.where(dense >= dense.sort(1).values[:, -5, None], dense, 0))
    other = train_sae(buffer, quick(activation="topk-5", l1=7.0))
    assert torch.equal(other.W_enc, sae.W_enc)  # λ is not used


def test_training_finds_a_planted_dictionary(tmp_path):
    generator = torch.Generator().manual_seed(123)  # not the SAE's, or it would start at the answer
    directions = torch.randn(24, 32, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    on = torch.rand(6000, 24, generator=generator) < 0.06
    tokens = (on * (1 + torch.rand(6000, 24, generator=generator))) @ directions
    buffer, settings = save(tmp_path, tokens), Training(2, epochs=40, batch_size=128, lr=2e-3)
    untrained, sae = new_sae(buffer.statistics(), settings), train_sae(buffer, settings)
    for each, found in ((untrained, False), (sae, True)):
        assert (((directions @ each.W_dec.T).amax(1) > 0.95) == found).all()


def test_same_seed_same_weights(buffer):
    first, second, other = (train_sae(buffer, quick(seed=seed)) for seed in (3, 3, 4))
    assert same_sae(first, second) and not torch.equal(first.W_dec, other.W_dec)


@pytest.mark.parametrize("pools, stored", [(1, "C"), (3, "F")])
def test_buffer_batches(buffer, tmp_path, monkeypatch, pools, stored):
    """Also of tokens that are stored column by column."""
    tokens = torch.from_numpy(np.array(buffer.tokens)).float()
    monkeypatch.setattr(sae_module, "POOL", buffer.tokens.nbytes // pools + 1)
    np.save(tmp_path / "again.npy", np.array(buffer.tokens, order=stored))
    buffer = ActivationBuffer(tmp_path / "again.npy")
    assert torch.equal(torch.cat(list(buffer.batches(64))), tokens)
    assert torch.equal(buffer.rows_at([3, 1]), tokens[[3, 1]])
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


def test_saved_without_pickle_and_loaded_the_same(buffer, tmp_path):
    sae = train_sae(buffer, quick(epochs=1), about={"layer": 3, "l1": 0.1})
    folder = tmp_path / "layer_03"
    sae.save_pretrained(folder)
    files = {path.name for path in folder.iterdir()}
    assert files == {"config.json", "model.safetensors", "README.md"}
    loaded = SparseAutoencoder.from_pretrained(folder)
    assert not loaded.training and same_sae(sae, loaded)
    assert loaded.encode(torch.randn(2, 12)).numpy().shape == (2, 96)  # asks for no gradients
    assert loaded.about == {"layer": 3, "l1": 0.1}
    assert json.loads((folder / "config.json").read_text())["latents"] == 96


def test_an_sae_of_other_tensors_settings_or_numbers_is_refused(tmp_path):
    def load(change=lambda sae: None, weights={}, lacks=None, **config):
        sae = SparseAutoencoder(4, 8, about={"layer": 3})
        change(sae)
        sae.save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        weights = load_file(tmp_path / "model.safetensors") | weights
        weights.pop(lacks, None)
        save_file(weights, tmp_path / "model.safetensors")
        return SparseAutoencoder.from_pretrained(tmp_path)

    assert load(top_k=2).top_k == 2
    for name in SparseAutoencoder(4, 8).state_dict():
        with raises(SAEError, match=f"(?s)is damaged, or of another kind .*{name}"):
            load(lacks=name)
    for given in (
        {"weights": {"W": torch.zeros(2)}},
        {"activation": "topk", "k": 4},
        {"top_k": 0},
        {"top_k": "2"},
        {"width": 5},
        {"change": lambda sae: sae.b_enc.data.fill_(float("nan"))},
        {"change": lambda sae: sae.scale.fill_(0)},
    ):
        with raises(SAEError, match="is damaged, or of another kind"):
            load(**given)


def test_numbers_of_numpy_are_saved_and_what_json_lacks_is_not_dropped(tmp_path):
    SparseAutoencoder(np.int64(4), np.int64(8), top_k=np.int64(2)).save_pretrained(tmp_path)
    assert SparseAutoencoder.from_pretrained(tmp_path).top_k == 2
    assert type(Training(expansion=np.int64(2)).expansion) is int
    with raises(TypeError, match="not JSON serializable"):
        SparseAutoencoder(4, 8, about={"layer": np.int64(3)}).save_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name, values",
    [
        ("inputs", ["centered"]),
        ("precision", ["bf16"]),
        ("expansion", [0, 2.5]),
        ("epochs", [0, 2.5]),
        ("batch_size", [0, 2.5]),
        ("lr", [0, -1, np.nan]),
        ("l1", [-1, np.nan, np.inf]),
        ("seed", [-1]),
    ],
)
def test_settings_that_are_none(name, values):
    for value in values:
        with raises(SAEError, match=f"{name}={value!r}: give"):
            Training(**{name: value})


def test_what_cannot_be_trained(tmp_path):
    noise = np.random.default_rng(0).normal(size=(50, 4))
    for tokens, training, words in [
        (noise, Training(batch_size=64), "a batch of 64 is larger than the 50 training tokens"),
        (np.ones((50, 4)), Training(batch_size=16), "all class tokens are the same"),
        (np.full((50, 4), np.nan), Training(batch_size=16), "the class tokens are not finite"),
        (noise, Training(batch_size=16, lr=1e30), "weights not finite after epoch 1: lower the"),
    ]:
        with raises(SAEError, match=words):
            train_sae(save(tmp_path, tokens), training)
    for activation in ("gelu", "topk-0", "topk-33", "topk-"):
        with raises(SAEError, match="give relu, or topk-K .* number of latents, 32"):
            train_sae(save(tmp_path, noise), Training(activation=activation, batch_size=16))
    with raises(SAEError, match="there is no SAE in"):
        SparseAutoencoder.from_pretrained(tmp_path)
