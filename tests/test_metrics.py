"""Scores against closed forms, brute force, hand-made cases and planted latents."""
import itertools
import math

import numpy as np
import pytest
import torch

import metrics
from kit.claims import agreement_trend, rising_trend
from metrics import (Profile, best_latents, consistency, hypernym_rows, iou_draws, linear_probe,
                     longest_chain, profile_latents, readings, relate, score_hierarchy,
                     sparse_units)
from taxonomy import Synset, Taxonomy, imagenet1k


def reconstruction(encode, decode, x, batch_size):
    labels = np.zeros(len(x), int)
    return profile_latents(encode, x.split(batch_size), [labels], 1, decode=decode)[0].reconstruction


def test_reconstruction_against_numpy_on_all_tokens_at_once():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(500, 6)) * 2 + 30).float()  # a large constant part
    weights = torch.from_numpy(rng.normal(size=(6, 9))).float()
    encode, decode = lambda x: torch.relu((x - 30) @ weights - 3), lambda z: 30 + 0.05 * z @ weights.T
    result = reconstruction(encode, decode, x, 64)
    z, x_hat, x = encode(x).numpy(), decode(encode(x)).double().numpy(), x.double().numpy()
    error = ((x - x_hat) ** 2).sum()
    assert result.nmse == pytest.approx(error / (x**2).sum(), rel=1e-6)
    assert result.fvu == pytest.approx(error / ((x - x.mean(0)) ** 2).sum(), rel=1e-6)
    assert result.l0 == pytest.approx((z > 0).sum(1).mean())
    assert result.dead == pytest.approx((z == 0).all(0).mean())


def test_reconstruction_closed_forms():
    x = torch.randn(1000, 5) + 3
    perfect = reconstruction(lambda x: x.abs(), lambda z: z, x.abs(), 100)
    assert perfect == (0, 0, 5, 0)
    mean = reconstruction(lambda x: 0 * x, lambda z: z + x.mean(0), x, 100)
    assert mean.fvu == pytest.approx(1, abs=1e-6) and mean.nmse < 0.2
    assert mean.dead == 1 and mean.l0 == 0
    assert reconstruction(lambda x: 0 * x, lambda z: z, x, 100).nmse == pytest.approx(1)


def test_profile_against_brute_force():
    rng = np.random.default_rng(0)
    images, latents, classes = 230, 17, 7
    z = rng.normal(size=(images, latents)) - rng.normal(size=latents)
    z = np.maximum(z, 0).astype(np.float32)
    labels, shuffled = rng.integers(0, classes, (2, images))
    for batch_size, k in ((1, 6), (4, 40), (50, 6), (1000, 6)):
        batches = torch.from_numpy(z).split(batch_size)
        profiles = profile_latents(lambda x: x, batches, [labels, shuffled], classes, k)
        for profile, of_images in zip(profiles, (labels, shuffled)):
            for latent in range(latents):
                fires = z[:, latent] > 0
                assert profile.fires[latent] == sum(fires)
                top = profile.top_images[latent]
                assert len(top) == max(k, metrics.TOP)
                if profile.fires[latent] >= len(top):
                    best = sorted(range(images), key=lambda i: -z[i, latent])
                    assert top.tolist() == best[: len(top)]
                assert profile.top_classes[latent].tolist() == [of_images[i] for i in top]
                for c in range(classes):
                    members = np.flatnonzero(of_images == c)
                    assert profile.counts[latent, c].tolist() == [
                        fires[members[half::2]].sum() for half in (0, 1)]
                    assert profile.rate[latent, c] == pytest.approx(fires[members].mean())
                    assert profile.images[c].tolist() == [len(members[0::2]), len(members[1::2])]


def test_sparse_units_fire_as_often_as_asked():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2000, 6, generator=generator) * 3 + 10
    directions = torch.randn(700, 6, generator=generator)
    for share in (0, 0.05, 0.5, 1):
        encode = sparse_units(directions, tokens, tokens.mean(0), share)
        fires = (encode(tokens) > 0).float().mean(0)
        assert fires.shape == (700,) and (fires - share).abs().max() < 0.002
    # for the largest projections, not for any
    largest = ((tokens - tokens.mean(0)) @ directions[0]).topk(100).indices
    encode = sparse_units(directions, tokens, tokens.mean(0), 0.05)
    assert set((encode(tokens)[:, 0] > 0).nonzero().flatten().tolist()) == set(largest.tolist())


