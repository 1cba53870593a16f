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
from kit.claims import claims_of_seed, combine, reading_rows
from kit.images import Decoded, fingerprint
from kit.job import Job, precisions, prepare, saes_name
from kit.process import (RANK, WORLD, check_disk, keep_freed_memory, lock, of_the_first,
                         run_as_command, wait_for_all)
from kit.recording import record_split, statistics_of, token_file
from kit.store import atomic_write, checksum, hash_of, read_record, reuse, write_record
from kit.tables import markdown
from metrics import (best_latents, consistency, hypernym_rows, iou_draws, linear_probe,
                     profile_latents, readings, relate, score_hierarchy, sparse_units)
from sae import SAE_FILES, ActivationBuffer, SAEError, SparseAutoencoder, Training, train_sae
from taxonomy import TaxonomyError

HERE = Path(__file__).resolve().parent
VAL_BATCH = 2048  # tokens scored at once
SAMPLE = 16_384  # training tokens on which the baselines' thresholds are set
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


def probe_layer(job: Job, path: Path, seed: int, layer: int, tokens: dict) -> float:
    """Accuracy of a linear probe on a layer's tokens, whatever its SAE; kept in `path`."""
    splits = [tokens["train"], tokens["val"]]
    made_from = {"tokens": [split[layer]["tokens"] for split in splits], "seed": seed,
                 "code": hash_of(HERE / "metrics.py")}
    if known := reuse(path, made_from):
        return known["top1"]
    data = []
    for split in splits:
        data += [np.load(token_file(split[layer]), mmap_mode="c"), split["labels"]]
    data = [torch.from_numpy(array).to(job.settings.device) for array in data]
    statistics = statistics_of(tokens["train"][layer])
    top1 = linear_probe(*data, statistics.mean, statistics.variance, seed)
    return write_record(path, made_from, top1=top1)["top1"]


def dictionaries_of(sae: SparseAutoencoder, sample: torch.Tensor, mean: torch.Tensor, seed: int):
    """(name, encoder, decoder) of the SAE, and of two baselines that differ from it in training
    alone: raw neurons and random directions, as many of them firing on a token as its latents."""
    share = float((sae.encode(sample) > 0).float().mean())
    n = len(mean)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the directions that the SAE's training began with
        untrained = SparseAutoencoder(n, len(sae.b_enc)).W_enc.detach().to(mean.device)
    axes = torch.eye(n, device=mean.device)
    return [("sae", sae.encode, sae.decode),
            ("neurons", sparse_units(torch.cat([axes, -axes]), sample, mean, share), None),
            ("untrained", sparse_units(untrained, sample, mean, share), None)]


