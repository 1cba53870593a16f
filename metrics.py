"""How much of the ImageNet hierarchy a dictionary of latents holds, and how good its tokens are.

    (profile,) = profile_latents(sae.encode, val.split(2048), [labels], classes=1000)
    scores = score_hierarchy(profile, tree)                  # LCH height, coverage, match, IoU
    accuracy = linear_probe(train, train_labels, val, labels)

A "dictionary" is any function from tokens (B, n) to non-negative activations (B, m): an SAE's
encoder, or units as sparse as it that were not trained (`sparse_units`). The formulas are in
docs/definitions.md.
"""
from typing import Iterable, NamedTuple

import numpy as np
import torch
from torch import nn

from taxonomy import Taxonomy

TOP = 32  # top images kept of each latent, at least; scores use the first k of them


class Reconstruction(NamedTuple):
    """How well an SAE reconstructs N tokens; sums in float64."""

    nmse: float  # Σ‖x - x̂‖² / Σ‖x‖²: the ease of auto-encoding the token as it comes
    fvu: float  # Σ‖x - x̂‖² / Σ‖x - mean(x)‖²: fraction of variance unexplained
    l0: float  # mean number of active latents
    dead: float  # share of latents that fire on no image


class Profile(NamedTuple):
    """What m latents respond to, over N images of C classes, which are taken in two halves: every
    other image of each class."""

    top_images: np.ndarray  # (m, TOP) int, the images with the largest z, best first
    top_classes: np.ndarray  # (m, TOP) int, their classes
    fires: np.ndarray  # (m,) int, number of images on which the latent fires, z > 0
    counts: np.ndarray  # (m, C, 2) float32, the same by class and half
    images: np.ndarray  # (C, 2) float32, how many there are
    reconstruction: Reconstruction | None  # where there is a decoder

    @property
    def rate(self) -> np.ndarray:
        """(m, C) share of each class's images on which the latent fires."""
        return self.counts.sum(2) / np.maximum(self.images.sum(1), 1)


@torch.inference_mode()
def sparse_units(directions: torch.Tensor, tokens: torch.Tensor, mean: torch.Tensor, share: float):
    """A baseline for an SAE that fires on `share` of its training tokens: units of the given
    directions (m, n), each with the threshold at which it fires on as large a share of `tokens`
    (N, n). Returns its encoder, (B, n) -> (B, m)."""
    fires = min(max(round(share * len(tokens)), 0), len(tokens) - 1)
    thresholds = torch.cat([
        ((tokens.float() - mean) @ some.T).kthvalue(len(tokens) - fires, dim=0).values
        for some in directions.split(512)  # bounds the memory
    ])

    def encode(x):
        return torch.relu((x - mean) @ directions.T - thresholds)

    return encode


@torch.inference_mode()
def profile_latents(encode, batches: Iterable[torch.Tensor], labelings: list[np.ndarray],
                    classes: int, k: int = 16, decode=None) -> list[Profile]:
    """One pass over batches of tokens (B, n) in the order of the images.

    labelings  one or more of shape (N,), as the true and a shuffled one: each gives a Profile
    decode     latents (B, m) -> tokens (B, n), for the reconstruction's scores
    Memory is O(m (B + C)), whatever N is.
    """
    N, fires, top, keep = 0, 0, None, max(k, TOP)
    error = squares = total = 0.0
    cells = [2 * labels + every_other(labels) for labels in labelings]  # a class and a half
    counts = [0] * len(labelings)  # (2C, m) each
    for x in batches:
        z = encode(x)  # (B, m)
        active = (z > 0).float()
        fires = fires + active.sum(0)
        for i, cell in enumerate(cells):  # exact below 2**24 images
            rows = torch.as_tensor(cell[N : N + len(z)], device=z.device)
            new = z.new_zeros(2 * classes, z.shape[1])
            counts[i] = counts[i] + new.index_add_(0, rows, active)
        values, images = z.topk(min(keep, len(z)), dim=0)  # (TOP, m)
        images = images + N
        if top is not None:
            values, images = torch.cat([top[0], values]), torch.cat([top[1], images])
            values, order = values.topk(min(keep, len(values)), dim=0)
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
    return [
        Profile(top_images, labels[top_images], fires,
                count.T.cpu().numpy().reshape(-1, classes, 2),
                np.bincount(cell, minlength=2 * classes).reshape(-1, 2).astype(np.float32), found)
        for labels, cell, count in zip(labelings, cells, counts)
    ]