@pytest.fixture
def small_tree():
    """root > (animal > (dog > d1 d2, cat > c1 c2), thing > (t1, t2, t3, t4)); 8 classes in the order of their wnids"""
    up = {"root": (), "animal": ("root",), "dog": ("animal",), "cat": ("animal",), "thing": ("root",)}
    up |= {"d1": ("dog",), "d2": ("dog",), "c1": ("cat",), "c2": ("cat",)} | {f"t{i}": ("thing",) for i in (1, 2, 3, 4)}
    return Taxonomy.from_graph({v: Synset(v, above) for v, above in up.items()}, [v for v in up if v[1:].isdigit()])


def hand_made(tree, top, rate):
    """A profile of one latent, from the names of its top images' classes and its rate by class."""
    index = {tree.wnids[node]: c for c, node in enumerate(tree.classes)}
    rates = np.zeros((1, len(index)), np.float32)
    for name, value in rate.items():
        rates[0, index[name]] = value
    classes = np.array([[index[name] for name in top]])
    counts = 100 * np.stack([rates, rates], 2)  # of 200 images of each class
    images = np.full((len(index), 2), 100, np.float32)
    return Profile(np.zeros_like(classes), classes, np.array([99]), counts, images, None)


@pytest.mark.parametrize(
    "top, rate, lch, height, pairwise, coverage, match, match_node",
    [
        # fires on dogs only: two of six pairs are of one class, four meet in dog
        (["d1", "d1", "d2", "d2"], {"d1": 0.9, "d2": 0.5}, "dog", 1, 4 / 6, 1, 1, "dog"),
        # one stray image sends the set's LCH to the root, the pairwise height to (3 * 1 + 3 * 3) / 6 at most
        (["d1", "d2", "d1", "t1"], {"d1": 1, "d2": 1}, "root", 3, (1 + 0 + 1 + 3 * 3) / 6, 2 / 8, 1, "dog"),
        # one class: height 0, and the match is the class itself
        (["t3", "t3", "t3", "t3"], {"t3": 0.7, "t1": 0.49}, "t3", 0, 0, 1, 1, "t3"),
        # three of four animals: Jaccard 3/4 with animal, 2/3 with dog
        (["d1", "d2", "c1", "c1"], {"d1": 1, "d2": 1, "c1": 1}, "animal", 2, (1 + 2 * 4 + 0) / 6, 3 / 4, 3 / 4, "animal"),
        # responds to nothing
        (["d1", "d2", "c1", "c2"], {"d1": 0.4}, "animal", 2, (1 + 1 + 2 * 4) / 6, 0, 0, None),
        # dense: full coverage for nothing, but the match is with the root, at half of all or less it is no hypernym found
        (["d1", "t1", "d2", "t2"], {c: 1 for c in "d1 d2 c1 c2 t1 t2 t3 t4".split()}, "root", 3, (1 + 1 + 3 * 4) / 6, 1, 1, "root"),
    ],
)
def test_scores_by_hand(small_tree, top, rate, lch, height, pairwise, coverage, match, match_node):
    scores = score_hierarchy(hand_made(small_tree, top, rate), small_tree, k=4)
    assert small_tree.wnids[scores.lch[0]] == lch and scores.height[0] == height
    assert scores.height_pairwise[0] == pytest.approx(pairwise)
    assert scores.coverage[0] == pytest.approx(coverage) and scores.match[0] == pytest.approx(match)
    by_name = dict(zip((small_tree.wnids[v] for v in scores.hypernyms), scores.hypernym_match))
    assert by_name.get(match_node, match) == pytest.approx(match)
    assert {small_tree.wnids[v] for v in scores.hypernyms} == {"animal", "dog", "cat", "thing"}  # not the root: all 8
    found = {small_tree.wnids[v] for v, found in zip(scores.hypernyms, scores.hypernym_lch) if found}
    assert found == ({lch} if lch in ("animal", "dog", "cat", "thing") else set())


