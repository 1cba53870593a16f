"""Does DINOv2's class token, layer by layer, hold the ImageNet hierarchy? (after arXiv 2505.15970)

    python reproduce.py --layers all                    the built-in demo, minutes on a CPU
    python reproduce.py --layers all --data tiny-imagenet --backbone dinov2_vits14
                                                        DINOv2 on photographs, which it fetches
    python reproduce.py --layers all --data imagenet    the paper's job: dinov2_vitg14, one GPU

Four stages, each of which skips what is already in the output folder:
    1. images -> class tokens of every asked-for layer    tokens/{train,val}/layer_NN.npy
    2. class tokens -> one sparse autoencoder a layer     saes/<settings>/layer_NN/
    3. latents -> reconstruction, probe, hierarchy        scores/<settings>/layer_NN.json
    4. scores -> tables, claims, figures, report          results/

torchrun --nproc-per-node 8 reproduce.py ...  shares images and layers among eight GPUs.
"""
import argparse
import io
import re
import sys
import time
import warnings
from contextlib import redirect_stderr
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dinov2_hooks import HUB, BackboneError, weights_hash
from kit import hub, plan, report
from kit.claims import claims_of
from kit.images import Decoded, fingerprint
from kit.job import Job, precisions, prepare, saes_name
from kit.process import (RANK, WORLD, check_disk, keep_freed_memory, lock, of_the_first,
                         run_as_command, wait_for_all)
from kit.recording import record_split, statistics_of, token_file
from kit.probes import probe_rows
from kit.readings import readings
from kit.rows import best_latents, hierarchy_rows, hypernym_rows, latent_rows, matched_sets
from kit.store import atomic_write, checksum, hash_of, read_record, reuse, write_record
from kit.tables import markdown
from metrics import (SAMPLE, as_labels, correct_by_class, dictionaries_of, kappa, linear_probe,
                     profile_latents, reconstruct, relate, responses_of, score_hierarchy)
from sae import (SAE_FILES, ActivationBuffer, SAEError, SparseAutoencoder, Statistics, Training,
                 train_sae)
from taxonomy import Taxonomy, TaxonomyError

HERE = Path(__file__).resolve().parent
VAL_BATCH = 2048  # tokens scored at once
PROBE_STEPS = 3000  # of the linear probe, at least
PERMUTED = {"sae": 40, "neurons": 10, "untrained": 10}  # trees whose classes are permuted
LIMITS = {  # of the settings that are numbers: the least and the largest
    "expansion": (1, 10**9), "l1": (0, 1e9), "epochs": (1, 10**9), "batch_size": (1, 10**9),
    "lr": (1e-12, 1), "top_k": (2, 10**9), "response_rate": (1e-12, 1), "seed": (0, 2**62),
    "images_per_class": (1, 10**9), "seeds": (1, 1000),
}


def parse_settings(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS, allow_abbrev=False)
    add = parser.add_argument
    add("--layers", default="all", help="blocks, from 0: all, last, 0-11 or 3,7,11 (default: all)")
    add("--data", help="folder with train/ and val/ of wnid folders, or Kaggle's ImageNet; or "
        "tiny-imagenet, which is fetched (default: $IMAGENET_DIR, ./imagenet, else the demo)")
    add("--backbone", help="entry point of the hub: dinov2_vits14, _vitb14, _vitl14, _vitg14, each "
        "also with _reg (default: dinov2_vitg14, the paper's)")
    add("--hub", help=f"torch.hub repository, or a folder with a hubconf.py (default: {HUB})")
    add("--transform", choices=["model", "dinov2"], default="model",
        help="of images: as the model's pretrained_cfg asks, if it has one, or DINOv2's (model)")
    add("--out", help="output folder (default: runs/<data>-<backbone>)")
    add("--expansion", type=int, default=8, help="SAE: latents per dimension of the token (8)")
    add("--activation", default="relu", help="SAE: relu, the paper's, or topk-K, as topk-32 (relu)")
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
    add("--seeds", type=int, default=1, help="so many SAEs a layer, from --seed on (1)")
    settings = parser.parse_args(argv)
    for name, (low, high) in LIMITS.items():
        value = getattr(settings, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} {value}: give a number from {low} to {high}")
    if not re.fullmatch(r"all|last|\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*", settings.layers):
        parser.error(f"--layers {settings.layers}: give all, last, a range 0-11 or a list 3,7,11")
    if not re.fullmatch(r"relu|topk-[1-9]\d{0,5}", settings.activation):
        parser.error(f"--activation {settings.activation}: give relu or topk-K, as topk-32")
    if settings.device == "cuda" and torch.cuda.device_count() == 0:
        parser.error("--device cuda: PyTorch finds no GPU here; give --device cpu, or leave it out")
    settings.device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return settings


