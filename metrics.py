"""How much of the ImageNet hierarchy a dictionary of latents holds, and how good its tokens are.

    profile = profile_latents(sae.encode, val.split(2048), labels, len(tree.classes))
    responses = responses_of(profile, k=16)                      # of its 16 top images
    scores = score_hierarchy(responses, tree)                    # LCH height, coverage, matches
    order = np.random.default_rng(0).permutation(len(tree.classes))
    control = score_hierarchy(responses, tree.permuted(order))   # the same latents, no kinship
    print(scores.summary()["lch_height_between"], control.summary()["lch_height_between"])

A *dictionary* is any function from tokens (B, n) to non-negative activations (B, m): an SAE's
encoder, or units that were never trained and fire as seldom (`dictionaries_of`). Labels number the
classes in the taxonomy's order; arrays, tensors and lists will do. docs/definitions.md has the
formulas in words.
"""
from typing import Callable, Iterable, NamedTuple

import numpy as np
import torch
from torch import nn

from sae import SparseAutoencoder
from taxonomy import Taxonomy

TOP = 64  # top images kept of a latent, so that each half of the images has enough
SAMPLE = 16_384  # training tokens on which the baselines' thresholds are set
MATCHED = 0.5  # a latent matches a hypernym above this Jaccard index


# ---------------------------------------------------------------- what latents respond to


class Profile(NamedTuple):
    """What m latents respond to, over N images of C classes. Tensors on the encoder's device.

    The images are in two halves, every other image of each class, so that a latent can be chosen
    on one half and judged on the other.
    """

    top_images: torch.Tensor  # (m, T) int, the images with the largest z, best first
    top_classes: torch.Tensor  # (m, T) int, their classes
    top_halves: torch.Tensor  # (m, T) int, 0 or 1
    fires: torch.Tensor  # (m,) int, number of images on which the latent fires, z > 0
    counts: torch.Tensor  # (2, m, C) float, the same by half and class
    images: torch.Tensor  # (2, C) float, how many there are

    @property
    def rate(self) -> torch.Tensor:
        """(m, C) share of each class's images on which the latent fires."""
        return self.counts.sum(0) / self.images.sum(0).clamp(min=1)


def every_other(labels: torch.Tensor) -> torch.Tensor:
    """(N,) 0 and 1 in turn, within each class."""
    order = labels.argsort(stable=True)
    in_order = labels[order]
    first = torch.searchsorted(in_order, in_order)  # where the class begins in this order
    halves = torch.empty_like(labels)
    halves[order] = (torch.arange(len(labels)) - first) % 2
    return halves


def as_labels(labels, rows: int) -> torch.Tensor:
    """Any sequence of class numbers -> (rows,) int64; ValueError for another length."""
    labels = labels.cpu() if isinstance(labels, torch.Tensor) else np.asarray(labels)
    labels = torch.as_tensor(labels, dtype=torch.int64)
    if len(labels) != rows:
        raise ValueError(f"there are {len(labels)} labels for {rows} tokens")
    return labels


@torch.inference_mode()
def profile_latents(encode, batches: Iterable[torch.Tensor], labels, classes: int) -> Profile:
    """One pass over batches of tokens (B, n) in the order of the labels (N,).

    Memory is O(m (B + C)), whatever N is. Raises ValueError where N is not the number of tokens.
    """
    given = as_labels(labels, len(labels))
    halves = every_other(given)
    cells = classes * halves + given  # a half and a class
    N = 0
    counts = None
    top_values = top_images = None
    for x in batches:
        z = encode(x)  # (B, m)
        if counts is None:
            counts = z.new_zeros(2 * classes, z.shape[1], dtype=torch.float32)
            top_values = z.new_empty(0, z.shape[1])
            top_images = torch.empty(0, z.shape[1], dtype=torch.int64, device=z.device)
        if N + len(z) > len(given):
            as_labels(given, N + len(z))  # raises
        cell = cells[N : N + len(z)].to(z.device)
        counts.index_add_(0, cell, (z > 0).float())  # exact below 2**24 images
        values, images = z.topk(min(TOP, len(z)), dim=0)  # (T, m)
        values = torch.cat([top_values, values])
        images = torch.cat([top_images, images + N])
        top_values, order = values.topk(min(TOP, len(values)), dim=0)
        top_images = images.gather(0, order)
        N += len(z)
    as_labels(given, N)
    fires = counts.sum(0).long()
    counts = counts.reshape(2, classes, -1).mT.contiguous()
    images = torch.bincount(cells, minlength=2 * classes).reshape(2, classes)
    top = top_images.T.contiguous()
    given = given.to(top.device)
    halves = halves.to(top.device)
    return Profile(top, given[top], halves[top], fires, counts, images.float().to(top.device))


