"""Files that are there or not, what results are made of, one run at a time, errors."""

import errno
import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from kit import runs
from kit.runs import InputError, check_disk, code_of, lock, sentence_of, write_aside


def test_written_aside_and_renamed_when_whole(tmp_path):
    file, folder = tmp_path / "a/file", tmp_path / "folder"
    with write_aside(file) as part:
        part.write_text("new")
        assert not file.exists()
    assert file.read_text() == "new"
    with pytest.raises(ZeroDivisionError), write_aside(file) as part:
        part.write_text("half")
        raise ZeroDivisionError
    assert file.read_text() == "new"
    for content in ("one", "two"):
        with write_aside(folder) as part:
            (part / "deep").mkdir(parents=True)
            (part / "deep" / content).write_text(content)
    assert [path.name for path in folder.rglob("*")] == ["deep", "two"]


def test_code_is_what_a_file_does(tmp_path):
    path = tmp_path / "module.py"

    def code(text, *names):
        path.write_text(text)
        return code_of(path, *names)

    plain = 'A = 1\ndef f():\n    """Says."""\n    return g() + A\n'
    plain += "def g():\n    return 2\ndef h():\n    pass\n"
    assert code(plain) == code(plain.replace("Says", "Tells") + "\n# a comment\n")
    assert code(plain) != code(plain.replace("return 2", "return 3"))
    for old, new, changed in (
        ("return 2", "return 3", True),
        ("A = 1", "A = 2", True),
        ("A = 1", "A: int = 2", True),
        ("A = 1", "A, B = 1, 2", True),
        ("A = 1", "A = 1\nA += 1", True),
        ("pass", "return", False),
    ):
        changes = code(plain, "f", "g") != code(plain.replace(old, new), "f", "g")
        assert changes == changed
    field = "class T:\n    a: int = 1\n    'what a is'\n"
    assert code(field) == code(field.replace("what a is", "said better"))
    assert code("from x import g\n" + plain, "f") != code("from y import g\n" + plain, "f")


def hold(folder, taken, done):
    with lock(folder):
        taken.set()
        done.wait()


def test_one_run_at_a_time(tmp_path):
    context = multiprocessing.get_context("fork")
    taken, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path, taken, done))
    process.start()
    taken.wait()
    with pytest.raises(InputError, match="another run is at work in"), lock(tmp_path):
        pass
    done.set()
    process.join()
    with lock(tmp_path):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def refuse(*given):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(runs.fcntl, "lockf", refuse)
    with lock(tmp_path):
        pass
    assert "no lock in" in capsys.readouterr().out


def test_room_on_the_disk(tmp_path, capsys):
    check_disk(tmp_path, 1e7)
    assert " 0.01 GB to write to" in capsys.readouterr().out
    with pytest.raises(InputError, match="not enough disk: 1000000000.00 GB to write to"):
        check_disk(tmp_path, 1e18)


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.ENOSPC, "No space left", "out/x"), "No space left: 'out/x': .* make room"),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), "'runs': .* another folder"),
        (RuntimeError("safetensors: No space left on device"), "make room"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory: lower --batch-size .* cpu"),
        (RuntimeError("CUDA error: no kernel image is available"), "no kernels for this GPU"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            "out of memory: lower",
        ),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal"), "give --workers 0"),
    ],
)
def test_errors_that_users_can_mend(error, words):
    import re

    assert re.search(words, sentence_of(error))


def test_bugs_are_no_sentences():
    for error in (KeyError("x"), RuntimeError("shape mismatch"), ValueError("no")):
        assert sentence_of(error) is None


def test_rank_without_world_size(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(InputError, match="only one of RANK and WORLD_SIZE"):
        runs.start_ranks("cpu")


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(runs, "RANKS", 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="more processes than GPUs: lower --nproc-per-node"):
        runs.start_ranks("cuda")


def test_a_folder_that_may_not_be_written(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    Path(tmp_path).chmod(0o500)
    with pytest.raises(PermissionError), write_aside(tmp_path / "x"):
        pass
