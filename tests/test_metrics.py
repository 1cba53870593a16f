"""Scores against closed forms, brute force, hand-made cases and planted latents."""

import itertools

import numpy as np
import pytest
import torch
from conftest import imagenet1k
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
    x_hat, z = (array.double().numpy() for array in sae(x))
    x = x.double().numpy()
    error = ((x - x_hat) ** 2).sum(1)
    assert result.nmse == pytest.approx(error.sum() / (x**2).sum(), rel=1e-6)
    assert result.fvu == pytest.approx(error.sum() / ((x - x.mean(0)) ** 2).sum(), rel=1e-6)
    assert result.l0 == pytest.approx((z > 0).sum(1).mean())
    assert result.dead == pytest.approx((z == 0).all(0).mean())
    for array, accuracy in ((x, result.probe_top1), (x_hat, result.probe_on_reconstruction)):
        assert accuracy == pytest.approx((array[:, :4].argmax(1) == labels).mean())
    of_images = {"images": 1, "error": error, "squares": (x**2).sum(1), "active": (z > 0).sum(1)}
    for name, values in of_images.items():
        expected = np.bincount(labels, np.broadcast_to(values, 500))
        assert sums[name].tolist() == pytest.approx(expected, rel=1e-6)


def test_profile_against_brute_force():
    rng = np.random.default_rng(0)
    images, latents, classes = 230, 17, 7
    z = rng.normal(size=(images, latents)) - rng.normal(size=latents)
    z = np.maximum(z, 0).astype(np.float32)
    labels = rng.integers(0, classes, images)
    for batch_size, given in ((1, labels), (50, labels.tolist()), (1000, torch.from_numpy(labels))):
        profile = profile_latents(
            lambda x: x, torch.from_numpy(z).split(batch_size), given, classes
        )
        for latent in range(latents):
            fires = z[:, latent] > 0
            assert profile.fires[latent] == sum(fires)
            top = profile.top_images[latent]
            best = sorted(range(images), key=lambda i: -z[i, latent])[: min(sum(fires), len(top))]
            assert len(top) == metrics.TOP and top[: len(best)].tolist() == best
            assert profile.top_classes[latent].tolist() == labels[top].tolist()
            for c in range(classes):
                members = np.flatnonzero(labels == c)
                for half in (0, 1):
                    mine = members[half::2]
                    assert profile.counts[half, latent, c] == fires[mine].sum()
                    assert profile.images[half, c] == len(mine)
                    here = set(top.tolist()) & set(mine.tolist())
                    assert all(profile.top_halves[latent][top == i] == half for i in here)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):  # of an encoder's output
        cast = profile_latents(
            lambda x: x.to(dtype), torch.from_numpy(z).split(50), labels, classes
        )
        assert (cast.counts - profile.counts).abs().max() <= 1  # a tiny value may round to zero
    with pytest.raises(ValueError, match="229 labels for 230 tokens"):
        profile_latents(lambda x: x, torch.from_numpy(z).split(50), labels[1:], classes)


@pytest.mark.parametrize("wrong", [[1, 2, 3], [-1, 0, 1], [0, 1, 1.5], [[0], [1], [2]]])
def test_labels_that_are_none(wrong):
    x = torch.rand(3, 4)
    with pytest.raises(ValueError, match="labels"):
        profile_latents(lambda x: x, [x], wrong, 3)
    with pytest.raises(ValueError, match="labels"):
        reconstruct(Affine(lambda x: x, lambda z: z), [x], wrong, 3, lambda x: x)
    with pytest.raises(ValueError, match="there are 4 labels for 3 tokens"):
        reconstruct(Affine(lambda x: x, lambda z: z), [x], [0, 1, 2, 0], 3, lambda x: x)


