"""Processes under torchrun: the results of one, whatever is killed; one sentence if one fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import reproduce
from conftest import ROOT, WNIDS, make_quick, results, small_run, write_images
from kit.data import find_images


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
    return subprocess.Popen(
        [sys.executable, *run],
        env=environment,
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory, hub):
    """A folder with images, and the results of one process on as many threads."""
    folder = tmp_path_factory.mktemp("work")
    for split, count in [("train", 40), ("val", 5)]:  # 160 are three steps
        for wnid in WNIDS:
            write_images(folder / "data" / split / wnid, count)
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch.setattr)
        patch.chdir(folder)
        run = small_run("data", hub, "--layers", "0,2", "--seeds", "2", "--out", "one")
        assert reproduce.main(run) == 0
    return folder


def test_one_fails_with_its_sentence_and_started_again_two_come_to_the_results_of_one(
    work, hub, monkeypatch
):
    monkeypatch.chdir(work)
    arguments = "data", hub, 2, "--layers", "0,2", "--seeds", "2"
    bad = Path("data/train", find_images("data")[0].names[-1])  # in the last share
    content = bad.read_bytes()
    bad.write_bytes(b"\0" * len(content))  # of one size: as far as is known, the same images
    running = start(*arguments)
    said, _ = running.communicate(timeout=300)
    bad.write_bytes(content)
    assert running.returncode != 0 and said.count("error: data/train/") == 1, said
    assert said.count("is no readable image") == 1 and Path("out/tokens/train").is_dir()
    running = start(*arguments)
    said, _ = running.communicate(timeout=300)
    assert running.returncode == 0, said
    assert said.count("[4/4]") == 1  # one of them speaks
    assert results("out") == results("one")
    assert not [*Path("out").rglob("progress_*"), *Path("out").rglob("*.part")]
