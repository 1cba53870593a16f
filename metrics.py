"""How much of the ImageNet hierarchy a dictionary of latents holds, and how good its tokens are: all scores of the kit.

    profile = profile_latents(sae.encode, val_batches, labels, classes=1000, k=16)   # one pass over the images
    scores = score_hierarchy(profile, tree)                                          # LCH height, coverage, match
    reconstruction(sae, val_batches), linear_probe(train, train_labels, val, val_labels)

A "dictionary" is any function from tokens (B, n) to non-negative activations (B, m): an SAE's encoder, or the raw
neurons (`neurons(mean)`) it is compared with. Definitions and formulas: README.md.
"""
import itertools
from typing import Callable, Iterable, NamedTuple

import numpy as np
import torch
from torch import nn

from taxonomy import Taxonomy

# ---------------------------------------------------------------------------------------------------------------------
# reconstruction


class Reconstruction(NamedTuple):
    nmse: float  # Σ‖x - x̂‖² / Σ‖x‖²: the ease of auto-encoding the token as it comes
    fvu: float  # Σ‖x - x̂‖² / Σ‖x - mean(x)‖²: fraction of variance unexplained
    l0: float  # mean number of active latents
    dead: float  # share of latents that fire on no image


@torch.inference_mode()
def reconstruction(sae: nn.Module, batches: Iterable[torch.Tensor]) -> Reconstruction:
    """Score an SAE, x -> (x̂, z), on batches of tokens (B, n); sums in float64."""
    rows, error, squares, total, active, fired = 0, 0.0, 0.0, 0.0, 0, False
    for x in batches:
        x_hat, z = sae(x)
        x = x.double()
        rows += len(x)
        error += float((x - x_hat).square().sum())
        squares += float(x.square().sum())
        total = total + x.sum(0)  # (n,)
        active += int((z > 0).sum())
        fired = fired | (z > 0).any(0)  # (m,)
    variance = squares - float(total.square().sum()) / rows
    return Reconstruction(error / squares, error / variance, active / rows, float((~fired).float().mean()))


# ---------------------------------------------------------------------------------------------------------------------
# latents


