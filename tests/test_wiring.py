"""What closed forms do not see: which numbers meet which, in training, scores, claims, figures."""

import base64
import io
import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import imagenet1k
from matplotlib.figure import Figure
from PIL import Image
from pytest import approx
from test_recording import Images
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode

import sae as sae_module
from dinov2_hooks import class_tokens, eval_transform, finish, record
from kit import figures, scores
from kit.claims import claims_of
from kit.data import Split
from kit.demo import SmallViT
from kit.probes import probe_rows
from kit.report import overlaid, write_page
from kit.rows import terms_of
from metrics import METRICS, relate
from reproduce import parse_settings, trainings_of
from sae import ActivationBuffer, SparseAutoencoder, Training, new_sae, train_sae
from taxonomy import Taxonomy

TREE = Taxonomy.from_wnids(imagenet1k()[150:300:12])  # 13 dogs, cats, bears and others
C = len(TREE.classes)


# ---------------------------------------------------------------- training, the backbone's pass


class Precisions(TorchFunctionMode):
    """Whether autocast is on in each product of a linear layer."""

    def __init__(self):
        super().__init__()
        self.low = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            self.low.append(torch.is_autocast_enabled("cpu"))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def buffer(tmp_path):
    tokens = np.random.default_rng(0).normal(3, 1, (640, 12)).astype(np.float16)
    np.save(tmp_path / "tokens.npy", tokens)
    return ActivationBuffer(tmp_path / "tokens.npy")


def test_every_step_has_its_rate_its_lambda_and_its_precision(buffer, monkeypatch):
    """100 steps, of which 5 warm up and 20 decay; λ warms up over the same 5."""
    rates, lambdas, norms, losses = [], [], [], []

    def look(optimizer, args, kwargs):
        group = optimizer.param_groups[0]
        rates.append(group["lr"])
        norms.append(float((group["params"][0].detach().norm(dim=1) - 1).abs().max()))

    loss_of = sae_module.loss_of
    monkeypatch.setattr(
        sae_module, "loss_of", lambda sae, x, l1: lambdas.append(l1) or loss_of(sae, x, l1)
    )
    hook = register_optimizer_step_pre_hook(look)
    for precision in ("float32", "bfloat16"):
        settings = Training(l1=0.3, lr=0.01, epochs=10, batch_size=64, precision=precision)
        with Precisions() as seen:
            losses.append(train_sae(buffer, settings, title=None).history[-1]["loss"])
        assert set(seen.low) == {precision == "bfloat16"}
    hook.remove()
    warm = np.minimum(1, np.arange(1, 101) / 5)
    decay = np.minimum(1, np.arange(100, 0, -1) / 20)
    assert rates == approx(np.tile(0.01 * np.minimum(warm, decay), 2))
    assert lambdas == approx(np.tile(0.3 * warm, 2))
    assert sae_module.schedule(0, 1) == (1, 1)
    assert max(norms) < 1e-6  # W_dec comes to each step with rows of norm one
    assert losses[0] == approx(losses[1], rel=0.02)


def test_a_gpu_that_can_trains_in_bfloat16(monkeypatch):
    for can, precision in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **more: can)
        settings = parse_settings(["--device", "cpu"])
        settings.device = "cuda"
        assert trainings_of(settings, 1000)[0].precision == precision


def test_the_backbone_runs_in_the_precision_that_is_asked_for(vit, tmp_path):
    images = torch.rand(3, 3, 16, 16)
    for precision in ("float32", "bfloat16"):
        with Precisions() as seen:
            class_tokens(vit, images, [1], precision)
            record(vit, Images(images), tmp_path / precision, [1], precision)
        assert set(seen.low) == {precision == "bfloat16"}
        finish(tmp_path / precision, [1])


# ---------------------------------------------------------------- one layer, end to end


def plain_threshold_units(directions, x, mean, fires):
    """Rows of directions, each firing on `fires` of the x: (B, n) -> (B, m)."""
    thresholds = []
    for direction, count in zip(directions, fires):
        values = sorted((x - mean) @ direction)
        thresholds.append(values[len(x) - count - 1] if count else np.inf)
    return lambda x: torch.relu((x - mean) @ directions.T - torch.tensor(thresholds))


def plain_height(z, labels, tree, k):
    """The main score: a loop over latents and pairs."""
    heights = []
    for values in z.T[(z > 0).sum(0) >= k]:
        top = labels[np.argsort(-values, kind="stable")[:k]]
        pairs = [pair for pair in itertools.combinations(top, 2) if pair[0] != pair[1]]
        if pairs:
            heights.append(np.mean([tree.height[tree.pair_lch[pair]] for pair in pairs]))
    return np.mean(heights)