def test_sparse_units_fire_as_often_as_each_is_asked():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2000, 6, generator=generator) * 3 + 10
    directions = torch.randn(700, 6, generator=generator)
    wanted = torch.randint(0, 2001, (700,), generator=generator)
    wanted[:2] = torch.tensor([0, 2000])
    encode = sparse_units(directions, tokens, tokens.mean(0), wanted)
    fires = (encode(tokens) > 0).sum(0)
    assert (fires - wanted).abs().max() <= 1  # to the rounding of a projection
    assert (encode(1000 * tokens)[:, 0] == 0).all()  # dead on other tokens too
    # for the largest projections, not for any
    largest = ((tokens - tokens.mean(0)) @ directions[5]).topk(int(wanted[5])).indices
    assert set((encode(tokens)[:, 5] > 0).nonzero().flatten().tolist()) == set(largest.tolist())


@pytest.mark.parametrize("expansion", [1, 8])
def test_baselines_have_the_rates_of_the_sae_dealt_at_random(expansion):
    torch.manual_seed(1)
    tokens, mean = torch.randn(1500, 12) * 2 + 5, torch.full((12,), 5.0)
    sae = SparseAutoencoder(12, 12 * expansion)
    sae.b_enc.data = torch.linspace(-30, -5, 12 * expansion)  # some never fire
    sae.requires_grad_(False)
    encoders = [encode for _, encode, _ in dictionaries_of(sae, tokens, mean, seed=3)]
    of_sae, of_neurons, of_untrained = ((encode(tokens) > 0).sum(0) for encode in encoders)
    assert (of_sae == 0).any() and (of_sae > 0).any()
    assert (of_untrained.sort().values - of_sae.sort().values).abs().max() <= 1
    assert not torch.equal(of_untrained, of_sae)
    assert len(of_neurons) == 24 and set(of_neurons.tolist()) <= {
        count + rounding for count in of_sae.tolist() for rounding in (-1, 0, 1)
    }
    torch.manual_seed(3)
    began = SparseAutoencoder(12, 12 * expansion).W_enc
    untrained = encoders[2](mean + 1e6 * began)
    assert (untrained.diagonal()[of_untrained > 0] > 0).all()  # the directions it began with


@pytest.fixture
def small_tree():
    """root > (animal > (dog > d1 d2, cat > c1 c2), thing > t1 t2 t3 t4)"""
    up = {
        "root": (),
        "animal": ("root",),
        "dog": ("animal",),
        "cat": ("animal",),
        "thing": ("root",),
    }
    up |= {"d1": ("dog",), "d2": ("dog",), "c1": ("cat",), "c2": ("cat",)}
    up |= {f"t{i}": ("thing",) for i in (1, 2, 3, 4)}
    graph = {v: Synset(v, above) for v, above in up.items()}
    return Taxonomy.from_graph(graph, [v for v in up if v[1:].isdigit()])


def hand_made(tree, top, rate, rate_B=None):
    """A profile of one latent, from the names of its top images' classes and its rate by class."""
    index = {tree.wnids[node]: c for c, node in enumerate(tree.classes)}
    counts = torch.zeros(2, 1, len(index))  # of 100 images of each class and half
    for half, rates in enumerate((rate, rate if rate_B is None else rate_B)):
        for name, value in rates.items():
            counts[half, 0, index[name]] = 100 * value
    classes = torch.tensor([[index[name] for name in top]])
    images = torch.full((2, len(index)), 100.0)
    return Profile(
        torch.zeros_like(classes),
        classes,
        torch.zeros_like(classes),
        torch.tensor([99]),
        counts,
        images,
    )


