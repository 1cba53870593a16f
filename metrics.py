"""How much of the ImageNet hierarchy a dictionary of latents holds, and how good its tokens are.

    profile = profile_latents(sae.encode, val.split(2048), labels, len(tree.classes))
    responses = responses_of(profile, k=16)                      # of its 16 top images
    placed = Placed(responses, tree)                             # LCHs, heights, matches
    order = np.random.default_rng(0).permutation(len(tree.classes))
    control = Placed(responses, tree.permuted(order))            # the same latents, no kinship
    print(placed.summary()["lch_height_between"], control.summary()["lch_height_between"])

A *dictionary* is any function from tokens (B, n) to non-negative activations (B, m): an SAE's
encoder, or units that were never trained and fire as seldom (`dictionaries_of`). Labels number the
classes in the taxonomy's order; arrays, tensors and lists will do. docs/definitions.md has the
formulas in words.
"""
from functools import cached_property
from typing import Callable, NamedTuple

import numpy as np
import torch
from numpy import ndarray as Array
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from sae import SparseAutoencoder

TOP = 64  # top images kept of a latent, so that each half of the images has enough
SAMPLE = 16_384  # training tokens on which the baselines' thresholds are set
MATCHED = 0.5  # a latent matches a hypernym above this Jaccard index


class Profile(NamedTuple):
    """What m latents respond to, over N images of C classes. Tensors on the encoder's device. Half
    0 and 1 are every other image of each class: a latent is chosen on one, judged on the other."""

    top_images: Tensor  # (m, T) int, the images with the largest z, best first
    top_classes: Tensor  # (m, T) int, their classes
    top_halves: Tensor  # (m, T) int, 0 or 1
    fires: Tensor  # (m,) int, number of images on which the latent fires, z > 0
    counts: Tensor  # (2, m, C) float, the same by half and class
    images: Tensor  # (2, C) float, how many there are

    @property
    def rate(self):
        """(m, C) share of each class's images on which the latent fires."""
        return self.counts.sum(0) / self.images.sum(0).clamp(min=1)


def every_other(labels):
    """labels (N,) -> (N,) 0 and 1 in turn, within each class."""
    order = labels.argsort(stable=True)
    in_order = labels[order]
    first = torch.searchsorted(in_order, in_order)  # where the class begins in this order
    return ((torch.arange(len(labels)) - first) % 2)[order.argsort()]


def as_labels(labels, rows, classes):
    """Any sequence of class numbers, 0 to classes - 1, -> (rows,) int64; else ValueError."""
    labels = torch.as_tensor(labels).cpu()
    if labels.shape != (rows,):
        raise ValueError(f"there are {len(labels)} labels for {rows} tokens")
    numbers = labels.long()
    if not (labels == numbers).all() or not ((0 <= numbers) & (numbers < classes)).all():
        raise ValueError(f"labels are from {labels.min()} to {labels.max()}: whole numbers from 0 "
                         f"to {classes - 1} are needed")
    return numbers


@torch.inference_mode()
def profile_latents(encode, batches, labels, classes):
    """One pass over batches of tokens (B, n) in the order of the labels (N,); memory O(m (B + C)).
    Raises ValueError if N is not the number of tokens."""
    labels = as_labels(labels, len(labels), classes)
    halves = every_other(labels)
    cells = classes * halves + labels  # a half and a class
    N = 0
    for x in batches:
        z = encode(x)  # (B, m)
        if N == 0:
            counts = z.new_zeros(2 * classes, z.shape[1], dtype=torch.float32)
            top_values = z[:0]
            top_images = top_values.long()
        if N + len(z) > len(labels):
            as_labels(labels, N + len(z), classes)  # raises
        # on how many images of each half and class every latent fires
        cell = cells[N : N + len(z)].to(z.device)
        counts.index_add_(0, cell, (z > 0).float())  # exact below 2**24 images
        # the top images so far, and this batch's: the largest of both
        values, images = z.topk(min(TOP, len(z)), dim=0)  # (T, m)
        values = torch.cat([top_values, values])
        images = torch.cat([top_images, images + N])
        top_values, order = values.topk(min(TOP, len(values)), dim=0)
        top_images = images.gather(0, order)
        N += len(z)
    as_labels(labels, N, classes)
    fires = counts.sum(0).long()
    counts = counts.unflatten(0, (2, classes)).mT.contiguous()
    images = torch.bincount(cells, minlength=2 * classes).view(2, classes).to(counts)
    top = top_images.T.contiguous()
    top_classes, top_halves = (each.to(top.device)[top] for each in (labels, halves))
    return Profile(top, top_classes, top_halves, fires, counts, images)


