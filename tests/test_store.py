"""Files and records: never half written, never stale, never damaged; the lock; the disk."""
import multiprocessing
import os
import shutil

import numpy as np
import pytest

from kit import process
from kit.process import check_disk, lock, sentence_of, size
from kit.store import (InputError, Stale, atomic_write, checksum, hash_of, read_record, reuse,
                       write_record)


def flip(path, place=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_write_that_is_cut_short_leaves_what_was_there(tmp_path, kind):
    path = tmp_path / "thing"

    def write(text, fail=False):
        with atomic_write(path) as part:
            if kind == "folder":
                part.mkdir()
            (part / "a" if kind == "folder" else part).write_text(text)
            if fail:
                raise KeyboardInterrupt

    def read():
        return (path / "a" if kind == "folder" else path).read_text()

    with pytest.raises(KeyboardInterrupt):
        write("first", fail=True)
    assert not path.exists()
    write("first")
    with pytest.raises(KeyboardInterrupt):
        write("second", fail=True)
    assert read() == "first"
    write("second")  # over what the kill left
    assert read() == "second" and os.listdir(tmp_path) == ["thing"]


def test_records(tmp_path, capsys):
    path, made_from = tmp_path / "record.json", {"seed": 0, "lr": 4e-4, "layers": (1, 2)}
    assert read_record(path, made_from) is None
    written = write_record(path, made_from, score=float("nan"), rows=3)
    assert written == read_record(path, made_from) == read_record(path)
    assert written["score"] is None and written["rows"] == 3
    with pytest.raises(Stale, match="other settings .seed was 0 and is now 1.$"):
        read_record(path, {**made_from, "seed": 1})
    with pytest.raises(Stale, match="batch was None and is now 5"):
        read_record(path, {**made_from, "batch": 5})
    assert reuse(path, {**made_from, "seed": 1}) is None
    assert "it is made again" in capsys.readouterr().out


def test_damaged_records_and_files(tmp_path):
    path, other = tmp_path / "record.json", tmp_path / "other"
    other.write_bytes(os.urandom(1000))
    for damaged, damage in [
        (path, lambda p: flip(p, 0.1)), (path, lambda p: flip(p, 0.5)), (path, lambda p: flip(p, 0.99)),
        (path, lambda p: os.truncate(p, 50)), (path, lambda p: p.write_bytes(b"")),
        (path, lambda p: p.write_text("[]")), (other, flip), (other, lambda p: os.truncate(p, 999)),
        (other, os.unlink),
    ]:
        other.write_bytes(os.urandom(1000))
        write_record(path, {"seed": 0}, files={"other": checksum(other)}, top1=0.25)
        read_record(path, {"seed": 0})
        damage(damaged)
        with pytest.raises(Stale, match=f"{damaged.name} is damaged"):
            read_record(path, {"seed": 0})


def test_hash_of_code_is_of_its_bytes(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    known = hash_of(tmp_path / "a.py")
    assert known == hash_of(tmp_path / "a.py")
    (tmp_path / "a.py").write_text("x = 1  # one\n")
    assert known != hash_of(tmp_path / "a.py")


def hold(folder, held, release):
    with lock(folder):
        held.set()
        release.wait(30)


def test_the_second_run_says_who_holds_the_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(tmp_path, held, release))
    holder.start()
    assert held.wait(60)
    with pytest.raises(InputError, match=f"is in use by process {holder.pid} on .* another --out"):
        with lock(tmp_path):
            pass
    holder.kill()  # the lock goes with the process
    holder.join()
    with lock(tmp_path):
        pass


def test_a_disk_too_small(tmp_path, monkeypatch):
    check_disk(tmp_path / "not/there/yet", 10)
    usage = shutil._ntuple_diskusage(10**9, 10**9, 10_000)
    monkeypatch.setattr(process.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="not enough disk: 20 kB .* where 10 kB are free; .*--out"):
        check_disk(tmp_path, 20_000)
    assert [size(n) for n in (0, 999, 1234, 5.25e8, 3e15)] == "0 B,999 B,1.23 kB,525 MB,3e+03 TB".split(",")


def test_errors_as_sentences():
    import torch

    for error, words in [
        (Stale("a.json is damaged"), "delete it"), (InputError("no such folder"), "no such folder"),
        (torch.OutOfMemoryError("CUDA out of memory"), "--device cpu"), (MemoryError(), "--batch-size"),
        (OSError(28, "No space left on device", "a.npy"), "the disk is full"),
        (PermissionError(13, "Permission denied", "out"), "Permission denied"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error.\nmore"), "(pid 7)"),
        (LookupError("mine"), "mine"),
    ]:
        assert words in sentence_of(error, (LookupError,))
    assert sentence_of(RuntimeError("shapes do not fit"), ()) is None  # a bug keeps its traceback
    assert sentence_of(np.exceptions.AxisError("axis"), ()) is None