@pytest.mark.parametrize(
    "top, rate, lch, height, pairwise, between, coverage, match, match_node",
    [
        # fires on dogs only: two of six pairs are of one class, four meet in dog
        (["d1", "d1", "d2", "d2"], {"d1": 0.9, "d2": 0.5}, "dog", 1, 4 / 6, 1, 1, 1, "dog"),
        # one stray image sends the set's LCH to the root
        (
            ["d1", "d2", "d1", "t1"],
            {"d1": 1, "d2": 1},
            "root",
            3,
            (1 + 0 + 1 + 3 * 3) / 6,
            11 / 5,
            2 / 8,
            1,
            "dog",
        ),
        # one class: height 0, no pairs between classes, and the match is the class itself
        (["t3", "t3", "t3", "t3"], {"t3": 0.7, "t1": 0.49}, "t3", 0, 0, np.nan, 1, 1, "t3"),
        # three of four animals: Jaccard 3/4 with animal, 2/3 with dog
        (
            ["d1", "d2", "c1", "c1"],
            {"d1": 1, "d2": 1, "c1": 1},
            "animal",
            2,
            (1 + 2 * 4 + 0) / 6,
            9 / 5,
            3 / 4,
            3 / 4,
            "animal",
        ),
        # responds to nothing
        (["d1", "d2", "c1", "c2"], {"d1": 0.4}, "animal", 2, 10 / 6, 10 / 6, 0, 0, None),
        # dense: full coverage for nothing, and the match is with the root, no hypernym found
        (
            ["d1", "t1", "d2", "t2"],
            {c: 1 for c in "d1 d2 c1 c2 t1 t2 t3 t4".split()},
            "root",
            3,
            14 / 6,
            14 / 6,
            1,
            1,
            "root",
        ),
    ],
)
def test_scores_by_hand(
    small_tree, top, rate, lch, height, pairwise, between, coverage, match, match_node
):
    placed = place(hand_made(small_tree, top, rate), small_tree, k=4)
    assert small_tree.wnids[placed.lch[0]] == lch and metrics.lch_height(placed)[0] == height
    assert placed.pair_heights[0][0] == pytest.approx(pairwise)
    assert placed.pair_heights[1][0] == pytest.approx(between, nan_ok=True)
    assert placed.summary()["single_class"] == (top[0] == "t3")
    assert metrics.coverage(placed)[0] == pytest.approx(coverage)
    assert metrics.match(placed)[0] == pytest.approx(match)
    inner = {"animal", "dog", "cat", "thing"}  # not the root: it has all 8
    by_name = dict(zip((small_tree.wnids[v] for v in placed.hypernyms), placed.choice.latent_match))
    assert set(by_name) == inner and by_name.get(match_node, match) == pytest.approx(match)
    is_lch = {
        small_tree.wnids[v]
        for v, found in zip(placed.hypernyms, metrics.hypernyms_lch(placed))
        if found
    }
    assert is_lch == inner & {lch}


def test_matched_needs_responses_and_top_images_on_one_half_and_responses_on_the_other(small_tree):
    def matched(top, rate, rate_B=None):
        placed = place(hand_made(small_tree, top, rate, rate_B), small_tree, k=4)
        return {small_tree.wnids[v] for v in placed.hypernyms[placed.choice.matched]}

    assert matched(["d1"] * 4, {"d1": 1}) == set()  # d1 is half of dog: Jaccard 0.5
    three = {"d1": 1, "d2": 1, "c1": 1}
    assert matched(["d1"] * 4, three) == {"animal", "dog"}  # Jaccard 3/4 and 2/3
    assert matched(["c1"] * 4, three) == {"animal"}  # it does not show a dog
    assert matched(["d1", "d1", "t1", "t1"], three) == set()  # half of what it shows is not more
    assert matched(["d1", "d1", "c1", "t1"], three) == {"animal"}
    assert matched(["d1"] * 4, three, {"d1": 1, "d2": 1}) == {"dog"}
    assert matched(["d1"] * 4, {"d1": 1}, three) == set()  # not chosen: B cannot help


def test_a_class_with_one_image_is_in_neither_half(small_tree):
    profile = hand_made(small_tree, ["d1", "d2", "c1", "c1"], {"d1": 1, "d2": 1, "c1": 1})
    c2 = [small_tree.wnids[v] for v in small_tree.classes].index("c2")
    profile.images[1, c2] = 0
    placed = place(profile, small_tree, k=4)
    match = dict(zip((small_tree.wnids[v] for v in placed.hypernyms), placed.choice.latent_match))
    assert match["animal"] == 1  # of the three classes that can be judged


