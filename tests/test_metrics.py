"""Scores against closed forms, brute force, hand-made cases and planted latents."""

import itertools

import numpy as np
import pytest
import torch
from conftest import imagenet1k
from pytest import approx
from torch.optim.optimizer import register_optimizer_step_pre_hook

import metrics
from kit.readings import readings
from kit.rows import (
    emergence_rows,
    height_rows,
    hypernym_rows,
    latent_rows,
    matched_sets,
    terms_of,
    tree_order,
)
from metrics import (
    Placed,
    Profile,
    dictionaries_of,
    kappa,
    linear_probe,
    profile_latents,
    reconstruct,
    relate,
    responses_of,
    sparse_units,
)
from sae import ActivationBuffer, SparseAutoencoder
from taxonomy import Synset, Taxonomy


def place(profile, tree, k=16, response_rate=0.5):
    return Placed(responses_of(profile, k, response_rate), tree)


def chosen(placed):
    """(H,) the latent of each hypernym; -1 for none."""
    return np.append(placed.latents, -1)[placed.choice.latent]


def profile_of(z, labels, classes):
    return profile_latents(lambda x: x, torch.as_tensor(z).float().split(64), labels, classes)


class Affine:
    """A stand-in for an SAE, with its encoder and decoder in closed form."""

    def __init__(self, encode, decode):
        self.encode, self.decode = encode, decode

    def __call__(self, x):
        z = self.encode(x)
        return self.decode(z), z


def test_reconstruction_against_numpy_on_all_tokens_at_once():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(500, 6)) * 2 + 30).float()  # a large constant part
    weights, labels = torch.from_numpy(rng.normal(size=(6, 9))).float(), rng.integers(0, 4, 500)
    sae = Affine(lambda x: torch.relu((x - 30) @ weights - 3), lambda z: 30 + 0.05 * z @ weights.T)
    result, sums = reconstruct(sae, x.split(64), labels, 4, lambda x: x[:, :4])
    x, x_hat, z = (array.double().numpy() for array in (x, *sae(x)))
    of_images = {"images": np.ones(500), "correct": x[:, :4].argmax(1) == labels}
    of_images |= {"error": ((x - x_hat) ** 2).sum(1), "squares": (x**2).sum(1)}
    of_images |= {"active": (z > 0).sum(1), "recovered": x_hat[:, :4].argmax(1) == labels}
    for name, values in of_images.items():
        assert sums[name].tolist() == approx(np.bincount(labels, values), rel=1e-6)
    _, right, error, squares, active, recovered = (values.sum() for values in of_images.values())
    fvu, dead = error / ((x - x.mean(0)) ** 2).sum(), (z == 0).all(0).mean()
    expected = right / 500, recovered / 500, error / squares, fvu, active / 500, dead
    assert result == approx(expected, rel=1e-6)


def test_profile_against_brute_force():
    rng = np.random.default_rng(0)
    images, classes = 230, 7
    z = np.maximum(rng.normal(size=(images, 17)) - rng.normal(size=17), 0).astype(np.float32)
    labels = rng.integers(0, classes, images)
    for batch_size, given in ((1, labels), (50, labels.tolist()), (1000, torch.from_numpy(labels))):
        batches = torch.from_numpy(z).split(batch_size)
        profile = profile_latents(lambda x: x, batches, given, classes)
        for latent, values in enumerate(z.T):
            fires = values > 0
            assert profile.fires[latent] == sum(fires)
            top = profile.top_images[latent]
            best = sorted(range(images), key=lambda i: -values[i])[: min(sum(fires), len(top))]
            assert len(top) == metrics.TOP and top[: len(best)].tolist() == best
            assert profile.top_classes[latent].tolist() == labels[top].tolist()
            for c, half in itertools.product(range(classes), (0, 1)):
                mine = np.flatnonzero(labels == c)[half::2]
                assert profile.counts[half, latent, c] == fires[mine].sum()
                assert profile.images[half, c] == len(mine)
                assert (profile.top_halves[latent][np.isin(top, mine)] == half).all()
    low = profile_latents(lambda x: x.bfloat16(), batches, labels, classes)
    assert (low.counts - profile.counts).abs().max() <= 1  # a tiny value may round to zero