def every_other(labels: np.ndarray) -> np.ndarray:
    """(N,) 0 and 1 in turn, within each class."""
    order = np.argsort(labels, kind="stable")
    first = np.searchsorted(labels[order], labels[order])  # where the class begins in this order
    halves = np.empty(len(labels), np.int64)
    halves[order] = (np.arange(len(labels)) - first) % 2
    return halves


class Scores(NamedTuple):
    """The A alive latents of a dictionary (they fire on at least k images) on H hypernyms."""

    latents: np.ndarray  # (A,) int, which ones
    lch: np.ndarray  # (A,) int, node: the LCH of the classes of the latent's top images
    height: np.ndarray  # (A,) int, that node's height
    height_pairwise: np.ndarray  # (A,) mean height of two top images' LCH; 0 for one class
    coverage: np.ndarray  # (A,) |R ∩ leaves(lch)| / |leaves(lch)|, R the classes it responds to
    match: np.ndarray  # (A,) max over nodes v of |R ∩ leaves(v)| / |R ∪ leaves(v)|
    ontology_covered: float  # share of the distinct nodes that are the LCH of some latent
    ontology_matched: float  # share of them that some latent matches
    hypernyms: np.ndarray  # (H,) int, distinct nodes of two classes to half of all
    hypernym_lch: np.ndarray  # (H,) bool, whether it is the LCH of some latent
    hypernym_match: np.ndarray  # (H,) best match of a latent that shows it; matched above 0.5
    hypernym_latent: np.ndarray  # (H,) int, that latent; -1 where there is none
    hypernym_iou: np.ndarray  # (H,) image-level IoU, latent chosen on one half, scored on the other
    iou_latent: np.ndarray  # (H,) int, that latent

    def summary(self) -> dict:
        """A row of hierarchy.csv: means over alive latents (NaN for none), hypernyms found."""
        means = {"lch_height": self.height, "lch_height_pairwise": self.height_pairwise,
                 "coverage": self.coverage, "match": self.match, "iou": self.hypernym_iou}
        return {
            "alive": len(self.latents),
            **{name: float(x.mean()) if len(x) else float("nan") for name, x in means.items()},
            "iou_best": float(self.hypernym_iou.max(initial=0)),
            "ontology_covered": self.ontology_covered,
            "hypernyms_lch": int(self.hypernym_lch.sum()),
            "hypernyms_matched": int((self.hypernym_match > 0.5).sum()),
        }


def score_hierarchy(profile: Profile, tree: Taxonomy, k=16, response_rate=0.5) -> Scores:
    """Score every alive latent of a profile, whose classes are the taxonomy's in the same order.

    A latent responds to the classes on whose images it fires at least at `response_rate`. It
    *shows* a hypernym if more than half of its k top images are under it.
    """
    leaves = tree.leaves.astype(np.float32)  # (V, C)
    sizes = leaves.sum(1)
    # the nodes told apart by their classes, lowest first: argmax takes the first of equals
    distinct = np.flatnonzero(tree.lowest == np.arange(len(sizes)))
    distinct = distinct[np.argsort(tree.height[distinct], kind="stable")]
    inner = np.flatnonzero((sizes[distinct] >= 2) & (sizes[distinct] <= len(tree.classes) / 2))
    alive = np.flatnonzero(profile.fires >= k)
    top = profile.top_classes[alive, :k]
    in_top = np.zeros((len(alive), len(tree.classes)), np.float32)
    np.add.at(in_top, (np.arange(len(alive))[:, None], top), 1 / top.shape[1])  # (A, C), of 1
    lch = tree.lch(in_top)
    responds = (profile.rate[alive] >= response_rate).astype(np.float32)  # (A, C): R
    both = responds @ leaves[distinct].T
    jaccard = both / (responds.sum(1, keepdims=True) + sizes[distinct] - both)  # (A, V')
    shown = np.where(in_top @ leaves[distinct].T > 0.5 + 1e-4, jaccard, 0)
    best = shown.max(0, initial=0)
    best_latent = np.where(best > 0, alive[shown.argmax(0)], -1) if len(alive) else best - 1
    iou, iou_latent = hypernym_iou(profile, leaves[distinct[inner]])
    covered = np.isin(distinct, tree.lowest[lch])  # nodes with one set of classes are one
    return Scores(
        alive, lch, tree.height[lch], pairwise(tree, tree.height, top, same=0),
        (responds * leaves[lch]).sum(1) / sizes[lch], jaccard.max(1, initial=0),
        float(covered.mean()), float((best > 0.5).mean()), distinct[inner], covered[inner],
        best[inner], best_latent[inner].astype(int), iou, iou_latent)