def test_a_latent_that_fires_on_fewer_than_k_images_is_not_alive(small_tree):
    profile = hand_made(small_tree, ["d1", "d2", "d1", "d2"], {"d1": 1, "d2": 1})
    for fires, alive in ((4, 1), (3, 0)):
        placed = place(profile._replace(fires=torch.tensor([fires])), small_tree, k=4)
        assert placed.summary()["alive"] == alive
    summary = placed.summary()
    assert summary["hypernyms_lch"] == summary["hypernyms_matched"] == 0
    assert np.isnan(summary["match"]) and (placed.choice.latent == -1).all()


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
    half = tree.leaves[tree.hypernyms].sum(1) <= 500
    assert placed.summary()["hypernyms_matched"] == len(placed.hypernyms) == half.sum()
    assert (placed.hypernyms == tree.hypernyms[chosen(placed)]).all()
    for latent in range(0, z.shape[1], 37):  # the LCH of top images is at or below the node
        assert not (tree.leaves[placed.lch[latent]] & ~tree.leaves[tree.hypernyms[latent]]).any()
    order = np.random.default_rng(0).permutation(1000)
    control = place(profile, tree.permuted(order)).summary()
    assert control["hypernyms_matched"] < 10  # of only the largest
    assert control["lch_height_between"] > placed.summary()["lch_height_between"] + 2


def random_profile(seed, latents=30):
    """Few classes, and latents with a taste for some of them."""
    tree = Taxonomy.from_wnids(imagenet1k()[:400:20])
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 20, 300)
    taste = rng.random((latents, 20)) ** 3
    z = np.maximum(rng.random((300, latents)) - 1 + 1.3 * taste.T[labels], 0).astype(np.float32)
    return tree, labels, z, profile_of(z, labels, 20)


@pytest.mark.parametrize("seed", range(3))
def test_held_out_matches_against_sets_of_images(seed):
    tree, labels, z, profile = random_profile(seed)
    placed = place(profile, tree, k=8, response_rate=0.4)
    halves = [], []
    for c in range(20):
        for i, image in enumerate(np.flatnonzero(labels == c)):
            halves[i % 2].append(image)

    def match(latent, v, half):
        responds = set()
        for c in range(20):
            mine = [i for i in halves[half] if labels[i] == c]
            if np.mean(z[mine, latent] > 0) >= 0.4:
                responds.add(c)
        under = set(np.flatnonzero(tree.leaves[v]).tolist())
        return len(responds & under) / len(responds | under)

    for v, latent, match_B, matched in zip(
        placed.hypernyms, chosen(placed), placed.choice.latent_match, placed.choice.matched
    ):
        on_A = {}
        for i in placed.latents:
            fires = [image for image in halves[0] if z[image, i] > 0]
            top = sorted(fires, key=lambda image: -z[image, i])[:8]
            if np.mean(tree.leaves[v, labels[top]]) > 0.5 and (value := match(i, v, 0)) > 0:
                on_A[i] = value
        if latent == -1:
            assert not on_A and match_B == 0
            continue
        assert on_A[latent] == pytest.approx(max(on_A.values()))
        assert match_B == pytest.approx(match(latent, v, 1))
        assert matched == (on_A[latent] > 0.5 and match_B > 0.5)
    nodes = {tree.lowest[v] for v in placed.lch}
    assert placed.summary()["ontology_covered"] == len(nodes) / len(set(tree.lowest))


def test_matches_are_at_chance_when_half_B_is_shuffled():
    """Choosing among thousands on the images that are counted would gain something."""
    tree, rng = Taxonomy.from_wnids(imagenet1k()[:400:20]), np.random.default_rng(0)
    labels = np.repeat(np.arange(20), 4)
    z = (rng.random((80, 4000)) < 0.3) * rng.random((80, 4000))
    placed = place(profile_of(z, labels, 20), tree, k=8)
    assert (placed.choice.latent >= 0).sum() > 5  # on A latents enough are found
    assert placed.summary()["hypernyms_matched"] <= 1