def test_matched_needs_both_responses_and_top_images(small_tree):
    def matched(top, rate):
        profile = hand_made(small_tree, top, rate)
        scores = score_hierarchy(profile, small_tree, k=4)
        best = best_latents(scores, profile, small_tree, 4)
        found = {small_tree.wnids[v] for v, match in zip(scores.hypernyms, scores.hypernym_match)
                 if match > 0.5}
        assert found == {wnid for wnid, one in best.items() if one["match"] > 0.5}
        return found

    assert matched(["d1"] * 4, {"d1": 1}) == set()  # d1 is half of dog: Jaccard 0.5
    three = {"d1": 1, "d2": 1, "c1": 1}
    assert matched(["d1"] * 4, three) == {"animal", "dog"}  # Jaccard 3/4 and 2/3
    assert matched(["c1"] * 4, three) == {"animal"}  # it does not show a dog
    assert matched(["d1", "d1", "t1", "t1"], three) == set()  # half of what it shows is not more
    assert matched(["d1", "d1", "c1", "t1"], three) == {"animal"}


def test_a_latent_that_fires_on_fewer_than_k_images_is_not_alive(small_tree):
    profile = hand_made(small_tree, ["d1", "d2", "d1", "d2"], {"d1": 1, "d2": 1})
    for fires, alive in ((4, 1), (3, 0)):
        scores = score_hierarchy(profile._replace(fires=np.array([fires])), small_tree, k=4)
        assert scores.summary()["alive"] == alive
    summary = scores.summary()
    assert summary["hypernyms_lch"] == summary["hypernyms_matched"] == 0
    assert math.isnan(summary["match"])


def planted(tree, images_of_class=8, seed=0):
    """One latent for every hypernym, firing on its images and no others; labels, (N, H)."""
    labels = np.random.default_rng(seed).permutation(np.arange(len(tree.classes)).repeat(images_of_class))
    return labels, torch.from_numpy(tree.leaves[tree.hypernyms][:, labels].T.astype(np.float32))


def test_planted_latents_recover_every_hypernym_of_imagenet():
    tree = Taxonomy.from_wnids(imagenet1k())
    labels, z = planted(tree)
    shuffled = np.random.default_rng(1).permutation(labels)
    profile, by_chance = profile_latents(lambda x: x, z.split(500), [labels, shuffled], 1000)
    scores = score_hierarchy(profile, tree)
    assert (scores.match == 1).all()
    assert (scores.hypernym_match == 1).all() and (scores.hypernym_iou == 1).all()
    half = tree.leaves[tree.hypernyms].sum(1) <= 500
    assert scores.summary()["hypernyms_matched"] == len(scores.hypernyms) == half.sum()
    assert (scores.hypernyms == tree.hypernyms[scores.hypernym_latent]).all()
    assert (scores.hypernyms == tree.hypernyms[scores.iou_latent]).all()
    draws = iou_draws(profile, scores, tree, draws=20)
    assert draws.shape == (20,) and draws == pytest.approx(1)
    for latent in range(0, z.shape[1], 37):  # the LCH of top images is at or below the node
        assert not (tree.leaves[scores.lch[latent]] & ~tree.leaves[tree.hypernyms[latent]]).any()
    chance = score_hierarchy(by_chance, tree)
    assert chance.summary()["hypernyms_matched"] < 10  # of only the largest
    # a latent that fires on a share p of the images, whatever they are: both / (p + q - both), of
    # an hypernym with a share q; that the best of all is chosen on the other half gains nothing
    q = tree.leaves[chance.hypernyms].sum(1) / 1000
    p = z.mean(0).numpy()[chance.iou_latent]
    expected = p * q / (p + q - p * q)
    assert abs(chance.hypernym_iou.mean() - expected.mean()) < 0.01


