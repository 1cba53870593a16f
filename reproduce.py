"""Does DINOv2's class token, layer by layer, hold the ImageNet hierarchy? (after arXiv 2505.15970)

    python reproduce.py --layers all                    the built-in demo, minutes on a CPU
    python reproduce.py --layers all --data tiny-imagenet --backbone dinov2_vits14
                                                        DINOv2 on photographs, which it fetches
    python reproduce.py --layers all --data imagenet    the paper's job: dinov2_vitg14, one GPU

Four stages, each of which takes what is already in the output folder:
    1. images -> class tokens of every asked-for layer    tokens/{train,val}/layer_NN.npy
    2. class tokens -> one sparse autoencoder a layer     saes/<settings>-<hash>/layer_NN/
    3. latents -> reconstruction, probes, hierarchy       scores/<settings>-<hash>/layer_NN.json
    4. scores -> tables, claims, figures, report          results/<settings>/

torchrun --nproc-per-node 8 reproduce.py ...  shares images, layers and seeds among eight GPUs.
"""
import argparse
import io
import itertools
import json
import os
import re
import sys
import time
import warnings
from contextlib import redirect_stderr
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: else busy machines crawl
import numpy as np
import torch
from tqdm import tqdm

from dinov2_hooks import (HUB, BackboneError, ImageError, check_class_token, finish, record,
                          token_path, weights_hash)
from kit import hub, report
from kit.claims import claims_of
from kit.data import Decoded, fingerprint, workers_for
from kit.inputs import find_inputs, where_to
from kit.probes import probe_rows
from kit.readings import readings
from kit.rows import best_latents, hierarchy_rows, hypernym_rows, latent_rows, matched_sets
from kit.runs import (RANK, RANKS, InputError, barrier, check_disk, code_of, keep_freed_memory,
                      lock, plain_streams, run_as_command, short_hash, to_json, write_aside)
from metrics import (SAMPLE, TOP, as_labels, correct_by_class, dictionaries_of, kappa, linear_probe,
                     profile_latents, reconstruct, relate, responses_of, score_hierarchy)
from sae import (ActivationBuffer, SAEError, SparseAutoencoder, Statistics, Training,
                 fast_precision, train_sae)
from taxonomy import TaxonomyError

HERE = Path(__file__).resolve().parent
VAL_BATCH = 2048  # tokens scored at once
PROBE_STEPS = 3000  # of the linear probe, at least
PERMUTED = {"sae": 40, "neurons": 10, "untrained": 10}  # trees whose classes are permuted
RESULT_SETTINGS = ("expansion", "epochs", "batch_size", "lr", "top_k", "response_rate", "seed")
LEAST = {  # of the settings that are numbers
    "expansion": 1, "l1": 0, "epochs": 1, "batch_size": 1, "lr": 1e-12, "top_k": 2, "seed": 0,
    "response_rate": 1e-12, "images_per_class": 1, "seeds": 1, "workers": 0,
}
SCORING = [  # code on which scores depend
    "sae.py", "taxonomy.py", "metrics.py", "kit/probes.py", "kit/readings.py", "kit/rows.py"]


def parse_settings(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS, allow_abbrev=False)
    add = parser.add_argument
    add("--layers", default="all", help="blocks, from 0: all, last, 0-11 or 3,7,11 (default: all)")
    add("--data", help="folder with train/ and val/ of wnid folders, or Kaggle's ImageNet; "
        "tiny-imagenet, which is fetched; demo (default: $IMAGENET_DIR, ./imagenet, else the demo)")
    add("--backbone", help="entry point of the hub: dinov2_vits14, _vitb14, _vitl14, _vitg14, each "
        "also with _reg (default: dinov2_vitg14, the paper's)")
    add("--hub", help="torch.hub repository, or a folder with a hubconf.py, whose code is run "
        f"(default: {HUB})")
    add("--transform", choices=["model", "dinov2"], default="model",
        help="of images: as the model's pretrained_cfg asks, if it has one, or DINOv2's (model)")
    add("--precision", choices=["float32", "float16", "bfloat16"], help="of the forward pass "
        "(default: float16 on a GPU, bfloat16 on a CPU that has it, or as tokens were recorded)")
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
    add("--saes", metavar="USER/NAME",
        help="score published SAEs, of the Hub or a folder of layer_NN, instead of training")
    add("--push-to-hub", metavar="USER/NAME", help="publish SAEs and results on Hugging Face")
    add("--device", choices=["cuda", "cpu"], help="(default: cuda where there is one)")
    add("--workers", type=int, help="processes that decode images (one for each CPU)")
    add("--seed", type=int, default=0, help="of the SAEs (0)")
    add("--seeds", type=int, default=1, help="so many SAEs a layer, from --seed on (1)")
    settings = parser.parse_args(argv)
    for name, least in LEAST.items():
        value = getattr(settings, name)
        if value is not None and not least <= value < 2**62:
            parser.error(f"--{name.replace('_', '-')} {value}: give a number from {least} on")
    if settings.response_rate > 1:
        parser.error(f"--response-rate {settings.response_rate}: give a share, at most 1")
    if settings.top_k > TOP // 2:
        parser.error(f"--top-k {settings.top_k}: give at most {TOP // 2}")
    if not re.fullmatch(r"all|last|\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*", settings.layers):
        parser.error(f"--layers {settings.layers}: give all, last, a range 0-11 or a list 3,7,11")
    if not re.fullmatch(r"relu|topk-[1-9]\d{0,5}", settings.activation):
        parser.error(f"--activation {settings.activation}: give relu or topk-K, as topk-32")
    if settings.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here; give --device cpu, or leave it out")
    if settings.saes and (settings.push_to_hub or settings.seeds > 1):
        parser.error("--push-to-hub and --seeds are for SAEs that this run trains: leave out "
                     "--saes")
    settings.device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return settings


