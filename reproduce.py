"""Does DINOv2's class token, layer by layer, hold the ImageNet hierarchy? (after arXiv 2505.15970)

    python reproduce.py --layers all                    the built-in demo, minutes on a CPU
    python reproduce.py --layers all --data data/tiny-imagenet-200 --backbone dinov2_vits14
                                                        DINOv2 on photographs of 200 classes
    python reproduce.py --layers all --data imagenet    the paper's job: dinov2_vitg14, one GPU

Four stages; the first three take what is already in the output folder:
    1. images -> class tokens of every asked-for layer    tokens/{train,val}/layer_NN.npy
    2. class tokens -> one sparse autoencoder a layer     saes/<settings>-<hash>/layer_NN/
    3. latents -> reconstruction, probes, hierarchy       scores/<settings>-<hash>/layer_NN.json
    4. scores -> tables, claims, figures, report          results/<settings>-<hash>/

torchrun --nproc-per-node 8 reproduce.py ...  shares images, layers and seeds among eight GPUs.
"""
import argparse
import csv
import itertools
import json
import os
import pickle
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: else busy machines crawl
import numpy as np
import torch
from huggingface_hub import HfApi
from tqdm import tqdm

from dinov2_hooks import (HUB, BackboneError, ImageError, check_class_token, finish, layer_name,
                          record, token_path)
from kit import hub, report
from kit.claims import claims_of
from kit.data import Decoded, fingerprint, workers_for
from kit.inputs import find_inputs, where_to
from kit.probes import probe_rows
from kit.readings import reading_rows
from kit.rows import emergence_rows, hierarchy_rows, hypernym_rows, latent_rows, matched_sets
from kit.tables import write_csv
from kit.runs import (RANK, RANKS, InputError, barrier, check_disk, code_of, lock, plain_streams,
                      run_as_command, short_hash, to_json, write_aside)
from metrics import (SAMPLE, TOP, Placed, dictionaries_of, kappa, linear_probe, profile_latents,
                     reconstruct, relate, responses_of)
from sae import ActivationBuffer, SAEError, SparseAutoencoder, Training, fast_precision, train_sae
from taxonomy import TaxonomyError

HERE = Path(__file__).resolve().parent
VAL_BATCH = 2048  # tokens scored at once
TREES = {"sae": 40, "neurons": 10, "untrained": 10}  # how many permuted trees
SCORING = [  # code on which scores depend, with `score_layer`
    "sae.py", "taxonomy.py", "metrics.py", "kit/probes.py", "kit/readings.py", "kit/rows.py"]


def number(kind, least, most=2**62):
    def parse(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text}: give a number from {least} to {most}")
        return value
    return parse