def random_profile(seed, latents=30):
    """Few classes, and latents with a taste for some of them."""
    tree = Taxonomy.from_wnids(imagenet1k()[:400:20])
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 20, 300)
    taste = rng.random((latents, 20)) ** 3
    z = np.maximum(rng.random((300, latents)) - 1 + 1.3 * taste.T[labels], 0).astype(np.float32)
    (profile,) = profile_latents(lambda x: x, torch.from_numpy(z).split(64), [labels], 20)
    return tree, labels, z, profile


@pytest.mark.parametrize("seed", range(3))
def test_iou_and_matches_against_sets_of_images(seed):
    tree, labels, z, profile = random_profile(seed)
    scores = score_hierarchy(profile, tree, k=8, response_rate=0.4)
    halves = [set(), set()]
    for c in range(20):
        for i, image in enumerate(np.flatnonzero(labels == c)):
            halves[i % 2].add(int(image))
    fires = [set(np.flatnonzero(z[:, i] > 0).tolist()) for i in range(z.shape[1])]
    for v, iou, match, latent in zip(scores.hypernyms, scores.hypernym_iou, scores.hypernym_match,
                                     scores.hypernym_latent):
        under = {i for i in range(300) if tree.leaves[v, labels[i]]}
        ious = [[len(fires[i] & under & half) / len((fires[i] | under) & half)
                 for i in range(z.shape[1])] for half in halves]
        assert iou == pytest.approx(ious[1][int(np.argmax(ious[0]))])
        jaccards = {}
        for i in scores.latents:
            responds = {c for c in range(20) if profile.rate[i, c] >= 0.4}
            classes = set(np.flatnonzero(tree.leaves[v]).tolist())
            if sum(tree.leaves[v, c] for c in profile.top_classes[i, :8]) > 4:
                jaccards[i] = len(responds & classes) / len(responds | classes)
        assert match == pytest.approx(max(jaccards.values(), default=0))
        assert latent == -1 if match == 0 else jaccards[latent] == pytest.approx(match)
    nodes = {tree.lowest[v] for v in scores.lch}
    assert scores.ontology_covered == len(nodes) / len(set(tree.lowest))


def test_iou_draws_are_a_bootstrap_over_classes():
    tree, labels, z, profile = random_profile(0)
    scores = score_hierarchy(profile, tree)
    draws = iou_draws(profile, scores, tree, draws=3000)
    assert abs(np.nanmean(draws) - scores.hypernym_iou.mean()) < 0.05 and np.nanstd(draws) > 0.01
    assert (draws == iou_draws(profile, scores, tree, draws=3000)).all()
    weights = np.random.default_rng(0).multinomial(20, np.ones(20) / 20, 3000)[7]  # by hand
    ious = []
    for v, latent in zip(scores.hypernyms, scores.iou_latent):
        both = sum(w * profile.counts[latent, c, 1] for c, w in enumerate(weights) if tree.leaves[v, c])
        fires = sum(w * profile.counts[latent, c, 1] for c, w in enumerate(weights))
        under = sum(w * profile.images[c, 1] for c, w in enumerate(weights) if tree.leaves[v, c])
        ious += [both / (fires + under - both)] if under else []
    assert draws[7] == pytest.approx(np.mean(ious), rel=1e-5)


def test_relations_on_a_planted_chain_and_on_planted_absorption():
    tree = Taxonomy.from_wnids(imagenet1k()[150:270])  # dogs
    labels, z = planted(tree, 16)
    sizes = tree.leaves[tree.hypernyms].sum(1)

    def relations(z):
        profile = profile_latents(lambda x: x, z.split(100), [labels], len(tree.classes))[0]
        scores = score_hierarchy(profile, tree)
        return relate(lambda x: x, lambda rows: z[torch.as_tensor(rows)], profile, scores, tree), scores

    (row, chain), scores = relations(z)
    assert row.related == row.auc == 1 and row.absorption == row.unrelated == 0
    assert row.p_value < 0.01 and row.related_pairs > 20 and row.unrelated_pairs > 20
    nodes = [scores.hypernyms[v] for v, _ in chain]
    assert len(nodes) >= 3 and chain[0][1] is None and all(share == 1 for _, share in chain[1:])
    for u, v in zip(nodes, nodes[1:]):
        assert not (tree.leaves[v] & ~tree.leaves[u]).any() and tree.leaves[u].sum() > tree.leaves[v].sum()
    # every latent of more than six classes is silent on every fourth image of a class
    silent = (metrics.every_other(labels) == 0) & (metrics.every_other(labels * 2 + metrics.every_other(
        labels)) == 0)
    general = torch.from_numpy(sizes > 6)
    z = torch.where(torch.from_numpy(silent)[:, None] & general, 0, z)
    (row, _), scores = relations(z)
    found = {tree.hypernyms[i]: i for i in range(len(sizes))}
    expected = []
    for u in scores.hypernyms:
        for v in scores.hypernyms:
            if u != v and not (tree.leaves[v] & ~tree.leaves[u]).any():
                latent = found[v]
                images = np.argsort(-z[:, latent].numpy(), kind="stable")
                top = profile_top(z, latent, images)
                expected.append(float((z[top, found[u]] > 0).float().mean()))
    assert 0 < row.absorption < 1 and row.absorption == pytest.approx(1 - np.mean(expected), abs=0.06)


