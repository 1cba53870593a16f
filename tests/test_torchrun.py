"""Processes under torchrun: the results of one, whatever is killed; one sentence if one fails."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import reproduce
from conftest import ROOT, WNIDS, make_quick, results, small_run, write_images
from kit import process
from kit.images import find_images


def start(data, hub, processes, *more, out="out"):
    script = Path("run.py")
    script.write_text(
        f"import sys\nsys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]!r}\n"
        "import conftest, reproduce\nconftest.make_quick()\n"
        "if __name__ == '__main__':\n    sys.exit(reproduce.main())\n"
    )
    run = [str(script), *small_run(data, hub, "--out", out, *more)]
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *run]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *run], env=environment, start_new_session=True, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def work(tmp_path_factory, hub):
    """A folder with images, and the results of one process on as many threads."""
    folder = tmp_path_factory.mktemp("work")
    for split, count in [("train", 50), ("val", 5)]:  # 200 are four steps
        for wnid in WNIDS:
            write_images(folder / "data" / split / wnid, count)
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch.setattr)
        patch.chdir(folder)
        assert reproduce.main(small_run("data", hub, "--seeds", "2", "--out", "one")) == 0
    return folder


def test_killed_and_resumed_two_processes_come_to_the_results_of_one(work, hub, monkeypatch):
    monkeypatch.chdir(work)
    running = start("data", hub, 2, "--seeds", "2")
    while not Path("out/tokens/train/layer_00.npy").exists() and running.poll() is None:
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    running = start("data", hub, 2, "--seeds", "2")
    said, _ = running.communicate(timeout=120)
    assert running.returncode == 0, said
    assert said.count("[4/4]") == 1  # one of them speaks
    assert results("out") == results("one")
    assert not [*Path("out").rglob("progress_*"), *Path("out").rglob("*.part")]


def test_the_failure_of_one_ends_all_with_its_sentence(work, hub, monkeypatch):
    monkeypatch.chdir(work)
    bad = Path("data/train", find_images("data")[0].names[-1])  # in the last share
    content = bad.read_bytes()
    bad.write_bytes(b"\0" * len(content))
    running = start("data", hub, 2, out="failed")
    said, _ = running.communicate(timeout=120)
    bad.write_bytes(content)
    assert running.returncode != 0 and said.count("error: data/train/") == said.count("is no readable image") == 1, said


def test_what_is_wrong_for_all_is_said_once(work, hub, monkeypatch, capsys):
    """Any other process waits for the first, which then says it and ends, before it looks at all."""
    monkeypatch.chdir(work)
    monkeypatch.setattr(reproduce, "RANK", 1)
    monkeypatch.setattr(reproduce, "wait_for_all", lambda: sys.exit(1))  # as the first one ended
    with pytest.raises(SystemExit):
        reproduce.main(small_run("data", hub, "--layers", "7", "--out", "never"))
    with pytest.raises(SystemExit):
        reproduce.main(["--lr", "7"])
    assert capsys.readouterr().err == "" and not Path("never").exists()


def test_more_processes_than_gpus(monkeypatch, capsys):
    monkeypatch.setattr(process, "WORLD", 2)
    monkeypatch.setattr(process, "LOCAL_RANK", 1)
    monkeypatch.setattr(process.torch.cuda, "device_count", lambda: 1)
    settings = reproduce.argparse.Namespace(device="cuda")
    assert process.run_as_command(lambda settings: None, settings, ()) == 2
    assert "more processes than the 1 GPUs: lower --nproc-per-node" in capsys.readouterr().err
