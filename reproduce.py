"""Does DINOv2's class token, layer by layer, hold the ImageNet hierarchy? (after arXiv 2505.15970)

    python reproduce.py --layers all                    the built-in demo, minutes on a CPU
    python reproduce.py --layers all --data imagenet    the paper's job: dinov2_vitg14, one GPU

Four stages, each of which skips what is already in the output folder:
    1. images -> class tokens of every asked-for layer    tokens/{train,val}/layer_NN.npy
    2. class tokens -> one sparse autoencoder a layer     saes/<settings>/layer_NN/
    3. latents -> reconstruction, probe, hierarchy        scores/<settings>/layer_NN.json
    4. scores -> tables, claims, figures, report          results/

torchrun --nproc-per-node 8 reproduce.py ...  shares images and layers among eight GPUs.
"""
import argparse
import re
import sys
import time
from contextlib import redirect_stderr
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dinov2_hooks import HUB, BackboneError, recording_precision, weights_hash
from kit import hub, plan, report
from kit.images import Decoded, fingerprint
from kit.job import Job, prepare, saes_name
from kit.process import (RANK, WORLD, check_disk, keep_freed_memory, lock, run_as_command,
                         wait_for_all)
from kit.recording import record_split, statistics_of
from kit.store import atomic_write, check_file, checksum, hash_of, read_record, reuse, write_record
from metrics import (agreement_trend, best_latents, consistency, hypernym_rows, linear_probe,
                     neurons, profile_latents, rising_trend, score_hierarchy)
from sae import (SAE_FILES, ActivationBuffer, SAEError, SparseAutoencoder, Training, new_sae,
                 train_sae)
from taxonomy import Taxonomy, TaxonomyError

HERE = Path(__file__).resolve().parent
VAL_BATCH = 2048  # tokens scored at once
LIMITS = {  # of the settings that are numbers: the least and the largest
    "expansion": (1, 10**9), "l1": (0, 1e9), "epochs": (1, 10**9), "batch_size": (1, 10**9),
    "lr": (1e-12, 1), "top_k": (2, 10**9), "response_rate": (1e-12, 1), "seed": (0, 2**63 - 1),
    "images_per_class": (1, 10**9),
}


def parse_settings(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS, allow_abbrev=False)
    add = parser.add_argument
    add("--layers", default="all", help="blocks, from 0: all, last, 0-11 or 3,7,11 (default: all)")
    add("--data", help="folder with train/ and val/ of wnid folders, or Kaggle's ImageNet "
        "(default: $IMAGENET_DIR, ./imagenet, else the built-in demo)")
    add("--backbone", help="entry point of the hub: dinov2_vits14, _vitb14, _vitl14, _vitg14, each "
        "also with _reg (default: dinov2_vitg14, the paper's)")
    add("--hub", help=f"torch.hub repository, or a folder with a hubconf.py (default: {HUB})")
    add("--out", help="output folder (default: runs/<data>-<backbone>)")
    add("--expansion", type=int, default=8, help="SAE: latents per dimension of the token (8)")
    add("--l1", type=float, default=0.1, help="SAE: λ, the weight of ‖z‖₁ in the loss (0.1)")
    add("--inputs", choices=["centred", "raw"], default="centred",
        help="SAE: tokens minus their mean, or as they come; both over one scalar (centred)")
    add("--epochs", type=int, default=50, help="SAE: of training (50)")
    add("--batch-size", type=int, help="SAE: of training (4096; less, for at least 1,500 steps)")
    add("--lr", type=float, default=4e-4, help="SAE: learning rate (4e-4)")
    add("--top-k", type=int, default=16, help="top images of a latent (16)")
    add("--response-rate", type=float, default=0.5,
        help="θ: a latent responds to a class if it fires on this share of its images (0.5)")
    add("--images-per-class", type=int, help="use no more training images of a class")
    add("--skip-bad-images", action="store_true", help="go on without images that do not decode")
    add("--plan", action="store_true", help="say what the run would write, compute and take")
    add("--saes", metavar="USER/NAME",
        help="score published SAEs, of the Hub or a folder of layer_NN, instead of training")
    add("--push-to-hub", metavar="USER/NAME", help="publish SAEs and results on Hugging Face")
    add("--device", choices=["cuda", "cpu"], help="(default: cuda where there is one)")
    add("--seed", type=int, default=0, help="of SAEs, probes and shuffled labels (0)")
    settings = parser.parse_args(argv)
    for name, (low, high) in LIMITS.items():
        value = getattr(settings, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} {value}: give a number from {low} to {high}")
    if not re.fullmatch(r"all|last|\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*", settings.layers):
        parser.error(f"--layers {settings.layers}: give all, last, a range 0-11 or a list 3,7,11")
    if settings.device == "cuda" and torch.cuda.device_count() == 0:
        parser.error("--device cuda: PyTorch finds no GPU here; give --device cpu, or leave it out")
    settings.device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return settings


