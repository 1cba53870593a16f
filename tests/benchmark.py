"""How fast each stage is, against its limit and against its peers.

    python tests/benchmark.py train|extract|score|buffer|precision|all [--rounds 7] [--quick]

Rounds are interleaved, times are medians with the quartiles beside them, and a ratio is one of
medians of one run. Peers are used where they are installed (pip install overcomplete saev sae-lens),
each by its own public training step. --quick: small shapes, to see that it runs.
"""
import argparse
import importlib.util
import os
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import metrics
import reproduce
import sae as sae_module
from dinov2_hooks import finish, record
from kit.demo import SmallViT
from kit.runs import keep_freed_memory
from sae import (ActivationBuffer, SparseAutoencoder, Training, fast_precision, loss_of, train_sae)
from taxonomy import Taxonomy, imagenet1k

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def measure(contestants: dict, rounds: int) -> dict[str, np.ndarray]:
    """name -> function, called in turn, once unmeasured, then `rounds` times; name -> seconds."""
    seconds = {name: [] for name in contestants}
    for round in range(rounds + 1):
        for name, function in contestants.items():
            start = time.perf_counter()
            function()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if round:
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(times) for name, times in seconds.items()}


def show(name: str, times: np.ndarray, remark: str = "") -> None:
    low, median, high = np.quantile(times, [0.25, 0.5, 0.75]) * 1e3
    print(f"  {name:<28} {median:10.2f} ms  [{low:.2f}, {high:.2f}]  {remark}", flush=True)


# --------------------------------------------------------------------------------------------------
# train


def five_products(n, m, B, precision):
    """The limit: the step's five matrix products alone, into memory that is there."""
    def new(*shape):
        return torch.randn(*shape, device=DEVICE).to(getattr(torch, precision))

    x, W_enc, W_dec, z, x_hat, gradient = (
        new(*shape) for shape in ((B, n), (m, n), (m, n), (B, m), (B, n), (m, n)))

    def step():
        torch.mm(x, W_enc.T, out=z)
        torch.mm(z, W_dec, out=x_hat)
        torch.mm(z.T, x, out=gradient)
        torch.mm(x, W_dec.T, out=z)
        torch.mm(z.T, x, out=gradient)

    return step


def ours(n, m, x, precision):
    """The step in sae.train_sae."""
    sae = SparseAutoencoder(n, m).to(DEVICE)
    optimizer = torch.optim.Adam(sae.parameters(), lr=4e-4, fused=True)

    def step():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = loss_of(sae, x, 0.1)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        with torch.no_grad():
            sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)

    return step


def overcomplete_step(n, m, x):
    try:
        from overcomplete.sae import SAE, train_sae
    except AttributeError:  # its plots do not import with matplotlib 3.11, its SAEs then do
        from overcomplete.sae import SAE, train_sae

    sae = SAE(n, nb_concepts=m, device=DEVICE)
    optimizer = torch.optim.Adam(sae.parameters(), lr=4e-4, fused=True)

    def criterion(x, x_hat, pre_codes, codes, dictionary):
        return (x - x_hat).square().sum(1).mean() + 0.1 * codes.sum(1).mean()

    return lambda: train_sae(sae, [x], criterion, optimizer, nb_epochs=1, clip_grad=0, monitoring=0,
                             device=DEVICE)