def test_permuted_trees_against_a_relabelled_graph():
    """Class c takes the leaf of order[c]: as if the hypernyms of the leaves had been exchanged."""
    wnids, rng = imagenet1k()[:400:20], np.random.default_rng(2)
    tree, graph = Taxonomy.from_wnids(wnids), {}
    order = rng.permutation(20)
    assert (order[order] != np.arange(20)).any()  # it is not its own inverse
    for v, wnid in enumerate(tree.wnids):
        covers = [
            u
            for u in range(len(tree.wnids))
            if u != v
            and tree.depth[u] == tree.depth[v] - 1
            and (tree.leaves[u] >= tree.leaves[v]).all()
        ]
        graph[wnid] = Synset(tree.names[v], tuple(tree.wnids[u] for u in covers[:1]))
    plain = Taxonomy.from_graph(graph, wnids)
    exchanged = dict(graph)
    for c, wnid in enumerate(wnids):
        exchanged[wnid] = Synset(graph[wnid].name, graph[wnids[order[c]]].hypernyms)
    _, _, _, profile = random_profile(5)
    expected = place(profile, Taxonomy.from_graph(exchanged, wnids), k=8)
    permuted = place(profile, plain.permuted(order), k=8)
    assert permuted.summary() == pytest.approx(expected.summary())
    for mine, other in zip(permuted.pair_heights, expected.pair_heights):
        assert mine == pytest.approx(other, nan_ok=True)
    assert permuted.summary() != place(profile, plain, k=8).summary()
    same = place(profile, plain.permuted(np.arange(20)), k=8)
    assert same.summary() == place(profile, plain, k=8).summary()


def test_pairwise_heights_and_readings_against_loops():
    tree, _, _, profile = random_profile(1)
    placed = place(profile, tree)
    read = readings(profile, placed)
    assert len(read) == 9 + 3 + 3
    values = {name: [] for name in ("set", "pairs", "between", "depth", "short", "quarter")}
    for i in np.flatnonzero(profile.fires >= 16):
        top = profile.top_classes[i, :16].numpy()
        members = np.zeros((1, 20))
        members[0, top] = 1
        lch = tree.lch(members)[0]
        values["set"].append(tree.height[lch])
        values["short"].append(tree.height_shortest[lch])
        leaves = np.flatnonzero(tree.leaves[lch])
        rate = profile.counts[:, i].sum(0) / profile.images.sum(0)
        values["quarter"].append(np.mean([float(rate[c]) >= 0.25 for c in leaves]))
        pairs, depths, between = [], [], []
        for a, b in itertools.combinations(top, 2):
            members = np.zeros((1, 20))
            members[0, [a, b]] = 1
            node = tree.lch(members)[0]
            pairs.append(0 if a == b else tree.height[node])
            between += [] if a == b else [tree.height[node]]
            depths.append(-tree.depth[node])
        values["pairs"].append(np.mean(pairs)), values["depth"].append(np.mean(depths))
        values["between"] += [np.mean(between)] if between else []
    for claim, reading, name in [
        ("height", "longest path, of the set", "set"),
        ("height", "longest path, over pairs", "pairs"),
        ("height", "longest path, between classes", "between"),
        ("height", "depth, over pairs", "depth"),
        ("height", "shortest path, of the set", "short"),
        ("coverage", "of its LCH, R = 25%", "quarter"),
    ]:
        assert read[claim, reading] == pytest.approx(np.mean(values[name]))
    summary = placed.summary()
    assert summary["lch_height"] == read["height", "longest path, of the set"]
    assert summary["lch_height_between"] == read["height", "longest path, between classes"]
    assert summary["coverage"] == pytest.approx(read["coverage", "of its LCH, R = 50%"])