def profile_top(z, latent, images):
    """All images on which it fires, of which any 16 may be its top images, as z is 0 or 1."""
    return torch.as_tensor(images[: int((z[:, latent] > 0).sum())].copy())


def test_no_relations_where_nothing_is_matched():
    tree, labels, z, _ = random_profile(0)
    shuffled = np.random.default_rng(0).permutation(labels)
    profile = profile_latents(lambda x: x, torch.from_numpy(z).split(64), [shuffled], 20)[0]
    scores = score_hierarchy(profile, tree, response_rate=0.99)
    row, chain = relate(lambda x: x, lambda rows: torch.from_numpy(z[rows]), profile, scores, tree)
    assert row.related_pairs == row.unrelated_pairs == 0 and chain == []
    assert math.isnan(row.auc) and math.isnan(row.p_value)


def test_longest_chain():
    above = np.zeros((6, 6), bool)
    for u, v in [(0, 2), (0, 3), (2, 4), (3, 5), (0, 4), (4, 5)]:
        above[u, v] = True
    assert longest_chain(above) == [(None, 0), (0, 2), (2, 4), (4, 5)]
    assert longest_chain(np.zeros((0, 0), bool)) == []


def test_readings_against_loops():
    tree, _, _, profile = random_profile(1)
    found = readings(profile, score_hierarchy(profile, tree), tree, 16)
    assert len(found["height"]) == len(found["coverage"]) == 24
    for k in (4, 16):
        alive = np.flatnonzero(profile.fires >= k)
        of = {name: [] for name in ("set", "pairs", "depth", "short", "any", "top")}
        for i in alive:
            top = profile.top_classes[i, :k]
            members = np.zeros((1, 20))
            members[0, top] = 1
            lch = tree.lch(members)[0]
            of["set"].append(tree.height[lch])
            of["short"].append(tree.height_shortest[lch])
            leaves = np.flatnonzero(tree.leaves[lch])
            of["any"].append(np.mean([profile.rate[i, c] > 0 for c in leaves]))
            of["top"].append(len(set(top)) / len(leaves))
            pairs, depths = [], []
            for a, b in itertools.combinations(top, 2):
                members = np.zeros((1, 20))
                members[0, [a, b]] = 1
                lch = tree.lch(members)[0]
                pairs.append(0 if a == b else tree.height[lch])
                depths.append(-tree.depth[lch])
            of["pairs"].append(np.mean(pairs)), of["depth"].append(np.mean(depths))
        for claim, reading, name in [
            ("height", "longest path, of the set", "set"), ("height", "longest path, over pairs", "pairs"),
            ("height", "depth, over pairs", "depth"), ("height", "shortest path, of the set", "short"),
            ("coverage", "of its LCH by a latent, R = any", "any"),
            ("coverage", "of its LCH by a latent, R = top images", "top"),
        ]:
            assert found[claim][f"{reading}, k = {k}"] == pytest.approx(np.mean(of[name]))


