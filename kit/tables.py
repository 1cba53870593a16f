"""What a run found: tables (CSV, Markdown, JSON) and sentences made from their numbers."""
import csv
import itertools
import json

import numpy as np

from kit.claims import MAIN, claimed
from kit.rows import values_of
from kit.files import to_json
from metrics import mean_of

MARKS = {"holds": "✓", "open": "○", "contradicted": "✗"}  # else –
POOR = 0.9  # of the variance unexplained, hardly better than the mean; of the first loss
FEW = 0.1  # of the latents in a mean
ALIKE = ("layers", "expansion", "inputs", "epochs", "batch_size", "lr", "top_k", "response_rate",
         "images_per_class")  # settings of runs that are compared over sparsity
FOUND = 1 / 3  # of what is planted in the demo, at least
FALL = 0.025  # of the loss, between the third and the fourth fifth of the steps
ROUNDING = 0.1  # of the variance of a layer's tokens
FP16 = 2.1e-4  # what rounding to fp16 adds to a number, as a share of it (root mean square)


def cell(value):
    if value is None or value != value:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown(rows):
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    for row in rows:
        lines.append(map(cell, row.values()))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def over_seeds(values):
    """mean ± standard deviation; the mean alone if all agree."""
    spread = np.std(values)
    text = cell(np.mean(values))
    return f"{text} ± {spread:.3g}" if spread > 1e-6 else text


def by_layer(tables, layers):
    """The scores that matter most: a row for each layer and dictionary, a number a cell."""
    rows = []
    for layer, dictionary in itertools.product(layers, ("sae", "untrained", "neurons")):
        where = {"layer": layer, "dictionary": dictionary}
        count = in_the_mean(tables, layer, dictionary)[0]
        row = where | {"latents in the mean": f"{count:.0f}"}
        for column, (name, sign, _) in claimed():
            for tree in ("wordnet", "permuted"):
                values = values_of(tables["hierarchy"], column, tree=tree, **where)
                row[f"{name} {'↑' if sign > 0 else '↓'}, {tree}"] = over_seeds(values)
        for tree in ("wordnet", "permuted"):
            values = values_of(tables["probes"], "iou", units=1, tree=tree, **where)
            row[f"probe IoU ↑, {tree}"] = over_seeds(values)
        rows.append(row)
    return rows


def in_the_mean(tables, layer, dictionary="sae"):
    """Over how many of how many latents the main score of a layer is a mean; over seeds."""
    where = {"dictionary": dictionary, "tree": "wordnet", "layer": layer}
    alive = values_of(tables["hierarchy"], "alive", **where)
    single_class = values_of(tables["hierarchy"], "single_class", **where)
    return (alive - single_class).mean(), values_of(tables["layers"], "latents", layer=layer).mean()