def parse_settings(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS, allow_abbrev=False)
    add = parser.add_argument
    count = number(int, 1)
    add("--layers", default="all", help="blocks, from 0: all, last, 0-11 or 3,7,11 (%(default)s)")
    add("--data", help="folder of images, see README ($IMAGENET_DIR, ./imagenet, else the demo)")
    add("--backbone", help="dinov2_vits14, _vitb14, _vitl14, or with _reg (dinov2_vitg14)")
    add("--hub", help=f"torch.hub repository, or a folder with a hubconf.py, and runs it ({HUB})")
    add("--transform", default="model", choices=["model", "dinov2"],
        help="of images: as the model's pretrained_cfg asks, or DINOv2's (%(default)s)")
    add("--precision", choices=["float32", "float16", "bfloat16"],
        help="of the forward pass (float16 on a GPU, else float32; or as recorded)")
    add("--out", help="output folder (runs/<data>-<backbone>)")
    # the SAEs and their training
    add("--expansion", type=count, default=8, help="latents per dimension (%(default)s)")
    add("--activation", default="relu", help="relu, the paper's, or topk-K, as topk-32")
    add("--l1", type=number(float, 0), default=0.1, help="λ, the weight of ‖z‖₁ (%(default)s)")
    add("--inputs", default="centred", choices=["centred", "raw"],
        help="tokens minus their mean, or as they come (%(default)s)")
    add("--epochs", type=count, default=50, help="of an SAE's training (%(default)s)")
    add("--batch-size", type=count, help="of training (4096; less, for at least 2,000 steps)")
    add("--lr", type=number(float, 1e-12), help="learning rate (3.5 / √(latents x steps))")
    add("--seed", type=number(int, 0), default=0, help="of the SAEs (%(default)s)")
    add("--seeds", type=count, default=1, help="SAEs per layer, from --seed on (%(default)s)")
    add("--saes", help="USER/NAME, or a folder of layer_NN: score these instead of training")
    # scores, and how the run goes about it
    add("--top-k", type=number(int, 2, TOP // 2), default=16,
        help="top images of a latent (%(default)s)")
    add("--response-rate", type=number(float, 1e-12, 1), default=0.5,
        help="θ: a latent responds to a class at this firing rate (%(default)s)")
    add("--images-per-class", type=count, help="use no more training images of a class")
    add("--skip-bad-images", action="store_true", help="go on without images that do not decode")
    add("--push-to-hub", help="USER/NAME: publish the first seed's SAEs and results")
    add("--device", choices=["cuda", "cpu"], help="(cuda if there is one)")
    add("--workers", type=number(int, 0), help="that decode images (one per CPU, at most 16)")
    settings = parser.parse_args(argv)
    if not re.fullmatch(r"all|last|\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*", settings.layers):
        parser.error(f"--layers {settings.layers}: give all, last, a range 0-11 or a list 3,7,11")
    if settings.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here; give --device cpu, or leave it out")
    if settings.saes and (settings.push_to_hub or settings.seeds > 1):
        parser.error("--push-to-hub and --seeds are for SAEs that this run trains: leave out "
                     "--saes")
    settings.device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return settings


def trainings_of(settings, rows):
    """The settings of the SAEs, one for each seed."""
    largest = min(4096, max(16, rows * settings.epochs // 2000))  # small data needs small batches
    batch_size = settings.batch_size or min(rows // 2, 2 ** int(np.log2(largest)))
    return [Training(settings.expansion, settings.activation, settings.l1, settings.inputs,
                     settings.epochs, batch_size, settings.lr, seed,
                     fast_precision(settings.device))
            for seed in range(settings.seed, settings.seed + settings.seeds)]


# ---------------------------------------------------------------- stage 1


def check_tokens(settings, inputs, folder):
    """What the class tokens in `folder` are made of. Raises InputError where they were made of
    something else: recording takes hours, and is not begun anew unasked."""
    path = folder / "settings.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    precision = "float16" if settings.device == "cuda" else "float32"
    tensors = inputs.model.state_dict().values()
    weights = sum(tensor.double().abs().sum().item() for tensor in tensors)
    about = {
        "backbone": settings.backbone, "hub": settings.hub, "weights": f"{weights:.10g} in sum",
        "images": f"{inputs.note} {fingerprint(inputs.train, inputs.val)}",
        "transform": str(inputs.transform),
        "precision": settings.precision or known.get("precision", precision)}
    for key, value in about.items():
        if known.get(key, value) != value:
            raise InputError(f"the class tokens in {folder} were recorded with other {key}: "
                             f"{known[key]}, now {value}; give another --out, or delete them")
    code = short_hash(code_of(HERE / "dinov2_hooks.py"), code_of(HERE / "kit/data.py"))
    if known.get("code", code) != code:
        print(f"      the code has changed since {folder} was recorded: delete that folder to "
              "record anew")
    return about | {"code": known.get("code", code)}


def record_tokens(settings, inputs, folder, about):
    """Stage 1. Returns the labels of the rows by split, and as val_ids which image each row is."""
    if RANK == 0:
        with write_aside(folder / "settings.json") as part:
            part.write_text(to_json(about))
    model = inputs.model.to(settings.device)
    side = inputs.transform.transforms[1].size[0]
    workers = workers_for(side**2) if settings.workers is None else settings.workers
    labels = {}
    for name, split in (("train", inputs.train), ("val", inputs.val)):
        missing = [n for n in inputs.layers if not token_path(folder / name, n).exists()]
        if missing:
            check_class_token(model, torch.rand(3, side, side, device=settings.device), missing)
            images = Decoded(split, inputs.transform)
            record(model, images, folder / name, missing, about["precision"], workers, RANK, RANKS,
                   settings.skip_bad_images, ready=barrier)
        barrier()
        if RANK == 0 and missing:
            finish(folder / name, missing)
        barrier()
        bad = json.loads((folder / name / "left_out.json").read_text())
        ids = np.delete(np.arange(len(split.names)), bad)
        labels[name] = split.labels[ids]
        labels["val_ids"] = ids
    model.cpu()  # ViT-g's 4.5 GB are of no use in stages 2 and 3
    return labels


# ---------------------------------------------------------------- stage 2


class Job(NamedTuple):
    """An SAE of a layer and a seed. Folders' names hold a hash of what their content is made of."""

    layer: int
    training: Training
    sae: Path
    scores: Path


def jobs_of(settings, inputs, trainings, out, about):
    code = [code_of(HERE / file) for file in SCORING]
    code.append(code_of(HERE / "reproduce.py", "open_layer", "score_layer", "permuted_trees"))
    scoring = (pickle.dumps(inputs.tree), settings.top_k, settings.response_rate, code)
    jobs = []
    for training in trainings:
        made_of = short_hash(about, training, code_of(HERE / "sae.py"))
        name = f"{training.activation}-l1_{training.l1:g}-{training.inputs}-seed_{training.seed}"
        folder = out / "saes" / f"{name}-{made_of}"
        newest = 0  # of the files of published SAEs
        if settings.saes:
            width = inputs.model.cls_token.shape[-1]
            folder = hub.find_saes(settings.saes, inputs.layers, width, settings.backbone)
            newest = max(path.stat().st_mtime_ns for path in folder.rglob("*"))
        made_of = short_hash(about, folder.name, newest, scoring)
        for layer in inputs.layers:
            name = layer_name(layer)
            scores = out / "scores" / f"{folder.name}-{made_of}" / f"{name}.json"
            jobs.append(Job(layer, training, folder / name, scores))
    return jobs


def train_saes(settings, jobs, tokens):
    """Stage 2: the SAE of each job, unless it is there."""
    pending = [job for job in jobs[RANK::RANKS] if not job.sae.is_dir()]
    for i, job in enumerate(pending, 1):
        title = f"      layer {job.layer}, seed {job.training.seed} ({i} of {len(pending)})"
        buffer = ActivationBuffer(token_path(tokens / "train", job.layer), settings.device)
        about = {**asdict(job.training), "layer": job.layer, "backbone": settings.backbone}
        try:
            sae = train_sae(buffer, job.training, about=about, title=None if RANK else title)
        except SAEError as error:
            raise SAEError(f"layer {job.layer}: {error}") from error
        with write_aside(job.sae) as part:
            sae.cpu().save_pretrained(part)
            write_csv(part / "training.csv", sae.history)
    barrier()


# ---------------------------------------------------------------- stage 3


def open_layer(train_path, val_path, labels, classes, device):
    """What all SAEs of a layer are scored with: (train, val, statistics, linear probe)."""
    train = ActivationBuffer(train_path, device)
    statistics = train.statistics()
    probe = linear_probe(train.tokens, labels["train"], classes, statistics.mean,
                         statistics.variance)
    return train, ActivationBuffer(val_path, device), statistics, probe


def permuted_trees(tree):
    """The controls: one tree a draw, the same for all layers, dictionaries and seeds."""
    rng = np.random.default_rng(0)
    return [tree.permuted(rng.permutation(len(tree.classes))) for _ in range(TREES["sae"])]


def score_layer(where, sae, layer, labels, tree, controls, k, response_rate):
    """Stage 3: the latents of a layer -> its rows of the tables, which begin with `where`, the
    layer and seed, and what claims and hypernyms.csv are made of over layers."""
    train, val, statistics, probe = layer
    C = len(tree.classes)
    rows = {"hierarchy": [], "relations": [], "probes": []}
    made = {"iou_draws": {}}
    mean = statistics.mean.float()
    sample = train.rows_at(slice(SAMPLE))  # rows are in random order
    seed = (sae.about or {}).get("seed", where["seed"])
    for name, encode, probed in dictionaries_of(sae, sample, mean, seed):
        profile = profile_latents(encode, val.batches(VAL_BATCH), labels["val"], C)
        responses = responses_of(profile, k, response_rate)
        placed = Placed(responses, tree)
        permuted = [Placed(responses, other) for other in controls[: TREES[name]]]
        by_tree, draws = hierarchy_rows(name, placed, permuted)
        rows["hierarchy"] += by_tree
        related = relate(encode, val.rows_at, profile, placed, k)
        rows["relations"].append({"dictionary": name, **related})
        if name == "sae":
            made["permuted_draws"] = draws
            made["hypernyms"] = hypernym_rows(placed, profile)
            rows["latents"] = latent_rows(placed, profile)
            rows["readings"] = reading_rows(profile, placed, permuted[:10])
        del profile, responses, placed, permuted  # before the probes take their room
        by_tree, draws = probe_rows(name, probed, train, val, labels, tree, controls[0])
        rows["probes"] += by_tree
        made["iou_draws"][name] = draws
    quality, made["by_class"] = reconstruct(sae, val.batches(VAL_BATCH), labels["val"], C, probe)
    gamma = statistics.mean.norm() / statistics.rms_deviation
    size = {"width": train.width, "latents": len(sae.b_enc)}
    rows["layers"] = [{**size, "gamma": gamma, **quality._asdict()}]
    for name in rows:
        made[name] = [{**where, **row} for row in rows[name]]
    return made


def score_layers(settings, inputs, tokens, labels, jobs):
    """Stage 3: {(layer, seed): rows of all tables}, read where they are there."""
    controls = permuted_trees(inputs.tree)
    for n in tqdm(inputs.layers[RANK::RANKS], "      layers", unit="layer", disable=RANK > 0):
        pending = [job for job in jobs if job.layer == n and not job.scores.exists()]
        if pending:  # the linear probe is fitted once a layer, whatever the SAE
            paths = [token_path(tokens / split, n) for split in ("train", "val")]
            layer = open_layer(*paths, labels, len(inputs.tree.classes), settings.device)
        for job in pending:
            sae = SparseAutoencoder.from_pretrained(job.sae).to(settings.device)
            where = {"layer": n, "seed": job.training.seed}
            made = score_layer(where, sae, layer, labels, inputs.tree, controls, settings.top_k,
                               settings.response_rate)
            with write_aside(job.scores) as part:
                part.write_text(to_json(made))
    barrier()
    return {(job.layer, job.training.seed): json.loads(job.scores.read_text()) for job in jobs}


# ---------------------------------------------------------------- stage 4


def tables_of(scores):
    """Stage 4: the scores by layer and seed -> the tables of a run."""
    scores = dict(sorted(scores.items()))
    layers, seeds = (sorted(set(numbers)) for numbers in zip(*scores))
    tables = {"consistency": []}
    for name in ("layers", "hierarchy", "probes", "relations", "readings", "latents"):
        tables[name] = sum((record[name] for record in scores.values()), [])
    tables["latents"] = [row for row in tables["latents"] if row["seed"] == seeds[0]]
    for seed in seeds:
        rows = {layer: scores[layer, seed]["hypernyms"] for layer in layers}
        if seed == seeds[0]:
            tables["hypernyms"] = emergence_rows(rows)
        agreement = kappa(matched_sets(rows.values()))
        for a, b in itertools.combinations(layers, 2):
            value = agreement[layers.index(a), layers.index(b)]
            row = {"layer_a": a, "layer_b": b, "seed": seed, "kappa": value}
            tables["consistency"].append(row)
    tables["claims"] = claims_of(scores)
    return tables


def training_rows(jobs):
    """Rows of training.csv; none of SAEs that were trained elsewhere."""
    rows = []
    for job in jobs:
        path = job.sae / "training.csv"
        if path.exists():
            for row in csv.DictReader(path.open()):
                where = {"layer": job.layer, "seed": job.training.seed}
                rows.append(where | {key: float(value) for key, value in row.items()})
    return rows


def say_what_is_written(inputs, jobs, out):
    """Bytes to write and bytes free, and what lies there from other settings or code."""
    width = inputs.model.cls_token.shape[-1]
    images = len(inputs.train.names) + len(inputs.val.names)
    tokens = 2 * width * images * len(inputs.layers)
    done = sum(path.stat().st_size for path in (out / "tokens").rglob("layer_*"))
    missing = sum(not job.sae.is_dir() for job in jobs)
    saes = 8 * jobs[0].training.expansion * width**2 * missing
    check_disk(out, max(0, tokens - done) + saes)
    used = {path.parent for job in jobs for path in (job.sae, job.scores)}
    unused = {*(out / "saes").glob("*"), *(out / "scores").glob("*")} - used
    if unused:
        names = ", ".join(sorted(str(path.relative_to(out)) for path in unused))
        print(f"      made with other settings or code, not used now: {names}")


def run(settings):
    if RANK > 0:
        barrier()  # the first process fetches what has to be fetched
    start = time.time()
    out = where_to(settings)
    card = torch.cuda.get_device_name() if settings.device == "cuda" else "no GPU is used"
    print(f"      device: {settings.device} ({card}), PyTorch {torch.__version__}")
    if settings.push_to_hub:
        HfApi().whoami()  # raises where there is no token, before the hours are spent
    with lock(out):
        inputs = find_inputs(settings, out)
        tokens = out / "tokens"
        trainings = trainings_of(settings, len(inputs.train.names))
        about = check_tokens(settings, inputs, tokens)
        jobs = jobs_of(settings, inputs, trainings, out, about)
        if RANK == 0:
            say_what_is_written(inputs, jobs, out)
            barrier()
        print(f"[1/4] images -> class tokens ({about['precision']})")
        labels = record_tokens(settings, inputs, tokens, about)
        print(f"[2/4] class tokens -> sparse autoencoders: {settings.saes or trainings[0]}")
        if not settings.saes:
            train_saes(settings, jobs, tokens)
        print("[3/4] latents -> scores")
        scores = score_layers(settings, inputs, tokens, labels, jobs)
        if RANK == 0:
            print("[4/4] scores -> tables, figures, report")
            record = {
                "settings": vars(settings), "made_of": about, "saes": str(jobs[0].sae.parent),
                "torch": torch.__version__, **tables_of(scores), "training": training_rows(jobs)}
            write_results(settings, inputs, out, jobs, record, labels["val_ids"])
            print(f"Done in {time.time() - start:.0f} s.")


def write_results(settings, inputs, out, jobs, record, ids):
    """Stage 4: tables, claims, figures and the report; the first seed's latents are shown."""
    saes = jobs[0].sae.parent
    shown = [(job.scores.parent.name, job.layer) for job in jobs]
    folder = out / "results" / f"{saes.name}-{short_hash(shown)}"
    inputs.model.to(settings.device)  # for the maps
    title = f"{settings.backbone} on {Path(settings.data).resolve().name}"
    with write_aside(folder) as part:
        print(report.write(part, title, inputs, record, saes, ids))
    if settings.push_to_hub:
        hub.publish(settings.push_to_hub, saes, folder, inputs, settings.backbone)
    print(f"\nReport: {folder / 'report.html'}")


def main(argv=None):
    plain_streams()
    settings = parse_settings(argv)
    return run_as_command(run, settings, (BackboneError, ImageError, SAEError, TaxonomyError))


if __name__ == "__main__":
    sys.exit(main())