def trainings_of(settings, rows):
    """The settings of the SAEs, one for each seed."""
    batch_size = settings.batch_size or 4096
    if not settings.batch_size:  # small data needs small batches
        while batch_size > 16 and rows * settings.epochs // batch_size < 1500:
            batch_size //= 2
    return [Training(settings.expansion, settings.activation, settings.l1, settings.inputs,
                     settings.epochs, min(batch_size, rows), settings.lr, seed,
                     fast_precision(settings.device))
            for seed in range(settings.seed, settings.seed + settings.seeds)]


def name_of(training):
    l1 = f"-l1_{training.l1:g}" if training.activation == "relu" else ""
    return f"{training.activation}{l1}-{training.inputs}-seed_{training.seed}"


# ---------------------------------------------------------------- stage 1


def check_tokens(settings, inputs, folder):
    """What the class tokens in `folder` are made of, written there the first time. Raises
    InputError where they were made of something else: recording takes hours, and is not begun anew
    unasked."""
    path, code = folder / "settings.json", short_hash(
        code_of(HERE / "dinov2_hooks.py"), code_of(HERE / "kit/data.py", "Decoded", "find_images"))
    known = json.loads(path.read_text()) if path.exists() else {}
    default = "float16" if settings.device == "cuda" else fast_precision("cpu")
    precision = settings.precision or known.get("precision", default)
    about = {
        "backbone": settings.backbone, "weights": weights_hash(inputs.model),
        "training images": len(inputs.train.names), "validation images": len(inputs.val.names),
        "images": fingerprint(inputs.train, inputs.val), "transform": str(inputs.transform),
        "precision": precision, "code": code}
    for key, value in about.items():
        if key != "code" and known.get(key, value) != value:
            raise InputError(f"the class tokens in {folder} were recorded with other {key}: "
                             f"{known[key]}, now {value}; give another --out, or delete them")
    if known.get("code", code) != code:
        print(f"      the code has changed since {folder} was recorded: delete that folder to "
              "record anew")
        about["code"] = known["code"]
    if RANK == 0 and known != about:
        with write_aside(path) as part:
            part.write_text(to_json(about))
    return about


def record_tokens(settings, inputs, folder, precision):
    """Stage 1. Returns the labels of the rows by split, and as val_ids which image each row is."""
    model = inputs.model.to(settings.device)
    labels = {}
    pixels = inputs.transform.transforms[1].size[0] ** 2
    workers = workers_for(pixels) if settings.workers is None else settings.workers
    for name, split in (("train", inputs.train), ("val", inputs.val)):
        images = Decoded(split, inputs.transform)
        missing = [n for n in inputs.layers if not token_path(folder / name, n).exists()]
        rows = len(split.names)
        if missing:
            decoded = (image for image in images if isinstance(image, torch.Tensor))
            for image in itertools.islice(decoded, 1):
                check_class_token(model, image.to(settings.device), missing)
            record(model, images, folder / name, missing, precision, workers, RANK, RANKS,
                   settings.skip_bad_images)
        barrier()
        if RANK == 0 and missing:
            finish(folder / name, missing, rows, model.cls_token.shape[-1])
        barrier()
        bad = json.loads((folder / name / "left_out.json").read_text())
        if bad:
            print(f"      left out {len(bad)} images that do not decode:", *bad.values(),
                  sep="\n        ")
        ids = np.delete(np.arange(rows), [int(row) for row in bad])
        labels[name], labels["val_ids"] = split.labels[ids], ids
    model.cpu()  # ViT-g's 4.5 GB are of no use in stages 2 and 3
    return labels


