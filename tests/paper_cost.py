"""What the paper's job would take on cards that were not at hand: counted, not measured.

    python tests/paper_cost.py --hub dinov2         a clone of facebookresearch/dinov2

The kit's own code runs at full size on tensors without values: one recorded batch of ViT-g, one
training step of its SAE, one step of its probe. Each operation is taken for the longer of its
products and of what it reads and writes, at the speeds below, and a step for no less than the
host's part in it. All of these speeds are assumptions.
"""

import argparse
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dinov2_hooks import BATCH, HUB, class_tokens, load_backbone
from metrics import linear_probe
from sae import Statistics, Training, train_sae

TRAIN, VAL, LAYERS, WIDTH = 1_281_167, 50_000, 40, 1536
PRODUCTS, MEMORY = 0.8, 0.85  # shares of the two figures of a card that are reached
OPERATION = 15e-6  # seconds that PyTorch takes on the host for one
STATISTICS = 12  # seconds a layer: means and variances (benchmark.py buffer)
TO_CARD = 10e9  # bytes a second
SCORES = 123  # seconds a layer, without encoding, as on two CPU cores (benchmark.py score)
CORES, DECODE = 16, 0.009  # seconds an image of 500 x 375


class Card(NamedTuple):
    name: str
    products: float  # FLOP a second: the best of all shapes in github.com/mag-/gpu_benchmark
    memory: float  # bytes a second, of its data sheet


CARDS = [Card("RTX 4090", 178.5e12, 1.008e12), Card("H100 SXM", 792.1e12, 3.35e12)]


class Count(TorchDispatchMode):
    """(FLOP, bytes read and written) of every operation that does something."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name = function._schema.name
        if function.is_view or not name.startswith("aten::") or "empty" in name:
            return out
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        moved = sum(min(t.numel() * t.itemsize, t.untyped_storage().nbytes()) for t in tensors)
        flop = flop_registry.get(function.overloadpacket, lambda *of, **more: 0)
        self.operations.append((flop(*args, **kwargs, out_val=out), moved))
        return out


def load_vit_g(hub: str, device="cuda"):
    """ViT-g on a FakeTensorMode's device, without filling in its weights."""
    with (
        mock.patch("torch.nn.init._no_grad_trunc_normal_", lambda tensor, *of, **more: tensor),
        mock.patch("torch.nn.Module.to", lambda module, device: module),
        torch.device(device),
    ):
        return load_backbone("dinov2_vitg14", hub, pretrained=False)


def train_three_steps(pool_rows: int, precision: str, progress=None) -> None:
    """Of the paper's SAE, in a FakeTensorMode, on the first rows of a pool; ends with a
    DataDependentOutputException: whether weights are finite cannot be told."""

    class Buffer:  # as ActivationBuffer
        rows, device = 3 * 4096, "cpu"

        def batches(self, batch_size, generator):
            pool = torch.empty(pool_rows, WIDTH, dtype=torch.float16)
            for rows in torch.arange(self.rows).split(batch_size):
                yield pool[rows].float()

    Buffer.pool_rows = pool_rows
    statistics = Statistics(*torch.zeros(2, WIDTH, dtype=torch.float64), 1.0, 1.0)
    with mock.patch("torch.nn.Module.to", lambda module, device: module):
        train_sae(Buffer(), Training(epochs=1, precision=precision), statistics, progress=progress)


def of_a_batch(hub: str) -> list:
    """The operations of one recorded batch of ViT-g, under autocast and with flash attention."""

    def attention(q, k, v, **more):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]

    with (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", attention),
        FakeTensorMode(),
        torch.no_grad(),
    ):
        model, images = load_vit_g(hub), torch.empty(BATCH, 3, 224, 224, device="cuda")
        with Count() as count:
            class_tokens(model, images, range(LAYERS), "float16").half().to("cpu")
    return count.operations


def of_a_step() -> list:
    """The operations of one training step of its SAE, in bfloat16."""
    starts = []
    with FakeTensorMode(), Count() as count, suppress(DataDependentOutputException):
        train_three_steps(3 * 4096, "bfloat16", lambda *of: starts.append(len(count.operations)))
    return count.operations[starts[0] : starts[1]]


def of_a_probe_step() -> list:
    """The operations of one step of a probe."""
    rows, labels, counts = np.random.rand(1024, WIDTH), torch.arange(1024) % 1000, []
    for steps in (44, 48):  # an epoch has four
        with Count() as count:
            linear_probe(rows, labels, 1000, torch.zeros(WIDTH), torch.ones(WIDTH), steps)
        counts.append(Counter(count.operations))
    step = counts[1] - counts[0]
    return list(step.elements())[::4]


def seconds(operations: list, card: Card) -> tuple[float, float, float]:
    """(what they take, their products alone, their reads and writes alone)"""
    products = [flop / card.products / PRODUCTS for flop, _ in operations]
    memory = [moved / card.memory / MEMORY for _, moved in operations]
    taken = max(sum(map(max, products, memory)), len(operations) * OPERATION)
    return taken, sum(products), sum(memory)


def main(hub: str) -> None:
    kinds = [of_a_batch(hub), of_a_step(), of_a_probe_step()]
    images, training = TRAIN + VAL, Training()
    times = [
        -(-images // BATCH),
        LAYERS * training.epochs * (TRAIN // training.batch_size),
        LAYERS * 10 * (TRAIN // 256),
    ]
    files = LAYERS * 2 * WIDTH * TRAIN
    for card in CARDS:
        print(f"\n{card.name}: {card.products / 1e12:.0f} TFLOP/s, {card.memory / 1e12:.2f} TB/s")
        total, rows = 0, []
        for name, operations, n in zip(("class tokens", "SAEs", "probes"), kinds, times):
            rows.append((name, n, len(operations), *(n * s for s in seconds(operations, card))))
        rows.append(("statistics, to the card", LAYERS, 0, LAYERS * STATISTICS + files / TO_CARD))
        rows.append(("scores", LAYERS, 0, LAYERS * SCORES))
        for name, n, operations, taken, *parts in rows:
            total += taken
            of = "".join(f"{part / 3600:8.2f} h" for part in parts)
            print(f"  {name:36}{n:9,} x {operations:5} operations{taken / 3600:8.2f} h {of}")
        print(
            f"  all {total / 3600:.2f} h; images decoded beside it, {CORES} cores: "
            f"{images * DECODE / CORES / 3600:.2f} h"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hub", default=HUB)
    main(parser.parse_args().hub)