def saev_step(n, m, x):
    from saev import config, nn

    settings = config.SparseAutoencoder(d_vit=n, exp_factor=m // n, sparsity_coeff=0.1)
    sae = nn.SparseAutoencoder(settings).to(DEVICE)
    optimizer = torch.optim.Adam(sae.parameters(), lr=4e-4, fused=True)

    def step():  # as in saev.training.train
        _, _, loss = sae(x)
        loss.loss.backward()
        sae.remove_parallel_grads()
        optimizer.step()
        sae.normalize_w_dec()
        optimizer.zero_grad()

    return step


def sae_lens_step(n, m, x):
    from sae_lens import LoggingConfig, StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = StandardTrainingSAE(StandardTrainingSAEConfig(
        d_in=n, d_sae=m, l1_coefficient=0.1, device=DEVICE, dtype="float32"))
    settings = SAETrainerConfig(
        n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False, device=DEVICE,
        total_training_samples=10**9, autocast=False, lr=4e-4, lr_end=4e-5, lr_warm_up_steps=0,
        lr_scheduler_name="constant", adam_beta1=0.9, adam_beta2=0.999, lr_decay_steps=0,
        n_restart_cycles=1, train_batch_size_samples=len(x), dead_feature_window=1000,
        feature_sampling_window=2000, logger=LoggingConfig(log_to_wandb=False))
    trainer = SAETrainer(settings, sae, iter(()))
    return lambda: trainer.step(x)


PEERS = {"overcomplete": overcomplete_step, "saev": saev_step, "sae_lens": sae_lens_step}


def train(rounds, quick):
    peers = {name: build for name, build in PEERS.items() if importlib.util.find_spec(name)}
    print("  not installed and left out:", ", ".join(PEERS.keys() - peers.keys()) or "none")
    shapes = [(192, 1024), (192, 4096), (384, 1024), (384, 4096), (768, 1024), (768, 4096),
              (1536, 1024), (1536, 4096)]
    for n, B in [(16, 32)] if quick else shapes:
        print(f"one training step, {n} -> {8 * n}, batch {B}")
        x, contestants = torch.randn(B, n, device=DEVICE) / n**0.5, {}
        for precision in dict.fromkeys(["float32", fast_precision(DEVICE)]):
            contestants[f"five products, {precision}"] = five_products(n, 8 * n, B, precision)
            contestants[f"ours, {precision}"] = ours(n, 8 * n, x, precision)
        for name, build in peers.items():
            try:
                contestants[name] = build(n, 8 * n, x)
            except Exception as error:  # a peer of another version
                print(f"  {name} could not be used: {error}")
        times = measure(contestants, rounds)
        fastest = min((np.median(times[name]) for name in peers if name in times), default=np.nan)
        for name in contestants:
            median, remark = np.median(times[name]), ""
            if name.startswith("ours"):
                products = np.median(times[name.replace("ours", "five products")])
                remark = f"products {products / median:.0%}; {fastest / median:.2f} x fastest peer"
            show(name, times[name], remark)


# --------------------------------------------------------------------------------------------------
# the other stages


def extract(rounds, quick):
    shapes = [("ViT-Ti/16", 16, 192, 3, 64), ("ViT-S/14", 14, 384, 6, 64)]
    precision = "float16" if DEVICE == "cuda" else fast_precision(DEVICE)
    for name, patch, width, heads, count in [("tiny", 56, 16, 2, 4)] if quick else shapes:
        vit = SmallViT(classes=2, size=224, patch=patch, width=width, depth=12, heads=heads)
        vit, images = vit.eval().requires_grad_(False).to(DEVICE), torch.randn(count, 3, 224, 224)

        @torch.inference_mode()
        def bare(precision):
            low = precision != "float32"
            with torch.autocast(DEVICE, getattr(torch, precision), enabled=low):
                vit(images.to(DEVICE))

        with tempfile.TemporaryDirectory() as folder:
            def recorded():
                record(vit, images, folder, range(12), precision)
                finish(folder, range(12), count, width)
                for path in Path(folder).iterdir():
                    path.unlink()

            times = measure({
                f"bare forward, {precision}": lambda: bare(precision),
                "all 12 layers to disk": recorded,
                "bare forward, float32": lambda: bare("float32"),
            }, rounds)
        print(f"class tokens of {count} images, {name} in shape, images in memory")
        first = np.median(next(iter(times.values())))
        for contestant, seconds in times.items():
            show(contestant, seconds, f"{count / np.median(seconds):.0f} images/s, "
                 f"{first / np.median(seconds):.1%} of the bare forward's rate")


def score(rounds, quick):
    """One layer and seed at the paper's size: three dictionaries, all trees, probes, readings."""
    width, expansion, C, rows = (64, 4, 100, (2000, 1000)) if quick else (1536, 8, 1000, (65_536, 50_000))
    tree, encoding = Taxonomy.from_wnids(imagenet1k()[:C]), [0.0]
    rng = np.random.default_rng(0)
    codes, labels = rng.normal(size=(C, width)).astype(np.float32), {}

    def timed(encode):
        def encode_timed(x):
            start = time.perf_counter()
            z = encode(x)
            encoding[0] += time.perf_counter() - start
            return z
        return encode_timed

    def dictionaries(*given):
        for one in metrics.dictionaries_of(*given):
            yield one._replace(encode=timed(one.encode), probed=timed(one.probed))

    with tempfile.TemporaryDirectory() as folder, mock.patch("reproduce.dictionaries_of", dictionaries):
        buffers = []
        for split, count in zip(("train", "val"), rows):
            labels[split] = rng.permutation(np.arange(count) % C)
            tokens = np.lib.format.open_memmap(f"{folder}/{split}.npy", "w+", np.float16, (count, width))
            for start in range(0, count, 4096):
                here = labels[split][start : start + 4096]
                tokens[start : start + 4096] = 0.5 * codes[here] + rng.normal(size=(len(here), width))
            buffers.append(ActivationBuffer(f"{folder}/{split}.npy", DEVICE))
        statistics = buffers[0].statistics()
        sae = sae_module.new_sae(statistics, Training(expansion=expansion)).to(DEVICE)
        sae.b_enc.data.fill_(-0.05)  # about 5% of random latents fire
        sae.requires_grad_(False)
        controls = reproduce.permuted_trees(tree)
        classifier = torch.nn.Linear(width, C).requires_grad_(False).to(DEVICE)
        start = time.perf_counter()
        reproduce.score_layer(0, 0, sae, *buffers, labels, statistics, tree, controls, classifier,
                              k=16, response_rate=0.5)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"one layer, {len(sae.b_enc):,} latents, {rows[1]:,} + {rows[0]:,} tokens, {C:,} classes: "
          f"{seconds:.0f} s, {seconds - encoding[0]:.0f} s without encoding; {peak:.2f} GiB at most")