def statistics_of(buffer, tokens):
    """Of a layer's training tokens; kept beside them, as at ImageNet's size they take 15 s."""
    code = short_hash(code_of(HERE / "sae.py", "ActivationBuffer"))
    path = tokens.with_suffix(f".statistics-{code}.json")
    if not path.exists():
        mean, variance, *norms = buffer.statistics()
        with write_aside(path) as part:
            part.write_text(json.dumps([mean.tolist(), variance.tolist(), *norms]))
    mean, variance, *norms = json.loads(path.read_text())
    return Statistics(*(torch.tensor(x, dtype=torch.float64) for x in (mean, variance)), *norms)


# ---------------------------------------------------------------- stage 2


def train_saes(settings, trainings, tokens, folders):
    """Stage 2: an SAE for each layer and seed, in its folder unless it is there."""
    keep_freed_memory(True)
    pending = [key for key, folder in folders.sae.items() if not folder.is_dir()]
    with tqdm(total=len(pending[RANK::RANKS]), unit="SAE", disable=RANK > 0) as bar:
        for layer, seed in pending[RANK::RANKS]:
            training = trainings[seed - settings.seed]

            def progress(step, steps, loss):
                if step % 100 == 0 or step == steps:
                    text = f"layer {layer}, seed {seed}, step {step} of {steps}, loss"
                    bar.set_description(f"      {text} {loss.total.item():.3f}")

            path = token_path(tokens / "train", layer)
            buffer = ActivationBuffer(path, settings.device)
            try:
                about = {**asdict(training), "layer": layer, "backbone": settings.backbone}
                sae = train_sae(buffer, training, statistics_of(buffer, path), about, progress)
            except SAEError as error:
                raise SAEError(f"layer {layer}: {error}") from error
            with write_aside(folders.sae[layer, seed]) as part:
                sae.cpu().save_pretrained(part)
            bar.update()
    keep_freed_memory(False)
    barrier()


# ---------------------------------------------------------------- stage 3


def permuted_trees(tree):
    """The controls: one tree a draw, the same for all layers, dictionaries and seeds."""
    rng = np.random.default_rng(0)
    return [tree.permuted(rng.permutation(len(tree.classes))) for _ in range(PERMUTED["sae"])]


def score_layer(layer, seed, sae, train, val, labels, statistics, tree, controls, probe, k,
                response_rate):
    """Stage 3: the latents of a layer -> its rows of all tables. probe: of `linear_probe`."""
    C = len(tree.classes)
    about = {"layer": layer, "seed": seed}
    made = {"hierarchy": [], "permuted_sd": [], "relations": [], "probes": [], "iou_draws": {}}
    mean = statistics.mean.float().to(train.device)
    sample = train.rows_at(slice(SAMPLE))  # rows are in random order
    for dictionary in dictionaries_of(sae, sample, mean, (sae.about or {}).get("seed", seed)):
        name = dictionary.name
        encode = dictionary.encode
        profile = profile_latents(encode, val.batches(VAL_BATCH), labels["val"], C)
        responses = responses_of(profile, k, response_rate)
        scores = score_hierarchy(responses, tree)
        permuted = [score_hierarchy(responses, other) for other in controls[: PERMUTED[name]]]
        rows = hierarchy_rows({**about, "dictionary": name}, scores, permuted)
        made["hierarchy"] += rows["hierarchy"]
        made["permuted_sd"] += rows["permuted_sd"]
        related = relate(encode, val.rows_at, profile, scores, tree, k)
        made["relations"].append({**about, "dictionary": name, **related._asdict()})
        if name == "sae":
            made["permuted_draws"] = rows["permuted_draws"]
            made["hypernyms"] = best_latents(scores, profile, responses, tree)
            made["latents"] = latent_rows(layer, scores, profile, responses, tree)
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


