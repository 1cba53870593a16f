"""The latents of a layer -> its rows of all tables, beside baselines and permuted trees."""
from contextlib import suppress
from pickle import UnpicklingError

import numpy as np
import torch

from kit.files import write_aside
from kit.probes import probe_rows
from kit.readings import reading_rows
from kit.rows import hierarchy_rows, hypernym_rows, latent_rows
from metrics import (SAMPLE, LinearProbe, Placed, dictionaries_of, linear_probe, profile_latents,
                     reconstruct, relate, responses_of)
from sae import ActivationBuffer

VAL_BATCH = 2048  # tokens scored at once
TREES = {"sae": 40, "neurons": 10, "untrained": 10}  # how many permuted trees


def open_layer(train_path, val_path, labels, classes, device, cached=None):
    """What all SAEs of a layer are scored with: (train, val, statistics, linear probe). cached: the
    file in which the linear probe is, or will be: on ImageNet it takes minutes."""
    train = ActivationBuffer(train_path, device)
    statistics = train.statistics()
    probe = None
    with suppress(OSError, EOFError, RuntimeError, UnpicklingError):  # not there, or damaged
        probe = cached and LinearProbe(*torch.load(cached, map_location=device))
    if probe is None:
        probe = linear_probe(train.tokens, labels["train"], classes, statistics.mean,
                             statistics.variance)
        if cached:
            with write_aside(cached) as part:
                torch.save(list(probe), part)
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
    about = sae.about if isinstance(sae.about, dict) else {}
    seed = about.get("seed", where["seed"])
    for name, encode, probed in dictionaries_of(sae, sample, mean, seed):
        # what each latent responds to, in WordNet's tree and in permuted ones
        profile = profile_latents(encode, val.batches(VAL_BATCH), labels["val"], C)
        responses = responses_of(profile, k, response_rate)
        placed = Placed(responses, tree)
        permuted = [Placed(responses, other) for other in controls[: TREES[name]]]
        by_tree, draws = hierarchy_rows(name, placed, permuted)
        rows["hierarchy"] += by_tree
        related = relate(encode, val.rows_at, profile, placed, k)
        rows["relations"].append({"dictionary": name, **related})
        # of the SAE also what claims are made of, and its latents one by one
        if name == "sae":
            made["permuted_draws"] = draws
            made["hypernyms"] = hypernym_rows(placed, profile)
            rows["latents"] = latent_rows(placed, profile)
            rows["readings"] = reading_rows(profile, placed, permuted[:10])
        del profile, responses, placed, permuted  # before the probes take their room
        # how well few units tell the images under a hypernym
        by_tree, draws = probe_rows(name, probed, train, val, labels, tree, controls[0])
        rows["probes"] += by_tree
        made["iou_draws"][name] = draws
    # how good the SAE is, and the layer's tokens
    quality, made["by_class"] = reconstruct(sae, val.batches(VAL_BATCH), labels["val"], C, probe)
    gamma = statistics.mean.norm() / statistics.rms_deviation
    size = {"width": train.width, "latents": len(sae.b_enc)}
    rows["layers"] = [{**size, "gamma": gamma, **quality._asdict()}]
    for name in rows:
        made[name] = [{**where, **row} for row in rows[name]]
    return made