def score_layer(job: Job, seed: int, path: Path, layer: int, tokens: dict, folder: Path) -> dict:
    """Stage 3: the latents of a layer, whose SAE is in `folder`, -> its rows of all tables; kept in
    `path`."""
    settings, tree, k = job.settings, job.tree, job.settings.top_k
    train, val, labels = tokens["train"][layer], tokens["val"][layer], tokens["val"]["labels"]
    code = [HERE / f"{module}.py" for module in ("metrics", "taxonomy", "sae")]
    made_from = {
        "tokens": [train["tokens"], val["tokens"]], "sae": checksum(folder / "model.safetensors"),
        "classes": tree.wnids, "top_k": k, "seed": seed, "code": hash_of(*code),
        "response_rate": settings.response_rate,
    }
    if known := reuse(path, made_from):
        return known
    probe_path = path.parent.parent / f"probe-seed_{seed}" / path.name
    accuracy = probe_layer(job, probe_path, seed, layer, tokens)
    buffers = [ActivationBuffer(token_file(record), settings.device) for record in (train, val)]
    sample = buffers[0].rows_at(slice(SAMPLE))  # of training tokens: rows are in random order
    statistics = statistics_of(train)
    mean = statistics.mean.float().to(settings.device)
    sae = SparseAutoencoder.from_pretrained(folder).to(settings.device)
    seed_of_sae = (sae.about or {}).get("seed", seed)
    shuffled = np.random.default_rng(seed).permutation(labels)
    kept = {"hierarchy": [], "relations": [], "iou_draws": {}}
    first = {"layer": layer, "seed": seed}
    for name, encode, decode in dictionaries_of(sae, sample, mean, seed_of_sae):
        labelings = {"true": labels, "shuffled": shuffled} if name == "sae" else {"true": labels}
        profiles = profile_latents(encode, buffers[1].batches(VAL_BATCH), list(labelings.values()),
                                   len(tree.classes), k, decode)
        for of, profile in zip(labelings, profiles):
            scores = score_hierarchy(profile, tree, k, settings.response_rate)
            row = {**first, "dictionary": name, "labels": of, **scores.summary()}
            kept["hierarchy"].append(row)
            if of == "shuffled":
                continue
            kept["iou_draws"][name] = iou_draws(profile, scores, tree).tolist()
            related, chain = relate(encode, buffers[1].rows_at, profile, scores, tree, k)
            kept["relations"].append({**first, "dictionary": name, **related._asdict()})
            if name == "sae":
                kept |= {"hypernyms": best_latents(scores, profile, tree, k),
                         "readings": readings(profile, scores, tree, k),
                         "chain": [(tree.wnids[scores.hypernyms[v]], share) for v, share in chain]}
                reconstruction = profile.reconstruction._asdict()
    gamma = float(statistics.mean.norm()) / statistics.rms_deviation
    layers = {**first, "width": len(mean), "gamma": gamma, "probe_top1": accuracy, **reconstruction}
    return write_record(path, made_from, layers=layers, **kept)


def tables_of(scores: dict[tuple[int, int], dict], job: Job) -> dict:
    """Stage 4: the scores by layer and seed -> the tables of a run."""
    seeds, layers = [training.seed for training in job.trainings], job.layers
    pairs, agreements, by_seed, reads, hypernyms = np.triu_indices(len(layers), 1), [], [], [], []
    for seed in seeds:
        records = {layer: scores[layer, seed] for layer in layers}
        best = {layer: record["hypernyms"] for layer, record in records.items()}
        agreements.append(consistency(list(best.values())))
        hypernyms.append(hypernym_rows(best, job.tree))
        by_seed.append(claims_of_seed(list(records.values()), hypernyms[-1]))
        reads += reading_rows(list(records.values()), seed)
    with warnings.catch_warnings():  # of a pair that is NaN in every seed
        warnings.simplefilter("ignore")
        agreement = np.nanmean(agreements, 0)
    return {
        "layers": [record["layers"] for record in scores.values()],
        "hierarchy": [row for record in scores.values() for row in record["hierarchy"]],
        "relations": [row for record in scores.values() for row in record["relations"]],
        "hypernyms": [row for row in hypernyms[0] if row["classes"] >= 5] or hypernyms[0],
        "consistency": [{"layer_a": layers[a], "layer_b": layers[b],
                         "jaccard": float(agreement[a, b])} for a, b in zip(*pairs)],
        "claims": combine(by_seed, reads), "readings": reads,
        "hypernyms_possible": len(hypernyms[0]),
        "agreement": agreement, "all_hypernyms": hypernyms[0],
    }


def make_results(job: Job, folders: dict, record: dict, scores: dict, tokens: dict) -> None:
    """Stage 4: scores -> tables, claims, figures, report, in the folder results/."""
    settings, first = job.settings, job.trainings[0]
    record |= tables_of(scores, job)
    records = {layer: scores[layer, first.seed] for layer in job.layers}
    latents = report.named_latents(record["all_hypernyms"], records)
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
        print(f"  {row['']} {row['claim']}: {row['value']}{sure}")
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
    scores = {}
    for layer, one in tqdm(mine, "      layers", unit="layer", disable=RANK > 0):
        key = layer, one.seed
        scores[key] = score_layer(job, one.seed, paths[key], layer, tokens, folders[key])
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
