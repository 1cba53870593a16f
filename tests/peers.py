"""Do other libraries train better SAEs? SAELens and overcomplete beside the kit's default.

    python tests/peers.py RUN DATA LAYERS [quick]     quick: two rates, one epoch, to see it run

The arguments are those of tests/training.py, but DATA is not read: no score here needs labels. It
needs an environment of its own: pip install -r requirements.txt sae-lens overcomplete

The libraries train with their own trainers and settings, at the learning rates of a grid and, in
the last row of each, at their default. All three see the same tokens in as many shuffled batches
and minimise the kit's loss: ‖x - x̂‖² + λ‖z‖₁ with decoder rows of norm 1 (ReLU), ‖x - x̂‖² (TopK).
Scores are on validation tokens; dead latents fire on none of them; seconds include the scoring. The
table goes to standard output, progress bars to standard error, the figure to docs/figures/peers.png
(quick: peers.png in the current folder): a rate beside each point, large markers for the defaults.
"""

import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

plt.cm.get_cmap = plt.get_cmap  # overcomplete calls it when imported; gone from matplotlib 3.11
import overcomplete.sae as overcomplete
import sae_lens
from sae_lens.config import SAETrainerConfig

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import reproduce
from sae import ActivationBuffer, learning_rate, train_sae
from training import GRID, side_by_side

K = 32


def train_saelens(data, n, m, B, steps, l1, lr):
    sae = sae_lens.TrainingSAE.from_dict(
        {
            "architecture": "standard" if l1 else "topk",
            "d_in": n,
            "d_sae": m,
            "l1_coefficient": l1,  # ignored by topk, as k by standard
            "k": K,
        }
    )
    # a constant rate does not use lr_end, but its default, None, is refused
    sae_lens.SAETrainer(SAETrainerConfig(steps * B, B, lr, lr_end=0), sae, data).fit()
    sae.fold_W_dec_norm()  # until here rows have any norm, and ‖z‖₁ is weighted with it
    return sae


def train_overcomplete(data, n, m, B, steps, l1, lr):
    sae = overcomplete.SAE(n, m) if l1 else overcomplete.TopKSAE(n, m, K)
    overcomplete.train_sae(
        sae,
        data,
        # the kit's loss over n: the error is a mean over coordinates, ‖z‖₁ a sum over the batch
        partial(overcomplete.mse_l1, penalty=l1 / (n * B)),
        torch.optim.Adam(sae.parameters(), lr),
        nb_epochs=1,  # of the data, which are all epochs
        monitoring=0,
    )
    return sae


def main(run, _, layers, quick=""):
    layers = np.array(layers.split(","), int)
    folder = tempfile.TemporaryDirectory()
    for split in ("train", "val"):
        tokens = side_by_side(Path(run), layers, split) / len(layers) ** 0.5  # mean squared norm 1
        np.save(f"{folder.name}/{split}.npy", tokens)
    train = ActivationBuffer(f"{folder.name}/train.npy")
    x = torch.from_numpy(tokens)
    plt.gcf().set_figwidth(10)
    print(
        "| library | activation | rate | steps | loss | FVU | L0 | dead | seconds |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for panel, activation, l1, label in (
        (121, "relu", 0.1, "ReLU: active latents an image (L0)"),
        (122, f"topk-{K}", 0, "TopK: learning rate"),
    ):
        given = f"--device=cpu --activation={activation} --l1={l1} {quick and '--epochs=1'}".split()
        (training,) = reproduce.trainings_of(reproduce.parse_settings(given), train.rows)
        n = train.width
        m = training.expansion * n
        B = training.batch_size
        steps = training.epochs * train.batches_of_an_epoch(B)
        plt.subplot(panel, xscale="log", xlabel=label, ylabel="FVU", xmargin=0.3)
        for name, marker, trainer, rates in (
            ("kit", "C0*", None, [learning_rate(m, steps, None if l1 else K)]),
            ("SAELens", "C1o", train_saelens, [*GRID, SAETrainerConfig.lr]),
            ("overcomplete", "C2o", train_overcomplete, GRID[::-1]),  # its README's is the first
        ):
            for lr in rates[-2:] if quick else rates:
                start = time.perf_counter()
                seed = torch.manual_seed(0)
                data = (b for _ in range(training.epochs) for b in train.batches(B, seed))
                if trainer:
                    sae = trainer(data, n, m, B, steps, l1, lr).requires_grad_(False)
                else:
                    sae = train_sae(train, training)
                z = sae.encode(x)
                if name == "overcomplete":
                    z = z[1]  # it gives them before the ReLU, too
                error = (sae.decode(z) - x).square().mean()
                fvu = error / tokens.var(0).mean()
                l0 = z.count_nonzero() / len(x)
                print(
                    f"| {name} | {activation} | {lr:.2g} | {steps:,} "
                    f"| {n * error + l1 * z.sum(1).mean():.4f} | {fvu:.4f} | {l0:.1f} "
                    f"| {(z == 0).all(0).float().mean():.1%} | {time.perf_counter() - start:.1f} |",
                    flush=True,
                )
                point = l0 if l1 else lr, fvu
                plt.plot(*point, marker)
                plt.text(*point, f" {lr:.2g}")
            plt.plot(*point, marker, ms=14, mfc="none", label=name)
    plt.legend()
    plt.savefig("peers.png" if quick else ROOT / "docs/figures/peers.png")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
