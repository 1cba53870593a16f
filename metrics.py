"""How much of the ImageNet hierarchy a dictionary of latents holds, and how good its tokens are.

    (profile,) = profile_latents(sae.encode, val.split(2048), [labels], classes=1000, k=16)
    scores = score_hierarchy(profile, tree)                  # LCH height, coverage, match
    accuracy = linear_probe(train, train_labels, val, labels)

A "dictionary" is any function from tokens (B, n) to non-negative activations (B, m): an SAE's
encoder, or the raw neurons (`neurons(mean)`) that it is compared with. Formulas: README.md.
"""
import itertools
from typing import Callable, Iterable, NamedTuple

import numpy as np
import torch
from torch import nn

from taxonomy import Taxonomy


class Reconstruction(NamedTuple):
    """How well an SAE reconstructs N tokens; sums in float64."""

    nmse: float  # Σ‖x - x̂‖² / Σ‖x‖²: the ease of auto-encoding the token as it comes
    fvu: float  # Σ‖x - x̂‖² / Σ‖x - mean(x)‖²: fraction of variance unexplained
    l0: float  # mean number of active latents
    dead: float  # share of latents that fire on no image


class Profile(NamedTuple):
    """What m latents respond to, over N images of C classes."""

    top_images: np.ndarray  # (m, k) int, the k images with the largest z, best first
    top_classes: np.ndarray  # (m, k) int, their classes
    fires: np.ndarray  # (m,) int, number of images on which the latent fires, z > 0
    rate: np.ndarray  # (m, C) float32, share of each class's images on which it fires
    reconstruction: Reconstruction | None  # where there is a decoder