def score_layers(settings, inputs, tokens, labels, folders):
    """Stage 3: {(layer, seed): rows of all tables}, read where they are there."""
    controls = permuted_trees(inputs.tree)
    layers = inputs.layers[RANK::RANKS]
    paths = folders.scores
    for layer in tqdm(layers, "      layers", unit="layer", disable=RANK > 0):
        pending = [key for key in paths if key[0] == layer and not paths[key].exists()]
        if not pending:
            continue
        train, val = (ActivationBuffer(token_path(tokens / split, layer), settings.device)
                      for split in ("train", "val"))
        statistics = statistics_of(train, token_path(tokens / "train", layer))
        moments = [x.to(settings.device) for x in (statistics.mean, statistics.variance)]
        probe = linear_probe(train.tokens, labels["train"], len(inputs.tree.classes), *moments,
                             PROBE_STEPS)  # whatever the SAE: once a layer
        for key in pending:
            sae = SparseAutoencoder.from_pretrained(folders.sae[key]).to(settings.device)
            made = score_layer(*key, sae, train, val, labels, statistics, inputs.tree, controls,
                               probe, settings.top_k, settings.response_rate)
            with write_aside(paths[key]) as part:
                part.write_text(to_json(made))
    barrier()
    return {key: json.loads(path.read_text()) for key, path in paths.items()}


# ---------------------------------------------------------------- stage 4


def tables_of(scores, tree):
    """Stage 4: the scores by layer and seed -> the tables of a run."""
    layers, seeds = (sorted(set(numbers)) for numbers in zip(*scores))
    hypernyms = {}
    agreements = []
    for seed in seeds:
        best = {layer: scores[layer, seed]["hypernyms"] for layer in layers}
        hypernyms[seed] = hypernym_rows(best, tree)
        agreements.append(kappa(matched_sets(list(best.values()), tree)))
    with warnings.catch_warnings():  # of a pair that is NaN in every seed
        warnings.simplefilter("ignore")
        agreement = np.nanmean(agreements, 0)
    tables = {}
    for name in ("hierarchy", "permuted_sd", "probes", "relations", "readings"):
        tables[name] = [row for record in scores.values() for row in record[name]]
    pairs = zip(*np.triu_indices(len(layers), 1))
    return tables | {
        "layers": [record["layers"] for record in scores.values()],
        "hypernyms": hypernyms[seeds[0]],
        "latents": [row for layer in layers for row in scores[layer, seeds[0]]["latents"]],
        "consistency": [{"layer_a": layers[a], "layer_b": layers[b],
                         "kappa": float(agreement[a, b])} for a, b in pairs],
        "claims": claims_of(scores, hypernyms, tree)}


class Folders(NamedTuple):
    """Where a run's results lie: names hold a hash of what they are made of."""

    saes: dict[int, Path]  # of each seed, with a folder for each layer
    sae: dict[tuple[int, int], Path]  # (layer, seed)
    scores: dict[tuple[int, int], Path]
    results: Path


def folders_of(settings, inputs, trainings, out, about):
    code = [code_of(HERE / file) for file in SCORING]
    code.append(code_of(HERE / "reproduce.py", "score_layer", "score_layers"))
    saes = {}
    sae = {}
    scores = {}
    training_code = code_of(HERE / "sae.py"), code_of(HERE / "reproduce.py", "train_saes")
    for training in trainings:
        made = short_hash(about, training, *training_code)
        saes[training.seed] = out / "saes" / f"{name_of(training)}-{made}"
    results = name_of(trainings[0]) + f"-{settings.seeds}_seeds" * (settings.seeds > 1)
    if settings.saes:
        results = "from_" + re.sub(r"[^\w.-]", "_", settings.saes)
        width = inputs.model.cls_token.shape[-1]
        saes[settings.seed] = hub.find_saes(settings.saes, inputs.layers, width, settings.backbone)
    tree = inputs.tree
    shape = tree.leaves.tobytes(), tree.height.tolist(), tree.depth.tolist(), tree.wnids
    for layer, (seed, folder) in itertools.product(inputs.layers, saes.items()):
        sae[layer, seed] = folder / f"layer_{layer:02d}"
        name = folder.name
        content = None
        if settings.saes:
            name = results
            content = (sae[layer, seed] / "model.safetensors").read_bytes()
        made = short_hash(about, name, content, shape, settings.top_k, settings.response_rate, code)
        scores[layer, seed] = out / "scores" / f"{name}-{made}" / f"layer_{layer:02d}.json"
    if settings.layers != "all":
        results += f"-layers_{settings.layers}"
    others = [getattr(settings, name) for name in RESULT_SETTINGS]
    return Folders(saes, sae, scores, out / "results" / f"{results}-{short_hash(others)[:4]}")