def test_a_layer_scored_end_to_end_against_a_plain_loop(tmp_path, monkeypatch):
    """Train and val differ, so that nothing can be taken from the wrong one unseen."""
    rng = np.random.default_rng(3)
    codes, labels, tokens = TREE.leaves.T @ rng.normal(size=(len(TREE.wnids), 10)), {}, []
    for split, count, moved in (("train", 40, 0), ("val", 20, 0.7)):
        labels[split] = rng.permutation(np.arange(C).repeat(count))
        noise = rng.normal(size=(C * count, 10))
        x = (5 + codes[labels[split]] + moved + (1 + moved) * noise).astype(np.float16)
        np.save(tmp_path / f"{split}.npy", x)
        tokens.append(torch.from_numpy(x).float())
    train, val = (ActivationBuffer(tmp_path / f"{split}.npy") for split in ("train", "val"))
    settings = Training(2, epochs=30, batch_size=40, seed=7)
    sae = train_sae(train, settings, title=None)
    classify = torch.from_numpy(rng.normal(size=(10, C))).float()
    layer = train, val, train.statistics(), lambda x: (x - 5) @ classify
    where = {"layer": 3, "seed": 7}
    met = []
    monkeypatch.setattr(scores, "relate", lambda *given: met.append(given[:2]) or relate(*given))
    made = scores.score_layer(where, sae, layer, labels, TREE, scores.permuted_trees(TREE), 8, 0.5)
    # the dictionaries, thresholds from train
    x, x_val = tokens
    mean, axes = x.mean(0), torch.eye(10)
    fires = (sae.encode(x) > 0).sum(0).numpy()
    dealt = np.random.default_rng([7, 1])
    order, few = dealt.permutation(20), dealt.choice(20, 20, replace=False)
    began = new_sae(train.statistics(), settings).W_enc.detach()
    encode = {
        "sae": sae.encode,
        "neurons": plain_threshold_units(torch.cat([axes, -axes]), x, mean, fires[few]),
        "untrained": plain_threshold_units(began, x, mean, fires[order]),
    }
    # the main score in WordNet's tree and the mean over all permuted ones, the probes
    rng = np.random.default_rng(0)
    permuted = [TREE.permuted(rng.permutation(C)) for _ in range(40)]
    rows = {(row["dictionary"], row["tree"]): row for row in made["hierarchy"]}
    probes = []
    for name, trees in (("sae", 40), ("neurons", 10), ("untrained", 10)):
        z = encode[name](x_val).numpy()
        units, read = met.pop(0)  # thresholds are train's, the top images of relations val's
        fires = (units(x_val) > 0).sum(0).numpy()
        assert abs(fires - (z > 0).sum(0)).max() <= 1 and read == val.rows_at
        own, *others = [plain_height(z, labels["val"], t, 8) for t in [TREE, *permuted[:trees]]]
        for tree, height in (("wordnet", own), ("permuted", np.mean(others))):
            assert rows[name, tree]["lch_height_between"] == approx(height, abs=0.03)
        probed = encode[name] if name != "neurons" else lambda x: x - mean
        probes += probe_rows(name, probed, train, val, labels, TREE, permuted[0])[0]
    for ours, expected in zip(made["probes"], probes, strict=True):
        assert ours["dictionary"] == expected["dictionary"]
        assert ours["iou"] == approx(expected["iou"], abs=0.01)
    assert len(made["permuted_draws"]["coverage"]) == 40
    # the quality of the SAE on val, and the mean of train
    (row,) = made["layers"]
    fvu = (sae(x_val)[0] - x_val).square().sum() / (x_val - x_val.mean(0)).square().sum()
    right = ((x_val - 5) @ classify).argmax(1).numpy() == labels["val"]
    gamma = mean.norm() / (x - mean).square().sum(1).mean().sqrt()
    ours = [row[name] for name in ("fvu", "probe_top1", "gamma")]
    assert ours == approx([float(fvu), right.mean(), float(gamma)], rel=1e-4)


# ---------------------------------------------------------------- claims


LAYERS, SEEDS = range(6), range(3)
PERMUTED = {"lch_height_between": 10, "lch_height_pairwise": 8, "coverage": 0.2,
            "hypernyms_lch": 5, "hypernyms_matched": 1}  # fmt: skip
# how much better than that, by layer, in the sae
BETTER = {
    "lch_height_between": [0, 1, 2, 3, 4, 5],
    "lch_height_pairwise": [5, 4, 3, 2, 1, 1],
    "coverage": [0.1] * 6,
    "hypernyms_lch": [-2] * 6,
    "hypernyms_matched": [0, 1, 2, 3, 4, -0.2],
}


