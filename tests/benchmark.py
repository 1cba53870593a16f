"""How fast each stage is, against its limit and against its peers; a plain script, not for pytest.

    python tests/benchmark.py [train|together|extract|score|buffer|precision|demo|all] [--rounds 7]

Rounds are interleaved, times are medians with the quartiles beside them, and a ratio is one of medians of one run.
Peers are used where they are installed (pip install overcomplete saev sae-lens), each by its own public training step.
"""
import argparse
import importlib.util
import json
import os
import platform
import resource
import sys
import tempfile
import time
import warnings
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import reproduce
import sae as sae_module
from dinov2_hooks import GrowingArray, SmallViT, record_class_tokens
from metrics import profile_latents, reconstruction, score_hierarchy
from sae import ActivationBuffer, SparseAutoencoder, Trainer, Training, fast_precision, multiply, new_sae, train_sae
from taxonomy import Taxonomy, imagenet1k

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def measure(contestants: dict, rounds: int) -> dict[str, np.ndarray]:
    """name -> function, called in turn, once unmeasured and then `rounds` times; name -> seconds (rounds,)."""
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
    print(f"  {name:<34} {median:10.2f} ms  [{low:.2f}, {high:.2f}]  {remark}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# train


def five_products(n, m, batch_size, precision, multiply=multiply):
    """The limit: the step's matrix products alone, into memory that is there."""
    new = lambda *shape: torch.randn(1, *shape, device=DEVICE).div_(shape[1] ** 0.5).to(getattr(torch, precision))
    bias, bias_out = new(1, m)[0], new(1, n)[0]
    x, W_enc, W_dec, z, x_hat, gradient = new(batch_size, n), new(m, n), new(m, n), new(batch_size, m), new(batch_size, n), new(m, n)

    def step():
        multiply(x, W_enc.mT, bias, out=z)
        multiply(z, W_dec, bias_out, out=x_hat)
        multiply(z.mT, x, out=gradient)
        multiply(x, W_dec.mT, bias, out=z)
        multiply(z.mT, x, out=gradient)

    return step


def ours(n, m, x, precision):
    trainer = Trainer([SparseAutoencoder(n, m).to(DEVICE)], len(x), precision)
    return lambda: trainer.step(x[None], 0.1, 4e-4)


PRODUCTS = ("aten::bmm", "aten::baddbmm", "mkldnn::_linear_pointwise")


def share_in_products(step) -> float:
    """Of the time in PyTorch's operations, that in matrix products, by its profiler."""
    with torch.profiler.profile() as profiler:
        for _ in range(3):
            step()
    time_of = lambda event: event.self_device_time_total if DEVICE == "cuda" else event.self_cpu_time_total
    events = profiler.key_averages()
    return sum(time_of(event) for event in events if event.key in PRODUCTS) / sum(map(time_of, events))


def overcomplete_step(n, m, x):
    try:
        from overcomplete.sae import SAE, train_sae
    except AttributeError:  # its plots do not import with matplotlib 3.11, its SAEs then do
        from overcomplete.sae import SAE, train_sae

    sae = SAE(n, nb_concepts=m, device=DEVICE)
    optimizer = torch.optim.Adam(sae.parameters(), lr=4e-4, fused=True)
    criterion = lambda x, x_hat, pre_codes, codes, dictionary: (x - x_hat).square().sum(1).mean() + 0.1 * codes.sum(1).mean()
    return lambda: train_sae(sae, [x], criterion, optimizer, nb_epochs=1, clip_grad=0, monitoring=0, device=DEVICE)


def saev_step(n, m, x):
    from saev import config, nn

    sae = nn.SparseAutoencoder(config.SparseAutoencoder(d_vit=n, exp_factor=m // n, sparsity_coeff=0.1)).to(DEVICE)
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

    sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=n, d_sae=m, l1_coefficient=0.1, device=DEVICE, dtype="float32"))
    settings = SAETrainerConfig(
        n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False, total_training_samples=10**9, device=DEVICE,
        autocast=False, lr=4e-4, lr_end=4e-5, lr_scheduler_name="constant", lr_warm_up_steps=0, adam_beta1=0.9,
        adam_beta2=0.999, lr_decay_steps=0, n_restart_cycles=1, train_batch_size_samples=len(x), dead_feature_window=1000,
        feature_sampling_window=2000, logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(settings, sae, iter(()))
    return lambda: trainer.step(x)


PEERS = {"overcomplete": overcomplete_step, "saev": saev_step, "sae_lens": sae_lens_step}


def train(rounds):
    fast = fast_precision(DEVICE)
    peers = {name: build for name, build in PEERS.items() if importlib.util.find_spec(name)}
    for name in PEERS.keys() - peers.keys():
        print(f"  {name} is not installed and is left out")
    for n, m in [(192, 1536), (384, 3072), (768, 6144), (1536, 12288)]:
        for batch_size in (1024, 4096):
            print(f"one training step, {n} -> {m}, batch {batch_size}")
            x = torch.randn(batch_size, n, device=DEVICE) / n**0.5
            contestants = {}
            by_bmm = lambda a, b, bias=None, out=None: torch.bmm(a, b, out=out)
            contestants["five by torch.bmm, float32"] = five_products(n, m, batch_size, "float32", by_bmm)
            for precision in dict.fromkeys(["float32", fast]):
                contestants[f"five products, {precision}"] = five_products(n, m, batch_size, precision)
                contestants[f"ours, {precision}"] = ours(n, m, x, precision)
            for name, build in peers.items():
                try:
                    contestants[name] = build(n, m, x)
                except Exception as error:  # a peer of another version
                    print(f"  {name} {version(name)} could not be used: {error}")
            times = measure(contestants, rounds)
            fastest = min((np.median(times[name]) for name in peers if name in times), default=np.nan)
            for name in contestants:
                precision = name.partition(", ")[2]
                remark = ""
                if name.startswith("ours"):
                    median = np.median(times[name])
                    share = np.median(times[f"five products, {precision}"]) / median
                    remark = (f"products alone {share:.0%}, in the step {share_in_products(contestants[name]):.0%} of its time; "
                              f"{fastest / median:.2f} x the fastest peer's speed")
                show(name, times[name], remark)


def together(rounds):
    for precision in dict.fromkeys(["float32", fast_precision(DEVICE)]):
        for n, L, batch_size in [(96, 6, 128), (96, 6, 512), (192, 12, 128), (192, 12, 512), (384, 12, 128), (384, 12, 4096)]:
            if DEVICE == "cpu" and batch_size > 512:
                continue
            x = torch.randn(L, batch_size, n, device=DEVICE) / n**0.5
            saes = lambda: [SparseAutoencoder(n, 8 * n).to(DEVICE) for _ in range(L)]
            one_by_one, all_at_once = [Trainer([sae], batch_size, precision) for sae in saes()], Trainer(saes(), batch_size, precision)
            times = measure({  # ten steps each, as one SAE's memory stays in the cache from step to step
                "one at a time": lambda: [trainer.step(its[None], 0.1, 4e-4) for trainer, its in zip(one_by_one, x) for _ in range(10)],
                "together": lambda: [all_at_once.step(x, 0.1, 4e-4) for _ in range(10)],
            }, rounds)
            print(f"ten steps of each of {L} SAEs, {n} -> {8 * n}, batch {batch_size}, {precision}")
            show("one at a time", times["one at a time"])
            ratio = np.median(times["one at a time"]) / np.median(times["together"])
            show("together", times["together"], f"{ratio:.2f} x, at {10 * batch_size * 8 * n * n:.1e} FLOP a step of one")


# ---------------------------------------------------------------------------------------------------------------------
# extract


def extract(rounds):
    torch.manual_seed(0)
    for name, vit, batch_size in [
        ("ViT-Ti/16 in shape", SmallViT(classes=2, size=224, patch=16, width=192, depth=12, heads=3), 32),
        ("ViT-S/14 in shape", SmallViT(classes=2, size=224, patch=14, width=384, depth=12, heads=6), 16),
    ]:
        vit = vit.eval().requires_grad_(False).to(DEVICE)
        batches = [(torch.randn(batch_size, 3, 224, 224), torch.zeros(batch_size, dtype=torch.long), torch.arange(batch_size))] * 4

        @torch.inference_mode()
        def bare():
            with torch.autocast("cuda", torch.bfloat16, enabled=DEVICE == "cuda"):
                for images, _, _ in batches:
                    vit(images.to(DEVICE))

        with tempfile.TemporaryDirectory() as folder:
            times = measure({"bare forward": bare, "all 12 layers to disk": lambda: record_class_tokens(vit, batches, range(12), folder)}, rounds)
        images = 4 * batch_size
        print(f"class tokens of {images} images, {name}, images in memory")
        show("bare forward", times["bare forward"], f"{images / np.median(times['bare forward']):.0f} images/s")
        rate = np.median(times["bare forward"]) / np.median(times["all 12 layers to disk"])
        show("all 12 layers to disk", times["all 12 layers to disk"], f"{rate:.1%} of the bare forward's rate")


# ---------------------------------------------------------------------------------------------------------------------
# score


def score(rounds):
    tree = Taxonomy.from_wnids(imagenet1k())
    latents, images, k = 12288, 50_000, 16
    labels = np.arange(1000).repeat(50)
    generator = torch.Generator().manual_seed(0)
    pool = torch.relu(torch.randn(4096, latents, generator=generator) - 1.5).to(DEVICE)  # 7% of the latents fire

    def batches():
        for start in range(0, images, 2048):
            yield pool[start % 2048 :][: min(2048, images - start)]

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    (profile,) = profile_latents(lambda z: z, batches(), [labels], 1000, k)
    middle = time.perf_counter()
    scores = score_hierarchy(profile, tree)
    end = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"hierarchy metrics, {latents:,} latents over {images:,} images and 1,000 classes, latents streamed in batches of 2,048")
    print(f"  profile {middle - start:.2f} s, scores {end - middle:.2f} s, together {end - start:.2f} s; "
          f"peak memory {peak / 2**20:.2f} GiB, of which {before / 2**20:.2f} before")

    warnings.simplefilter("ignore")
    try:
        from nltk.corpus import wordnet

        wordnet.ensure_loaded()
    except LookupError:
        print("  NLTK's WordNet is not installed and is left out")
        return
    synsets = [wordnet.synset_from_pos_and_offset("n", int(wnid[1:])) for wnid in imagenet1k()]
    heights = dict(zip(tree.names, tree.height))
    sample = 40
    looping = time.perf_counter()
    for latent in range(sample):
        top = profile.top_classes[latent]
        pairs = [(a, b) for i, a in enumerate(top) for b in top[:i]]
        lowest = [0 if a == b else heights[synsets[a].lowest_common_hypernyms(synsets[b])[0].name()] for a, b in pairs]
        assert abs(np.mean(lowest) - scores.height_pairwise[latent]) < 0.2  # of several deepest, NLTK gives any first
    theirs = (time.perf_counter() - looping) / sample * latents
    tree = Taxonomy.from_wnids(imagenet1k())  # fresh: nothing computed yet
    looking_up = time.perf_counter()
    top = profile.top_classes
    again = tree.pair_height[top[:, :, None], top[:, None, :]].sum((1, 2)) / (k * (k - 1))
    ours = time.perf_counter() - looking_up
    assert (again == scores.height_pairwise).all()
    print(f"  pairwise LCH heights of all latents: {ours:.3f} s; in loops over NLTK's lowest_common_hypernyms {theirs:,.0f} s, "
          f"scaled from {sample} latents: {theirs / ours:,.0f} x")


# ---------------------------------------------------------------------------------------------------------------------
# buffer, demo


def buffer(tokens=None):
    rows, width, batch_size, steps = 1_281_167, 1536, 4096, 3
    with tempfile.TemporaryDirectory() as folder:
        file = GrowingArray(Path(folder) / "layer.npy", np.float16, (width,))
        block = np.random.default_rng(0).normal(size=(8192, width)).astype(np.float16)
        for start in range(0, rows, len(block)):
            file.append(block[: rows - start])
        file.sync()
        file.finish()
        print(f"a layer of ImageNet-1k's size, {rows:,} x {width}, {file.path.stat().st_size / 1e9:.1f} GB on disk")
        start = time.perf_counter()
        tokens_of_layer = ActivationBuffer(file.path, DEVICE)
        statistics = tokens_of_layer.statistics()
        print(f"  statistics in {time.perf_counter() - start:.1f} s")
        settings = Training(batch_size=batch_size, precision=fast_precision(DEVICE))
        sae = new_sae(statistics, settings).to(DEVICE)
        trainer = Trainer([sae], batch_size, settings.precision)
        start, read = time.perf_counter(), 0
        for i, batch in enumerate(tokens_of_layer.batches(batch_size, torch.Generator().manual_seed(0))):
            if i % 80 < steps:  # some steps in each pool; the rest is only drawn
                trainer.step(sae.normalise(batch)[None], 0.1, 4e-4)
            read += len(batch)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"  an epoch's {read:,} rows drawn; peak memory {peak:.2f} GiB")
    if tokens is None:
        print("  give --tokens RUN/tokens/train/layer_NN.npy to compare shuffling in pools with a full shuffle")
        return
    val = str(tokens).replace("train", "val")
    fvu = {}
    for name, pools in [("full shuffle", 1), ("in 4 pools", 4), ("in 16 pools", 16)]:
        size = np.load(tokens, mmap_mode="r").nbytes
        sae_module.POOL_BYTES = 1 << 40 if pools == 1 else -(-size // pools)
        train_buffer = ActivationBuffer(tokens, DEVICE)
        fvu[name] = [
            reconstruction(train_sae(train_buffer, Training(batch_size=256, seed=seed)).to("cpu"), ActivationBuffer(val).batches(2048)).fvu
            for seed in range(3)
        ]
        ratio = np.mean(fvu[name]) / np.mean(fvu["full shuffle"])
        print(f"  final FVU, {name:<12} {np.mean(fvu[name]):.5f} ± {np.std(fvu[name]):.5f} over 3 seeds, {ratio:.4f} of a full shuffle's")


def precision(tokens):
    """Final FVU and L0 in the fast precision against float32, on a layer of a finished run."""
    train_buffer, val = ActivationBuffer(tokens, DEVICE), str(tokens).replace("train", "val")
    scores = {}
    for name in ("float32", fast_precision(DEVICE)):
        start = time.perf_counter()
        sae = train_sae(train_buffer, Training(batch_size=512, precision=name))
        scores[name] = reconstruction(sae.to("cpu"), ActivationBuffer(val).batches(2048))
        print(f"  {name:<9} FVU {scores[name].fvu:.5f}, L0 {scores[name].l0:.3f}, {time.perf_counter() - start:.1f} s")
    ratios = [getattr(scores[name], score) / getattr(scores["float32"], score) for score in ("fvu", "l0")]
    print(f"  {tokens}: FVU {ratios[0]:.4f}, L0 {ratios[1]:.4f} of float32's")


def demo(rounds):
    with tempfile.TemporaryDirectory() as folder:
        with redirect_stdout(None):
            reproduce.main(["--out", folder])
        seconds = json.loads((Path(folder) / "results/results.json").read_text())["seconds"]
    total = sum(seconds.values())
    print("the demo's stages (tokens: images, ViT and class tokens): " + ", ".join(f"{k} {v:.1f} s ({v / total:.0%})" for k, v in seconds.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="all", choices="train together extract score buffer precision demo all".split())
    parser.add_argument("--tokens", help="for buffer and precision: tokens/train/layer_NN.npy of a finished run")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    print(f"{device}; Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads; "
          f"fast precision {fast_precision(DEVICE)}; {arguments.rounds} rounds, medians [quartiles]")
    for stage in (train, together, extract, score, demo):
        if arguments.what in (stage.__name__, "all"):
            stage(arguments.rounds)
    if arguments.what in ("buffer", "all"):
        buffer(arguments.tokens)
    if arguments.what in ("precision", "all") and arguments.tokens:
        precision(arguments.tokens)
