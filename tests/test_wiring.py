"""What closed forms do not see: which numbers meet which, in training, scores, claims, figures."""

import base64
import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import imagenet1k
from matplotlib.figure import Figure
from PIL import Image
from test_hooks import Images
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode

import sae as sae_module
from dinov2_hooks import class_tokens, eval_transform, finish, record
from kit import figures, scores
from kit.claims import claims_of
from kit.data import Split
from kit.demo import SmallViT
from kit.report import overlaid, write_page
from kit.rows import terms_of
from metrics import METRICS, relate
from reproduce import parse_settings, trainings_of
from sae import ActivationBuffer, SparseAutoencoder, Training, train_sae
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
    rates, lambdas, norms = [], [], []

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
            train_sae(buffer, settings, title=None)
        assert set(seen.low) == {precision == "bfloat16"}
    hook.remove()
    warm = np.minimum(1, np.arange(1, 101) / 5)
    decay = np.minimum(1, np.arange(100, 0, -1) / 20)
    assert rates == pytest.approx(np.tile(0.01 * np.minimum(warm, decay), 2))
    assert lambdas == pytest.approx(np.tile(0.3 * warm, 2))
    assert max(norms) < 1e-6  # W_dec comes to each step with rows of norm one


def test_a_gpu_that_can_trains_in_bfloat16(monkeypatch):
    for can, precision in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **more: can)
        settings = parse_settings(["--device", "cpu"])
        settings.device = "cuda"
        assert trainings_of(settings, 1000)[0].precision == precision


def test_the_backbone_runs_in_the_precision_that_is_asked_for(tmp_path):
    torch.manual_seed(0)
    vit = SmallViT(classes=2, size=16, patch=4, width=16, depth=2, heads=2).eval()
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
    return lambda x: np.maximum((x - mean) @ directions.T - thresholds, 0)


def plain_height(z, labels, tree, k):
    """The main score: a loop over latents and pairs."""
    heights = []
    for values in z.T:
        if (values > 0).sum() >= k:
            top = labels[np.argsort(-values, kind="stable")[:k]]
            pairs = [(a, b) for i, a in enumerate(top) for b in top[:i] if a != b]
            if pairs:
                heights.append(np.mean([tree.height[tree.pair_lch[pair]] for pair in pairs]))
    return np.mean(heights)


def plain_iou(yes, under):
    return (yes & under).sum() / (yes | under).sum()


def plain_probe(z, labels, tree, z_val, labels_val):
    """Mean IoU of one unit over hypernyms of at least five classes: all chosen on train."""
    mean, deviation = z.mean(0), z.std(0)
    deviation[deviation == 0] = np.inf
    z, z_val = (z - mean) / deviation, (z_val - mean) / deviation
    ious = []
    for v in tree.hypernyms_to_find:
        if tree.leaves[v].sum() >= 5:
            under = tree.leaves[v][labels]
            unit = np.argmax(abs(z[under].mean(0)))
            sign = np.sign(z[under, unit].mean())
            values = sorted(set(sign * z[under, unit]))
            best = max(values, key=lambda t: plain_iou(sign * z[:, unit] >= t, under))
            ious.append(plain_iou(sign * z_val[:, unit] >= best, tree.leaves[v][labels_val]))
    return np.mean(ious)