def made_scores(training=1.0):
    """Scores by hand: the untrained SAE has `training` edges less in its surplus, neurons ten."""
    made = {}
    by_class = {"images": 10, "squares": 20, "active": 30, "recovered": 1}
    flat = np.full(1001, 0.3)
    iou = {"sae": flat, "untrained": flat - 0.1, "neurons": flat + 0.1}
    for layer, seed in itertools.product(LAYERS, SEEDS):
        rows = []
        other = {column: PERMUTED.get(column, 1) for column in METRICS}
        for name, less in (("sae", 0), ("untrained", training), ("neurons", 10)):
            own = {}
            for column, metric in METRICS.items():
                surplus = BETTER.get(column, [0] * 6)[layer] - less + 0.01 * seed
                own[column] = other[column] + (metric.better or 1) * surplus
            rows.append({"dictionary": name, "tree": "wordnet", **own})
            rows.append({"dictionary": name, "tree": "permuted", **other})
        draws = {column: value + np.linspace(-0.3, 0.3, 40) for column, value in other.items()}
        sums = by_class | {"correct": 2 + layer, "error": 9 - layer}
        sums = {name: [value] * 12 for name, value in sums.items()}
        made[layer, seed] = {"hierarchy": rows, "permuted_draws": draws, "iou_draws": iou,
                             "by_class": sums}  # fmt: skip
    return made


THERE, GROWS = "the hierarchy is there", "it grows with depth"
EXPECTED = {
    THERE: ("holds", 5 - 0.01), GROWS: ("holds", 4), "training brings it": ("holds", 1),
    f"{THERE}, by pairwise LCH height": ("holds", 8 - 1.01),
    f"{GROWS}, by pairwise LCH height": ("contradicted", -3.5),
    f"{THERE}, by coverage": ("open", 0.31), f"{GROWS}, by coverage": ("open", 0),
    f"{THERE}, by hypernyms that are an LCH": ("contradicted", 3.01),
    f"{GROWS}, by hypernyms that are an LCH": ("open", 0),
    f"{THERE}, by hypernyms matched": ("open", 0.81),
    f"{GROWS}, by hypernyms matched": ("open", 1.4),  # as it is not there in the last layer
    "category information grows with depth": ("holds", 0.4),
    "early layers are easier to auto-encode": ("contradicted", -0.2),
    "early layers need fewer active latents": ("open", 0),
    "a latent tells a hypernym better than an untrained one": ("holds", 0.1),
    "a latent tells a hypernym better than a neuron": ("contradicted", -0.1),
}  # fmt: skip


def test_claims_of_scores_made_by_hand():
    rows = {row["claim"]: row for row in claims_of(made_scores())}
    assert {claim: row["verdict"] for claim, row in rows.items()} == {
        claim: verdict for claim, (verdict, _) in EXPECTED.items()
    }
    for claim, (_, value) in EXPECTED.items():
        assert rows[claim]["value"] == approx(value, abs=1e-6), claim
    assert rows[THERE]["permuted"] == 10 and rows[THERE]["p_value"] == approx(1 / 41)
    opposite = {row["claim"]: row["verdict"] for row in claims_of(made_scores(training=-1))}
    assert opposite["training brings it"] == "contradicted" and opposite[THERE] == "holds"


# ---------------------------------------------------------------- figures


def made_tables():
    """hierarchy, probes, layers: every number of its own."""
    rng = np.random.default_rng(0)
    tables = {"hierarchy": [], "probes": [], "layers": [], "training": [], "heights": []}
    for layer, seed in itertools.product((0, 4, 9), (0, 1)):
        where = {"layer": layer, "seed": seed}
        tables["layers"].append(where | {column: rng.random() for column in figures.COLUMNS})
        for name in ("sae", "untrained", "neurons", "token"):
            for tree in ("wordnet", "permuted", "permuted_sd"):
                row = where | {"dictionary": name, "tree": tree}
                tables["hierarchy"].append(row | {column: rng.random() for column in METRICS})
                for units in (1, 4, 16):
                    tables["probes"].append(row | {"units": units, "iou": rng.random()})
    return tables


def drawn(name, tables):
    """y-data of the lines of a figure."""
    axis = Figure().subplots()
    _, action, *more = figures.all_figures()[name]
    action(axis, tables, [0, 4, 9], *more)
    return [line.get_ydata() for line in axis.lines]


def over(rows, column, key, points, **where):
    """The mean over rows at each point."""
    means = []
    for point in points:
        chosen = [row for row in rows if row[key] == point and where.items() <= row.items()]
        means.append(np.mean([row[column] for row in chosen]))
    return approx(means)