# ---------------------------------------------------------------- dictionaries to compare


@torch.no_grad()
def sparse_units(directions: torch.Tensor, tokens: torch.Tensor, mean: torch.Tensor,
                 fires: torch.Tensor) -> Callable:
    """Units that were not trained: directions (m, n), each with the threshold at which it fires on
    `fires` (m,) of the `tokens` (N, n). Returns their encoder, (B, n) -> (B, m)."""
    thresholds = []
    centred = (tokens.float() - mean).T
    for rows in torch.arange(len(directions)).split(512):  # bounds the memory
        values = sort_rows(directions[rows] @ centred)  # (512, N), rising
        silent = len(tokens) - 1 - fires[rows].to(values.device)  # place of the largest that is
        threshold = values.gather(1, silent.clamp(min=0)[:, None]).squeeze(1)
        below_all = 2 * values[:, 0] - values[:, -1]
        threshold = torch.where(silent < 0, below_all, threshold)  # fires on all of these tokens
        threshold[silent == len(tokens) - 1] = torch.inf  # a dead unit, on other tokens too
        thresholds.append(threshold)
    thresholds = torch.cat(thresholds)

    def encode(x):
        return torch.relu((x - mean) @ directions.T - thresholds)

    return encode


def sort_rows(values: torch.Tensor) -> torch.Tensor:
    """Each row in rising order; NumPy's sort is seven times as fast as PyTorch's on a CPU."""
    if values.is_cuda:
        return values.sort(dim=1).values
    return torch.from_numpy(np.sort(values.numpy(), axis=1))


class Dictionary(NamedTuple):
    name: str  # sae, neurons or untrained
    encode: Callable  # tokens (B, n) -> (B, m)
    probed: Callable  # the same for the hypernym probe: neurons are then signed, not thresholded


@torch.no_grad()
def dictionaries_of(sae: SparseAutoencoder, tokens: torch.Tensor, mean: torch.Tensor,
                    seed: int) -> list[Dictionary]:
    """The SAE and two baselines that differ from it in training alone: raw neurons (each coordinate
    and its negative) and an untrained SAE (the random directions that training began with).

    On these training tokens (N, n) the units have the SAE's own firing rates, dealt at random: at
    equal means alone, rates that differ among latents would flatter the SAE.
    """
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
    return [Dictionary("sae", sae.encode, sae.encode),
            Dictionary("neurons", neurons, lambda x: x - mean),
            Dictionary("untrained", untrained, untrained)]


# ---------------------------------------------------------------- hierarchy scores


class Scores(NamedTuple):
    """The A alive latents (they fire on at least k images) on H hypernyms: the distinct nodes of
    two classes to half of all. NumPy arrays."""

    latents: np.ndarray  # (A,) int, which ones
    lch: np.ndarray  # (A,) int, node: the LCH of the classes of the latent's top images
    height: np.ndarray  # (A,) int, that node's height
    height_pairwise: np.ndarray  # (A,) mean height of the LCH of two top images; 0 for one class
    height_between: np.ndarray  # (A,) the same over pairs of two classes; NaN where there is none
    coverage: np.ndarray  # (A,) |R ∩ leaves(lch)| / |leaves(lch)|, R the classes it responds to
    match: np.ndarray  # (A,) max over nodes v of |R ∩ leaves(v)| / |R ∪ leaves(v)|
    ontology_covered: float  # share of the distinct nodes that are the LCH of some latent
    hypernyms: np.ndarray  # (H,) int, nodes
    hypernym_lch: np.ndarray  # (H,) bool, whether it is the LCH of some latent
    hypernym_latent: np.ndarray  # (H,) int, the latent chosen on half A; -1 where none shows it
    hypernym_match: np.ndarray  # (H,) its match on half B
    hypernym_matched: np.ndarray  # (H,) bool, above MATCHED on both halves

    def summary(self) -> dict:
        """A row of hierarchy.csv: means over alive latents (NaN for none), hypernyms found."""
        several = np.isfinite(self.height_between)
        return {
            "alive": len(self.latents), "single_class": int((~several).sum()),
            "lch_height": mean_of(self.height),
            "lch_height_pairwise": mean_of(self.height_pairwise),
            "lch_height_between": mean_of(self.height_between[several]),
            "coverage": mean_of(self.coverage), "match": mean_of(self.match),
            "ontology_covered": self.ontology_covered,
            "hypernyms_lch": int(self.hypernym_lch.sum()),
            "hypernyms_matched": int(self.hypernym_matched.sum()),
        }