def train_layer(job: Job, training: Training, folder: Path, layer: int, tokens: dict, about: dict,
                progress) -> None:
    """Stage 2: the class tokens of a layer -> its SAE, in `folder`."""
    record = tokens["train"][layer]
    made_from = {**asdict(training), "layer": layer, "tokens": record["tokens"],
                 "code": hash_of(HERE / "sae.py")}
    if reuse(folder / "sae.json", made_from):
        return
    buffer = ActivationBuffer(token_file(record), job.settings.device)
    try:
        sae = train_sae(buffer, training, statistics_of(record), about | made_from, progress)
    except SAEError as error:
        raise SAEError(f"layer {layer}: {error}") from error
    with atomic_write(folder) as part:
        sae.cpu().save_pretrained(part)
        files = {file: checksum(part / file) for file in SAE_FILES}
        write_record(part / "sae.json", made_from, files=files)


def permuted_trees(tree: Taxonomy) -> list[Taxonomy]:
    """The controls: one tree a draw, the same for all layers, dictionaries and seeds."""
    rng = np.random.default_rng(0)
    return [tree.permuted(rng.permutation(len(tree.classes))) for _ in range(PERMUTED["sae"])]


def score_layer(layer: int, seed: int, sae: SparseAutoencoder, train: ActivationBuffer,
                val: ActivationBuffer, labels: dict, statistics: Statistics, tree: Taxonomy,
                controls: list[Taxonomy], probe, k: int, response_rate: float) -> dict:
    """Stage 3: the latents of a layer -> its rows of all tables. probe: of tokens, `linear_probe`."""
    C, about = len(tree.classes), {"layer": layer, "seed": seed}
    made = {"hierarchy": [], "permuted_sd": [], "relations": [], "probes": [], "iou_draws": {}}
    mean = statistics.mean.float().to(train.device)
    sample = train.rows_at(slice(SAMPLE))  # rows are in random order
    for dictionary in dictionaries_of(sae, sample, mean, (sae.about or {}).get("seed", seed)):
        name, encode = dictionary.name, dictionary.encode
        profile = profile_latents(encode, val.batches(VAL_BATCH), labels["val"], C)
        responses = responses_of(profile, k, response_rate)
        scores = score_hierarchy(responses, tree)
        permuted = [score_hierarchy(responses, other) for other in controls[: PERMUTED[name]]]
        rows = hierarchy_rows({**about, "dictionary": name}, scores, permuted)
        made["hierarchy"] += rows["hierarchy"]
        made["permuted_sd"] += rows["permuted_sd"]
        related, chain = relate(encode, val.rows_at, profile, scores, tree, k)
        made["relations"].append({**about, "dictionary": name, **related._asdict()})
        if name == "sae":
            made["permuted_draws"] = rows["permuted_draws"]
            made["hypernyms"] = best_latents(scores, profile, tree, k)
            made["latents"] = latent_rows(layer, scores, profile, responses, tree)
            made["chain"] = [(tree.wnids[scores.hypernyms[h]], share) for h, share in chain]
            read, *others = readings(profile, [tree, *controls[:10]], [scores, *permuted[:10]])
            made["readings"] = [
                {"claim": claim, "reading": reading, **about, "value": value,
                 "permuted": float(np.mean([other[claim, reading] for other in others]))}
                for (claim, reading), value in read.items()]
        del profile, responses  # before the probes take their room
        rows, draws = probe_rows(dictionary, train, val, labels, tree, controls[0])
        made["probes"] += [{**about, **row} for row in rows]
        made["iou_draws"][name] = draws.tolist()
    reconstruction, sums = reconstruct(sae, val.batches(VAL_BATCH), labels["val"], C, probe)
    correct = correct_by_class(probe, val.batches(VAL_BATCH), labels["val"], C)
    gamma = float(statistics.mean.norm()) / statistics.rms_deviation
    made["layers"] = {**about, "width": train.width, "gamma": gamma,
                      "probe_top1": float(correct.sum() / val.rows), **reconstruction._asdict()}
    images = torch.bincount(as_labels(labels["val"], val.rows), minlength=C)
    made["by_class"] = {"images": images.tolist(), "correct": correct.tolist()}
    made["by_class"] |= dict(zip(("error", "squares", "active"), sums.T.tolist()))
    return made


