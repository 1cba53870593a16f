"""Files that are there or not, what results are made of, one run at a time, errors."""

import errno
import multiprocessing
import os
import re
import socket
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import WNIDS
from pytest import raises

from kit import files, processes
from kit.demo import SmallViT
from kit.files import InputError, check_disk, lock, write_aside
from kit.made_of import code_of, tree_of, weights_of
from kit.processes import run_as_command, sentence_of
from taxonomy import Taxonomy


def test_written_aside_and_renamed_when_whole(tmp_path):
    file, folder = tmp_path / "a/file", tmp_path / "folder"
    with write_aside(file) as part:
        part.write_text("new")
        assert not file.exists()
    with raises(ZeroDivisionError), write_aside(file) as part:
        part.write_text("half")
        raise ZeroDivisionError
    assert file.read_text() == "new"
    for content in ("one", "two"):
        with write_aside(folder) as part:
            part.mkdir()
            (part / content).touch()
    assert os.listdir(folder) == ["two"]


def test_code_is_text_without_comments_and_docstrings(tmp_path):
    def code(text):
        (tmp_path / "module.py").write_text(text)
        return code_of(tmp_path, "module.py")

    plain = '''"""What it is."""
A = 1
CARD = """
text
"""
# why
def f():
    """Says.

    More.
    """
    return "two"  # at the end of a line
def g(x):
    """One more."""  # noqa
    return x + 1
class T:
    a: int = 1
    """what a is"""
'''
    same = {
        "What it is": "Another",
        "# why\n": "",
        "Says.\n\n    More": "Says",
        "what a is": "x",
        "A = 1\n": "A = 1\n\n\n    # indented\n",
    }
    other = {"A = 1": "A = 2", "text": "tent", '"two"': '"to"', "int = 1": "int = 2", "x + 1": "x"}
    for old, new in (same | other).items():
        assert old in plain and (code(plain.replace(old, new)) == code(plain)) == (old in same)


def test_weights_and_trees_by_all_that_they_are():
    def vit(change=lambda model: None):
        torch.manual_seed(0)
        model = SmallViT(classes=2, size=8, patch=4, width=8, depth=2, heads=2)
        change(model)
        return weights_of(model)

    def of_the_same_sum(model):
        W = model.blocks[0].proj.weight.data
        model.blocks[0].proj.weight.data = W.flatten().flip(0).view_as(W)

    def exchanged(model):
        model.blocks = torch.nn.ModuleList(reversed(model.blocks))

    def last_number(model):
        model.blocks[1].qkv.weight.data[-1, -1] += 1

    def renamed(model):
        model.last = model.head
        del model.head

    assert vit() == vit()
    for change in (
        of_the_same_sum,
        exchanged,
        last_number,
        renamed,
        SmallViT.half,
        SmallViT.bfloat16,
    ):
        assert vit(change) != vit()
    tree = Taxonomy.from_wnids(WNIDS)
    assert tree_of(tree) == tree_of(Taxonomy.from_wnids(WNIDS))
    for other in (Taxonomy.from_wnids(WNIDS[::-1]), replace(tree, height=tree.height + 1)):
        assert tree_of(other) != tree_of(tree)


def test_one_run_at_a_time(tmp_path):
    def hold():
        with lock(tmp_path):
            taken.set()
            done.wait()

    context = multiprocessing.get_context("fork")
    taken, done = context.Event(), context.Event()
    process = context.Process(target=hold)
    process.start()
    taken.wait()
    with raises(InputError, match="another run is at work in"), lock(tmp_path):
        pass
    done.set()
    process.join()
    with lock(tmp_path):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def refuse(*given):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "lockf", refuse)
    with lock(tmp_path):
        pass
    assert "no lock in" in capsys.readouterr().out


def test_room_on_the_disk(tmp_path, capsys):
    check_disk(tmp_path, 1e7)
    assert " 0.01 GB to write to" in capsys.readouterr().out
    with raises(InputError, match="not enough disk: 1000000000.00 GB to write to"):
        check_disk(tmp_path, 1e18)


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.ENOSPC, "No space left", "out/x"), "No space left: 'out/x': make room"),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), "'runs': .*another folder"),
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
    assert re.search(words, sentence_of(error))


@pytest.mark.parametrize(
    "error", [KeyError("x"), RuntimeError("shape mismatch"), FileNotFoundError(2, "a student's")]
)
def test_a_bug_keeps_its_traceback(error):
    def mistake(settings):
        raise error

    with raises(type(error)):
        run_as_command(mistake, SimpleNamespace(workers=0), (ValueError,))


def start(monkeypatch, device="cpu", workers=1, **environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    processes.start_ranks(SimpleNamespace(workers=workers, device=device))


@pytest.mark.parametrize(
    "left_over",
    [
        {"RANK": "1"},
        {"WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2"},
        {"RANK": "", "WORLD_SIZE": ""},
        {"RANK": "N/A", "WORLD_SIZE": "1"},
        {"RANK": "-1", "WORLD_SIZE": "1"},
        {"RANK": "1", "WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "N/A"},
    ],
)
def test_what_another_program_left_in_the_environment(left_over, monkeypatch):
    with raises(InputError, match=f"{[*left_over][0]}=.*unset RANK"):
        start(monkeypatch, **left_over)


TWO = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


def test_processes_that_no_port_is_free_for(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with raises(InputError, match="the 2 processes of torchrun do not find one another"):
            start(monkeypatch, RANK="0", MASTER_PORT=str(taken.getsockname()[1]), **TWO)


def test_a_temporary_folder_of_too_long_a_name(monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/tmp/" + "x" * 80)
    with raises(InputError, match="TMPDIR=/tmp/x.* is too long for the sockets"):
        start(monkeypatch)
    start(monkeypatch, workers=0)


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with raises(InputError, match="more processes than GPUs: lower --nproc-per-node"):
        start(monkeypatch, "cuda", RANK="1", LOCAL_RANK="1", MASTER_PORT="0", **TWO)


def test_a_folder_that_may_not_be_written(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    with raises(PermissionError), write_aside(tmp_path / "x"):
        pass
