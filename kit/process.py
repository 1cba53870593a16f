"""This process among others: torchrun's ranks, the lock on a folder, memory, the disk, and what
goes wrong as one sentence and an exit code."""
import ctypes
import errno
import os
import re
import shutil
import socket
import sys
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch

from kit.store import InputError, Stale

try:
    import fcntl
except ImportError:  # Windows: there, two runs in one output folder are not told apart
    fcntl = None

# as torchrun says
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))


def wait_for_all() -> None:
    """Until every process of this torchrun is here; if one has failed, and said why, end."""
    if WORLD > 1:
        try:
            torch.distributed.barrier()
        except RuntimeError:
            sys.exit(1)


def of_the_first(value):
    """What the first process says, in every process: where machines differ, one has to decide."""
    said = [value]
    if WORLD > 1:
        torch.distributed.broadcast_object_list(said)
    return said[0]


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one: from the system it comes page by page,
    which on a CPU is up to 40% of a training step."""
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
    with suppress(OSError, AttributeError):  # another system
        for name, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 1 << 28)):
            ctypes.CDLL("libc.so.6").mallopt(name, value)


@contextmanager
def lock(out: Path):
    """One run at a time in an output folder. The lock ends with the process, however that ends."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "a+") as file:
        if RANK == 0:
            try:
                if fcntl is not None:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                file.seek(0)
                raise InputError(f"{out} is in use by {file.read()}: wait for it to end, or give "
                                 "another --out") from error
            file.truncate(0)
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}")
            file.flush()
        yield


def size(count: float) -> str:
    """1234567 -> "1.23 MB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            return f"{count:.3g} {unit}"
        count /= 1000


def check_disk(out: Path, needed: int) -> None:
    """Raises InputError where so many bytes do not fit."""
    free = shutil.disk_usage(next(p for p in (out, *out.resolve().parents) if p.exists())).free
    if needed > free:
        raise InputError(
            f"not enough disk: {size(needed)} are to go to {out}, where {size(free)} are free; "
            "make room there, choose another --out, fewer --layers or a lower --images-per-class")


def sentence_of(error: Exception, expected: tuple) -> str | None:
    """What a user can do about an error that is no bug; None for one that is."""
    if isinstance(error, Stale):
        return f"{error}: delete it, and it is made anew, or give another --out"
    if isinstance(error, (InputError, *expected)):
        return str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return ("out of memory: lower --batch-size or --expansion, choose a smaller --backbone, "
                "or, if it is the GPU's, give --device cpu; what is done is kept")
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (f"the disk is full ({error}): make room there and give the same command again, "
                "which goes on from here")
    if isinstance(error, OSError):  # a file or folder that may not be read or written
        return f"{error}; mend it and give the same command again, which goes on from here"
    if re.search("DataLoader (worker|timed out)|allocate memory", str(error)):
        return ("out of memory, or of shared memory for the processes that read images: lower "
                f"--batch-size or end other programs ({str(error).splitlines()[0]})")
    return None


def run_as_command(action, settings, expected: tuple) -> int:
    """action(settings), as one of torchrun's processes -> exit code; if it fails, one sentence.
    `expected` are the errors that are one already."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # a file's name may be no UTF-8; a log is to be up to date
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        if WORLD > 1:
            gpus = torch.cuda.device_count()
            if settings.device == "cuda" and LOCAL_RANK >= gpus:
                raise InputError(f"more processes than the {gpus} GPUs: lower --nproc-per-node")
            if settings.device == "cuda":
                torch.cuda.set_device(LOCAL_RANK)
            sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
        action(settings)
        if WORLD > 1:
            torch.distributed.destroy_process_group()
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as error:
        if (sentence := sentence_of(error, expected)) is None:
            raise
        print("error: " + " ".join(sentence.split("\n")), file=sys.stderr)
        return 2