def test_relations_on_a_planted_chain_and_on_planted_absorption():
    tree = Taxonomy.from_wnids(imagenet1k()[150:270])  # dogs
    labels, z = planted(tree, 16)

    def relations(z):
        profile = profile_of(z, labels, len(tree.classes))
        placed = place(profile, tree)
        return relate(lambda x: x, lambda rows: z[rows], profile, placed), placed, profile

    row, _, _ = relations(z)
    assert row["related"] == row["expected"] == 1 and row["absorption"] == row["unrelated"] == 0
    assert row["related_pairs"] > 20 and row["unrelated_pairs"] > 20
    # now every latent of more than six classes is silent on a quarter of all images, at random
    rng = np.random.default_rng(0)
    silent = torch.from_numpy(rng.random(len(labels)) < 0.25)
    general = torch.from_numpy(tree.leaves[tree.hypernyms].sum(1) > 6)
    z = z * (1 + torch.from_numpy(rng.random(z.shape)))  # so that no two are level
    z = torch.where(silent[:, None] & general, 0, z).float()
    row, placed, profile = relations(z)
    shares, expected = [], []
    for u, latent_u in zip(placed.hypernyms, chosen(placed)):
        for v, latent_v in zip(placed.hypernyms, chosen(placed)):
            if u == v or (tree.leaves[v] & ~tree.leaves[u]).any():
                continue
            top = profile.top_images[latent_v, :16].numpy()
            fires = (z[:, latent_u] > 0).numpy()
            rates = []
            for i in top:
                others = [j for j in np.flatnonzero(labels == labels[i]) if j not in top]
                rates += [fires[others].mean()] if others else []
            shares.append(fires[top].mean()), expected.append(np.mean(rates))
    assert (
        row["absorption"] == pytest.approx(1 - np.mean(shares)) and 0.02 < row["absorption"] < 0.3
    )
    assert row["expected"] == pytest.approx(np.mean(expected), rel=1e-5)


def test_probe_on_separable_and_on_random_labels(tmp_path):
    rng = np.random.default_rng(0)
    centres, labels = rng.normal(size=(10, 32)), rng.integers(0, 10, 3000)
    tokens = np.hstack(
        [  # separable once standardised: a loud coordinate, a constant
            centres[labels] + 0.2 * rng.normal(size=(3000, 32)),
            1e3 * rng.normal(size=(3000, 1)),
            np.ones((3000, 1)),
        ]
    ).astype(np.float16)
    np.save(tmp_path / "tokens.npy", tokens[:2000])
    about = ActivationBuffer(tmp_path / "tokens.npy").statistics()

    def accuracy(train, labels_of_train):
        probe = linear_probe(
            train, labels_of_train, 10, about.mean, about.variance, least_steps=600
        )
        logits = probe(torch.from_numpy(tokens[2000:]).float())
        return float((logits.argmax(1) == torch.from_numpy(labels[2000:])).float().mean())

    other = labels[:511].copy()  # in two batches: every row counts
    other[510] = (other[510] + 1) % 10
    groups = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *given: groups.append(optimizer.param_groups[0].copy())
    )
    probes = [
        linear_probe(tokens[:511], y, 10, about.mean, about.variance, least_steps=9)
        for y in (labels[:511], other)
    ]
    hook.remove()
    rates = 2e-3 * np.linspace(1, 0, 20, endpoint=False)  # ten epochs of two steps
    assert [group["lr"] for group in groups] == pytest.approx(np.tile(rates, 2))
    assert {group["weight_decay"] for group in groups} == {1e-2}
    assert not torch.equal(probes[0].W, probes[1].W)
    from_disk = accuracy(np.load(tmp_path / "tokens.npy", mmap_mode="r"), labels[:2000])
    assert from_disk > 0.99 and from_disk == accuracy(tokens[:2000], labels[:2000].tolist())
    assert (
        accuracy(tokens[:2000], rng.permutation(labels[:2000])) < 0.35
    )  # luck: a majority's label