def mean_of(values) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def hypernyms_to_find(tree: Taxonomy) -> np.ndarray:
    """(H,) the distinct nodes of two classes to half of all."""
    nodes = tree.hypernyms
    return nodes[tree.leaves[nodes].sum(1) <= len(tree.classes) / 2]


def leaves_of(tree: Taxonomy, nodes, device="cpu") -> torch.Tensor:
    """(len(nodes), C) float, 1 where the class is at or below the node."""
    return torch.from_numpy(tree.leaves[nodes]).to(device, torch.float32)


class Responses(NamedTuple):
    """All of a profile that scores need, whatever the tree. Float tensors unless said."""

    alive: np.ndarray  # (A,) int, latents that fire on at least k images
    top: torch.Tensor  # (m, k) int, the classes of the top images
    shown: torch.Tensor  # (m, C) how many of the top images are of a class
    responds: torch.Tensor  # (m, C) 1 where the latent responds to the class
    shown_A: torch.Tensor  # (m, C) as shown, by half A's own top images, on which it fires
    responds_A: torch.Tensor  # (m, C)
    responds_B: torch.Tensor  # (m, C)
    halved: torch.Tensor  # (C,) 1 for a class of two images or more: in both halves


@torch.inference_mode()
def responses_of(profile: Profile, k=16, response_rate=0.5) -> Responses:
    """A latent responds to the classes on whose images it fires at least at `response_rate`."""
    top = profile.top_classes[:, :k]
    empty = torch.zeros_like(profile.counts[0])
    rank = torch.arange(profile.top_images.shape[1], device=top.device)
    in_A = (profile.top_halves == 0) & (rank < profile.fires[:, None])
    in_A &= in_A.cumsum(1) <= k
    responds = []
    for rate in (profile.rate, *(profile.counts / profile.images.clamp(min=1)[:, None])):
        responds.append((rate >= response_rate).float())
    halved = (profile.images.amin(0) > 0).float()
    shown_A = empty.scatter_add(1, profile.top_classes, in_A.float())
    return Responses(
        (profile.fires >= k).nonzero().flatten().cpu().numpy(), top,
        empty.scatter_add(1, top, torch.ones_like(top, dtype=torch.float32)), responds[0],
        shown_A * halved, responds[1] * halved, responds[2] * halved, halved)


def lowest_common(shown: torch.Tensor, tree: Taxonomy) -> np.ndarray:
    """(m,) node: the LCH of the classes of which at least one image is shown (m, C)."""
    shown = (shown > 0).float()
    several = shown.sum(1, keepdim=True)
    under = shown @ leaves_of(tree, tree.hypernyms, shown.device).T  # (m, H)
    first = (under == several).float().argmax(1)  # the lowest comes first
    single = tree.classes[shown.argmax(1).cpu().numpy()]
    return np.where(several.squeeze(1).cpu() == 1, single, tree.hypernyms[first.cpu().numpy()])


def over_pairs(top: torch.Tensor, value: np.ndarray, same=None) -> tuple[np.ndarray, np.ndarray]:
    """((m,), (m,)) mean of value (C, C) over pairs of the top images, classes (m, k): over all, two
    of one class giving `same` where it is given; over pairs of two classes, NaN where none is."""
    first, second = torch.triu_indices(top.shape[1], top.shape[1], 1, device=top.device)
    a = top[:, first]
    b = top[:, second]  # (m, pairs)
    different = (a != b).float()
    values = torch.from_numpy(value).to(top.device, torch.float32)[a, b]
    between = (values * different).sum(1)
    count = different.sum(1)
    total = values.sum(1) if same is None else between
    if same:
        total = total + same * (len(first) - count)
    return (total / len(first)).cpu().numpy(), (between / count).cpu().numpy()


def jaccard(responds: torch.Tensor, leaves: torch.Tensor) -> torch.Tensor:
    """Of sets of classes responds (m, C) and leaves (H, C), 0 or 1 -> (m, H); 0 for no class."""
    both = responds @ leaves.T
    either = responds.sum(1, keepdim=True) + leaves.sum(1) - both
    return both / either.clamp(min=1)


def matches_on_A(responses: Responses, leaves: torch.Tensor) -> torch.Tensor:
    """(m, H) the match of alive latents and hypernyms, leaves (H, C), on half A; 0 where the latent
    does not show the hypernym there."""
    shows = responses.shown_A @ leaves.T > responses.shown_A.sum(1, keepdim=True) / 2
    alive = torch.zeros(len(responses.top), 1, device=leaves.device)
    alive[torch.from_numpy(responses.alive).to(leaves.device)] = 1
    return jaccard(responses.responds_A, leaves) * shows * alive


