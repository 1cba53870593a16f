"""Several processes under torchrun: the results of one, whatever is killed, and one sentence if one of them fails."""
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT, WNIDS, results, small_run, write_images
from reproduce import find_images


def start(data, hub, processes, *more, out="out"):
    script = Path("run.py")
    script.write_text(
        f"import sys\nsys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]!r}\nimport conftest, reproduce\nconftest.make_quick()\n"
        "if __name__ == '__main__':\n    sys.exit(reproduce.main())\n"
    )
    run = [str(script), *small_run(data, hub, "--out", out, *more)]
    if processes > 1:
        run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *run]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *run], env=environment, start_new_session=True, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def work(tmp_path_factory, hub):
    """A folder with images, and with the results of one process, on as many threads as each of several has."""
    folder = tmp_path_factory.mktemp("work")
    for split, count in [("train", 50), ("val", 5)]:  # 200 are four steps
        for wnid in WNIDS:
            write_images(folder / "data" / split / wnid, count)
    os.chdir(folder)
    process = start("data", hub, 1, out="one")
    assert process.wait(120) == 0, process.stdout.read()
    return folder


def test_killed_again_and_again_two_processes_come_to_the_results_of_one(work, hub, monkeypatch):
    monkeypatch.chdir(work)
    random.seed(0)
    for _ in range(2):
        process = start("data", hub, 2)
        time.sleep(random.uniform(3, 6))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process = start("data", hub, 2)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert said.count("[4/4]") == 1  # one of them speaks
    assert results("out", ["out"]) == results("one", ["out"])
    assert not [*Path("out").rglob("rank_*"), *Path("out").rglob("*.part"), *Path("out").rglob("pass.json")]


def test_the_failure_of_one_ends_all_with_its_sentence(work, hub, monkeypatch):
    monkeypatch.chdir(work)
    bad = Path("data/train", find_images("data", None)[0].names[-1])  # in the last share
    content = bad.read_bytes()
    bad.write_bytes(b"\0" * len(content))
    process = start("data", hub, 2, out="failed")
    said, _ = process.communicate(timeout=120)
    bad.write_bytes(content)
    assert process.returncode != 0 and said.count("error: data/train/") == said.count("is no readable image") == 1, said


def test_what_is_wrong_for_all_is_said_once(work, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(work)
    process = start("data", hub, 2, "--layers", "7", out="never")
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and said.count("error: ") == said.count("layer 7 is out of range") == 1, said
    assert not Path("never").exists()