@pytest.mark.parametrize(
    "wrong", [[1, 2, 3], [-1, 0, 1], [0, 1, 1.5], [[0, 1, 2]], [0, 1], [0, 1, 2, 0]]
)
def test_labels_that_are_none(wrong):
    x = torch.rand(3, 4)
    with pytest.raises(ValueError, match="labels"):
        profile_latents(lambda x: x, [x], wrong, 3)
    with pytest.raises(ValueError, match="labels"):
        reconstruct(Affine(lambda x: x, lambda z: z), [x], wrong, 3, lambda x: x)


def test_sparse_units_fire_as_often_as_each_is_asked():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2000, 6, generator=generator) * 3 + 10
    directions = torch.randn(700, 6, generator=generator)
    wanted = torch.randint(0, 2001, (700,), generator=generator)
    wanted[:2] = torch.tensor([0, 2000])
    encode = sparse_units(directions, tokens, tokens.mean(0), wanted)
    # to the rounding of a projection
    assert ((encode(tokens) > 0).sum(0) - wanted).abs().max() <= 1
    assert (encode(1000 * tokens)[:, 0] == 0).all()  # dead on other tokens too
    # also where there are fewer latents than neurons, or none fires
    sae = SparseAutoencoder(6, 6).requires_grad_(False)
    sae.b_enc[0] = -1000
    encoders = [encode for _, encode, _ in dictionaries_of(sae, tokens, tokens.mean(0), 0)]
    of_sae, _, untrained = ((encode(tokens) > 0).sum(0).sort().values for encode in encoders)
    assert (untrained - of_sae).abs().max() <= 1


@pytest.fixture
def small_tree():
    """root > (animal > (dog > d1 d2, cat > c1 c2), thing > t1 t2 t3 t4)"""
    graph = {"root": Synset("root", ())}
    tree = "root animal thing, animal dog cat, dog d1 d2, cat c1 c2, thing t1 t2 t3 t4"
    for edges in tree.split(","):
        parent, *below = edges.split()
        graph |= {v: Synset(v, (parent,)) for v in below}
    return Taxonomy.from_graph(graph, "d1 d2 c1 c2 t1 t2 t3 t4".split())


def hand_made(tree, top, rate, fires=99):
    """A profile of one latent, from the names of its top images' classes and its rate by class."""
    index = {tree.wnids[node]: c for c, node in enumerate(tree.classes)}
    counts = torch.zeros(2, 1, len(index))  # of 100 images of each class and half
    for name, value in rate.items():
        counts[:, 0, index[name]] = 100 * value
    classes = torch.tensor([[index[name] for name in top.split()]])
    zeros = torch.zeros_like(classes)
    images = torch.full((2, len(index)), 100.0)
    return Profile(zeros, classes, zeros, torch.tensor([fires]), counts, images)


def by_wnid(placed, values):
    return dict(zip((placed.tree.wnids[v] for v in placed.hypernyms), values))


