"""Two processes as torchrun starts them: the results of one; one sentence if one fails."""

import multiprocessing
import os
import sys
from pathlib import Path

from conftest import WNIDS, results, small_run, write_images

import reproduce
from kit import demo, files, processes
from kit.data import find_images


def process(rank, run):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29581"}
    for module in (files, processes, reproduce, demo):  # which were imported before
        module.RANK, module.RANKS = rank, 2
    sys.stdout = sys.stderr = open(f"said_{rank}", "w")
    code = reproduce.main(run)
    sys.stderr.flush()
    os._exit(code)


def run_two(run):
    """(exit code, what was said) of each."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=process, args=(rank, run)) for rank in (0, 1)]
    for each in processes:
        each.start()
    for each in processes:
        each.join()
    return [(each.exitcode, Path(f"said_{i}").read_text()) for i, each in enumerate(processes)]


def test_one_fails_with_its_sentence_and_started_again_two_come_to_the_results_of_one(
    hub, work, monkeypatch
):
    monkeypatch.setattr("dinov2_hooks.CHUNK", 1)  # of three: two are the first process's
    for split, count in [("train", 40), ("val", 5)]:  # 160 are three batches
        for wnid in WNIDS:
            write_images(work / "data" / split / wnid, count)
    run = small_run("data", hub, "--layers", "0,2", "--seeds", "2")
    assert reproduce.main([*run, "--out", "one"]) == 0
    bad = Path("data/train", find_images("data")[0].names[100])  # in the second batch
    content = bad.read_bytes()
    bad.write_bytes(b"\0" * len(content))  # of one size: as far as is known, the same images
    (first, _), (second, said) = run_two(run)
    assert first != 0 and second == 2 and said.count("error: data/train/") == 1
    assert "is not a readable image" in said
    bad.write_bytes(content)
    (first, said), (second, silence) = run_two(run)
    assert first == second == 0 and "[4/4]" in said and "[4/4]" not in silence
    assert results("out") == results("one")
    assert not [*Path("out").rglob("*.part")]