def test_a_layer_scored_end_to_end_against_a_plain_loop(tmp_path, monkeypatch):
    """Train and val differ, so that nothing can be taken from the wrong one unseen."""
    rng = np.random.default_rng(3)
    codes, labels, tokens = TREE.leaves.T @ rng.normal(size=(len(TREE.wnids), 10)), {}, {}
    for split, count, moved in (("train", 40, 0), ("val", 20, 0.7)):
        labels[split] = rng.permutation(np.arange(C).repeat(count))
        noise = rng.normal(size=(C * count, 10))
        tokens[split] = (5 + codes[labels[split]] + moved + (1 + moved) * noise).astype(np.float16)
        np.save(tmp_path / f"{split}.npy", tokens[split])
    train, val = (ActivationBuffer(tmp_path / f"{split}.npy") for split in ("train", "val"))
    settings = Training(2, epochs=30, batch_size=40, seed=7)
    sae = train_sae(train, settings, about={"seed": 7}, title=None)
    classify = torch.from_numpy(rng.normal(size=(10, C))).float()
    layer = train, val, train.statistics(), lambda x: (x - 5) @ classify
    where = {"layer": 3, "seed": 7}
    controls = scores.permuted_trees(TREE)
    met = []
    monkeypatch.setattr(
        scores, "relate", lambda *given: met.append((given[0], given[1])) or relate(*given)
    )
    made = scores.score_layer(where, sae, layer, labels, TREE, controls, 8, 0.5)
    # the dictionaries, thresholds from train
    x, x_val = (tokens[split].astype(float) for split in ("train", "val"))
    mean, axes, latents = x.mean(0), np.eye(10), len(sae.b_enc)
    encode = {"sae": lambda x: sae.encode(torch.from_numpy(x).float()).numpy()}
    fires = (encode["sae"](x) > 0).sum(0)
    dealt = np.random.default_rng([7, 1])
    order, few = dealt.permutation(latents), dealt.choice(latents, 20, replace=False)
    axes = np.concatenate([axes, -axes])
    encode["neurons"] = plain_threshold_units(axes, x, mean, fires[few])
    torch.manual_seed(7)
    random = SparseAutoencoder(10, latents).W_enc.detach().double().numpy()
    encode["untrained"] = plain_threshold_units(random, x, mean, fires[order])
    # the main score in WordNet's tree and the mean over all permuted ones, the probe of one unit
    rng = np.random.default_rng(0)
    permuted = [TREE.permuted(rng.permutation(C)) for _ in range(40)]
    rows = {(row["dictionary"], row["tree"]): row for row in made["hierarchy"]}
    probes = {(row["dictionary"], row["tree"], row["units"]): row for row in made["probes"]}
    for name, trees in (("sae", 40), ("neurons", 10), ("untrained", 10)):
        z = encode[name](x_val)
        units, read = met.pop(0)  # thresholds are train's, the top images of relations val's
        fires = (units(val.rows_at(slice(None))) > 0).sum(0).numpy()
        assert abs(fires - (z > 0).sum(0)).max() <= 1 and read == val.rows_at
        heights = [plain_height(z, labels["val"], t, 8) for t in [TREE, *permuted[:trees]]]
        assert rows[name, "wordnet"]["lch_height_between"] == pytest.approx(heights[0], abs=0.03)
        mean_height = rows[name, "permuted"]["lch_height_between"]
        assert mean_height == pytest.approx(np.mean(heights[1:]), abs=0.03)
        probed = encode[name] if name != "neurons" else lambda x: x - mean
        iou = plain_probe(probed(x), labels["train"], TREE, probed(x_val), labels["val"])
        assert probes[name, "wordnet", 1]["iou"] == pytest.approx(iou, abs=0.01), name
        assert len(made["permuted_draws"]["coverage"]) == 40
    # the quality of the SAE: sums over all images, not means of ratios
    z = torch.from_numpy(encode["sae"](x_val))
    x_hat = sae.decode(z).double().numpy()
    (row,) = made["layers"]
    error = ((x_val - x_hat) ** 2).sum()
    assert row["nmse"] == pytest.approx(error / (x_val**2).sum(), rel=1e-4)
    assert row["fvu"] == pytest.approx(error / ((x_val - x_val.mean(0)) ** 2).sum(), rel=1e-4)
    assert row["l0"] == pytest.approx(float((z > 0).sum(1).double().mean()), rel=1e-4)
    right = ((x_val - 5) @ classify.numpy()).argmax(1) == labels["val"]
    assert row["probe_top1"] == pytest.approx(right.mean(), abs=0.01)
    deviation = np.sqrt(((x - mean) ** 2).sum(1).mean())
    assert row["gamma"] == pytest.approx(np.linalg.norm(mean) / deviation, rel=1e-4)


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
    for layer in LAYERS:
        for seed in SEEDS:
            jitter = 0.01 * seed
            rows, draws = [], {}
            for name, less in (("sae", 0), ("untrained", training), ("neurons", 10)):
                own, other = {}, {}
                for column, metric in METRICS.items():
                    other[column] = PERMUTED.get(column, 1)
                    surplus = BETTER.get(column, [0] * 6)[layer] - less + jitter
                    own[column] = other[column] + (metric.better or 1) * surplus
                    draws[column] = other[column] + np.linspace(-0.3, 0.3, 40)
                rows.append({"dictionary": name, "tree": "wordnet", **own})
                rows.append({"dictionary": name, "tree": "permuted", **other})
            by_class = {"images": [10] * 12, "correct": [2 + layer] * 12, "error": [9 - layer] * 12,
                        "squares": [20] * 12, "active": [30] * 12, "recovered": [1] * 12}  # fmt: skip
            flat = np.full(1001, 0.3)
            iou = {"sae": flat, "untrained": flat - 0.1, "neurons": flat + 0.1}
            made[layer, seed] = {"hierarchy": rows, "permuted_draws": draws, "by_class": by_class,
                                 "iou_draws": iou}  # fmt: skip
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
        assert rows[claim]["value"] == pytest.approx(value, abs=1e-6), claim
    assert rows[THERE]["permuted"] == 10 and rows[THERE]["p_value"] == pytest.approx(1 / 41)
    opposite = {row["claim"]: row["verdict"] for row in claims_of(made_scores(training=-1))}
    assert opposite["training brings it"] == "contradicted" and opposite[THERE] == "holds"


# ---------------------------------------------------------------- figures