def test_pairwise_height_against_loops():
    tree = Taxonomy.from_wnids(imagenet1k()[::25])
    rng = np.random.default_rng(0)
    top = rng.integers(0, 40, (30, 8))
    counts = np.zeros((30, 40, 2), np.float32)
    profile = Profile(top, top, np.full(30, 8), counts, counts[0] + 1, None)
    scores = score_hierarchy(profile, tree, k=8)
    for classes, pairwise, lch in zip(top, scores.height_pairwise, scores.lch):
        heights = []
        for a, b in itertools.combinations(classes, 2):
            pair = np.zeros((1, 40))
            pair[0, [a, b]] = 1
            heights.append(0 if a == b else tree.height[tree.lch(pair)[0]])
        assert pairwise == pytest.approx(np.mean(heights))
        assert tree.leaves[lch][classes].all()


def test_probe_on_separable_and_on_random_labels():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(10, 32))
    labels = [rng.integers(0, 10, count) for count in (2000, 1000)]
    tokens = [  # separable only once standardised: a loud coordinate that tells nothing, a constant
        np.hstack([centres[y] + 0.2 * rng.normal(size=(len(y), 32)),
                   1e3 * rng.normal(size=(len(y), 1)), np.ones((len(y), 1))])
        for y in labels
    ]
    (train, val), (train_labels, val_labels) = (
        [torch.from_numpy(x) for x in pair] for pair in ([x.astype(np.float16) for x in tokens], labels))
    expected = linear_probe(train, train_labels, val, val_labels)
    assert expected > 0.99
    mean, variance = train.double().mean(0), train.double().var(0, correction=0)
    assert linear_probe(train, train_labels, val, val_labels, mean, variance) == expected
    random = torch.from_numpy(rng.permutation(labels[0]))
    assert 0.04 < linear_probe(train, random, val, val_labels) < 0.18


@pytest.fixture
def three_layers():
    """A taxonomy, and best latents by layer: toy dog is matched from 4 on, domestic in 2 and 6."""
    tree = Taxonomy.from_wnids(["n02085620", "n02085782", "n02123045", "n02690373", "n02701002",
                                "n01440764"])
    dog, domestic = (tree.wnids[tree.names.index(name)]
                     for name in ("toy_dog.n.01", "domestic_animal.n.01"))
    matches = {2: {domestic: 0.6}, 4: {dog: 0.7, domestic: 0.5}, 6: {dog: 0.9, domestic: 0.8}}
    return tree, {
        layer: {wnid: {"match": match, "latent": 10 * layer, "lch": "toy_dog.n.01"}
                for wnid, match in found.items()}
        for layer, found in matches.items()
    }


def test_emergence(three_layers):
    rows = {row["name"]: row for row in hypernym_rows(three_layers[1], three_layers[0])}
    dog, domestic = rows["toy_dog.n.01"], rows["domestic_animal.n.01"]
    assert [dog[key] for key in ("emergence_layer", "best_layer", "best_latent", "match", "classes")
            ] == [4, 6, 60, 0.9, 2]
    assert (domestic["emergence_layer"], domestic["match"], domestic["lch"]) == (2, 0.8, "toy_dog.n.01")
    never = [row for row in rows.values() if row["emergence_layer"] is None]
    assert len(never) == len(rows) - 2
    assert all(row["match"] == 0 and row["best_layer"] is None for row in never)
    assert all(2 <= row["classes"] <= 3 for row in rows.values())  # at most half of six


def test_consistency_is_the_jaccard_of_what_is_matched(three_layers):
    agreement = consistency(list(three_layers[1].values()))
    assert agreement.tolist() == [[1, 0, 0.5], [0, 1, 0.5], [0.5, 0.5, 1]]  # not at exactly 0.5
    assert np.isnan(consistency([{}, {}])).all()


def test_best_latents(small_tree):
    profile = hand_made(small_tree, ["d1", "d2", "d1", "d1"], {"d1": 1, "d2": 0.6})
    best = best_latents(score_hierarchy(profile, small_tree, k=4), profile, small_tree, 4)
    assert best["dog"] == {"match": 1.0, "latent": 0, "lch": "dog", "top_images": [0, 0, 0, 0]}
    assert best["animal"]["match"] == 0.5 and "cat" not in best