def matches_on_B(responses: Responses, latents: torch.Tensor, leaves: torch.Tensor) -> torch.Tensor:
    """(H,) the match of each hypernym, leaves (H, C), with one latent (H,), on half B."""
    responds = responses.responds_B[latents]
    both = (responds * leaves).sum(1)
    return both / (responds.sum(1) + leaves.sum(1) - both).clamp(min=1)


@torch.inference_mode()
def score_hierarchy(responses: Responses, tree: Taxonomy) -> Scores:
    """Score the alive latents on a tree, whose classes are in the order of the labels.

    A latent *shows* a hypernym if more than half of its top images are under it. For each hypernym
    the latent is chosen on half A, where it shows it and matches it best, and judged on half B.
    """
    nodes = hypernyms_to_find(tree)
    device = responses.top.device
    lch = lowest_common(responses.shown, tree)
    pairwise, between = over_pairs(responses.top, tree.height[tree.pair_lch], same=0)
    of_lch = leaves_of(tree, lch, device)  # (m, C)
    coverage = (responses.responds * of_lch).sum(1) / of_lch.sum(1)
    single = (1 / responses.responds.sum(1)).nan_to_num(posinf=0)  # the match with a class
    several = jaccard(responses.responds, leaves_of(tree, tree.hypernyms, device)).amax(1)
    leaves = leaves_of(tree, nodes, device) * responses.halved  # (H, C)
    match_A, latent = matches_on_A(responses, leaves).max(0)
    match_B = matches_on_B(responses, latent, leaves) * (match_A > 0)
    matched = (match_A > MATCHED) & (match_B > MATCHED)
    latent = torch.where(match_A > 0, latent, -1)
    alive = responses.alive
    is_lch = np.unique(tree.lowest[lch[responses.alive]])
    return Scores(
        alive, lch[alive], tree.height[lch[alive]], pairwise[alive], between[alive],
        coverage.cpu().numpy()[alive], torch.maximum(several, single).cpu().numpy()[alive],
        len(is_lch) / len(np.unique(tree.lowest)), nodes, np.isin(nodes, is_lch),
        latent.cpu().numpy(), match_B.cpu().numpy(), matched.cpu().numpy())


# ---------------------------------------------------------------- relations among latents


class Relations(NamedTuple):
    """Do the latents of general hypernyms fire where those of specific ones do? A row of
    relations.csv. A share is that of the top images of one latent on which another fires."""

    related_pairs: int  # of hypernyms matched, u above v, by different latents
    related: float  # mean share of the top images of v's latent on which u's fires
    expected: float  # the same from u's firing rates on the classes of these images
    unrelated_pairs: int  # without a common class
    unrelated: float
    absorption: float  # 1 - related: how often the general latent is silent


@torch.inference_mode()
def relate(encode, read, profile: Profile, scores: Scores, tree: Taxonomy, k=16):
    """Relations among the hypernyms matched; read gives tokens (rows, n) by number."""
    matched = np.flatnonzero(scores.hypernym_matched)
    sizes = tree.leaves[scores.hypernyms[matched]].sum(1)
    matched = matched[np.argsort(-sizes, kind="stable")]
    latents = torch.from_numpy(scores.hypernym_latent[matched])  # (M,)
    share, expected = torch.full((2, len(matched), len(matched)), torch.nan)  # [u, v]
    counts = profile.counts[:, latents].sum(0).cpu()  # (M, C)
    for v, latent in enumerate(latents):
        top = profile.top_images[latent, :k].cpu()
        classes = profile.top_classes[latent, :k].cpu()
        fires = (encode(read(top)) > 0)[:, latents].cpu().T.float()  # (M, k)
        others = torch.zeros_like(counts).index_add_(1, classes, fires)
        left = profile.images.sum(0).cpu() - torch.bincount(classes, minlength=counts.shape[1])
        rate = (counts - others) / left  # without the top images; NaN where no other is left
        share[:, v] = fires.mean(1)
        expected[:, v] = rate[:, classes].nanmean(1)
    share[latents[:, None] == latents] = torch.nan  # not defined of a latent and itself
    leaves = tree.leaves[scores.hypernyms[matched]].astype(int)
    common = leaves @ leaves.T  # (M, M) classes of both
    above = (common == leaves.sum(1)) & (common < leaves.sum(1)[:, None])  # u above v
    share = share.numpy()
    expected = expected.numpy()
    related = above & np.isfinite(share)
    unrelated = (common == 0) & np.isfinite(share)
    mean = mean_of(share[related])
    return Relations(int(related.sum()), mean, mean_of(expected[related]), int(unrelated.sum()),
                     mean_of(share[unrelated]), 1 - mean)