def buffer(rounds, quick):
    rows, width = (20_000, 64) if quick else (1_281_167, 1536)
    sae_module.POOL_BYTES = 1 << 20 if quick else sae_module.POOL_BYTES
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "layer.npy")
        file = np.lib.format.open_memmap(path, "w+", np.float16, (rows, width))
        block = np.random.default_rng(0).normal(size=(8192, width)).astype(np.float16)
        for start in range(0, rows, len(block)):
            file[start : start + len(block)] = block[: rows - start]
        del file
        start = time.perf_counter()
        ActivationBuffer(path, DEVICE).statistics()
        times = [start, time.perf_counter()]
        fresh = ActivationBuffer(path, DEVICE)
        for _ in range(2):
            read = sum(len(x) for x in fresh.batches(4096, torch.Generator().manual_seed(0)))
            times.append(time.perf_counter())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"a layer of {rows:,} x {width}: statistics %.1f s; {read:,} rows drawn "
              "in %.1f s, in the next epoch %.1f s;" % tuple(np.diff(times)),
              f"peak memory {peak:.2f} GiB")


def precision(rounds, quick):
    """Final loss in the fast precision against float32, on planted directions."""
    generator = torch.Generator().manual_seed(0)
    n, rows = (16, 500) if quick else (192, 20_000)
    directions = torch.randn(4 * n, n, generator=generator)
    on = torch.rand(rows, 4 * n, generator=generator) < 0.05
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "layer.npy")
        np.save(path, (on.float() @ directions).numpy().astype(np.float16))
        for name in dict.fromkeys(["float32", fast_precision(DEVICE)]):
            losses = []
            train_sae(ActivationBuffer(path, DEVICE), Training(batch_size=100, epochs=10, precision=name),
                      progress=lambda step, steps, loss: losses.append(loss.reconstruction.item()))
            print(f"  {name}: reconstruction {np.mean(losses[-50:]):.5f} over the last 50 steps")


if __name__ == "__main__":
    stages = {stage.__name__: stage for stage in (train, extract, score, buffer, precision)}
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="all", choices=[*stages, "all"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{os.cpu_count()} cores"
    print(f"{device}, {platform.machine()}; Python {platform.python_version()}, torch "
          f"{torch.__version__}; fast precision {fast_precision(DEVICE)}; {arguments.rounds} rounds")
    for name, stage in stages.items():
        if arguments.what in (name, "all"):
            stage(arguments.rounds, arguments.quick)