def made_tables():
    """hierarchy, probes, layers: every number of its own."""
    rng = np.random.default_rng(0)
    tables = {"hierarchy": [], "probes": [], "layers": [], "training": [], "heights": []}
    for layer in (0, 4, 9):
        for seed in (0, 1):
            where = {"layer": layer, "seed": seed}
            values = rng.random(9).tolist()
            tables["layers"].append(where | dict(zip(figures.COLUMNS, values)))
            for name in ("sae", "untrained", "neurons", "token"):
                for tree in ("wordnet", "permuted", "permuted_sd"):
                    row = where | {"dictionary": name, "tree": tree}
                    columns = {column: rng.random() for column in METRICS}
                    tables["hierarchy"].append(row | columns)
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
    return pytest.approx(means)


def test_lines_of_figures_are_the_tables():
    tables = made_tables()
    rows, layers = tables["hierarchy"], [0, 4, 9]
    others = [name for name, metric in METRICS.items() if metric.better]
    others.remove("lch_height_between")
    for column in ("lch_height_between", *others):
        lines = drawn(column if column in others else "hierarchy", tables)
        kinds = [(name, "wordnet") for name in ("sae", "untrained", "neurons")]
        for (name, tree), line in zip([*kinds, ("sae", "permuted")], lines, strict=True):
            assert line == over(rows, column, "layer", layers, dictionary=name, tree=tree)
    few, depth = drawn("by_units", tables), drawn("by_layer", tables)
    kinds = [(n, t) for t in ("wordnet", "permuted") for n in ("sae", "untrained", "neurons")]
    for (name, tree), line in zip(kinds, few, strict=True):
        where = {"dictionary": name, "tree": tree, "layer": 9}
        assert line == over(tables["probes"], "iou", "units", (1, 4, 16), **where)
    del depth[3], depth[-1]  # the token's
    for (name, tree), line in zip(kinds, depth, strict=True):
        where = {"dictionary": name, "tree": tree, "units": 1}
        assert line == over(tables["probes"], "iou", "layer", layers, **where)
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
    inside, outside = (np.flatnonzero(TREE.leaves[under] == is_under) for is_under in (1, 0))
    labels = np.repeat([inside[0], outside[0], inside[1]], 2)
    colour = 210, 40, 120
    Image.new("RGB", (8, 8), colour).save(tmp_path / "a.png")
    val = Split(tmp_path, ["a.png"] * 7, np.r_[outside[1], labels])  # the first is left out
    inputs = SimpleNamespace(
        model=SmallViT(classes=2, size=16, patch=4, width=6, depth=3, heads=2),
        transform=eval_transform(16, 16), val=val, tree=TREE, layers=[1, 2], note="")  # fmt: skip
    for layer in (1, 2):
        SparseAutoencoder(6, 10, about=layer).save_pretrained(tmp_path / f"layer_{layer:02d}")
    rows = []
    for layer, match in ((1, 0.6), (2, 0.9)):
        rows.append({
            "layer": layer, "wnid": TREE.wnids[under], "term": "the term", "indent": 0,
            "classes": 2, "matched": True, "best_latent": 3 + layer, "match": match, "shown": True,
            "top_images": [4, 2, 0], "responds_to": [inside[0], outside[0]], "emergence_layer": 1,
        })  # fmt: skip
    looked = []

    def maps(model, images, layer, score):
        sae = SparseAutoencoder.from_pretrained(tmp_path / f"layer_{layer:02d}")
        x = torch.randn(200, 6)
        z = sae.encode(x)
        looked.append((layer, [i for i in range(10) if torch.equal(z[:, i], score(x))]))
        return torch.rand(len(images), 4, 4)

    monkeypatch.setattr("kit.report.relevancy_maps", maps)
    settings = {"backbone": "vit", "top_k": 3}
    record = {"settings": settings, "hypernyms": rows, "claims": [dict.fromkeys(
        ("claim", "verdict", "value", "permuted", "low", "high", "p_value"), "a claim")]}  # fmt: skip
    write_page(tmp_path, "title", inputs, record, tmp_path, np.arange(1, 7), {}, ["answer"], {})
    text = (tmp_path / "report.html").read_text()
    assert set(map(str, looked)) == {"(2, [5])"}  # the layer of the best match, its latent
    names = terms_of([TREE.names[v] for v in TREE.classes])
    captions = re.findall("<figcaption>(.*?)</figcaption>", text)
    first, other, second = (names[c] for c in (inside[0], outside[0], inside[1]))
    assert captions == [second, f"✗ {other}", first]
    tile = io.BytesIO(base64.b64decode(re.search('webp;base64,([^"]*)', text)[1]))
    assert abs(np.array(Image.open(tile), int) - colour).max() < 9  # as it was before normalising
    assert "the term: 2 of 3 top images" in text
    assert f"Responds to: {first}. Outside the term: {other}." in text
    assert len(re.findall('class="c[58] m"', text)) == 2
    grey, maps = torch.full((2, 3, 8, 8), 0.5), torch.rand(2, 4, 4)  # each on its own scale
    louder = maps * torch.tensor([1.0, 9])[:, None, None]
    torch.testing.assert_close(overlaid(grey, louder), overlaid(grey, maps))