def train_layer(job: Job, folder: Path, layer: int, tokens: dict, about: dict, progress) -> None:
    """Stage 2: the class tokens of a layer -> its SAE, in `folder`."""
    record = tokens["train"][layer]
    made_from = {**asdict(job.training), "layer": layer, "tokens": record["tokens"],
                 "code": hash_of(HERE / "sae.py")}
    if reuse(folder / "sae.json", made_from):
        return
    buffer = ActivationBuffer(check_file(record["path"], record["tokens"]), job.settings.device)
    try:
        sae = train_sae(buffer, job.training, statistics_of(record), about | made_from, progress)
    except SAEError as error:
        raise SAEError(f"layer {layer}: {error}") from error
    with atomic_write(folder) as part:
        sae.cpu().save_pretrained(part)
        files = {file: checksum(part / file) for file in SAE_FILES}
        write_record(part / "sae.json", made_from, files=files)


def probe_layer(job: Job, path: Path, layer: int, tokens: dict) -> float:
    """Accuracy of a linear probe on a layer's tokens, whatever its SAE; kept in `path`."""
    splits, seed = [tokens["train"], tokens["val"]], job.settings.seed
    made_from = {"tokens": [split[layer]["tokens"] for split in splits], "seed": seed,
                 "code": hash_of(HERE / "metrics.py")}
    if known := reuse(path, made_from):
        return known["top1"]
    data = []
    for split in splits:
        file = check_file(split[layer]["path"], split[layer]["tokens"])
        data += [np.load(file, mmap_mode="c"), split["labels"]]
    data = [torch.from_numpy(array).to(job.settings.device) for array in data]
    statistics = statistics_of(tokens["train"][layer])
    top1 = linear_probe(*data, statistics.mean, statistics.variance, seed)
    return write_record(path, made_from, top1=top1)["top1"]


