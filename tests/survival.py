"""Does a run that is killed, or whose disk fills, come to the same results?

    python tests/survival.py kill [--kills 100]    SIGKILL at random moments, until it is through
    python tests/survival.py disk                  a disk that is full again and again (needs root)

On Linux. A small real run: 4 classes of drawn images, a random ViT of 3 blocks, all four stages.
Runs are forked from one process that has imported everything, so that a kill costs a second. Tables,
SAEs and class tokens are compared to the byte.
"""
import argparse
import collections
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import reproduce
from conftest import WNIDS, make_quick, results, small_run, write_hub, write_images
from kit import images, recording

STAGES = ["before", "tokens", "SAEs", "scores", "results"]


def start(folder: Path, data: Path, log: Path, roomy=False) -> int:
    """Fork a run in `folder`; returns its process id. roomy: the disk seems empty at first."""
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
        recording.COMMIT_SECONDS, images.BATCH, images.WORKERS = 0, 16, 0
        make_quick(figures=True)
        code = reproduce.main(small_run(data / "images", data / "hub", "--epochs", 12))
        sys.stdout.flush(), sys.stderr.flush()
    finally:
        os._exit(code)


def finish(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def running(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def stage_of(log: Path) -> str:
    stages = re.findall(r"\[(\d)/4\]", log.read_text(errors="replace")) if log.is_file() else []
    return STAGES[int(stages[-1]) if stages else 0]


def uninterrupted(folder: Path, data: Path) -> tuple[dict, list[float]]:
    """Results of a run nobody disturbs, and how long each stage lasts; of two, which must agree."""
    found, log = [], folder / "log"
    for name in ("first", "second"):
        (folder / name).mkdir()
        log.unlink(missing_ok=True)
        pid, began, stages = start(folder / name, data, log), time.monotonic(), {}
        while running(pid):
            stages.setdefault(stage_of(log), time.monotonic() - began)
            time.sleep(0.01)
        assert finish(pid) == 0, log.read_text()
        found.append(results(folder / name / "out"))
        times = [stages.get(stage) for stage in STAGES] + [time.monotonic() - began]
    assert found[0] == found[1], "two runs alike do not agree"
    times = [times[i] if times[i] is not None else times[i + 1] for i in range(len(times))]
    return found[0], [b - a for a, b in zip(times, times[1:])]


def kill(folder: Path, data: Path, kills: int) -> None:
    expected, lasts = uninterrupted(folder, data)
    killed, lives, resumed, log = collections.Counter(), 0, 0, folder / "log"
    random.seed(0)
    while killed.total() < kills:
        home, attempts = folder / f"life_{lives}", 0
        home.mkdir()
        some = random.choices(range(len(lasts)), k=min(6, kills))  # kills, then to its end
        for stage in [*sorted(some), None]:
            log.unlink(missing_ok=True)
            pid = start(home, data, log)
            if stage is not None:
                while STAGES.index(stage_of(log)) < stage and running(pid):
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
        assert results(home / "out") == expected, f"other results after {attempts} kills: {home}"
        left = [str(path) for name in ("*.part", "progress_*") for path in home.rglob(name)]
        assert not left, left
        shutil.rmtree(home)
        lives += 1
    where = ", ".join(f"{killed[stage]} in {stage}" for stage in STAGES[1:])
    print(f"{killed.total()} kills ({where}, {killed['before']} before these; {resumed} in a run that "
          f"was itself a resumption) of {lives} runs: results equal to the byte")


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
        lines = log.read_text().splitlines()
        said = [line.partition("error: ")[2] for line in lines if "error: " in line]
        assert code == 0 or code == 2 and len(said) == 1, log.read_text()
        return said[0] if code else None

    try:
        print("told beforehand:", attempt(roomy=False))
        for stage, made in zip(STAGES[1:], ("tokens", "saes", "scores", "results")):
            shutil.rmtree(home / "out" / made, ignore_errors=True)
            kilobytes, told = 4, False
            leave(kilobytes)
            while said := attempt(roomy=True):
                assert "the disk is full" in said, said
                told = told or stage_of(log) == stage
                full[stage_of(log)] += 1
                kilobytes += 40 if stage_of(log) == "results" else 4
                leave(kilobytes)
            assert told, f"never full in {stage}"
            assert results(home / "out") == expected, "other results after a full disk"
        where = ", ".join(f"{full[stage]} in {stage}" for stage in STAGES[1:])
        print(f"disk full {full.total()} times ({where}), then room: results equal to the byte")
    finally:
        subprocess.run(["umount", str(home)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kill", "disk"])
    parser.add_argument("--kills", type=int, default=100)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as data:
        for split, count in [("train", 40), ("val", 10)]:
            for wnid in WNIDS:
                write_images(Path(data) / "images" / split / wnid, count)
        write_hub(Path(data) / "hub")
        if settings.what == "kill":
            kill(Path(folder), Path(data), settings.kills)
        else:
            disk(Path(folder), Path(data))


if __name__ == "__main__":
    main()