def pairwise(tree: Taxonomy, value: np.ndarray, top: np.ndarray, same=None) -> np.ndarray:
    """(A,) mean of value (V,) at the LCH of two of the top images' classes (A, k); for two of one
    class `same`, if given."""
    pairs, k = value[tree.pair_lch], top.shape[1]
    own = pairs.diagonal()[top].sum(1)  # of an image with itself, which is no pair
    if same is not None:
        np.fill_diagonal(pairs, same)
        own = same * k
    return (pairs[top[:, :, None], top[:, None, :]].sum((1, 2)) - own) / (k * (k - 1))


def iou_of(fires: np.ndarray, images: np.ndarray, leaves: np.ndarray) -> np.ndarray:
    """Images under a hypernym on which a latent fires, over those under it or on which it fires:
    fires (m, C), images (C,), leaves (H, C) -> (m, H)."""
    both = fires @ leaves.T
    return both / np.maximum(fires.sum(1, keepdims=True) + leaves @ images - both, 1)


def hypernym_iou(profile: Profile, leaves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For every hypernym the latent of the largest IoU on one half of the images, its IoU on the
    other half: choosing among thousands of latents then gains nothing."""
    latents = iou_of(profile.counts[:, :, 0], profile.images[:, 0], leaves).argmax(0)  # (H,)
    scored = iou_of(profile.counts[latents, :, 1], profile.images[:, 1], leaves)
    return scored.diagonal(), latents


def iou_draws(profile: Profile, scores: Scores, tree: Taxonomy, draws=1000, seed=0) -> np.ndarray:
    """(draws,) the mean over hypernyms of their latents' IoU, in a bootstrap over classes: the same
    classes for one seed, so that dictionaries can be compared draw by draw."""
    leaves, C = tree.leaves[scores.hypernyms].astype(np.float32), len(tree.classes)
    weights = np.random.default_rng(seed).multinomial(C, np.ones(C) / C, draws).T  # (C, draws)
    fires, images = profile.counts[scores.iou_latent, :, 1], profile.images[:, 1]
    both, under = (fires * leaves) @ weights, (images * leaves) @ weights  # (H, draws)
    iou = np.where(under > 0, both / np.maximum(fires @ weights + under - both, 1), 0)
    drawn = (under > 0).sum(0)  # hypernyms none of whose classes were drawn have no IoU
    return np.divide(iou.sum(0), drawn, out=np.full(draws, np.nan), where=drawn > 0)


class Relations(NamedTuple):
    """Do the latents of general hypernyms fire where those of special ones do? A row of
    relations.csv. A share is that of the top images of one latent on which another fires."""

    related_pairs: int  # of hypernyms matched, u above v, by different latents
    related: float  # mean share of the top images of v's latent on which u's fires
    unrelated_pairs: int  # without a common class
    unrelated: float
    auc: float  # chance that a related pair has a larger share than an unrelated one
    absorption: float  # 1 - related: how often the general latent is silent
    p_value: float  # of the difference, by which latent belongs to which matched hypernym


@torch.inference_mode()
def relate(encode, read, profile: Profile, scores: Scores, tree: Taxonomy, k=16, draws=1000):
    """Relations among the hypernyms matched, and the longest chain from general to special, as
    [(place among the hypernyms, share of the one above)]; read gives tokens (rows, n) by number."""
    matched = np.flatnonzero(scores.hypernym_match > 0.5)
    matched = matched[np.argsort(-tree.leaves[scores.hypernyms[matched]].sum(1), kind="stable")]
    M, latents = len(matched), scores.hypernym_latent[matched]
    leaves = tree.leaves[scores.hypernyms[matched]].astype(np.float32)
    common = leaves @ leaves.T  # (M, M) classes of both
    above = (common == leaves.sum(1)) & (common < leaves.sum(1)[:, None])  # u above v
    share = np.zeros((M, M))  # [u, v]
    for v in range(M):
        z = encode(read(profile.top_images[latents[v], :k]))
        share[:, v] = (z[:, latents] > 0).double().mean(0).cpu().numpy()
    share[latents[:, None] == latents] = np.nan  # not defined of a latent and itself

    def split(order):
        shuffled = share[np.ix_(order, order)]
        parts = shuffled[above], shuffled[common == 0]
        return [part[np.isfinite(part)] for part in parts]

    related, unrelated = split(np.arange(M))
    means = [float(part.mean()) if len(part) else float("nan") for part in (related, unrelated)]
    auc = p_value = float("nan")
    if len(related) and len(unrelated):
        sides = [np.searchsorted(np.sort(unrelated), related, side) for side in ("left", "right")]
        auc = float(np.mean(sides) / len(unrelated))
        rng = np.random.default_rng(0)
        others = (split(rng.permutation(M)) for _ in range(draws))
        larger = sum(a.mean() - b.mean() >= means[0] - means[1] - 1e-9
                     for a, b in others if len(a) and len(b))
        p_value = float((1 + larger) / (1 + draws))
    row = Relations(len(related), means[0], len(unrelated), means[1], auc, 1 - means[0], p_value)
    chain = [(int(matched[v]), None if u is None else float(share[u, v]))
             for u, v in longest_chain(above & np.isfinite(share))]
    return row, chain


def longest_chain(above: np.ndarray) -> list[tuple]:
    """The longest descent through above (M, M), u before v: [(None, v0), (v0, v1), ...]."""
    chains = []  # the longest that ends in each
    for v in range(len(above)):
        before = max((chains[u] for u in np.flatnonzero(above[:v, v])), key=len, default=[])
        chains.append([*before, (before[-1][1] if before else None, v)])
    return max(chains, key=len, default=[])


def readings(profile: Profile, scores: Scores, tree: Taxonomy, k: int) -> dict[str, dict]:
    """LCH height and Ontological Coverage as their names may be meant: {claim: {reading: value}},
    means over alive latents; a height by the depth from the root is negative."""
    heights = {"longest path": (tree.height, 0), "shortest path": (tree.height_shortest, 0),
               "depth": (-tree.depth, None)}
    leaves = tree.leaves.astype(np.float32)
    height, coverage = {}, {}
    for some in [some for some in (4, 8, 16, 32) if some <= profile.top_images.shape[1]]:
        alive = profile.fires >= some
        top, rate = profile.top_classes[alive, :some], profile.rate[alive]
        in_top = np.zeros((len(top), len(tree.classes)), bool)
        in_top[np.arange(len(top))[:, None], top] = True
        lch = tree.lch(in_top)
        for name, (value, same) in heights.items():
            height[f"{name}, of the set, k = {some}"] = value[lch]
            height[f"{name}, over pairs, k = {some}"] = pairwise(tree, value, top, same)
        for name, responds in {
            "25%": rate >= 0.25, "50%": rate >= 0.5, "75%": rate >= 0.75, "any": rate > 0,
            "top images": in_top,
        }.items():
            share = (responds * leaves[lch]).sum(1) / leaves[lch].sum(1)
            coverage[f"of its LCH by a latent, R = {name}, k = {some}"] = share
    for name, of in (("height", height), ("coverage", coverage)):
        for key, x in of.items():
            of[key] = float(x.mean()) if len(x) else float("nan")
    for how, nodes, hypernyms in [
        ("as LCH", scores.ontology_covered, scores.hypernym_lch),
        ("matched", scores.ontology_matched, scores.hypernym_match > 0.5),
    ]:
        share = float(hypernyms.mean()) if len(hypernyms) else float("nan")
        coverage[f"of the ontology, hypernyms, {how}, k = {k}"] = share
        coverage[f"of the ontology, hypernyms and classes, {how}, k = {k}"] = nodes
    return {"height": height, "coverage": coverage}


def best_latents(scores: Scores, profile: Profile, tree: Taxonomy, k: int) -> dict[str, dict]:
    """wnid of each hypernym that some latent shows -> the latent that matches it best."""
    place = {latent: i for i, latent in enumerate(scores.latents.tolist())}
    rows = zip(scores.hypernyms, scores.hypernym_match, scores.hypernym_latent.tolist())
    return {
        tree.wnids[v]: {"match": float(match), "latent": latent,
                        "lch": tree.names[scores.lch[place[latent]]],
                        "top_images": profile.top_images[latent, :k].tolist()}
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