# ---------------------------------------------------------------- dictionaries to compare


@torch.no_grad()
def sparse_units(directions, tokens, mean, fires):
    """Units that were not trained: directions (m, n), each with the threshold at which it fires on
    `fires` (m,) of the `tokens` (N, n). Returns their encoder, (B, n) -> (B, m)."""
    thresholds = []
    centred = (tokens - mean).T
    for rows in torch.arange(len(directions)).split(512):  # bounds the memory
        values = sort_rows(directions[rows] @ centred)  # (512, N), rising
        below_all = 2 * values[:, :1] - values[:, -1:]  # fires on all of these tokens
        values[:, -1] = torch.inf  # a dead unit, on other tokens too
        silent = len(tokens) - fires[rows, None].to(values.device)  # so many are
        thresholds.append(torch.cat([below_all, values], dim=1).gather(1, silent))
    thresholds = torch.cat(thresholds).squeeze(1)
    return lambda x: torch.relu((x - mean) @ directions.T - thresholds)


def sort_rows(values):
    """Each row in rising order; NumPy's sort is seven times as fast as PyTorch's on a CPU."""
    if values.is_cuda:
        return values.sort(dim=1).values
    return torch.from_numpy(np.sort(values.numpy(), axis=1))


@torch.no_grad()
def dictionaries_of(sae, tokens, mean, seed):
    """The SAE and two baselines that differ from it in training alone: raw neurons (each coordinate
    and its negative) and an untrained SAE (the random directions that training began with). Each as
    (name, encoder, encoder for the hypernym probe: neurons are then signed, not thresholded).

    On these training tokens (N, n) the units have the SAE's own firing rates, dealt at random: at
    equal means alone, rates that differ among latents would flatter the SAE.
    """
    # how often each latent fires, and these rates dealt anew to the units
    latents, n = sae.W_enc.shape
    fires = torch.zeros(latents, dtype=torch.int64)
    for x in tokens.split(2048):
        fires += (sae.encode(x) > 0).sum(0).cpu()
    rng = np.random.default_rng([seed, 1])
    dealt = fires[rng.permutation(latents)]
    few = fires[rng.choice(latents, 2 * n, replace=2 * n > latents)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        untrained = SparseAutoencoder(n, latents).W_enc.detach().to(mean.device)
    axes = torch.eye(n, device=mean.device)
    neurons = sparse_units(torch.cat([axes, -axes]), tokens, mean, few)
    untrained = sparse_units(untrained, tokens, mean, dealt)
    return [("sae", sae.encode, sae.encode), ("neurons", neurons, lambda x: x - mean),
            ("untrained", untrained, untrained)]


# ---------------------------------------------------------------- hierarchy scores


def mean_of(values):
    """Of those that are not NaN; NaN for none."""
    values = np.array(values, float)
    return values[~np.isnan(values)].mean() if not np.isnan(values).all() else np.nan


def leaves_of(tree, nodes, device="cpu"):
    """(len(nodes), C) float, 1 if the class is at or below the node."""
    return torch.from_numpy(tree.leaves[nodes]).to(device, torch.float32)


class Responses(NamedTuple):
    """All of a profile that scores need, whatever the tree, of the A alive latents: those that fire
    on at least k images. Float tensors unless said."""

    latents: Tensor  # (A,) int
    top: Tensor  # (A, k) int, the classes of the top images
    shown: Tensor  # (A, C) how many of the top images are of a class
    responds: Tensor  # (A, C) 1 if the latent responds to the class
    shown_A: Tensor  # (A, C) as shown, by half A's own top images, on which it fires
    responds_A: Tensor  # (A, C)
    responds_B: Tensor  # (A, C)
    in_both_halves: Tensor  # (C,) 1 for a class of two images or more: in both halves


@torch.inference_mode()
def responses_of(profile, k=16, response_rate=0.5):
    """A latent responds to the classes on whose images it fires at least at `response_rate`."""
    # the classes of the top images: of all of them, and of half A's on which the latent fires
    latents = (profile.fires >= k).nonzero().flatten()
    classes = profile.top_classes[latents]
    top = classes[:, :k]
    empty = profile.images.new_zeros(len(latents), profile.images.shape[1])
    shown = empty.scatter_add(1, top, torch.ones_like(top, dtype=torch.float32))
    rank = torch.arange(classes.shape[1], device=top.device)
    in_A = (profile.top_halves[latents] == 0) & (rank < profile.fires[latents, None])
    in_A &= in_A.cumsum(1) <= k
    shown_A = empty.scatter_add(1, classes, in_A.float())
    # firing rates by class: over all images, over half A, over half B
    counts = torch.cat([profile.counts.sum(0, keepdim=True), profile.counts])[:, latents]
    images = torch.cat([profile.images.sum(0, keepdim=True), profile.images])
    rates = counts / images.clamp(min=1)[:, None]
    responds, responds_A, responds_B = (rates >= response_rate).float()
    # a class of one image is in one half only, and no latent can be judged by it
    in_both_halves = (profile.images.amin(0) > 0).float()
    return Responses(latents, top, shown, responds, shown_A * in_both_halves,
                     responds_A * in_both_halves, responds_B, in_both_halves)


def over_pairs(top, value):
    """((A,), (A,)) mean of value (C, C) over pairs of the top images, classes (A, k): over all, and
    over pairs of two classes, NaN if there is none."""
    first, second = torch.triu_indices(top.shape[1], top.shape[1], 1, device=top.device)
    a = top[:, first]
    b = top[:, second]  # (A, pairs)
    different = (a != b).float()
    values = torch.from_numpy(value).to(top.device, torch.float32)[a, b]
    between = (values * different).sum(1) / different.sum(1)
    return values.mean(1).cpu().numpy(), between.cpu().numpy()


def jaccard(responds, leaves):
    """Of sets of classes responds (A, C) and leaves (H, C), 0 or 1 -> (A, H); 0 for no class."""
    both = responds @ leaves.T
    either = responds.sum(1, keepdim=True) + leaves.sum(1) - both
    return both / either.clamp(min=1)


class Choice(NamedTuple):
    """Which latent for which hypernym: chosen on half A of the images, judged on half B."""

    latent: Array  # (H,) int, which of the alive latents is chosen; -1: none shows the hypernym
    latent_match: Array  # (H,) its match on half B
    matched: Array  # (H,) bool, above MATCHED on both halves
    node: Array  # (A,) int, which of the hypernyms the latent shows and matches best; -1: none
    node_match: Array  # (A,) its match with it on half B


class Placed:
    """The A alive latents in their places in a tree, whose classes are in the order of the labels.
    NumPy arrays, computed when first asked for; the metrics below are made of them."""

    def __init__(self, responses, tree):
        self.responses = responses
        self.tree = tree
        self.latents = responses.latents.cpu().numpy()
        self.hypernyms = tree.hypernyms_to_find  # (H,) nodes

    @cached_property
    def lch(self):
        """(A,) int, node: the LCH of the classes of the latent's top images"""
        return self.tree.lch(self.responses.shown.cpu())

    @cached_property
    def nodes_that_are_lch(self):
        """int, each distinct node that is the LCH of a latent, once"""
        return np.unique(self.tree.lowest[self.lch])

    @cached_property
    def pair_heights(self):
        """((A,), (A,)) mean height of the LCH of two top images, as `over_pairs` has it"""
        return over_pairs(self.responses.top, self.tree.heights_of_pairs(self.tree.height))

    @cached_property
    def choice(self):
        """A latent *shows* a hypernym if more than half of its top images are under it. For each
        hypernym the latent is chosen on half A, where it shows it and matches it best."""
        responses = self.responses
        leaves = leaves_of(self.tree, self.hypernyms, responses.top.device)
        leaves *= responses.in_both_halves  # (H, C)
        # how well every latent matches every hypernym: on A where it shows it, and on B
        shows = responses.shown_A @ leaves.T > responses.shown_A.sum(1, keepdim=True) / 2
        match_A = jaccard(responses.responds_A, leaves) * shows  # (A, H)
        match_B = jaccard(responses.responds_B, leaves)
        # a first row and column of zeros is what is chosen if no latent shows a hypernym
        match_A, match_B = (pad(x, (1, 0, 1, 0)).cpu().numpy() for x in (match_A, match_B))
        latent = match_A.argmax(0)
        node = match_A.argmax(1)
        latent_match = match_B[latent, np.arange(len(latent))]
        node_match = match_B[np.arange(len(node)), node]
        matched = (match_A.max(0) > MATCHED) & (latent_match > MATCHED)
        return Choice(latent[1:] - 1, latent_match[1:], matched[1:], node[1:] - 1, node_match[1:])

    def summary(self):
        """A row of hierarchy.csv, all metrics: numbers are averaged, True is counted."""
        row = {}
        for name, metric in METRICS.items():
            values = np.asarray(metric.function(self))
            row[name] = values.sum() if values.dtype == bool else mean_of(values)
        return row


class Metric(NamedTuple):
    title: str
    better: int  # the sign that makes more hierarchy larger; 0: a column and no claim
    function: Callable


METRICS = {}  # by the name of the function, which is the column of hierarchy.csv


def metric(title, better=0):
    """Register a function of `Placed` for all tables, permuted trees, claims, figures. It returns a
    number per latent (averaged, NaN left out) or True and False per latent or hypernym (counted).
    """
    def register(function):
        METRICS[function.__name__] = Metric(title, better, function)
        return function

    return register


@metric("alive latents")
def alive(placed):
    return np.ones(len(placed.latents), bool)


@metric("latents that see one class")
def single_class(placed):
    return np.isnan(placed.pair_heights[1])


@metric("LCH height")
def lch_height(placed):
    return placed.tree.height[placed.lch]


@metric("pairwise LCH height", better=-1)
def lch_height_pairwise(placed):
    return placed.pair_heights[0]


@metric("LCH height between classes", better=-1)
def lch_height_between(placed):
    return placed.pair_heights[1]


@metric("coverage", better=1)
def coverage(placed):
    """|R ∩ leaves(lch)| / |leaves(lch)|, R the classes that a latent responds to"""
    responds = placed.responses.responds
    leaves = leaves_of(placed.tree, placed.lch, responds.device)  # (A, C)
    return ((responds * leaves).sum(1) / leaves.sum(1)).cpu().numpy()


@metric("match")
def match(placed):
    """max over nodes v of |R ∩ leaves(v)| / |R ∪ leaves(v)|"""
    responds = placed.responses.responds
    leaves = leaves_of(placed.tree, placed.tree.hypernyms, responds.device)
    with_a_class = (1 / responds.sum(1)).nan_to_num(posinf=0)
    return torch.maximum(jaccard(responds, leaves).amax(1), with_a_class).cpu().numpy()


@metric("ontology covered")
def ontology_covered(placed):
    nodes = np.unique(placed.tree.lowest)
    return np.isin(nodes, placed.nodes_that_are_lch).astype(float)


@metric("hypernyms that are an LCH", better=1)
def hypernyms_lch(placed):
    return np.isin(placed.hypernyms, placed.nodes_that_are_lch)


@metric("hypernyms matched", better=1)
def hypernyms_matched(placed):
    return placed.choice.matched


@torch.inference_mode()
def relate(encode, read, profile, placed, k=16):
    """Do the latents of general hypernyms fire where those of specific ones do? Columns of
    relations.csv, over the M hypernyms matched; read gives tokens (rows, n) by number.

    A share is that of the top images of v's latent on which u's fires. related: its mean over pairs
    with u above v, by different latents; expected: the same from u's firing rates on the classes of
    these images, which are left out of the rates; unrelated: pairs without a common class;
    absorption: 1 - related, how often the general latent is silent.
    """
    matched = placed.choice.matched
    latents = placed.latents[placed.choice.latent[matched]]  # (M,)
    leaves = placed.tree.leaves[placed.hypernyms[matched]].astype(int)  # (M, C)
    share, expected = np.full((2, len(latents), len(latents)), np.nan)  # [u, v]
    counts = profile.counts[:, latents].sum(0).cpu()  # (M, C)
    for v, latent in enumerate(latents):
        top = profile.top_images[latent, :k].cpu()
        classes = profile.top_classes[latent, :k].cpu()
        fires = (encode(read(top)) > 0)[:, latents].cpu().T.float()  # (M, k)
        others = counts.index_add(1, classes, fires, alpha=-1)  # without the top images
        left = profile.images.sum(0).cpu() - torch.bincount(classes, minlength=counts.shape[1])
        share[:, v] = fires.mean(1).numpy()
        rates = (others / left)[:, classes]  # NaN: no other image of a class
        expected[:, v] = rates.nanmean(1).numpy()
    common = leaves @ leaves.T  # (M, M) classes of both
    size = leaves.sum(1)
    different = latents[:, None] != latents
    related = different & (common == size) & (common < size[:, None])  # u above v
    unrelated = different & (common == 0)
    mean = mean_of(share[related])
    return {"related_pairs": related.sum(), "related": mean, "expected": mean_of(expected[related]),
            "unrelated_pairs": unrelated.sum(), "unrelated": mean_of(share[unrelated]),
            "absorption": 1 - mean}


def kappa(matched):
    """Consistency: Cohen's kappa of every two layers' hypernyms matched, (L, H) bool -> (L, L).
    Agreement beyond what sets of these sizes have by chance; NaN if a set is empty or full."""
    share = matched.mean(1)
    expected = np.outer(share, share) + np.outer(1 - share, 1 - share)
    agreement = (matched[:, None] == matched).mean(2)
    result = np.full_like(expected, np.nan)
    defined = (share > 0) & (share < 1)
    pairs = np.ix_(defined, defined)
    result[pairs] = (agreement[pairs] - expected[pairs]) / (1 - expected[pairs])
    return result


class Reconstruction(NamedTuple):
    """How well an SAE reconstructs N tokens; sums in float64. Columns of layers.csv."""

    probe_top1: float  # accuracy on x of a linear probe
    probe_on_reconstruction: float  # its accuracy on x̂
    nmse: float  # Σ‖x - x̂‖² / Σ‖x‖²: the ease of auto-encoding the token as it comes
    fvu: float  # Σ‖x - x̂‖² / Σ‖x - mean(x)‖²: fraction of variance unexplained
    l0: float  # mean number of active latents
    dead: float  # share of latents that fire on no image


@torch.inference_mode()
def reconstruct(sae, batches, labels, classes, probe):
    """(Reconstruction, sums by class, (C,) each: images, correct on x, error ‖x - x̂‖², squares
    ‖x‖², active latents, recovered: correct on x̂). probe: (B, n) -> logits (B, C)."""
    labels = as_labels(labels, len(labels), classes)
    names = "images", "correct", "error", "squares", "active", "recovered"
    sums = torch.zeros(len(names), classes, dtype=torch.float64)
    N = 0
    total = 0
    alive = 0
    for x in batches:
        x_hat, z = sae(x)
        here = as_labels(labels[N : N + len(x)], len(x), classes)
        correct, recovered = (probe(each.float()).argmax(1).cpu() == here for each in (x, x_hat))
        x = x.double()
        of_images = [torch.ones(len(x)), correct, (x - x_hat).square().sum(1), x.square().sum(1),
                     (z > 0).sum(1), recovered]
        sums.index_add_(1, here, torch.stack([each.cpu().double() for each in of_images]))
        alive = alive + (z > 0).sum(0)
        total = total + x.sum(0)
        N = N + len(x)
    as_labels(labels, N, classes)
    _, correct, error, squares, active, recovered = sums.sum(1)
    variance = squares - (total.square().sum() / N).cpu()
    dead = (alive == 0).double().mean()
    values = correct / N, recovered / N, error / squares, error / variance, active / N, dead
    return Reconstruction(*map(float, values)), dict(zip(names, sums))


class LinearProbe(NamedTuple):
    """A linear classifier: tokens (B, n) -> logits (B, classes)."""

    mean: Tensor  # (n,)
    deviation: Tensor  # (n,)
    W: Tensor  # (n, classes)
    b: Tensor  # (classes,)

    def __call__(self, x):
        return (x - self.mean) / self.deviation @ self.W + self.b


def linear_probe(train, labels, classes, mean, variance, least_steps=3000):
    """A LinearProbe of tokens, train (N, n), an array in memory or on disk, on the device of mean
    and variance (n,).

    Multinomial logistic regression on standardised tokens; AdamW at 2e-3 decaying to 0, batches of
    about 256 consecutive rows (in random order already), 10 epochs but at least so many steps.
    """
    device = mean.device
    labels = as_labels(labels, len(train), classes).to(device)
    deviation = variance.sqrt().float()
    deviation[deviation <= 1e-6 * deviation.max()] = torch.inf  # a constant tells nothing
    mean = mean.float()
    W = torch.zeros(len(mean), classes, device=device, requires_grad=True)
    b = torch.zeros(classes, device=device, requires_grad=True)
    probe = LinearProbe(mean, deviation, W, b)
    optimizer = torch.optim.AdamW([W, b], lr=2e-3, weight_decay=1e-2, fused=True)
    steps = max(1, round(len(train) / 256))  # an epoch
    starts = np.linspace(0, len(train), steps + 1).astype(int)  # of batches of nearly one size
    epochs = max(10, -(-least_steps // steps))
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=epochs * steps)
    rng = np.random.default_rng(0)
    for _ in range(epochs):
        for i in rng.permutation(steps):
            rows = slice(starts[i], starts[i + 1])
            x = torch.from_numpy(np.array(train[rows])).to(device).float()  # of a memory map
            loss = cross_entropy(probe(x), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
    return LinearProbe(*(tensor.detach() for tensor in probe))