@pytest.mark.parametrize(
    "top, rate, lch, coverage, match, match_node",
    [
        # one class: no pairs between classes, and the match is the class itself
        ("t3 t3 t3 t3", {"t3": 0.7, "t1": 0.49}, "t3", 1, 1, "t3"),
        # three of four animals: Jaccard 3/4 with animal, 2/3 with dog
        ("d1 d2 c1 c1", {"d1": 1, "d2": 1, "c1": 1}, "animal", 3 / 4, 3 / 4, "animal"),
        # responds to nothing
        ("d1 d2 c1 c2", {"d1": 0.4}, "animal", 0, 0, None),
        # dense: full coverage for nothing, and the match is with the root, no hypernym found
        ("d1 t1 d2 t2", dict.fromkeys("d1 d2 c1 c2 t1 t2 t3 t4".split(), 1), "root", 1, 1, "root"),
    ],
)
def test_scores_by_hand(small_tree, top, rate, lch, coverage, match, match_node):
    placed = place(hand_made(small_tree, top, rate), small_tree, k=4)
    assert small_tree.wnids[placed.lch[0]] == lch
    assert placed.summary()["single_class"] == (lch == "t3")
    assert metrics.coverage(placed)[0] == approx(coverage)
    assert metrics.match(placed)[0] == approx(match)
    inner = {"animal", "dog", "cat", "thing"}  # not the root: it has all 8
    of_hypernyms = by_wnid(placed, placed.choice.latent_match)
    assert of_hypernyms.keys() == inner
    assert of_hypernyms.get(match_node, match) == approx(match)
    is_lch = by_wnid(placed, metrics.hypernyms_lch(placed))
    assert {wnid for wnid, found in is_lch.items() if found} == inner & {lch}


def test_a_class_with_one_image_is_in_neither_half_and_a_rare_latent_not_alive(small_tree):
    animals = "d1 d2 c1 c1", {"d1": 1, "d2": 1, "c1": 1}
    profile = hand_made(small_tree, *animals)
    profile.images[1, [small_tree.wnids[v] for v in small_tree.classes].index("c2")] = 0
    placed = place(profile, small_tree, k=4)  # of the three classes that can be judged
    assert by_wnid(placed, placed.choice.latent_match)["animal"] == 1
    for fires, alive in ((4, 1), (3, 0)):
        placed = place(hand_made(small_tree, *animals, fires), small_tree, k=4)
        assert placed.summary()["alive"] == alive
    assert np.isnan(placed.summary()["match"]) and (placed.choice.latent == -1).all()