def neurons(mean: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The baseline dictionary of raw neurons: each coordinate of the centred token and its negative, (B, n) -> (B, 2n)."""

    def encode(x):
        centred = x - mean
        return torch.cat([centred, -centred], dim=1).relu_()

    return encode


class Profile(NamedTuple):
    """What m latents respond to, over N images of C classes."""

    top_images: np.ndarray  # (m, k) int, the k images with the largest z, best first
    top_classes: np.ndarray  # (m, k) int, their classes
    fires: np.ndarray  # (m,) int, number of images on which the latent fires, z > 0
    rate: np.ndarray  # (m, C) float32, share of each class's images on which it fires


@torch.inference_mode()
def profile_latents(
    encode, batches: Iterable[torch.Tensor], labelings: list[np.ndarray], classes: int, k: int = 16
) -> list[Profile]:
    """One pass over batches of tokens (B, n); one Profile for each labelling (N,) of the images, in their order.

    Several labellings, as the true and a shuffled one, share the pass. Memory is O(m (B + C + k)), whatever N is.
    """
    start, fires, top = 0, 0, None
    counts = [None] * len(labelings)
    for x in batches:
        z = encode(x)  # (B, m)
        active = (z > 0).float()
        fires = fires + active.sum(0)
        for i, labels in enumerate(labelings):
            if counts[i] is None:
                counts[i] = torch.zeros(classes, z.shape[1], device=z.device)  # (C, m), exact below 2**24 images
            counts[i].index_add_(0, torch.as_tensor(labels[start : start + len(z)], device=z.device), active)
        values, images = z.topk(min(k, len(z)), dim=0)  # (k, m)
        images = images + start
        if top is not None:
            values, images = torch.cat([top[0], values]), torch.cat([top[1], images])
            values, order = values.topk(min(k, len(values)), dim=0)
            images = images.gather(0, order)
        top = values, images
        start += len(z)
    top_images, fires = top[1].T.cpu().numpy(), fires.long().cpu().numpy()
    profiles = []
    for labels, count in zip(labelings, counts):
        images_of_class = np.maximum(np.bincount(labels, minlength=classes), 1).astype(np.float32)
        profiles.append(Profile(top_images, labels[top_images], fires, count.cpu().numpy().T / images_of_class))
    return profiles


# ---------------------------------------------------------------------------------------------------------------------
# hierarchy


class Scores(NamedTuple):
    """The A alive latents of a dictionary (those that fire on at least k images) against a taxonomy of H hypernyms."""

    latents: np.ndarray  # (A,) int, which ones
    lch: np.ndarray  # (A,) int, node: the LCH of the classes of the latent's top images
    height: np.ndarray  # (A,) int, that node's height
    height_pairwise: np.ndarray  # (A,) mean height of the LCH of two top images; 0 for two of one class
    coverage: np.ndarray  # (A,) |R ∩ leaves(lch)| / |leaves(lch)|, R the classes the latent responds to
    match: np.ndarray  # (A,) max over nodes v of |R ∩ leaves(v)| / |R ∪ leaves(v)|
    match_node: np.ndarray  # (A,) int, the node that attains it; of several, the lowest
    hypernyms: np.ndarray  # (H,) int, distinct inner nodes of at least two classes and at most half of all
    hypernym_lch: np.ndarray  # (H,) bool, whether it is the LCH of some latent
    hypernym_match: np.ndarray  # (H,) the best match of any latent with each of them
    hypernym_latent: np.ndarray  # (H,) int, the latent that attains it; -1 where none matches at all

    def summary(self) -> dict:
        """One row of hierarchy.csv: means over alive latents (NaN where there are none), and hypernyms found."""
        return {
            "alive": len(self.latents),
            **{
                name: float(values.mean()) if len(values) else float("nan")
                for name, values in [
                    ("lch_height", self.height),
                    ("lch_height_pairwise", self.height_pairwise),
                    ("coverage", self.coverage),
                    ("match", self.match),
                ]
            },
            "hypernyms_lch": int(self.hypernym_lch.sum()),
            "hypernyms_matched": int((self.hypernym_match > 0.5).sum()),
        }


def score_hierarchy(profile: Profile, tree: Taxonomy, response_rate: float = 0.5) -> Scores:
    """Score every alive latent of a profile, whose classes are the taxonomy's in the same order.

    A latent responds to the classes on whose images it fires at a rate of at least `response_rate`.
    """
    k = profile.top_images.shape[1]
    leaves = tree.leaves.astype(np.float32)  # (V, C)
    sizes = leaves.sum(1)
    alive = np.flatnonzero(profile.fires >= k)
    distinct = np.flatnonzero(tree.lowest == np.arange(len(sizes)))
    distinct = distinct[np.argsort(tree.height[distinct], kind="stable")]  # lowest first: argmax takes the first of equals
    inner = np.flatnonzero((sizes[distinct] >= 2) & (sizes[distinct] <= len(tree.classes) / 2))

    best, best_latent = np.zeros(len(inner), np.float32), np.full(len(inner), -1)
    parts = []
    for latents in np.array_split(alive, max(1, len(alive) // 1024)):  # bounds memory: (1024, V) at a time
        top = profile.top_classes[latents]  # (a, k)
        in_top = np.zeros((len(latents), len(tree.classes)), bool)
        in_top[np.arange(len(latents))[:, None], top] = True
        lch = tree.lch(in_top)
        pairwise = tree.pair_height[top[:, :, None], top[:, None, :]].sum((1, 2)) / (k * (k - 1))
        responds = (profile.rate[latents] >= response_rate).astype(np.float32)  # (a, C): R
        coverage = (responds * leaves[lch]).sum(1) / sizes[lch]
        both = responds @ leaves[distinct].T
        jaccard = both / (responds.sum(1, keepdims=True) + sizes[distinct] - both)  # (a, V')
        parts.append((lch, pairwise, coverage, jaccard.max(1), distinct[jaccard.argmax(1)]))
        if len(latents):
            better = jaccard[:, inner].max(0) > best
            best_latent[better] = latents[jaccard[:, inner].argmax(0)][better]
            best = np.maximum(best, jaccard[:, inner].max(0))
    lch, pairwise, coverage, match, match_node = (np.concatenate(columns) for columns in zip(*parts))
    found = np.isin(distinct[inner], tree.lowest[lch])  # nodes with one set of classes count as one
    return Scores(
        alive, lch, tree.height[lch], pairwise, coverage, match, match_node, distinct[inner], found, best, best_latent
    )


# ---------------------------------------------------------------------------------------------------------------------
# linear probe


def probe_steps(rows: int, least: int = 3000) -> tuple[int, int]:
    """(epochs, steps an epoch) of `linear_probe` on so many rows."""
    steps = max(1, rows // 256)
    return max(10, -(-least // steps)), steps


def linear_probe(train, train_labels, val, val_labels, device: str = "cpu", seed: int = 0, least: int = 3000) -> float:
    """Top-1 accuracy on `val` (M, n) of a linear classifier fitted to `train` (N, n), arrays or memory maps.

    Multinomial logistic regression on features standardised on train; AdamW, batches of 256 consecutive rows (which
    are to be in random order), 10 epochs but at least `least` steps, learning rate 2e-3 decaying to zero.
    """
    epochs, steps = probe_steps(len(train), least)
    batch_size = min(256, len(train))
    starts = batch_size * np.arange(steps)
    total, squares = 0.0, 0.0
    for start in range(0, len(train), 8192):
        rows = np.asarray(train[start : start + 8192], np.float64)
        total, squares = total + rows.sum(0), squares + np.square(rows).sum(0)
    mean = total / len(train)
    deviation = np.sqrt(np.maximum(squares / len(train) - mean**2, 0))
    deviation[deviation <= 1e-6 * max(deviation.max(), 1e-30)] = np.inf  # a constant coordinate tells nothing
    mean, deviation = (torch.from_numpy(a).float().to(device) for a in (mean, deviation))

    def features(rows):
        return (torch.from_numpy(np.array(rows)).to(device).float() - mean) / deviation

    classes = int(max(train_labels.max(), val_labels.max())) + 1
    probe = nn.Linear(len(mean), classes, device=device)
    nn.init.zeros_(probe.weight), nn.init.zeros_(probe.bias)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=2e-3, weight_decay=1e-2)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=epochs * steps)
    order = np.random.default_rng(seed)
    for _ in range(epochs):
        for start in order.permutation(starts):
            x = features(train[start : start + batch_size])
            y = torch.from_numpy(np.array(train_labels[start : start + batch_size])).to(device)
            loss = nn.functional.cross_entropy(probe(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
    with torch.inference_mode():
        right = sum(
            int((probe(features(val[s : s + 8192])).argmax(1).cpu().numpy() == val_labels[s : s + 8192]).sum())
            for s in range(0, len(val), 8192)
        )
    return right / len(val)


# ---------------------------------------------------------------------------------------------------------------------
# tests of trends over layers


class Trend(NamedTuple):
    rho: float  # Spearman's rank correlation
    p_value: float  # one-sided: the share of orderings of y whose rho is at least as large


def _ranks(values) -> np.ndarray:
    """Ranks from 0, ties getting their mean."""
    values = np.asarray(values, float)
    return ((values[:, None] > values).sum(1) + (values[:, None] >= values).sum(1) - 1) / 2


def rising_trend(x, y, permutations: int = 100_000, seed: int = 0) -> Trend:
    """Does y rise with x? Spearman's rho and its one-sided permutation p-value: exact for up to 8 points.

    Points with a NaN are left out. NaN for both where x or y is constant or there are fewer than three points.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    there = np.isfinite(x) & np.isfinite(y)
    a, b = _ranks(x[there]) - (there.sum() - 1) / 2, _ranks(y[there]) - (there.sum() - 1) / 2
    norm = float(np.sqrt((a @ a) * (b @ b)))
    if len(a) < 3 or norm == 0:
        return Trend(float("nan"), float("nan"))
    observed = a @ b
    if len(a) <= 8:
        orders = np.array(list(itertools.permutations(b)))
        return Trend(float(observed / norm), float((orders @ a >= observed - 1e-9).mean()))
    rng, larger, part = np.random.default_rng(seed), 0, permutations // 20  # in parts, for the memory
    for _ in range(20):
        larger += (rng.permuted(np.tile(b, (part, 1)), axis=1) @ a >= observed - 1e-9).sum()
    return Trend(float(observed / norm), float((1 + larger) / (1 + 20 * part)))


def agreement_trend(agreement: np.ndarray, permutations: int = 10_000, seed: int = 0) -> Trend:
    """Do near layers agree more than far ones? agreement (L, L), symmetric, NaN where not defined.

    Mantel's test: Spearman's rho of agreement and nearness over pairs of layers, and its one-sided p-value by
    permuting the layers, since pairs that share a layer are not independent of each other.
    """
    a, b = np.triu_indices(len(agreement), 1)
    there = np.isfinite(agreement[a, b])
    a, b = a[there], b[there]
    if len(a) < 3:
        return Trend(float("nan"), float("nan"))
    values = _ranks(agreement[a, b])
    distances, inverse = np.unique(b - a, return_inverse=True)
    nearness = np.zeros(len(agreement))  # rank of -distance, by distance
    nearness[distances] = _ranks(-(b - a))[[np.flatnonzero(inverse == i)[0] for i in range(len(distances))]]
    values, nearness = values - values.mean(), nearness - nearness[b - a].mean()
    norm = float(np.sqrt((values @ values) * (nearness[b - a] @ nearness[b - a])))
    if norm == 0:
        return Trend(float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    observed = values @ nearness[b - a]
    orders = (rng.permutation(len(agreement)) for _ in range(permutations))
    larger = sum(values @ nearness[np.abs(order[b] - order[a])] >= observed - 1e-9 for order in orders)
    return Trend(float(observed / norm), float((1 + larger) / (1 + permutations)))