def neurons(mean: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The dictionary of raw neurons: a centred token's coordinates and their negatives."""
    def encode(x):  # (B, n) -> (B, 2n)
        return torch.cat([x - mean, mean - x], dim=1).relu_()

    return encode


@torch.inference_mode()
def profile_latents(encode, batches: Iterable[torch.Tensor], labelings: list[np.ndarray],
                    classes: int, k: int = 16, decode=None) -> list[Profile]:
    """One pass over batches of tokens (B, n) in the order of the images.

    labelings  one or more of shape (N,), as the true and a shuffled one: each gives a Profile
    decode     latents (B, m) -> tokens (B, n), for the reconstruction's scores
    Memory is O(m (B + C + k)), whatever N is.
    """
    N, fires, top = 0, 0, None
    error = squares = total = 0.0
    counts = [0] * len(labelings)  # (C, m) each
    for x in batches:
        z = encode(x)  # (B, m)
        active = (z > 0).float()
        fires = fires + active.sum(0)
        for i, labels in enumerate(labelings):  # exact below 2**24 images
            rows = torch.as_tensor(labels[N : N + len(z)], device=z.device)
            counts[i] = counts[i] + z.new_zeros(classes, z.shape[1]).index_add_(0, rows, active)
        values, images = z.topk(min(k, len(z)), dim=0)  # (k, m)
        images = images + N
        if top is not None:
            values, images = torch.cat([top[0], values]), torch.cat([top[1], images])
            values, order = values.topk(min(k, len(values)), dim=0)
            images = images.gather(0, order)
        top, N = (values, images), N + len(z)
        if decode is not None:
            x_hat, x = decode(z), x.double()
            error, squares = error + (x - x_hat).square().sum(), squares + x.square().sum()
            total = total + x.sum(0)
    found = None
    if decode is not None:
        variance = squares - total.square().sum() / N
        l0, dead = fires.double().sum() / N, (fires == 0).double().mean()
        found = Reconstruction(*map(float, (error / squares, error / variance, l0, dead)))
    top_images, fires = top[1].T.cpu().numpy(), fires.long().cpu().numpy()
    profiles = []
    for labels, count in zip(labelings, counts):
        of_class = np.maximum(np.bincount(labels, minlength=classes), 1).astype(np.float32)
        rate = count.cpu().numpy().T / of_class
        profiles.append(Profile(top_images, labels[top_images], fires, rate, found))
    return profiles


class Scores(NamedTuple):
    """The A alive latents of a dictionary (they fire on at least k images) on H hypernyms."""

    latents: np.ndarray  # (A,) int, which ones
    lch: np.ndarray  # (A,) int, node: the LCH of the classes of the latent's top images
    height: np.ndarray  # (A,) int, that node's height
    height_pairwise: np.ndarray  # (A,) mean height of two top images' LCH; 0 for one class
    coverage: np.ndarray  # (A,) |R ∩ leaves(lch)| / |leaves(lch)|, R the classes it responds to
    match: np.ndarray  # (A,) max over nodes v of |R ∩ leaves(v)| / |R ∪ leaves(v)|
    match_node: np.ndarray  # (A,) int, the node that attains it; of several, the lowest
    hypernyms: np.ndarray  # (H,) int, distinct nodes of two classes to half of all
    hypernym_lch: np.ndarray  # (H,) bool, whether it is the LCH of some latent
    hypernym_match: np.ndarray  # (H,) the best match of any latent with each of them
    hypernym_latent: np.ndarray  # (H,) int, the latent that attains it; -1 where none matches

    def summary(self) -> dict:
        """A row of hierarchy.csv: means over alive latents (NaN for none), hypernyms found."""
        means = {"lch_height": self.height, "lch_height_pairwise": self.height_pairwise,
                 "coverage": self.coverage, "match": self.match}
        return {
            "alive": len(self.latents),
            **{name: float(x.mean()) if len(x) else float("nan") for name, x in means.items()},
            "hypernyms_lch": int(self.hypernym_lch.sum()),
            "hypernyms_matched": int((self.hypernym_match > 0.5).sum()),
        }


def score_hierarchy(profile: Profile, tree: Taxonomy, response_rate: float = 0.5) -> Scores:
    """Score every alive latent of a profile, whose classes are the taxonomy's in the same order.

    A latent responds to the classes on whose images it fires at least at `response_rate`.
    """
    k = profile.top_images.shape[1]
    leaves = tree.leaves.astype(np.float32)  # (V, C)
    sizes = leaves.sum(1)
    alive = np.flatnonzero(profile.fires >= k)
    # the nodes told apart by their classes, lowest first: argmax takes the first of equals
    distinct = np.flatnonzero(tree.lowest == np.arange(len(sizes)))
    distinct = distinct[np.argsort(tree.height[distinct], kind="stable")]
    inner = np.flatnonzero((sizes[distinct] >= 2) & (sizes[distinct] <= len(tree.classes) / 2))
    best, best_latent = np.zeros(len(inner), np.float32), np.full(len(inner), -1)
    parts = []
    for latents in np.array_split(alive, max(1, len(alive) // 1024)):  # bounds the memory
        top = profile.top_classes[latents]  # (a, k)
        in_top = np.zeros((len(latents), len(tree.classes)), bool)
        in_top[np.arange(len(latents))[:, None], top] = True
        lch = tree.lch(in_top)
        pair_heights = tree.pair_height[top[:, :, None], top[:, None, :]]  # (a, k, k)
        pairwise = pair_heights.sum((1, 2)) / (k * (k - 1))
        responds = (profile.rate[latents] >= response_rate).astype(np.float32)  # (a, C): R
        coverage = (responds * leaves[lch]).sum(1) / sizes[lch]
        both = responds @ leaves[distinct].T
        jaccard = both / (responds.sum(1, keepdims=True) + sizes[distinct] - both)  # (a, V')
        parts.append((lch, pairwise, coverage, jaccard.max(1), distinct[jaccard.argmax(1)]))
        if len(latents):
            of_inner = jaccard[:, inner]
            better = of_inner.max(0) > best
            best_latent[better] = latents[of_inner.argmax(0)][better]
            best = np.maximum(best, of_inner.max(0))
    lch, pairwise, coverage, match, match_node = map(np.concatenate, zip(*parts))
    found = np.isin(distinct[inner], tree.lowest[lch])  # nodes with one set of classes are one
    return Scores(alive, lch, tree.height[lch], pairwise, coverage, match, match_node,
                  distinct[inner], found, best, best_latent)


def best_latents(scores: Scores, profile: Profile, tree: Taxonomy) -> dict[str, dict]:
    """wnid of each hypernym that some latent responds to -> the latent that matches it best."""
    place = {latent: i for i, latent in enumerate(scores.latents.tolist())}
    rows = zip(scores.hypernyms, scores.hypernym_match, scores.hypernym_latent.tolist())
    return {
        tree.wnids[v]: {"match": float(match), "latent": latent,
                        "lch": tree.names[scores.lch[place[latent]]],
                        "top_images": profile.top_images[latent].tolist()}
        for v, match, latent in rows if latent >= 0
    }


def consistency(layers: list[dict]) -> np.ndarray:
    """`best_latents` of L layers -> (L, L) Jaccard of the hypernyms matched; NaN for none."""
    found = [{wnid for wnid, best in layer.items() if best["match"] > 0.5} for layer in layers]
    jaccard = [[len(a & b) / len(a | b) if a | b else np.nan for b in found] for a in found]
    return np.array(jaccard)


def hypernym_rows(layers: dict[int, dict], tree: Taxonomy) -> list[dict]:
    """`best_latents` by layer -> for every hypernym of at most half of all classes, the most
    general first: the layer in which it emerges, and its best latent in any layer."""
    rows, sizes = [], tree.leaves.sum(1)
    for v in sorted(tree.hypernyms, key=lambda v: (-tree.height[v], -sizes[v], tree.wnids[v])):
        if sizes[v] > len(tree.classes) / 2:
            continue
        found = {n: best[tree.wnids[v]] for n, best in layers.items() if tree.wnids[v] in best}
        layer = max(found, key=lambda layer: found[layer]["match"], default=None)
        best = found.get(layer, {})
        rows.append({
            "wnid": tree.wnids[v], "name": tree.names[v], "classes": int(sizes[v]),
            "height": int(tree.height[v]),
            "emergence_layer": next((n for n, one in found.items() if one["match"] > 0.5), None),
            "best_layer": layer, "best_latent": best.get("latent"),
            "match": best.get("match", 0.0), "lch": best.get("lch"),
        })
    return rows


def probe_steps(rows: int, least: int = 3000) -> tuple[int, int]:
    """(epochs, steps an epoch) of `linear_probe` on so many rows."""
    steps = max(1, rows // 256)
    return max(10, -(-least // steps)), steps


def linear_probe(train: torch.Tensor, train_labels: torch.Tensor, val: torch.Tensor,
                 val_labels: torch.Tensor, mean=None, variance=None, seed: int = 0) -> float:
    """Top-1 accuracy on `val` (M, n) of a linear classifier fitted to `train` (N, n).

    Multinomial logistic regression on features standardised by `mean` and `variance` (n,), or
    train's own; AdamW, batches of 256 consecutive rows (which are to be in random order), 10
    epochs but at least 3,000 steps, learning rate 2e-3 decaying to zero. All on one device.
    """
    epochs, steps = probe_steps(len(train))
    mean = train.double().mean(0) if mean is None else mean
    variance = train.double().var(0, correction=0) if variance is None else variance
    deviation = variance.sqrt()
    deviation[deviation <= 1e-6 * deviation.max()] = torch.inf  # a constant tells nothing
    mean, deviation = (x.to(train.device, torch.float32) for x in (mean, deviation))
    probe = nn.Linear(len(mean), 1 + int(max(train_labels.max(), val_labels.max())))
    nn.init.zeros_(probe.weight), nn.init.zeros_(probe.bias)
    probe.to(train.device)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=2e-3, weight_decay=1e-2, fused=True)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=epochs * steps)
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        for start in 256 * rng.permutation(steps):
            x = (train[start : start + 256].float() - mean) / deviation
            loss = nn.functional.cross_entropy(probe(x), train_labels[start : start + 256])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
    with torch.inference_mode():
        pairs = zip(val.split(8192), val_labels.split(8192))
        guesses = ((probe((x.float() - mean) / deviation).argmax(1), labels) for x, labels in pairs)
        return sum(int((guess == labels).sum()) for guess, labels in guesses) / len(val)


class Trend(NamedTuple):
    rho: float  # Spearman's rank correlation
    p_value: float  # one-sided: the share of orderings of y whose rho is at least as large


def _ranks(values) -> np.ndarray:
    """Ranks from 0, ties getting their mean."""
    values = np.asarray(values, float)
    below, up_to = (values[:, None] > values).sum(1), (values[:, None] >= values).sum(1)
    return (below + up_to - 1) / 2


def rising_trend(x, y, permutations: int = 100_000, seed: int = 0) -> Trend:
    """Does y rise with x? Spearman's rho, its one-sided permutation p: exact for up to 8 points.

    Points with a NaN are left out. NaN for both where x or y is constant, or of under 3 points.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    there = np.isfinite(x) & np.isfinite(y)
    a, b = (_ranks(values[there]) - (there.sum() - 1) / 2 for values in (x, y))
    norm = float(np.sqrt((a @ a) * (b @ b)))
    if len(a) < 3 or norm == 0:
        return Trend(float("nan"), float("nan"))
    observed = a @ b - 1e-9
    if len(a) <= 8:
        orders = np.array(list(itertools.permutations(b)))
        return Trend(float(a @ b / norm), float((orders @ a >= observed).mean()))
    rng, larger, part = np.random.default_rng(seed), 0, permutations // 20  # in parts: the memory
    for _ in range(20):
        larger += (rng.permuted(np.tile(b, (part, 1)), axis=1) @ a >= observed).sum()
    return Trend(float(a @ b / norm), float((1 + larger) / (1 + 20 * part)))


def agreement_trend(agreement: np.ndarray, permutations: int = 10_000, seed: int = 0) -> Trend:
    """Do near layers agree more than far ones? agreement (L, L), symmetric, NaN where not defined.

    Mantel's test: Spearman's rho of agreement and nearness over pairs of layers, its one-sided p
    by permuting the layers, since pairs that share a layer are not independent of each other.
    """
    a, b = np.triu_indices(len(agreement), 1)
    there = np.isfinite(agreement[a, b])
    a, b = a[there], b[there]
    if len(a) < 3:
        return Trend(float("nan"), float("nan"))
    values, nearness = _ranks(agreement[a, b]), np.zeros(len(agreement))
    nearness[b - a] = _ranks(a - b)  # the rank of -distance, by distance
    values, nearness = values - values.mean(), nearness - nearness[b - a].mean()
    norm = float(np.sqrt((values @ values) * (nearness[b - a] @ nearness[b - a])))
    if norm == 0:
        return Trend(float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    observed = values @ nearness[b - a]
    orders = (rng.permutation(len(agreement)) for _ in range(permutations))
    larger = sum(values @ nearness[abs(order[b] - order[a])] >= observed - 1e-9 for order in orders)
    return Trend(float(observed / norm), float((1 + larger) / (1 + permutations)))
