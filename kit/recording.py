"""Stage 1's machinery: a pass over the images that can be killed, resumed and shared by ranks.

The token files have their full size from the start and every rank writes its own rows in place, so
that resuming is a number: the rows that are on disk for good. A layer is whole when its record,
layer_NN.json, is there.
"""
import io
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dinov2_hooks import TokenFiles
from kit import images
from kit.process import RANK, WORLD, wait_for_all
from kit.store import (InputError, atomic_write, check_file, checksum, read_record, reuse,
                       write_record)
from sae import ActivationBuffer, Statistics

COMMIT_SECONDS = 30  # how often the rows so far are put on disk for good


def record_split(model, transform, split, layers, folder, made_from, skip_bad=False) -> dict:
    """The class tokens of a split after some layers, recorded unless they are there.

    Returns {layer: its record, with "path"}, "labels" (N,) and "ids" (N,), of each row its place in
    the split, and "left_out". skip_bad: go on without images that do not decode.
    """
    paths = {layer: folder / f"layer_{layer:02d}.npy" for layer in layers}
    missing = [layer for layer, path in paths.items()
               if not (read_record(path.with_suffix(".json"), made_from) and path.is_file())]
    if missing:
        record_layers(model, transform, split, missing, folder, made_from, skip_bad)
    if RANK == 0:
        remove_progress(folder)
    records = {layer: {**read_record(path.with_suffix(".json"), made_from), "path": path}
               for layer, path in paths.items()}
    left_out = records[layers[0]]["left_out"]
    if any(record["left_out"] != left_out for record in records.values()):
        raise InputError(f"other images of {split.root} decoded when some layers in {folder} were "
                         "recorded: restore them, or give another --out")
    if left_out:
        print(f"      left out {len(left_out)} images that do not decode:", *left_out.values(),
              sep="\n        ")
    kept = np.delete(np.arange(len(split.names)), [int(row) for row in left_out])
    labels = split.labels[kept]
    for name, rows in (("labels", labels), ("ids", kept)):
        path, content = folder / f"{name}.npy", io.BytesIO()
        np.save(content, rows)
        if RANK == 0 and not (path.is_file() and path.read_bytes() == content.getvalue()):
            with atomic_write(path) as part:
                part.write_bytes(content.getvalue())
    return {**records, "labels": labels, "ids": kept, "left_out": left_out}


def record_layers(model, transform, split, layers, folder, made_from, skip_bad: bool) -> None:
    """Record this process's share of the images, from where it was left off. When all processes
    are done, write each layer's record."""
    N, width = len(split.names), model.cls_token.shape[-1]
    steps = -(-N // images.BATCH)  # shares are whole batches: any number of ranks computes the same
    shares = [min(N, rank * steps // WORLD * images.BATCH) for rank in range(WORLD + 1)]
    records = [folder / f"progress_{rank}_of_{WORLD}.json" for rank in range(WORLD)]
    if RANK > 0:
        wait_for_all()  # until the first process has made the files
    files = TokenFiles(folder, layers, N, width, made_from["precision"])
    if RANK == 0:
        if files.made:  # then no row is there yet
            remove_progress(folder)
        wait_for_all()
    state = reuse(records[RANK], made_from)
    if not state or not set(layers) <= set(state["layers"]):
        state = {"rows": shares[RANK], "left_out": {}}
    row, end, left_out = state["rows"], shares[RANK + 1], state["left_out"]
    bar = tqdm(total=end - shares[RANK], initial=row - shares[RANK], unit="image",
               desc=f"      {folder.name}", disable=RANK > 0)
    committed = 0.0
    pinned = model.cls_token.device.type == "cuda"
    for batch, errors, systems in images.batches(split, transform, row, end, pinned):
        for place, (error, fatal) in enumerate(zip(errors, systems.tolist())):
            if fatal:
                raise InputError(f"{error}; mend it and give the same command again")
            if error and not skip_bad:
                raise InputError(f"{error}; mend or remove the image, or leave such images out "
                                 "with --skip-bad-images")
            if error:
                left_out[str(row + place)] = error
        files.record(model, batch, row, split.names[row : row + len(batch)])
        row += len(batch)
        bar.update(len(batch))
        if time.monotonic() - committed >= COMMIT_SECONDS:
            files.sync()
            write_record(records[RANK], made_from, layers=layers, rows=row, left_out=left_out)
            committed = time.monotonic()
    bar.close()
    files.sync()
    write_record(records[RANK], made_from, layers=layers, rows=row, left_out=left_out)
    wait_for_all()
    left_out = {row: error for path in records
                for row, error in read_record(path, made_from)["left_out"].items()}
    if len(left_out) == N:
        raise InputError(f"none of the {N} images of {split.root} decodes; {left_out['0']}")
    for path in files.paths[RANK::WORLD]:
        finish_layer(path, left_out, made_from)
    wait_for_all()


def remove_progress(folder: Path) -> None:
    for path in folder.glob("progress_*"):
        path.unlink()


def finish_layer(path: Path, left_out: dict[str, str], made_from: dict) -> None:
    """Remove the rows of images that could not be read; write the layer's record."""
    if left_out:
        with atomic_write(path) as part, open(part, "wb") as file:
            rows = np.load(path, mmap_mode="r")
            np.save(file, np.delete(rows, [int(row) for row in left_out], axis=0))
    mean, variance, *norms = ActivationBuffer(path).statistics()
    write_record(path.with_suffix(".json"), made_from, tokens=checksum(path), left_out=left_out,
                 statistics=[mean.tolist(), variance.tolist(), *norms])


def token_file(record: dict) -> Path:
    """The path of a layer's token file. Once a run its checksum is compared: else Stale."""
    if not record.get("intact"):
        check_file(record["path"], record["tokens"])
        record["intact"] = True
    return record["path"]


def statistics_of(record: dict) -> Statistics:
    """The statistics of a layer's tokens, from its record."""
    mean, variance, *norms = record["statistics"]
    return Statistics(*(torch.tensor(x, dtype=torch.float64) for x in (mean, variance)), *norms)