def say_what_is_written(inputs, training, folders, out):
    """Bytes to write and bytes free, and what lies there from other settings or code."""
    width = inputs.model.cls_token.shape[-1]
    count = 0
    layers = set()
    for split, images in (("train", inputs.train), ("val", inputs.val)):
        for layer in inputs.layers:
            path = token_path(out / "tokens" / split, layer)
            if not path.exists():
                part = path.with_suffix(".part")
                there = part.stat().st_size if part.exists() else 0
                count += max(0, 2 * width * len(images.names) - there)
                layers.add(layer)
    saes = [folder for folder in folders.sae.values() if not folder.is_dir()]
    count += 8 * training.expansion * width**2 * len(saes)
    check_disk(out, count, f"{len(layers)} layers of class tokens, {len(saes)} SAEs")
    used = {*folders.saes.values(), *(path.parent for path in folders.scores.values())}
    unused = {*(out / "saes").glob("*"), *(out / "scores").glob("*")} - used
    if unused:
        names = ", ".join(sorted(str(path.relative_to(out)) for path in unused))
        print(f"      made with other settings or code, not used now: {names}")


def run(settings):
    if RANK > 0:
        barrier()  # the first process fetches what has to be fetched
    times = [time.time()]
    out = where_to(settings)
    card = torch.cuda.get_device_name() if settings.device == "cuda" else "no GPU is used"
    if settings.device == "cpu" and not torch.backends.cuda.is_built():
        card += ": this PyTorch is a build without CUDA"
    print(f"      device: {settings.device} ({card})")
    if settings.push_to_hub:
        hub.check_token(settings.push_to_hub)
    with lock(out):
        inputs = find_inputs(settings, out)
        tokens = out / "tokens"
        trainings = trainings_of(settings, len(inputs.train.names))
        about = check_tokens(settings, inputs, tokens)
        folders = folders_of(settings, inputs, trainings, out, about)
        if RANK == 0:
            barrier()
        say_what_is_written(inputs, trainings[0], folders, out)
        print(f"[1/4] images -> class tokens ({about['precision']})")
        labels = record_tokens(settings, inputs, tokens, about["precision"])
        times.append(time.time())
        print(f"[2/4] class tokens -> sparse autoencoders: {settings.saes or trainings[0]}")
        if not settings.saes:
            train_saes(settings, trainings, tokens, folders)
        times.append(time.time())
        print("[3/4] latents -> scores")
        scores = score_layers(settings, inputs, tokens, labels, folders)
        times.append(time.time())
        if RANK == 0:
            print("[4/4] scores -> tables, figures, report")
            seconds = np.diff(times).round(1).tolist()
            record = {
                "settings": vars(settings) | {"batch_size": trainings[0].batch_size},
                "made_of": about, "saes": str(folders.saes[settings.seed]),
                "seconds": dict(zip(("tokens", "saes", "scores"), seconds)),
                "versions": {name: version(name) for name in ("torch", "torchvision", "numpy")},
                **tables_of(scores, inputs.tree)}
            write_results(settings, inputs, folders, scores, record, labels)
            print(f"Done in {time.time() - times[0]:.0f} s.")


def write_results(settings, inputs, folders, scores, record, labels):
    """Stage 4: tables, claims, figures and the report; the first seed's latents are shown."""
    first = settings.seed
    saes = folders.saes[settings.seed]
    inputs.model.to(settings.device)  # for the maps
    with write_aside(folders.results) as part:
        title = f"{settings.backbone} on {Path(settings.data).resolve().name}"
        shown = report.write(
            part, "The built-in demo" if settings.data == "demo" else title, inputs, record,
            {layer: scores[layer, first] for layer in inputs.layers},
            {layer: folders.sae[layer, first] for layer in inputs.layers}, labels["val_ids"])
    print(shown)
    if not settings.saes:
        tables = (folders.results / "tables.md").read_text(encoding="utf-8")
        hub.write_card(saes, settings.push_to_hub or "USER/NAME", inputs, settings.backbone, tables)
    if settings.push_to_hub:
        hub.publish(settings.push_to_hub, saes, folders.results)
    print(f"\nReport: {folders.results / 'report.html'}")


def main(argv=None):
    plain_streams()
    with redirect_stderr(sys.stderr if RANK == 0 else io.StringIO()):  # said once
        settings = parse_settings(argv)
    return run_as_command(run, settings, (BackboneError, ImageError, SAEError, TaxonomyError))


if __name__ == "__main__":
    sys.exit(main())
