"""Does DINOv2's class token, layer by layer, hold the ImageNet hierarchy? (after arXiv 2505.15970)

    python reproduce.py --layers all                    the built-in demo, minutes on a CPU
    python reproduce.py --layers all --data tiny-imagenet --backbone dinov2_vits14
                                                        DINOv2 on photographs of 200 classes
    python reproduce.py --layers all --data imagenet    the paper's job: dinov2_vitg14, one GPU

Four stages; the first three take what is already in the output folder:
    1. images -> class tokens of every asked-for layer    tokens/{train,val}/layer_NN.npy
    2. class tokens -> one sparse autoencoder per layer   saes/<settings>-<hash>/layer_NN/
    3. latents -> reconstruction, probes, hierarchy       scores/<settings>-<hash>/layer_NN.json
    4. scores -> tables, claims, figures, report          results/<settings>-<hash>/

torchrun --nproc-per-node 8 reproduce.py ...  shares images, layers and seeds among eight GPUs.
"""
import argparse
import csv
import itertools
import os
import re
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: else busy machines crawl
import numpy as np
import torch
from huggingface_hub import HfApi
from tqdm import tqdm

from dinov2_hooks import (HUB, BackboneError, ImageError, check_class_token, finish, layer_name,
                          record, rows_to_do, token_path)
from kit import figures, hub, made_of, report
from kit.claims import claims_of
from kit.data import Decoded, fingerprint, workers_for
from kit.files import RANK, InputError, check_disk, finished_results, lock, write_aside
from kit.inputs import find_inputs, where_to
from kit.processes import RANKS, barrier, plain_streams, run_as_command
from kit.rows import emergence_rows, height_rows, matched_sets
from kit.scores import open_layer, permuted_trees, score_layer
from kit.tables import is_other_sparsity, last_layer_of, write_csv, write_tables
from metrics import TOP, kappa
from sae import (HISTORY, SAE_FILES, ActivationBuffer, SAEError, SparseAutoencoder, Training,
                 fast_precision, learning_rate, top_k_of, train_sae)
from taxonomy import TaxonomyError

HERE = Path(__file__).resolve().parent
SPLITS = "train", "val"
HISTORY_FILE = "training.csv"  # beside an SAE
RECORDING = "dinov2_hooks.py", "kit/data.py"  # code that class tokens depend on
SCORING = ("sae.py", "taxonomy.py", "metrics.py", "kit/scores.py", "kit/probes.py",
           "kit/readings.py", "kit/rows.py")