def doubts(tables, layers):
    """Sentences on SAEs that are not good enough for their scores to mean much."""
    bad = {}
    for layer in layers:
        fvu = values_of(tables["layers"], "fvu", layer=layer)
        count, latents = in_the_mean(tables, layer)
        gamma = values_of(tables["layers"], "gamma", layer=layer).max()
        # windows of training before the learning rate decays: from the third fifth to the fourth
        loss = values_of(tables["training"], "loss", layer=layer).reshape(len(fvu), -1).mean(0)
        third, fourth = (mean_of(loss[i * len(loss) // 5 :][: len(loss) // 5]) for i in (2, 3))
        for value, limit, text in (
                (fvu.max(), POOR, "the SAE reconstructs hardly better than the mean: lower --l1, "
                                  "or train longer. FVU:"),
                ((FP16 * gamma) ** 2, ROUNDING, "class tokens hardly differ from their mean, and "
                                                "fp16 rounds: leave out these layers. Share of "
                                                "their variance that is rounding:"),
                (1 - count / latents, 1 - FEW, "nearly all latents are in no mean, as they fire on "
                                               "few images or on one class: lower --l1. Left "
                                               "out:"),
                (mean_of(loss[-1:]) / mean_of(loss[:1]), POOR, "the loss hardly fell at all: raise "
                                                               "--lr or --epochs. Left of it:"),
                (1 - fourth / third, FALL, "the loss still fell before the learning rate did: more "
                                           "--epochs. By:")):
            if value > limit:
                bad.setdefault(text, []).append(f"layer {layer} ({value:.0%})")
    return [f"Beware, {text} {', '.join(where)}." for text, where in bad.items()]


def matched_by(tables, dictionary="sae", tree="wordnet"):
    """How many hypernyms are matched in a run's last layer, the mean over seeds."""
    where = {"layer": tables["layers"][-1]["layer"], "dictionary": dictionary, "tree": tree}
    return values_of(tables["hierarchy"], "hypernyms_matched", **where).mean()


def last_layer_of(tables):
    """(L0, hypernyms matched) of a run's SAEs in its last layer, means over seeds."""
    last = tables["layers"][-1]["layer"]
    return values_of(tables["layers"], "l0", layer=last).mean(), matched_by(tables)


def is_other_sparsity(tables, others):
    """Whether the tables of another run differ from this one's in λ or activation alone."""
    settings, other = tables["settings"], others["settings"]
    alike = all(settings[key] == other.get(key) for key in ALIKE)
    same = all(settings[key] == other[key] for key in ("l1", "activation"))
    columns = others["hierarchy"][0]
    return alike and not same and "hypernyms_matched" in columns


def as_kin(tables, value):
    """A height in words: two classes that meet there."""
    row = min(tables["heights"], key=lambda row: abs(row["height"] - value))
    return f"as {row['a']} and {row['b']} ({row['height']})"


def terms_with_a_latent(tables, last):
    """(a sentence on the hypernyms matched in the last layer, whether they are enough for the demo,
    which has planted them)"""
    rows = [row for row in tables["hypernyms"] if row["layer"] == last]
    matched = sorted((row for row in rows if row["matched"]), key=lambda row: -row["classes"])
    examples = ", ".join(row["term"] for row in matched[:3])
    examples = f" ({examples} ...)" if examples else ""
    by_chance = matched_by(tables, tree="permuted")
    untrained = matched_by(tables, "untrained")
    l0, count = last_layer_of(tables)
    sentence = (
        f"{count:.3g} of {len(rows)} general terms{examples} have a latent of their own in the "
        f"last layer, confirmed on images it was not chosen on; by chance "
        f"{by_chance:.2g}, in an untrained SAE {untrained:.3g}. That is at {l0:.3g} active latents "
        "per image (L0).")
    others = tables["others"]["(L0, matched)"]
    if others:
        sparsities, counts = zip(*others)
        sentence += (f" At the other settings tried, with an L0 of {min(sparsities):.3g} to "
                     f"{max(sparsities):.3g}, it is {min(counts):.3g} to {max(counts):.3g}.")
    return sentence, count >= FOUND * len(rows) and count > max(by_chance, untrained)


def findings(tables, layers):
    """What was found, in sentences: each number beside its value under permuted trees."""
    first = layers[0]
    last = layers[-1]

    def mean(column, layer=last, dictionary="sae", tree="wordnet"):
        where = {"layer": layer, "dictionary": dictionary, "tree": tree}
        return values_of(tables["hierarchy"], column, **where).mean()

    def beside(*where):
        permuted = mean(MAIN, *where, tree="permuted")
        return f"{cell(mean(MAIN, *where))} (permuted {cell(permuted)})"

    terms, enough = terms_with_a_latent(tables, last)
    sentences = [terms]
    # how closely related the classes of a latent are
    main, grows = tables["claims"][:2]
    answer = {"holds": "the hierarchy is there", "open": "it cannot be told from chance",
              "contradicted": "related classes lie further apart than by chance"}
    answer = answer.get(main["verdict"], main["verdict"])
    spread = mean(MAIN, tree="permuted_sd") or np.nan
    sentences.append(
        f"Two of a latent's top images, of different classes, meet {main['value']:.3g} edges up "
        f"in the last layer, {as_kin(tables, main['value'])}; under permuted trees "
        f"{main['permuted']:.3g}, {as_kin(tables, main['permuted'])}, "
        f"{abs(main['permuted'] - main['value']) / spread:.2g} standard deviations away (p = "
        f"{main['p_value']:.2g}): {answer}. The untrained SAE has {beside(last, 'untrained')}, raw "
        f"neurons {beside(last, 'neurons')}.")
    count, latents = in_the_mean(tables, last)
    fvu = values_of(tables["layers"], "fvu", layer=last).mean()
    sentences.append(f"That is a mean over {count:.0f} of {latents:.0f} latents; the SAE leaves "
                     f"{fvu:.0%} of the variance unexplained (FVU).")
    if first < last:
        sentences.append(
            f"In the first layer it is {beside(first)}. From the first third of the "
            f"layers to the last, the hierarchy's part grows by {grows['value']:.3g} edges: "
            f"{grows['verdict']}.")
    beware = doubts(tables, layers)
    sentences += beware
    backbone = tables["settings"]["backbone"]
    if backbone != "dinov2_vitg14" or tables["classes"] < 1000:
        sentences.append("Not run here: the paper's job, dinov2_vitg14 on ImageNet-1k.")
    if backbone == "demo":
        most = count >= latents / 2  # a few latents can look good
        passed = main["verdict"] == "holds" and enough and most and not beware
        sentences[0] = f"Check {'passed' if passed else 'FAILED'}: {sentences[0]}"
    return sentences


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_tables(folder, title, note, tables, layers):
    """Every table as CSV, those for reading as tables.md, all as results.json. Returns the
    findings."""
    for name, rows in json.loads(to_json(tables)).items():
        if rows and isinstance(rows, list):
            write_csv(folder / f"{name}.csv", rows)
    shown = {"claims": tables["claims"], "by_layer": by_layer(tables, layers)}
    sentences = findings(tables, layers)
    text = [f"# {title}", note, *sentences]
    for name, rows in shown.items():
        text.append(f"## {name.replace('_', ' ').capitalize()}\n\n{markdown(rows)}")
    (folder / "tables.md").write_text("\n\n".join(text) + "\n", "utf-8", "backslashreplace")
    large = {name: f"{name}.csv" for name in ("latents", "hypernyms")}
    (folder / "results.json").write_text(to_json(tables | large) + "\n")
    return sentences