def test_lines_of_figures_are_the_tables():
    tables = made_tables()
    layers, units = [0, 4, 9], (1, 4, 16)
    kinds = [(n, t) for t in ("wordnet", "permuted") for n in ("sae", "untrained", "neurons")]
    metrics = {name: name for name, metric in METRICS.items() if metric.better}
    metrics["hierarchy"] = metrics.pop("lch_height_between")
    for figure, column in metrics.items():
        for (name, tree), line in zip(kinds[:4], drawn(figure, tables), strict=True):
            where = {"dictionary": name, "tree": tree}
            assert line == over(tables["hierarchy"], column, "layer", layers, **where)
    few, depth = drawn("by_units", tables), drawn("by_layer", tables)
    for tree, line in (("permuted", depth.pop()), ("wordnet", depth.pop(3))):
        where = {"dictionary": "token", "tree": tree}
        assert line == over(tables["probes"], "iou", "layer", layers, **where)
    for (name, tree), *lines in zip(kinds, few, depth, strict=True):
        where = {"dictionary": name, "tree": tree}
        assert lines[0] == over(tables["probes"], "iou", "units", units, layer=9, **where)
        assert lines[1] == over(tables["probes"], "iou", "layer", layers, units=1, **where)
    for column in figures.COLUMNS:
        (line,) = drawn(column, tables)
        assert line == over(tables["layers"], column, "layer", layers)
    # examples of heights stand at these heights
    tables["heights"] = [{"height": height, "a": "cat", "b": "dog"} for height in (0.5, 7)]
    left = Figure().subplots()
    figures.draw_main(left, tables, layers, "lch_height_between")
    right = left.figure.axes[1]
    assert right.get_ylim() == left.get_ylim() and right.get_yticks().tolist() == [0.5]


# ---------------------------------------------------------------- page


def test_the_page_shows_the_latent_of_the_row(tmp_path, monkeypatch):
    """Whose map, of which layer; tiles in the order of the top images; what is outside."""
    under = TREE.hypernyms_to_find[0]
    (first, second, *_), (other, *_) = (np.flatnonzero(TREE.leaves[under] == x) for x in (1, 0))
    colour = 210, 40, 120
    Image.new("RGB", (8, 8), colour).save(tmp_path / "a.png")
    labels = np.repeat([other, first, other, second], [1, 2, 2, 2])  # the first is left out
    val = Split(tmp_path, ["a.png"] * 7, labels)
    vit = SmallViT(classes=2, size=16, patch=4, width=6, depth=3, heads=2)
    inputs = SimpleNamespace(
        model=vit, transform=eval_transform(16, 16), val=val, tree=TREE, layers=[1, 2], note=""
    )
    row = {"wnid": TREE.wnids[under], "term": "the term", "indent": 0, "classes": 2,
           "matched": True, "shown": True, "top_images": [4, 2, 0], "emergence_layer": 1,
           "responds_to": [first, other]}  # fmt: skip
    rows = []
    for layer, match in ((1, 0.6), (2, 0.9)):
        SparseAutoencoder(6, 10).save_pretrained(tmp_path / f"layer_{layer:02d}")
        rows.append(row | {"layer": layer, "best_latent": 3 + layer, "match": match})
    looked = []

    def maps(model, images, layer, score):
        sae = SparseAutoencoder.from_pretrained(tmp_path / f"layer_{layer:02d}")
        x = torch.randn(200, 6)
        z = sae.encode(x)
        looked.append((layer, [i for i in range(10) if torch.equal(z[:, i], score(x))]))
        return torch.rand(len(images), 4, 4)

    monkeypatch.setattr("kit.report.relevancy_maps", maps)
    settings = {"backbone": "vit", "top_k": 3}
    claim = dict.fromkeys("claim verdict value permuted low high p_value".split(), "a claim")
    record = {"settings": settings, "hypernyms": rows, "claims": [claim]}

    def page():
        write_page(tmp_path, "title", inputs, record, tmp_path, np.arange(1, 7), ["answer"], {})
        return (tmp_path / "report.html").read_text()

    text = page()
    assert set(map(str, looked)) == {"(2, [5])"}  # the layer of the best match, its latent
    names = terms_of([TREE.names[v] for v in TREE.classes])
    captions = re.findall("<figcaption>(.*?)</figcaption>", text)
    first, other, second = (names[c] for c in (first, other, second))
    assert captions == [second, f"✗ {other}", first]
    tile = io.BytesIO(base64.b64decode(re.search('webp;base64,([^"]*)', text)[1]))
    assert abs(np.array(Image.open(tile), int) - colour).max() < 9  # as it was before normalising
    assert "the term: 2 of 3 top images" in text
    assert f"Responds to: {first}. Outside the term: {other}." in text
    assert len(re.findall('class="c[58] m"', text)) == 2
    grey, maps = torch.full((2, 3, 8, 8), 0.5), torch.rand(2, 4, 4)  # each on its own scale
    louder = maps * torch.tensor([1.0, 9])[:, None, None]
    torch.testing.assert_close(overlaid(grey, louder), overlaid(grey, maps))
    monkeypatch.setattr("kit.report.relevancy_maps", lambda *given: 1 / 0)
    assert "No maps: ZeroDivisionError" in page()