def scores_of_layer(job: Job, layer: int, paths: dict, tokens: dict, folders: dict, controls):
    """Stage 3 for all seeds of a layer, unless it is done: {(layer, seed): record}."""
    train, val = tokens["train"][layer], tokens["val"][layer]
    labels = {split: tokens[split]["labels"] for split in ("train", "val")}
    code = [HERE / f"{module}.py" for module in ("metrics", "taxonomy", "sae", "reproduce")]
    settings, scores, probe = job.settings, {}, None
    for one in job.trainings:
        path, folder = paths[layer, one.seed], folders[layer, one.seed]
        made_from = {
            "tokens": [train["tokens"], val["tokens"]], "classes": job.tree.wnids,
            "sae": checksum(folder / "model.safetensors"), "top_k": settings.top_k,
            "seed": one.seed, "code": hash_of(*code), "response_rate": settings.response_rate,
        }
        scores[layer, one.seed] = reuse(path, made_from)
        if scores[layer, one.seed]:
            continue
        files = [token_file(record) for record in (train, val)]
        statistics = statistics_of(train)
        if probe is None:  # whatever the SAE: once a layer
            moments = [x.to(settings.device) for x in (statistics.mean, statistics.variance)]
            probe = linear_probe(np.load(files[0], mmap_mode="r"), labels["train"],
                                 len(job.tree.classes), *moments, PROBE_STEPS)
        sae = SparseAutoencoder.from_pretrained(folder).to(settings.device)
        made = score_layer(layer, one.seed, sae,
                           *(ActivationBuffer(file, settings.device) for file in files), labels,
                           statistics, job.tree, controls, probe, settings.top_k,
                           settings.response_rate)
        scores[layer, one.seed] = write_record(path, made_from, **made)
    return scores


def tables_of(scores: dict[tuple[int, int], dict], job: Job) -> dict:
    """Stage 4: the scores by layer and seed -> the tables of a run."""
    seeds, layers = [training.seed for training in job.trainings], job.layers
    hypernyms, agreements = {}, []
    for seed in seeds:
        best = {layer: scores[layer, seed]["hypernyms"] for layer in layers}
        hypernyms[seed] = hypernym_rows(best, job.tree)
        agreements.append(kappa(matched_sets(list(best.values()), job.tree)))
    with warnings.catch_warnings():  # of a pair that is NaN in every seed
        warnings.simplefilter("ignore")
        agreement = np.nanmean(agreements, 0)
    tables = {name: [row for record in scores.values() for row in record[name]]
              for name in ("hierarchy", "permuted_sd", "probes", "relations", "readings")}
    return tables | {
        "layers": [record["layers"] for record in scores.values()],
        "hypernyms": hypernyms[seeds[0]],
        "latents": [row for layer in layers for row in scores[layer, seeds[0]]["latents"]],
        "consistency": [
            {"layer_a": layers[a], "layer_b": layers[b], "kappa": float(agreement[a, b])}
            for a, b in zip(*np.triu_indices(len(layers), 1))],
        "claims": claims_of(scores, hypernyms, job.tree), "agreement": agreement,
    }


def make_results(job: Job, folders: dict, record: dict, scores: dict, tokens: dict) -> None:
    """Stage 4: scores -> tables, claims, figures, report, in the folder results/."""
    settings, first = job.settings, job.trainings[0]
    record |= tables_of(scores, job)
    records = {layer: scores[layer, first.seed] for layer in job.layers}
    latents = report.named_latents(record["hypernyms"], records)
    chain = report.chain_to_show(records, job.tree)
    saes = {layer: folders[layer, first.seed] for layer in job.layers}
    root = saes[job.layers[0]].parent
    title = f"{settings.backbone} on {Path(settings.data).resolve().name}, "
    title += saes_name(settings, first) + f" and {settings.seeds - 1} more" * (settings.seeds > 1)
    with atomic_write(job.out / "results") as folder:
        (folder / "figures").mkdir(parents=True)
        report.draw_latents(folder / "figures", latents + chain, saes, job.model,
                            Decoded(job.val, job.transform), tokens["val"]["ids"])
        found, shown = report.write_results(folder, title, job.note, record, latents, chain,
                                            job.tree)
    print("\n" + "\n\n".join(found) + "\n")
    for row in shown["claims"]:
        sure = "" if row["p, or 95% interval"] is None else f", {row['p, or 95% interval']}"
        print(f"  {row['']} {row['claim']}: {row['value']}{sure}, {row['verdict']}")
    print(f"\n{job.note}\nReport: {job.out / 'results/report.html'}; tables beside it; "
          f"SAEs: {root}")
    if not settings.saes:
        repo = settings.push_to_hub or "USER/NAME"
        tables = f"{markdown(shown['by layer'])}\n\n{markdown(shown['claims'])}"
        hub.write_card(root, repo, title, job.note, job.layers[-1], tables)
    if settings.push_to_hub:
        hub.publish(settings.push_to_hub, root, job.out / "results")


