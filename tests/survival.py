"""Does a run that is killed, or whose disk fills, come to the same results? Do fifty runs leave anything behind?

    python tests/survival.py kill [--kills 200]    SIGKILL at random moments, resumed until it is through; then the next
    python tests/survival.py disk                  a disk that is full again and again (a small tmpfs; needs root)
    python tests/survival.py soak                  50 runs in one process, and 50 in as many

On Linux. A small real run: 4 classes of drawn images, a random ViT of 3 blocks, all four stages. Runs are forked from one process
that has imported everything, so that a kill costs a second. Results are compared to the byte: results.json (seconds
aside), the SAEs' weights, the recorded tokens.
"""
import argparse
import collections
import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot  # noqa: F401  (once here, and not in every forked run)
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import reproduce
from conftest import WNIDS, results, small_run, write_hub, write_images

EPOCHS = 12
STAGES = ["before", "tokens", "SAEs", "scores", "results"]


def start(folder: Path, data: Path, log: Path, roomy: bool = False) -> int:
    """Fork a run in `folder`; returns its process id. `roomy`: the disk seems empty at first, and another program fills it."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.chdir(folder)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1), os.dup2(handle, 2)
        if roomy:
            shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**12, 0, 10**12)
        code = run(data)
        sys.stdout.flush(), sys.stderr.flush()
    finally:
        os._exit(code)


def run(data: Path) -> int:
    reproduce.COMMIT_SECONDS, reproduce.IMAGES_PER_STEP = 0, 16  # commit after every batch, every epoch
    return reproduce.main(small_run(data / "images", data / "hub", "--epochs", EPOCHS))


def finish(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kept(out: Path) -> list[int]:
    """What is done and would not be done again: images seen by split, epochs by layer, scores."""
    def read(path):
        return json.loads(path.read_text()) if path.is_file() else {}

    whole, images = read(out / "tokens/tokens.json").get("tokens", {}), []
    for split, count in [("train", 40 * len(WNIDS)), ("val", 10 * len(WNIDS))]:
        images.append(count if f"{split}/ids.npy" in whole else read(out / f"tokens/{split}/pass.json").get("seen", 0))
    names = [f"layer_{layer:02d}" for layer in range(3)]
    in_training = {
        name: int(step) for state in map(np.load, out.glob("saes/*/*_training.npz"))
        for name, step in zip(json.loads(str(state["identities"])), state["steps_done"])
    }
    steps = [10**9 if list(out.glob(f"saes/*/{name}/sae.json")) else in_training.get(name, 0) for name in names]
    return [*images, *steps, len(list(out.glob("saes/*/*/scores.json")))]


def stage_of(log: Path) -> str:
    stages = re.findall(r"\[(\d)/4\]", log.read_text(errors="replace")) if log.is_file() else []
    return STAGES[int(stages[-1]) if stages else 0]


def uninterrupted(folder: Path, data: Path) -> tuple[dict, dict]:
    """Results of a run nobody disturbs, and when each stage began; of two runs, which must agree."""
    found = []
    for name in ("first", "second"):
        (folder / name).mkdir()
        pid, began, stages = start(folder / name, data, folder / "log"), time.monotonic(), {}
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            stages.setdefault(stage_of(folder / "log"), time.monotonic() - began)
            time.sleep(0.01)
        assert finish(pid) == 0, (folder / "log").read_text()
        found.append(results(folder / name / "out"))
    assert found[0] == found[1], "two runs alike do not agree"
    return found[0], {**stages, "end": time.monotonic() - began}


def kill(folder: Path, data: Path, kills: int) -> None:
    expected, began = uninterrupted(folder, data)
    lasts = [end - start for start, end in zip(began.values(), [*began.values()][1:])]
    random.seed(0)
    killed, lives, resumed = collections.Counter(), 0, 0
    log = folder / "log"
    while killed.total() < kills:
        home, before, attempts = folder / f"life_{lives}", None, 0
        home.mkdir()
        for stage in [*sorted(random.choices(range(len(lasts)), k=6)), None]:  # six kills, then to its end
            log.unlink(missing_ok=True)
            pid = start(home, data, log)
            if stage is not None:
                running = lambda: os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
                while STAGES.index(stage_of(log)) < stage and running():
                    time.sleep(0.002)
                time.sleep(random.uniform(0, lasts[stage]))
                os.kill(pid, signal.SIGKILL)
            code = finish(pid)
            if code == 0:  # it had come to its end
                break
            assert code == -signal.SIGKILL, log.read_text()
            killed[stage_of(log)] += 1
            resumed += attempts > 0
            attempts += 1
            after = kept(home / "out")
            assert before is None or all(a >= b for a, b in zip(after, before)), f"lost work: {before} -> {after}"
            before = after
        assert results(home / "out") == expected, f"other results after {attempts} kills: {home}"
        leftover = [str(path) for path in home.rglob("*.part")] + [str(path) for path in home.rglob("*_training.npz")]
        assert not leftover, leftover
        shutil.rmtree(home)
        lives += 1
    where = ", ".join(f"{killed[stage]} in {stage}" for stage in STAGES[1:]) + f", {killed['before']} before these"
    print(f"{killed.total()} kills ({where}; {resumed} of them in a run that was itself a resumption) over {lives} runs of "
          f"{began['end']:.1f} s: every one came to results equal to the byte, and no committed work was lost")


def disk(folder: Path, data: Path) -> None:
    expected, _ = uninterrupted(folder, data)
    home, log, full = folder / "disk", folder / "log", collections.Counter()
    home.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(home)], check=True)

    def leave(kilobytes):
        used = os.statvfs(home).f_blocks - os.statvfs(home).f_bfree
        size = used * os.statvfs(home).f_bsize // 1024 + kilobytes
        subprocess.run(["mount", "-o", f"remount,size={size}k", str(home)], check=True)

    def attempt(roomy):
        code = finish(start(home, data, log, roomy))
        said = [line.partition("error: ")[2] for line in log.read_text().splitlines() if "error: " in line]
        assert code == 0 or code == 2 and len(said) == 1 and "B of " in said[0], log.read_text()
        return said[0] if code else None

    try:
        print("told beforehand:", attempt(roomy=False))
        for stage, made in [("tokens", "tokens"), ("SAEs", "saes/*"), ("scores", "saes/*/*/scores.json"), ("results", "results")]:
            for path in (home / "out").glob(made):  # a run that was through, but for this stage and what follows from it
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            kilobytes, told = 4, False
            leave(kilobytes)
            while said := attempt(roomy=True):
                assert "the disk is full" in said, said
                if stage_of(log) == stage and not told:
                    print(f"in {stage}: {said}")
                    told = True
                full[stage_of(log)] += 1
                kilobytes += 4 if stage_of(log) != "results" else 40
                leave(kilobytes)
            assert told, f"never full in {stage}"
            assert results(home / "out") == expected, "other results after a full disk"
        where = ", ".join(f"{full[stage]} in {stage}" for stage in STAGES[1:])
        print(f"disk full {full.total()} times ({where}), then room: results equal to the byte")
    finally:
        subprocess.run(["umount", str(home)], check=True)


def memory() -> int:
    gc.collect()
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # kB


def soak(folder: Path, data: Path, runs: int = 50) -> None:
    def files():
        return sum(len(names) for _, _, names in os.walk(folder)), len(os.listdir(tempfile.gettempdir()))

    before = None
    for i in range(runs):
        assert finish(start(folder, data, folder / "log")) == 0, (folder / "log").read_text()
        before = before or files()
    assert files() == before, (before, files())
    print(f"{runs} runs in as many processes on one folder: {before[0]} files after the first and after the last")
    pid = os.fork()
    if pid == 0:
        os.chdir(folder)
        handle = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        out = os.dup(1)
        os.dup2(handle, 1), os.dup2(handle, 2)
        seen = []
        for i in range(runs):
            shutil.rmtree("out")
            assert run(data) == 0
            seen.append((memory(), len(os.listdir("/proc/self/fd")), files()))
        tenth, last = seen[9], seen[-1]
        os.write(out, (
            f"{runs} whole runs in one process, after the 10th and the last: memory {tenth[0] / 1e3:.0f} and "
            f"{last[0] / 1e3:.0f} MB, open handles {tenth[1]} and {last[1]}, files {tenth[2][0]} and {last[2][0]}\n"
        ).encode())
        os._exit(not (last[1] <= tenth[1] and last[2] == tenth[2] and last[0] < 1.03 * tenth[0]))
    assert finish(pid) == 0, "growth"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kill", "disk", "soak"])
    parser.add_argument("--kills", type=int, default=200)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as data:
        for split, count in [("train", 40), ("val", 10)]:
            for wnid in WNIDS:
                write_images(Path(data) / "images" / split / wnid, count)
        write_hub(Path(data) / "hub")
        {"kill": lambda *where: kill(*where, settings.kills), "disk": disk, "soak": soak}[settings.what](Path(folder), Path(data))


if __name__ == "__main__":
    main()