def text(argument):
    """Not the empty one of an unset variable; ~ is the home folder, also where no shell says so."""
    if not argument.strip():
        raise argparse.ArgumentTypeError("nothing is given: an unset variable?")
    return os.path.expanduser(argument)


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
    add = partial(parser.add_argument, type=text)
    count = number(int, 1)
    add("--layers", default="all", help="blocks, from 0: all, last, 0-11 or 3,7,11 (%(default)s)")
    add("--data", help="folder of images, see README, or tiny-imagenet, which is fetched "
        "($IMAGENET_DIR, ./imagenet, else the demo)")
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
    add("--lr", type=number(float, 1e-12), help="(3.5 / √(latents x steps), twice that for topk)")
    add("--seed", type=number(int, 0), default=0, help="of the SAEs (%(default)s)")
    add("--seeds", type=count, default=1, help="SAEs per layer, from --seed on (%(default)s)")
    add("--saes", help="USER/NAME, or a folder of layer_NN: score these instead of training")
    # scores, and how the run goes about it
    add("--top-k", type=number(int, 2, TOP // 2), default=16,
        help="top images of a latent (%(default)s)")
    add("--response-rate", type=number(float, 1e-12, 1), default=0.5,
        help="θ: a latent responds to a class at this firing rate (%(default)s)")
    add("--images-per-class", type=count, help="use no more training images of a class")
    parser.add_argument("--skip-bad-images", action="store_true",
                        help="go on without images that do not decode")
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


def missing_layers(folder, layers):
    return [layer for layer in layers if not token_path(folder, layer).exists()]


def check_tokens(settings, inputs, folder):
    """What the class tokens in `folder` are made of, as kit/made_of.py has it. Raises InputError
    where they were made of something else."""
    path = folder / made_of.NAME
    known = made_of.read_json(path) if path.exists() else {}
    precision = "float16" if settings.device == "cuda" else "float32"
    made = {
        "backbone": settings.backbone, "weights": made_of.weights_of(inputs.model),
        "images": f"{inputs.note} {fingerprint(inputs.train, inputs.val)}",
        "transform": str(inputs.transform),
        "precision": settings.precision or known.get("precision", precision),
        "code": made_of.code_of(HERE, *RECORDING)}
    for key, value in made.items():
        if known.get(key, value) == value:
            continue
        if key == "code" and not any(missing_layers(folder / split, inputs.layers)
                                     for split in SPLITS):
            print(f"      the code has changed since {folder} was recorded: delete that folder to "
                  "record them again")
            made["code"] = known["code"]
            continue
        raise InputError(f"the class tokens in {folder} were recorded with other {key}: "
                         f"{known[key]}, now {value}; put that back, give another --out, or delete "
                         f"{folder}")
    if RANK == 0 and not known:
        if any(folder.rglob("layer_*")):
            print(f"      {path} is not there: the class tokens are taken to be of this command")
        made_of.write_json(path, made)
    return made


def tokens_to_write(inputs, folder):
    """Bytes, without the rows that are recorded already."""
    width = inputs.model.cls_token.shape[-1]
    total = 0
    for name, split in zip(SPLITS, (inputs.train, inputs.val)):
        for layer in missing_layers(folder / name, inputs.layers):
            total += 2 * width * rows_to_do(folder / name, layer, len(split.names))
    return total


def record_tokens(settings, inputs, folder, made):
    """Stage 1. Returns the labels of the rows by split, as val_ids which image each row is, and
    what the tokens are made of: `made`, and the numbers of the images left out."""
    model = inputs.model.to(settings.device)
    side = inputs.transform.transforms[1].size[0]
    workers = workers_for(side**2) if settings.workers is None else settings.workers
    labels = {}
    made = made | {"left_out": {}}
    for name, split in zip(SPLITS, (inputs.train, inputs.val)):
        missing = missing_layers(folder / name, inputs.layers)
        if missing:
            check_class_token(model, torch.rand(3, side, side, device=settings.device), missing)
            images = Decoded(split, inputs.transform)
            record(model, images, folder / name, missing, made["precision"], workers, RANK, RANKS,
                   settings.skip_bad_images, ready=barrier)
        barrier()
        if RANK == 0 and missing:
            finish(folder / name, missing)
        barrier()
        noted = folder / name / "left_out.json"
        left_out = made_of.read_json(noted) if noted.exists() else []
        ids = np.delete(np.arange(len(split.names)), left_out)
        for layer in inputs.layers:
            check_rows(token_path(folder / name, layer), len(ids))
        labels[name] = split.labels[ids]
        labels["val_ids"] = ids
        made["left_out"][name] = left_out
    model.cpu()  # ViT-g's 4.5 GB are of no use in stages 2 and 3
    return labels, made


def check_rows(path, rows):
    """Raises InputError if a file of tokens is cut short, or has other rows."""
    try:
        intact = len(np.load(path, mmap_mode="r")) == rows
    except (ValueError, EOFError):
        intact = False
    if not intact:
        raise InputError(f"{path} is damaged: delete this one file, and the same command records "
                         "its layer again")


# ---------------------------------------------------------------- stage 2


class Job(NamedTuple):
    """An SAE of a layer and a seed."""

    layer: int
    training: Training
    sae: Path
    scores: Path


def changed_settings(settings, seed):
    """As name_value, those of the SAEs that are not the defaults."""
    defaults = vars(parse_settings([])) | {"seed": 0}
    values = vars(settings) | {"seed": seed}
    names = "activation l1 inputs expansion epochs batch_size lr seed".split()
    return [f"{name}_{values[name]}" for name in names if values[name] != defaults[name]]


def jobs_of(settings, inputs, trainings, out, tokens, published):
    """The SAEs of a run; tokens: what these are made of; published: the folder of --saes."""
    scoring = {
        "tokens": tokens, "tree": made_of.tree_of(inputs.tree), "top_k": settings.top_k,
        "response_rate": settings.response_rate, "code": made_of.code_of(HERE, *SCORING)}
    jobs = []
    for training in trainings:
        changed = changed_settings(settings, training.seed)
        sae = {"tokens": tokens, "training": asdict(training),
               "code": made_of.code_of(HERE, "sae.py")}
        if settings.saes:
            saes = published
            files = [f"{layer_name(n)}/{file}" for n in inputs.layers for file in SAE_FILES]
            sae = made_of.files_of(saes, files)
            changed = [saes.name]
        else:
            saes = made_of.folder_for(out / "saes", sae, changed)
        scores = made_of.folder_for(out / "scores", scoring | {"sae": sae}, changed)
        for layer in inputs.layers:
            name = layer_name(layer)
            jobs.append(Job(layer, training, saes / name, scores / f"{name}.json"))
    return jobs


def train_saes(settings, jobs, tokens):
    """Stage 2: the SAE of each job, unless it is there."""
    pending = [job for job in jobs[RANK::RANKS] if not job.sae.is_dir()]
    for i, job in enumerate(pending, 1):
        title = f"      layer {job.layer}, seed {job.training.seed} ({i} of {len(pending)})"
        buffer = ActivationBuffer(token_path(tokens / "train", job.layer), settings.device)
        steps = job.training.epochs * buffer.batches_of_an_epoch(job.training.batch_size)
        latents = job.training.expansion * buffer.width
        rate = learning_rate(latents, steps, top_k_of(job.training.activation, latents))
        config = {**asdict(job.training), "lr": job.training.lr or rate, "layer": job.layer,
                  "backbone": settings.backbone}
        try:
            sae = train_sae(buffer, job.training, about=config, title=None if RANK else title)
        except SAEError as error:
            raise SAEError(f"layer {job.layer}: {error}") from error
        with write_aside(job.sae) as part:
            sae.cpu().save_pretrained(part)
            write_csv(part / HISTORY_FILE, sae.history)
    barrier()


# ---------------------------------------------------------------- stage 3


def score_layers(settings, inputs, out, labels, jobs, made):
    """Stage 3: {(layer, seed): rows of all tables}, read where they are there. made: what the
    tokens are made of, and so the linear probes."""
    controls = permuted_trees(inputs.tree)
    code = made_of.code_of(HERE, "metrics.py", since="class LinearProbe")
    probes = made_of.folder_for(out / "probes", {"tokens": made, "code": code})
    for n in tqdm(inputs.layers[RANK::RANKS], "      layers", unit="layer", disable=RANK > 0):
        pending = [job for job in jobs if job.layer == n and not job.scores.exists()]
        if pending:
            paths = [token_path(out / "tokens" / split, n) for split in SPLITS]
            layer = open_layer(*paths, labels, len(inputs.tree.classes), settings.device,
                               probes / f"{layer_name(n)}.pt")
        for job in pending:
            sae = SparseAutoencoder.from_pretrained(job.sae).to(settings.device)
            where = {"layer": n, "seed": job.training.seed}
            made = score_layer(where, sae, layer, labels, inputs.tree, controls, settings.top_k,
                               settings.response_rate)
            made_of.write_json(job.scores, made)
    barrier()
    if RANK > 0:  # the first process makes the tables
        return {}
    return {(job.layer, job.training.seed): made_of.read_json(job.scores) for job in jobs}


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
    """Rows of training.csv; none of SAEs that were trained elsewhere. Raises InputError if a file
    is damaged."""
    rows = []
    if not all((job.sae / HISTORY_FILE).exists() for job in jobs):
        return rows
    for job in jobs:
        path = job.sae / HISTORY_FILE
        text = path.read_text(encoding="utf-8", errors="replace")
        where = {"layer": job.layer, "seed": job.training.seed}
        try:
            for row in csv.DictReader(text.splitlines()):
                rows.append(where | {key: float(row[key]) for key in HISTORY})
        except (ValueError, TypeError, KeyError, csv.Error):
            text = ""
        if not text.endswith("\n"):  # empty or cut
            raise InputError(f"{path} is damaged: delete this folder, and the same command makes "
                             "it again")
    return rows


def say_what_is_unused(jobs, out):
    """What lies in the folder from other settings or code."""
    used = {path.parent for job in jobs for path in (job.sae, job.scores)}
    unused = {*(out / "saes").glob("*"), *(out / "scores").glob("*")} - used
    if unused:
        names = ", ".join(sorted(str(path.relative_to(out)) for path in unused))
        print(f"      made with other settings or code, not used now: {names}")


def run(settings):
    # the first process fetches what has to be fetched, the others wait
    if RANK > 0:
        barrier()
    start = time.time()
    out = where_to(settings)
    card = torch.cuda.get_device_name() if settings.device == "cuda" else "no GPU is used"
    print(f"      device: {settings.device} ({card}), PyTorch {torch.__version__}")
    if settings.push_to_hub:
        HfApi().whoami()  # raises where there is no token, before the hours are spent
    with lock(out):
        # what there is to work on, and whether it is what the tokens in `out` were made of
        inputs = find_inputs(settings, out)
        published = settings.saes and hub.find_saes(settings, inputs)
        tokens = out / "tokens"
        made = check_tokens(settings, inputs, tokens)
        if RANK == 0:
            check_disk(out, tokens_to_write(inputs, tokens))
            barrier()
        print(f"[1/4] images -> class tokens ({made['precision']})")
        labels, made = record_tokens(settings, inputs, tokens, made)
        # only now is it known which images could be read, of which all that follows is made
        trainings = trainings_of(settings, len(labels["train"]))
        jobs = jobs_of(settings, inputs, trainings, out, made, published)
        if RANK == 0:
            missing = sum(not job.sae.is_dir() for job in jobs)
            width = inputs.model.cls_token.shape[-1]
            check_disk(out, 8 * settings.expansion * width**2 * missing)
            say_what_is_unused(jobs, out)
        print(f"[2/4] class tokens -> sparse autoencoders: {settings.saes or trainings[0]}")
        if not settings.saes:
            train_saes(settings, jobs, tokens)
        print("[3/4] latents -> scores")
        scores = score_layers(settings, inputs, out, labels, jobs, made)
        if RANK == 0:
            print("[4/4] scores -> tables, figures, report")
            record = {
                "settings": vars(settings), "made_of": made, "torch": torch.__version__,
                "saes": os.path.relpath(jobs[0].sae.parent, out),
                "classes": len(inputs.tree.classes), "heights": height_rows(inputs.tree),
                "training": [] if settings.saes else training_rows(jobs), **tables_of(scores)}
            write_results(settings, inputs, out, jobs, record, labels["val_ids"])
            print(f"Done in {time.time() - start:.0f} s.")


def write_results(settings, inputs, out, jobs, record, ids):
    """Stage 4: tables, figures, the page, the answer in print; latents are the first seed's."""
    # a folder of its own for what these scores are of
    saes = jobs[0].sae.parent
    made = {"scores": [str(job.scores.relative_to(out)) for job in jobs]}
    changed = [saes.name] if settings.saes else changed_settings(settings, settings.seed)
    folder = out / "results" / "-".join([*changed, made_of.short_hash(made)])
    title = f"{settings.backbone} on {Path(settings.data).resolve().name}"
    title = "The built-in demo" if settings.data == "demo" else title
    # what the other sparsities that were tried here have
    tried = map(made_of.read_json, finished_results(out))
    others = [last_layer_of(tables) for tables in tried if is_other_sparsity(record, tables)]
    record["others"] = {"(L0, matched)": others}
    with write_aside(folder) as part:
        part.mkdir()
        sentences = write_tables(part, title, inputs.note, record, inputs.layers)
        pictures = figures.draw(part / "figures", record, inputs.layers)
        inputs.model.to(settings.device)  # for the maps
        report.write_page(part, title, inputs, record, saes, ids, sentences, pictures)
        made_of.write_json(part / made_of.NAME, made)
    print(report.printed(sentences, record["claims"]))
    if settings.push_to_hub:
        hub.publish(settings.push_to_hub, saes, folder, inputs, settings.backbone)
    print(f"\nReport: {folder / 'report.html'}")


def main(argv=None):
    plain_streams()
    settings = parse_settings(argv)
    return run_as_command(run, settings, (BackboneError, ImageError, SAEError, TaxonomyError))


if __name__ == "__main__":
    sys.exit(main())