def run_stages(job: Job, roots: dict[int, Path]) -> None:
    """All four stages; `roots` are the folders of the SAEs by seed."""
    settings, first, times = job.settings, job.trainings[0], [time.time()]
    mine = [(layer, one) for one in job.trainings for layer in job.layers][RANK::WORLD]
    print("[1/4] images -> class tokens")
    made_from = {
        "format": 1, "images": fingerprint(job.train, job.val), "backbone": settings.backbone,
        "train images": len(job.train.names), "val images": len(job.val.names),
        "weights": weights_hash(job.model), "transform": str(job.transform),
        "precision": settings.token_precision,
    }
    tokens = {
        name: record_split(job.model, job.transform, split, job.layers, job.out / "tokens" / name,
                           made_from, settings.skip_bad_images)
        for name, split in (("train", job.train), ("val", job.val))
    }
    times.append(time.time())

    print(f"[2/4] class tokens -> sparse autoencoders: {settings.saes or first}")
    folders = {(layer, one.seed): roots[one.seed] / f"layer_{layer:02d}"
               for one in job.trainings for layer in job.layers}
    about = {"backbone": settings.backbone, "images": made_from["images"]}
    with tqdm(total=0, unit="step", disable=RANK > 0 or bool(settings.saes)) as bar:
        def progress(step, steps, loss):
            bar.total = steps * len(mine)
            bar.update()

        for layer, one in [] if settings.saes else mine:
            bar.set_description(f"      layer {layer}, seed {one.seed}")
            train_layer(job, one, folders[layer, one.seed], layer, tokens, about, progress)
    wait_for_all()
    times.append(time.time())

    print("[3/4] latents -> scores")
    kept = job.out / "scores"
    paths = {(layer, one.seed): kept / saes_name(settings, one) / f"layer_{layer:02d}.json"
             for layer in job.layers for one in job.trainings}
    scores, controls = {}, permuted_trees(job.tree)
    for layer in tqdm(job.layers[RANK::WORLD], "      layers", unit="layer", disable=RANK > 0):
        scores |= scores_of_layer(job, layer, paths, tokens, folders, controls)
    wait_for_all()
    times.append(time.time())
    if RANK > 0:
        return

    print("[4/4] scores -> tables, figures, report")
    record = {
        "settings": vars(settings) | {"batch_size": first.batch_size, "out": str(job.out)},
        "made_from": made_from, "saes": str(roots[first.seed]),
        "seconds": dict(zip(("tokens", "saes", "scores"), np.diff(times).round(1).tolist())),
        "left_out": {split: len(found["left_out"]) for split, found in tokens.items()},
        "versions": {name: version(name) for name in ("torch", "torchvision", "nltk", "numpy")},
    }
    scores = {key: scores.get(key) or read_record(path) for key, path in paths.items()}
    make_results(job, folders, record, scores, tokens)
    print(f"Done in {time.time() - times[0]:.0f} s.")


def run(settings: argparse.Namespace) -> None:
    said = of_the_first(precisions(settings.device))
    settings.token_precision, settings.sae_precision = said
    if RANK > 0 and settings.plan:
        return
    if RANK > 0:
        wait_for_all()  # until the first process has found all as it should be
    job = prepare(settings)
    counts = len(job.train.names), len(job.val.names)
    parts = plan.plan(job.model, job.transform, *counts, job.layers, job.trainings)
    if settings.plan:
        parts = plan.with_seconds(parts, job.model, job.train, job.transform, counts[1],
                                  job.trainings[0], settings.token_precision)
    print(plan.table(parts))
    if settings.plan:
        return
    roots = {one.seed: job.out / "saes" / saes_name(settings, one) for one in job.trainings}
    if settings.saes:
        width = job.model.cls_token.shape[-1]
        roots = {settings.seed: hub.find_saes(settings.saes, job.layers, width, settings.backbone)}
    check_disk(job.out, plan.still_to_write(parts, job.out, roots.values(), job.layers))
    if RANK == 0:
        wait_for_all()
    with lock(job.out):
        run_stages(job, roots)


def main(argv=None) -> int:
    with redirect_stderr(sys.stderr if RANK == 0 else io.StringIO()):  # said once
        settings = parse_settings(argv)
    keep_freed_memory()
    return run_as_command(run, settings, expected=(BackboneError, SAEError, TaxonomyError))


if __name__ == "__main__":
    sys.exit(main())
