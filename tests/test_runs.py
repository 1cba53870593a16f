"""Files that are there or not, what results are made of, one run at a time, errors."""

import errno
import multiprocessing
import os
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import WNIDS

from kit import files, processes
from kit.demo import SmallViT
from kit.files import InputError, check_disk, lock, write_aside
from kit.made_of import code_of, tree_of, weights_of
from kit.processes import sentence_of
from taxonomy import Taxonomy


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
def h():
    """Nothing."""
class T:
    a: int = 1
    """what a is"""
'''
    for old, new in (
        ("What it is", "Another"),
        ("# why\n", ""),
        ("Says.\n\n    More", "Says"),
        ("what a is", "x"),
        ("A = 1\n", "A = 1\n\n\n    # indented\n"),
    ):
        assert old in plain and code(plain) == code(plain.replace(old, new))
    for old, new in (
        ("A = 1", "A = 2"),
        ("text", "tent"),
        ('"two"', '"to"'),
        ("a: int = 1", "a: int = 2"),
        ("return", "return not"),
        ("x + 1", "x + 2"),
    ):
        assert old in plain and code(plain) != code(plain.replace(old, new))


def test_weights_and_trees_by_all_that_they_are():
    def vit():
        torch.manual_seed(0)
        return SmallViT(classes=2, size=8, patch=4, width=8, depth=2, heads=2)

    known, model = weights_of(vit()), vit()
    assert known == weights_of(model)
    W = model.blocks[0].proj.weight.data
    model.blocks[0].proj.weight.data = W.flatten().flip(0).view_as(W)  # of the same sum
    assert weights_of(model) != known
    model = vit()
    model.blocks[1].qkv.weight.data[-1, -1] += 1  # the last of many numbers
    assert weights_of(model) != known
    model = vit()
    model.blocks = torch.nn.ModuleList(reversed(model.blocks))
    assert weights_of(model) != known
    assert weights_of(vit().half()) != known and weights_of(vit().bfloat16()) != known
    tree = Taxonomy.from_wnids(WNIDS)
    higher = tree.height + (tree.height == tree.height.max())
    assert tree_of(tree) == tree_of(Taxonomy.from_wnids(WNIDS))
    for other in (Taxonomy.from_wnids(WNIDS[::-1]), replace(tree, height=higher)):
        assert tree_of(other) != tree_of(tree)


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

    monkeypatch.setattr(files.fcntl, "lockf", refuse)
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
    import re

    assert re.search(words, sentence_of(error))


def test_bugs_are_no_sentences():
    for error in (KeyError("x"), RuntimeError("shape mismatch"), ValueError("no")):
        assert sentence_of(error) is None


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
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    settings = SimpleNamespace(workers=1, device="cpu")
    with pytest.raises(InputError, match=f"{[*left_over][0]}=.*unset RANK"):
        processes.start_ranks(settings)


def test_processes_that_no_port_is_free_for(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        left_over = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in left_over.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(InputError, match="the 2 processes of torchrun do not find one another"):
            processes.start_ranks(SimpleNamespace(workers=1, device="cpu"))


def test_a_temporary_folder_of_too_long_a_name(monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/tmp/" + "x" * 80)
    with pytest.raises(InputError, match="TMPDIR=/tmp/x.* is too long for the sockets"):
        processes.start_ranks(SimpleNamespace(workers=1, device="cpu"))
    processes.start_ranks(SimpleNamespace(workers=0, device="cpu"))


def test_more_processes_than_gpus(monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="more processes than GPUs: lower --nproc-per-node"):
        processes.start_ranks(SimpleNamespace(workers=1, device="cuda"))


def test_a_folder_that_may_not_be_written(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    Path(tmp_path).chmod(0o500)
    with pytest.raises(PermissionError), write_aside(tmp_path / "x"):
        pass