def planted(tree, images_of_class=8, seed=0):
    """One latent for every hypernym, firing on its images and no others; labels, (N, H)."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(len(tree.classes)).repeat(images_of_class))
    return labels, torch.from_numpy(tree.leaves[tree.hypernyms][:, labels].T.astype(np.float32))


def test_planted_latents_recover_every_hypernym_of_imagenet():
    tree = Taxonomy.from_wnids(imagenet1k())
    labels, z = planted(tree)
    profile = profile_of(z, labels, 1000)
    placed = place(profile, tree)
    assert (metrics.match(placed) == 1).all() and (placed.choice.latent_match == 1).all()
    assert (placed.hypernyms == tree.hypernyms[chosen(placed)]).all()
    half = tree.leaves[tree.hypernyms].sum(1) <= 500
    summary = placed.summary()
    assert summary["hypernyms_matched"] == len(placed.hypernyms) == half.sum()
    order = np.random.default_rng(0).permutation(1000)
    control = place(profile, tree.permuted(order)).summary()
    assert control["hypernyms_matched"] < 10  # of only the largest
    assert control["lch_height_between"] > summary["lch_height_between"] + 2


def random_profile(seed, latents=30):
    """Few classes, and latents with a taste for some of them, more or less those of a hypernym."""
    tree = Taxonomy.from_wnids(imagenet1k()[:400:20])
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 20, 300)
    taste = (rng.random((latents, 20)) + tree.leaves[rng.choice(tree.hypernyms, latents)]) ** 2 / 3
    z = np.maximum(rng.random((300, latents)) - 1 + 1.3 * taste.T[labels], 0).astype(np.float32)
    return tree, labels, z, profile_of(z, labels, 20)


@pytest.mark.parametrize("seed", [2, 15, 28])  # with matches above a half on B alone
def test_held_out_matches_against_sets_of_images(seed):
    tree, labels, z, profile = random_profile(seed)
    placed = place(profile, tree, k=8, response_rate=0.4)
    halves = [[np.flatnonzero(labels == c)[half::2] for c in range(20)] for half in (0, 1)]

    def match(latent, v, half):
        responds = np.array([(z[mine, latent] > 0).mean() >= 0.4 for mine in halves[half]])
        return (responds & tree.leaves[v]).sum() / (responds | tree.leaves[v]).sum()

    assert 0 < placed.choice.matched.sum() < len(placed.hypernyms)
    choice = placed.choice
    for v, latent, match_B, matched in zip(
        placed.hypernyms, chosen(placed), choice.latent_match, choice.matched
    ):
        on_A = {}
        for i in placed.latents:
            top = sorted(np.concatenate(halves[0]), key=lambda image: -z[image, i])[:8]
            shown = tree.leaves[v, labels[top]][z[top, i] > 0]
            if shown.mean() > 0.5 and match(i, v, 0) > 0:
                on_A[i] = match(i, v, 0)
        expected = match(latent, v, 1) if on_A else 0
        assert (latent in on_A) == bool(on_A) and match_B == approx(expected)
        assert on_A.get(latent, 0) == approx(max(on_A.values(), default=0))
        assert matched == (on_A.get(latent, 0) > 0.5 and match_B > 0.5)
    nodes = {tree.lowest[v] for v in placed.lch}
    assert placed.summary()["ontology_covered"] == len(nodes) / len(set(tree.lowest))


def test_permuted_trees_against_a_relabelled_graph():
    """Class c takes the leaf of order[c]: as if the hypernyms of the leaves had been exchanged."""
    tree, _, _, profile = random_profile(5)
    wnids = [tree.wnids[v] for v in tree.classes]
    order = np.random.default_rng(2).permutation(20)
    assert (order[order] != np.arange(20)).any()  # it is not its own inverse
    graph = {}
    for v, wnid in enumerate(tree.wnids):  # one hypernym each, an edge above
        above = (tree.depth == tree.depth[v] - 1) & (tree.leaves >= tree.leaves[v]).all(1)
        graph[wnid] = Synset(wnid, tuple(tree.wnids[u] for u in np.flatnonzero(above)[:1]))
    exchanged = graph | {wnid: graph[wnids[other]] for wnid, other in zip(wnids, order)}
    plain = Taxonomy.from_graph(graph, wnids)
    expected = place(profile, Taxonomy.from_graph(exchanged, wnids), k=8).summary()
    permuted = place(profile, plain.permuted(order), k=8).summary()
    assert permuted == approx(expected)
    assert permuted != place(profile, plain, k=8).summary()


def test_heights_and_readings_against_loops():
    tree, _, _, profile = random_profile(1)
    placed = place(profile, tree)
    read = readings(profile, placed)
    assert len(read) == 9 + 3 + 3
    values = {name: [] for name in READINGS}

    def lch(*classes):
        return tree.lch(np.bincount(classes, minlength=20)[None])[0]

    for i in np.flatnonzero(profile.fires >= 16):
        top = profile.top_classes[i, :16].tolist()
        node = lch(*top)
        rate = profile.counts[:, i].sum(0) / profile.images.sum(0)
        pairs = list(itertools.combinations(top, 2))
        heights = np.array([0 if a == b else tree.height[lch(a, b)] for a, b in pairs])
        depths = [-tree.depth[lch(a, b)] for a, b in pairs]
        between = heights[[a != b for a, b in pairs]]
        of_latent = tree.height[node], heights.mean(), between.mean() if len(between) else np.nan
        of_latent += np.mean(depths), tree.height_shortest[node]
        of_latent += tuple(
            (rate.numpy() >= share)[tree.leaves[node]].mean() for share in (0.25, 0.5)
        )
        for name, value in zip(values, of_latent, strict=True):
            values[name].append(value)
    for (claim, reading), column in READINGS.items():
        mean = approx(np.nanmean(values[claim, reading]))
        assert read[claim, reading] == mean
        assert column is None or placed.summary()[column] == mean


READINGS = {  # and columns of hierarchy.csv
    ("height", "longest path, of the set"): "lch_height",
    ("height", "longest path, over pairs"): "lch_height_pairwise",
    ("height", "longest path, between classes"): "lch_height_between",
    ("height", "depth, over pairs"): None,
    ("height", "shortest path, of the set"): None,
    ("coverage", "of its LCH, R = 25%"): None,
    ("coverage", "of its LCH, R = 50%"): "coverage",
}


def test_relations_against_loops_with_planted_absorption():
    """Of latents of hypernyms; those of more than six classes are silent on a quarter of images."""
    tree = Taxonomy.from_wnids(imagenet1k()[150:270])  # dogs
    labels, z = planted(tree, 10)  # of some classes all images are top images
    rng = np.random.default_rng(0)
    general = torch.from_numpy(tree.leaves[tree.hypernyms].sum(1) > 6)
    silent = torch.from_numpy(rng.random((len(labels), 1)) < 0.25) & general
    z = torch.where(silent, 0, z * (1 + torch.rand(z.shape)))  # no two are level
    profile = profile_of(z, labels, len(tree.classes))
    placed = place(profile, tree)
    row = relate(lambda x: x, lambda rows: z[rows], profile, placed)
    related, expected, unrelated = [], [], []
    latents = zip(placed.hypernyms, chosen(placed))
    for (u, latent_u), (v, latent_v) in itertools.permutations(latents, 2):
        top = profile.top_images[latent_v, :16].numpy()
        fires = (z[:, latent_u] > 0).numpy()
        if not (tree.leaves[v] & tree.leaves[u]).any():
            unrelated.append(fires[top].mean())
        elif (tree.leaves[v] <= tree.leaves[u]).all():
            related.append(fires[top].mean())
            others = [np.setdiff1d(np.flatnonzero(labels == labels[i]), top) for i in top]
            rates = [fires[rest].mean() for rest in others if len(rest)]
            expected += [np.mean(rates)] if rates else []
    assert (row["related_pairs"], row["unrelated_pairs"]) == (len(related), len(unrelated))
    assert row["related"] == approx(np.mean(related)) and row["unrelated"] == np.mean(unrelated)
    assert row["absorption"] == approx(1 - np.mean(related)) and 0.02 < row["absorption"] < 0.3
    assert row["expected"] == approx(np.mean(expected), rel=1e-5)


def test_probe_on_separable_and_on_random_labels(tmp_path):
    rng = np.random.default_rng(0)
    centres, labels = rng.normal(size=(10, 32)), rng.integers(0, 10, 3000)
    noise = rng.normal(size=(3000, 33))
    # separable once standardised: a loud coordinate, a constant
    parts = centres[labels] + 0.2 * noise[:, :32], 1e3 * noise[:, 32:], np.ones((3000, 1))
    tokens = np.hstack(parts).astype(np.float16)
    np.save(tmp_path / "tokens.npy", tokens[:2000])
    about = ActivationBuffer(tmp_path / "tokens.npy").statistics()

    def fit(tokens, labels, steps=600):
        return linear_probe(tokens, labels, 10, about.mean, about.variance, least_steps=steps)

    def accuracy(train, labels_of_train):
        logits = fit(train, labels_of_train)(torch.from_numpy(tokens[2000:]).float())
        return (logits.argmax(1).numpy() == labels[2000:]).mean()

    on_disk = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    assert accuracy(on_disk, labels[:2000].tolist()) > 0.99
    assert accuracy(on_disk, rng.permutation(labels[:2000])) < 0.35  # luck: a majority's label
    other = labels[:511].copy()  # in two batches: every row counts
    other[510] = (other[510] + 1) % 10
    groups = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *given: groups.append(optimizer.param_groups[0].copy())
    )
    assert not torch.equal(fit(tokens[:511], labels[:511], 9).W, fit(tokens[:511], other, 9).W)
    hook.remove()
    rates = 2e-3 * np.linspace(1, 0, 20, endpoint=False)  # ten epochs of two steps
    assert [group["lr"] for group in groups] == approx(np.tile(rates, 2))
    assert {group["weight_decay"] for group in groups} == {1e-2}


def test_emergence_and_what_the_picture_shows():
    """A dog is matched from layer 4 on, a cat below a carnivore in 2, a fish in none."""
    indents, matched = [0, 1, 1, 0, 1], ["", "46", "2", "", ""]  # with an animal above the fish
    layers = {
        layer: [{"indent": i, "matched": str(layer) in m} for i, m in zip(indents, matched)]
        for layer in (2, 4, 6)
    }
    rows = emergence_rows(layers)
    assert [row["layer"] for row in rows[::5]] == [2, 4, 6]
    assert [row["emergence_layer"] for row in rows] == 3 * [None, 4, 2, None, None]
    assert [row["shown"] for row in rows] == 3 * [True, True, True, False, False]
    assert matched_sets(layers.values()).sum(1).tolist() == [1, 1, 1]


def test_the_trees_order_and_terms():
    """Each hypernym stands below the smallest that is above it, as in a loop over all."""
    tree = Taxonomy.from_wnids(imagenet1k()[::7])
    order, indents = tree_order(tree, tree.hypernyms_to_find)
    sets = [set(np.flatnonzero(tree.leaves[v])) for v in tree.hypernyms_to_find]
    assert sorted(order) == list(range(len(sets)))
    path = []  # the sets above a place
    for h, indent in zip(order, indents):
        path = path[:indent]
        above = [other for other in sets if other > sets[h]]
        assert len(path) == indent and bool(above) == bool(path)
        assert not path or (path[-1] in above and len(path[-1]) == min(map(len, above)))
        path.append(sets[h])
    names = ["dog.n.01", "crane.n.04", "crane.n.05", "motor_car.n.01"]
    assert terms_of(names) == ["dog", "crane (4)", "crane (5)", "motor car"]
    terms = terms_of([tree.names[v] for v in tree.classes])
    for row in height_rows(tree):
        a, b = (terms.index(row[key]) for key in "ab")
        assert tree.height[tree.pair_lch[a, b]] == row["height"]


def test_kappa_by_brute_force():
    rng = np.random.default_rng(0)
    sets = rng.random((4, 40)) < np.array([0.1, 0.5, 0.9, 0])[:, None]
    result = kappa(sets)
    for a, b in itertools.product(range(3), range(3)):
        chance = (sets[a][:, None] == sets[b]).mean()
        expected = ((sets[a] == sets[b]).mean() - chance) / (1 - chance)
        assert result[a, b] == approx(expected)
    assert np.isnan(result[3]).all() and np.isnan(result[:, 3]).all()  # nothing is matched


def test_rows_of_latents_and_of_hypernyms(small_tree):
    profile = hand_made(small_tree, "d1 d2 d1 d1", {"d1": 1, "d2": 0.6})
    placed = place(profile, small_tree, k=4)
    rows = {row["wnid"]: row for row in hypernym_rows(placed, profile)}
    assert list(rows) == ["animal", "dog", "cat", "thing"]
    dog = rows["dog"]
    assert (dog["best_latent"], dog["match"], dog["matched"], dog["lch"]) == (0, 1, True, "dog")
    assert dog["top_images"].tolist() == [0] * 4 and dog["responds_to"].tolist() == [0, 1]
    assert not rows["animal"]["matched"] and rows["cat"]["best_latent"] is None
    (row,) = latent_rows(placed, profile)
    assert (row["hypernym"], row["match"], row["classes"]) == ("dog", 1, "d1 d2")
    tree, _, _, profile = random_profile(2)
    least = int(profile.fires.median())  # so that half of the latents are not alive
    rows = latent_rows(place(profile._replace(fires=profile.fires - least), tree, k=1), profile)
    assert 0 < len(rows) < 30
    assert all(row["fires"] == profile.fires[row["latent"]] > least for row in rows)