def test_emergence_and_what_the_picture_shows():
    """A dog is matched from layer 4 on, a cat below a carnivore in 2, a fish in none."""
    terms = ("carnivore", 0, ""), ("dog", 1, "46"), ("cat", 1, "2"), ("animal", 0, ""), ("fish", 1, "")
    layers = {}
    for layer in (2, 4, 6):
        layers[layer] = [
            {"name": name, "indent": indent, "matched": str(layer) in matched}
            for name, indent, matched in terms
        ]
    rows = emergence_rows(layers)
    assert [row["layer"] for row in rows[::5]] == [2, 4, 6]
    for start in (0, 5, 10):
        assert [row["emergence_layer"] for row in rows[start : start + 5]] == [None, 4, 2, None, None]
        assert [row["shown"] for row in rows[start : start + 5]] == [True, True, True, False, False]
    assert matched_sets(layers.values()).sum(1).tolist() == [1, 1, 1]


def test_the_trees_order_and_terms():
    """Each hypernym stands below the smallest that is above it, as in a loop over all."""
    tree = Taxonomy.from_wnids(imagenet1k()[::7])
    nodes = tree.hypernyms_to_find
    order, indents = tree_order(tree, nodes)
    assert sorted(order) == list(range(len(nodes))) and indents[0] == 0
    sets = [set(np.flatnonzero(tree.leaves[v])) for v in nodes]
    for place, (h, indent) in enumerate(zip(order, indents)):
        above = [u for u in range(len(nodes)) if sets[u] > sets[h]]
        if indent == 0:
            assert not above
        else:
            earlier = [i for i in range(place) if indents[i] == indent - 1]
            assert len(sets[order[earlier[-1]]]) == min(len(sets[u]) for u in above)
            assert sets[order[earlier[-1]]] > sets[h]
    assert terms_of(["dog.n.01", "crane.n.04", "crane.n.05", "car.n.01"]) == [
        "dog",
        "crane (4)",
        "crane (5)",
        "car",
    ]
    for row in height_rows(tree):
        a, b = (terms_of([tree.names[v] for v in tree.classes]).index(row[key]) for key in "ab")
        assert tree.height[tree.pair_lch[a, b]] == row["height"]


def test_kappa_by_brute_force():
    rng = np.random.default_rng(0)
    sets = rng.random((5, 40)) < np.array([0.1, 0.3, 0.5, 0.9, 0])[:, None]
    result = kappa(sets)
    for a, b in itertools.product(range(4), range(4)):
        observed = np.mean(sets[a] == sets[b])
        chance = np.mean([x == y for x in sets[a] for y in sets[b]])
        assert result[a, b] == pytest.approx((observed - chance) / (1 - chance))
    assert np.isnan(result[4]).all() and np.isnan(result[:, 4]).all()  # nothing is matched


def test_rows_of_latents_and_of_hypernyms(small_tree):
    profile = hand_made(small_tree, ["d1", "d2", "d1", "d1"], {"d1": 1, "d2": 0.6})
    placed = place(profile, small_tree, k=4)
    rows = {row["wnid"]: row for row in hypernym_rows(placed, profile)}
    assert list(rows) == ["animal", "dog", "cat", "thing"]
    dog = rows["dog"]
    assert (dog["best_latent"], dog["match"], dog["matched"], dog["lch"]) == (0, 1, True, "dog")
    assert dog["top_images"].tolist() == [0] * 4 and dog["responds_to"].tolist() == [0, 1]
    assert not rows["animal"]["matched"] and rows["cat"]["best_latent"] is None
    (row,) = latent_rows(placed, profile)
    assert (row["hypernym"], row["match"], row["classes"]) == ("dog", 1, "d1 d2")
    tree, _, _, profile = random_profile(1)
    least = int(profile.fires.median())  # so that half of the latents are not alive
    rows = latent_rows(place(profile._replace(fires=profile.fires - least), tree, k=1), profile)
    assert 0 < len(rows) < 30
    assert all(row["fires"] == profile.fires[row["latent"]] > least for row in rows)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_scores_equal_the_cpus():
    tree, labels, z, _ = random_profile(0)
    summaries = []
    for device in ("cpu", "cuda"):
        batches = torch.from_numpy(z).to(device).split(64)
        profile = profile_latents(lambda x: x, batches, labels, 20)
        summaries.append(place(profile, tree).summary())
    assert summaries[0] == pytest.approx(summaries[1])