def test_trend_closed_forms():
    assert rising_trend(range(6), [1, 2, 3, 5, 8, 9]) == (pytest.approx(1), pytest.approx(1 / 720))
    assert rising_trend(range(6), [9, 8, 5, 3, 2, 1]) == (pytest.approx(-1), pytest.approx(1))
    # Spearman's rho without ties is 1 - 6 Σd² / (n (n² - 1)); here d = (0, 1, -1, 0)
    assert rising_trend(range(4), [1, 3, 2, 4]).rho == pytest.approx(1 - 6 * 2 / 60)
    # ties share their mean rank: Pearson's correlation of (0, 1, 2, 3) and (0.5, 0.5, 2, 3)
    assert rising_trend(range(4), [1, 1, 2, 4]).rho == pytest.approx(np.corrcoef([0, 1, 2, 3], [0.5, 0.5, 2, 3])[0, 1])
    assert rising_trend(range(5), [1, math.nan, 2, 3, 4]) == rising_trend(range(4), [1, 2, 3, 4])
    for constant_or_short in ([1, 1, 1, 1], [1, 2]):
        assert all(math.isnan(value) for value in rising_trend(range(len(constant_or_short)), constant_or_short))


def test_trend_p_value_sampled_agrees_with_the_t_distribution():
    # rho = 0.6 at n = 12: t = rho sqrt((n - 2) / (1 - rho²)) = 2.37 on 10 degrees of freedom, one-sided p = 0.0196
    y = np.array([2, 0, 6, 3, 1, 9, 4, 11, 5, 7, 8, 10])
    rho = 1 - 6 * ((np.arange(12) - y) ** 2).sum() / (12 * 143)
    trend = rising_trend(range(12), y)
    assert trend.rho == pytest.approx(rho)
    t = rho * math.sqrt(10 / (1 - rho**2))
    grid = np.linspace(t, 200, 2_000_001)
    density = math.gamma(5.5) / (math.sqrt(10 * math.pi) * math.gamma(5)) * (1 + grid**2 / 10) ** -5.5
    assert trend.p_value == pytest.approx(np.trapezoid(density, grid) if hasattr(np, "trapezoid") else np.trapz(density, grid), rel=0.25)


def test_agreement_trend_against_all_orders_of_the_layers():
    """Mantel's test by brute force: Pearson's correlation of ranks under every one of the 5! orders."""
    rng = np.random.default_rng(3)
    agreement = rng.random((5, 5))
    agreement = (agreement + agreement.T) / 2 - 0.15 * np.abs(np.subtract.outer(range(5), range(5)))
    upper = np.triu_indices(5, 1)

    def ranks(values):
        return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])

    def rho(order):
        distance = np.abs(np.subtract.outer(order, order))[upper]
        return np.corrcoef(ranks(-distance), ranks(agreement[upper]))[0, 1]

    exact = np.mean([rho(np.array(order)) >= rho(np.arange(5)) - 1e-9 for order in itertools.permutations(range(5))])
    trend = agreement_trend(agreement)
    assert trend.rho == pytest.approx(rho(np.arange(5))) and trend.p_value == pytest.approx(exact, abs=0.015)


def test_agreement_trend_leaves_out_what_is_not_defined():
    layers = np.arange(7)
    agreement = 1.0 - 0.1 * np.abs(np.subtract.outer(layers, layers))
    agreement[:2, :2] = np.nan
    assert agreement_trend(agreement).rho == pytest.approx(1) and agreement_trend(agreement).p_value < 0.01
    assert agreement_trend(-agreement).rho == pytest.approx(-1)
    assert math.isnan(agreement_trend(np.full((4, 4), np.nan)).rho) and math.isnan(agreement_trend(np.ones((4, 4))).rho)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_profile_equals_the_cpus():
    z = torch.rand(3000, 64, generator=torch.Generator().manual_seed(0)) - 0.5
    labels = np.arange(3000) % 10
    cpu, gpu = (profile_latents(torch.relu, z.to(device).split(512), [labels], 10)[0] for device in ("cpu", "cuda"))
    assert all((a == b).all() for a, b in zip(cpu, gpu))