# ---------------------------------------------------------------- consistency of layers


def kappa(matched: np.ndarray) -> np.ndarray:
    """Consistency: Cohen's kappa of every two layers' hypernyms matched, (L, H) bool -> (L, L).

    Agreement beyond what sets of these sizes have by chance; NaN where a set is empty or full.
    """
    share = matched.mean(1)
    expected = np.outer(share, share) + np.outer(1 - share, 1 - share)
    agreement = (matched[:, None] == matched).mean(2)
    undefined = (share == 0) | (share == 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        result = (agreement - expected) / (1 - expected)
    result[undefined] = result[:, undefined] = np.nan
    return result


# ---------------------------------------------------------------- reconstruction, linear probe


class Reconstruction(NamedTuple):
    """How well an SAE reconstructs N tokens; sums in float64. Columns of layers.csv."""

    nmse: float  # Σ‖x - x̂‖² / Σ‖x‖²: the ease of auto-encoding the token as it comes
    fvu: float  # Σ‖x - x̂‖² / Σ‖x - mean(x)‖²: fraction of variance unexplained
    l0: float  # mean number of active latents
    dead: float  # share of latents that fire on no image
    probe_on_reconstruction: float  # accuracy on x̂ of the linear probe that was fitted on x


@torch.inference_mode()
def reconstruct(sae, batches: Iterable[torch.Tensor], labels, classes: int, probe):
    """(Reconstruction, sums (C, 3) of ‖x - x̂‖², ‖x‖² and active latents by class). probe: tokens
    (B, n) -> logits (B, C), as `linear_probe` returns it."""
    labels = as_labels(labels, len(labels))
    sums = torch.zeros(classes, 3, dtype=torch.float64)
    N = 0
    right = 0
    total = 0
    alive = 0
    for x in batches:
        x_hat, z = sae(x)
        here = labels[N : N + len(x)]
        guess = probe(x_hat.float()).argmax(1).cpu()
        right += int((guess == here).sum())
        x = x.double()
        alive = alive + (z > 0).sum(0)
        error = (x - x_hat).square().sum(1)
        row = torch.stack([error, x.square().sum(1), (z > 0).sum(1).double()], dim=1)
        sums.index_add_(0, here, row.cpu())
        total = total + x.sum(0)
        N = N + len(x)
    error, squares, active = sums.sum(0)
    variance = squares - (total.square().sum() / N).cpu()
    values = error / squares, error / variance, active / N, (alive == 0).double().mean(), right / N
    return Reconstruction(*map(float, values)), sums


def linear_probe(train, labels, classes: int, mean: torch.Tensor, variance: torch.Tensor,
                 least_steps=3000):
    """A linear classifier of tokens, train (N, n), an array in memory or on disk. Returns a
    function, tokens (B, n) -> logits (B, classes), on the device of mean and variance (n,).

    Multinomial logistic regression on standardised tokens; AdamW, batches of 256 consecutive rows
    (which are to be in random order), 10 epochs but at least so many steps, learning rate 2e-3
    decaying to zero.
    """
    labels = as_labels(labels, len(train)).to(mean.device)
    device = mean.device
    deviation = variance.sqrt()
    deviation[deviation <= 1e-6 * deviation.max()] = torch.inf  # a constant tells nothing
    mean = mean.float()
    deviation = deviation.float()
    classifier = nn.Linear(len(mean), classes, device=device)
    nn.init.zeros_(classifier.weight), nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=1e-2, fused=True)
    steps = max(1, len(train) // 256)  # an epoch
    epochs = max(10, -(-least_steps // steps))
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=epochs * steps)
    rng = np.random.default_rng(0)
    for _ in range(epochs):
        for start in 256 * rng.permutation(steps):
            x = torch.from_numpy(np.array(train[start : start + 256])).to(device)  # of a memory map
            logits = classifier((x.float() - mean) / deviation)
            loss = nn.functional.cross_entropy(logits, labels[start : start + 256])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
    return lambda x: classifier((x - mean) / deviation)


@torch.inference_mode()
def correct_by_class(probe, batches: Iterable[torch.Tensor], labels, classes: int) -> torch.Tensor:
    """(C,) how many of a class's images the probe gets right."""
    labels = as_labels(labels, len(labels))
    right = []
    for x in batches:
        right.append(probe(x).argmax(1).cpu())
    right = torch.cat(right) == labels
    return torch.bincount(labels[right], minlength=classes)