def score_layer(job: Job, path: Path, layer: int, tokens: dict, folder: Path) -> dict:
    """Stage 3: the latents of a layer, whose SAE is in `folder`, -> its row of layers.csv, its rows
    of hierarchy.csv and the best latent for every hypernym; kept in `path`."""
    settings, record, labels = job.settings, tokens["val"][layer], tokens["val"]["labels"]
    code = [HERE / f"{module}.py" for module in ("metrics", "taxonomy", "sae")]
    made_from = {
        "tokens": record["tokens"], "sae": checksum(folder / "model.safetensors"),
        "classes": job.tree.wnids, "top_k": settings.top_k, "seed": settings.seed,
        "response_rate": settings.response_rate, "code": hash_of(*code),
    }
    probe_path = path.parent.parent / f"probe-seed_{settings.seed}" / path.name
    accuracy = probe_layer(job, probe_path, layer, tokens)
    if known := reuse(path, made_from):
        return known
    buffer = ActivationBuffer(check_file(record["path"], record["tokens"]), settings.device)
    statistics = statistics_of(tokens["train"][layer])
    mean, n = statistics.mean.float().to(settings.device), len(statistics.mean)
    sae = SparseAutoencoder.from_pretrained(folder).to(settings.device)
    about = {"inputs": "centred", "seed": 0, **(sae.about or {})}
    alike = Training(expansion=len(sae.b_enc) // n, inputs=about["inputs"], seed=about["seed"])
    untrained = new_sae(statistics, alike).to(settings.device)
    shuffled = np.random.default_rng(settings.seed).permutation(labels)
    hierarchy = []
    for name, encode, decode, labelings in [
        ("sae", sae.encode, sae.decode, {"true": labels, "shuffled": shuffled}),
        ("neurons", neurons(mean), None, {"true": labels}),
        ("untrained", untrained.encode, None, {"true": labels}),
    ]:
        profiles = profile_latents(encode, buffer.batches(VAL_BATCH), list(labelings.values()),
                                   len(job.tree.classes), settings.top_k, decode)
        for of, profile in zip(labelings, profiles):
            scores = score_hierarchy(profile, job.tree, settings.response_rate)
            row = {"layer": layer, "dictionary": name, "labels": of}
            hierarchy.append(row | scores.summary())
            if (name, of) == ("sae", "true"):
                hypernyms = best_latents(scores, profile, job.tree)
                reconstruction = profile.reconstruction._asdict()
    gamma = float(statistics.mean.norm()) / statistics.rms_deviation
    layers = {"layer": layer, "width": n, "gamma": gamma, "probe_top1": accuracy, **reconstruction}
    return write_record(path, made_from, layers=layers, hierarchy=hierarchy, hypernyms=hypernyms)


def check_claims(layers, hierarchy, agreement, hypernyms) -> list[dict]:
    """The paper's qualitative claims on this run's numbers, and one of ours: rows of claims.csv.

    Each is a one-sided permutation test of Spearman's rho. Verdict: "holds" where p < 0.05,
    "contradicted" where the opposite has p < 0.05, else "open", as with too few layers to tell.
    """
    def column(name, labels):
        return np.array([row[name] for row in hierarchy
                         if row["dictionary"] == "sae" and row["labels"] == labels], float)

    depth = [row["layer"] for row in layers]
    tests = [
        (claim, f"layer and {name}", rising_trend, [depth], np.array([row[name] for row in layers]))
        for claim, name in [("category information grows with depth", "probe_top1"),
                            ("early layers are easier to auto-encode", "nmse"),
                            ("early layers need fewer active latents", "l0")]
    ]
    for claim, name, sign in [
        ("latents grow more specific: LCH height falls", "lch_height_pairwise", -1),
        ("more hypernyms are the LCH of some latent", "hypernyms_lch", 1),
        ("more hypernyms are matched by some latent", "hypernyms_matched", 1),
    ]:
        y, by_chance = sign * column(name, "true"), sign * column(name, "shuffled")
        said = "layer and " + "-" * (sign < 0) + name
        tests += [(claim, said, rising_trend, [depth], y),
                  ("... by more than under shuffled labels", said + ", less that under shuffled",
                   rising_trend, [depth], y - by_chance)]
    emerged = [row for row in hypernyms if row["emergence_layer"] is not None]
    emergence = np.array([row["emergence_layer"] for row in emerged])
    tests += [
        ("near layers agree more than far ones",
         "nearness and Jaccard, over pairs of layers (Mantel)", agreement_trend, [], agreement),
        ("beyond the paper: general hypernyms emerge earlier",
         f"height and -emergence_layer, over {len(emerged)} hypernyms", rising_trend,
         [[row["height"] for row in emerged]], -emergence),
    ]
    rows = []
    for claim, statistic, test, x, y in tests:
        (rho, p), (_, p_opposite) = test(*x, y), test(*x, -y)
        verdict = "holds" if p < 0.05 else "contradicted" if p_opposite < 0.05 else "open"
        rows.append({"claim": claim, "statistic": f"Spearman's rho of {statistic}", "value": rho,
                     "p_value": p, "verdict": verdict})
    return rows


def tables_of(scores: dict[int, dict], tree: Taxonomy) -> dict:
    """Stage 4: the scores of all layers -> the tables of a run."""
    layers = [score["layers"] for score in scores.values()]
    hierarchy = [row for score in scores.values() for row in score["hierarchy"]]
    best = {layer: score["hypernyms"] for layer, score in scores.items()}
    hypernyms, pairs = hypernym_rows(best, tree), np.triu_indices(len(layers), 1)
    agreement = consistency(list(best.values()))
    return {
        "layers": layers, "hierarchy": hierarchy, "hypernyms_possible": len(hypernyms),
        "hypernyms": [row for row in hypernyms if row["classes"] >= 5] or hypernyms,
        "consistency": [{"layer_a": layers[a]["layer"], "layer_b": layers[b]["layer"],
                         "jaccard": float(agreement[a, b])} for a, b in zip(*pairs)],
        "claims": check_claims(layers, hierarchy, agreement, hypernyms),
        "agreement": agreement, "all_hypernyms": hypernyms,
    }


def make_results(job: Job, root: Path, record: dict, scores: dict, tokens: dict) -> None:
    """Stage 4: scores -> tables, claims, figures, report, in the folder results/."""
    settings, folders = job.settings, {layer: root / f"layer_{layer:02d}" for layer in job.layers}
    record |= tables_of(scores, job.tree)
    latents = report.named_latents(record["all_hypernyms"])
    title = f"{settings.backbone} on {Path(settings.data).resolve().name}, {saes_name(job)}"
    with atomic_write(job.out / "results") as folder:
        (folder / "figures").mkdir(parents=True)
        report.draw_latents(folder / "figures", latents, scores, folders, job.model,
                            Decoded(job.val, job.transform), tokens["val"]["ids"])
        shown = report.write_results(folder, title, job.note, record, latents, job.tree)
    print(f"\n{shown}\n\n{job.note}\nTables, figures, report: {job.out / 'results'}; SAEs: {root}")
    if not settings.saes:
        repo = settings.push_to_hub or "USER/NAME"
        hub.write_card(root, repo, title, job.note, job.layers[-1], shown)
    if settings.push_to_hub:
        hub.publish(settings.push_to_hub, root, job.out / "results")


def run_stages(job: Job, root: Path) -> None:
    """All four stages; `root` is the folder of the SAEs, of which there is one a layer."""
    settings, mine, times = job.settings, job.layers[RANK::WORLD], [time.time()]
    print("[1/4] images -> class tokens")
    made_from = {
        "format": 1, "images": fingerprint(job.train, job.val), "backbone": settings.backbone,
        "train images": len(job.train.names), "val images": len(job.val.names),
        "weights": weights_hash(job.model), "transform": str(job.transform),
        "precision": recording_precision(settings.device),
    }
    tokens = {
        split: record_split(job.model, job.transform, images, job.layers, job.out / "tokens" / split,
                            made_from, settings.skip_bad_images)
        for split, images in (("train", job.train), ("val", job.val))
    }
    times.append(time.time())

    print(f"[2/4] class tokens -> sparse autoencoders: {settings.saes or job.training}")
    about = {"backbone": settings.backbone, "images": made_from["images"]}
    with tqdm(total=0, unit="step", disable=RANK > 0 or bool(settings.saes)) as bar:
        def progress(step, steps, loss):
            bar.total = steps * len(mine)
            bar.update()

        for layer in [] if settings.saes else mine:
            bar.set_description(f"      layer {layer}")
            train_layer(job, root / f"layer_{layer:02d}", layer, tokens, about, progress)
    wait_for_all()
    times.append(time.time())

    print("[3/4] latents -> scores")
    kept, scores = job.out / "scores" / saes_name(job), {}
    for layer in tqdm(mine, "      layers", unit="layer", disable=RANK > 0):
        name = f"layer_{layer:02d}"
        scores[layer] = score_layer(job, kept / f"{name}.json", layer, tokens, root / name)
    wait_for_all()
    times.append(time.time())
    if RANK > 0:
        return

    print("[4/4] scores -> tables, figures, report")
    scores = {layer: scores.get(layer) or read_record(kept / f"layer_{layer:02d}.json")
              for layer in job.layers}
    record = {
        "settings": vars(settings) | {"batch_size": job.training.batch_size, "out": str(job.out)},
        "made_from": made_from, "saes": str(root),
        "seconds": dict(zip(("tokens", "saes", "scores"), np.diff(times).round(1).tolist())),
        "left_out": {split: len(found["left_out"]) for split, found in tokens.items()},
        "versions": {name: version(name) for name in ("torch", "torchvision", "nltk", "numpy")},
    }
    make_results(job, root, record, scores, tokens)
    print(f"Done in {time.time() - times[0]:.0f} s.")


def run(settings: argparse.Namespace) -> None:
    if RANK > 0 and settings.plan:
        return
    if RANK > 0:
        wait_for_all()  # until the first process has found all as it should be
    job = prepare(settings)
    counts = len(job.train.names), len(job.val.names)
    parts = plan.plan(job.model, job.transform, *counts, job.layers, job.training)
    if settings.plan:
        images = Decoded(job.train, job.transform)
        parts = plan.with_seconds(parts, job.model, images, *counts, job.training)
    print(plan.table(parts))
    if settings.plan:
        return
    root = job.out / "saes" / saes_name(job)
    if settings.saes:
        width = job.model.cls_token.shape[-1]
        root = hub.find_saes(settings.saes, job.layers, width, settings.backbone)
    check_disk(job.out, plan.still_to_write(parts, job.out, root, job.layers))
    if RANK == 0:
        wait_for_all()
    with lock(job.out):
        run_stages(job, root)


def main(argv=None) -> int:
    with redirect_stderr(sys.stderr if RANK == 0 else None):  # said once
        settings = parse_settings(argv)
    keep_freed_memory()
    return run_as_command(run, settings, expected=(BackboneError, SAEError, TaxonomyError))


if __name__ == "__main__":
    sys.exit(main())
