"""A run among others: its folders, its processes, and what goes wrong in one sentence."""
import ast
import ctypes
import errno
import hashlib
import json
import math
import os
import shutil
import socket
import sys
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # Windows: there, two runs in one output folder are not told apart
    fcntl = None

RANK = int(os.environ.get("RANK", 0))  # torchrun's
RANKS = int(os.environ.get("WORLD_SIZE", 1))


class InputError(ValueError):
    """What the run cannot go on with: one sentence that names the thing and the way out."""


# ---------------------------------------------------------------- what a result was made of


def code_of(path, *names):
    """A Python file as its code alone, without comments and docstrings. With names, only these
    definitions, and all others of the file that they mention."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    by_name = {}
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):
            node.body = [part for part in node.body if not is_text(part)]
    if not names:
        return ast.dump(tree)
    for node in tree.body:
        mentioned = [getattr(node, "name", "")]
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            mentioned = [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            mentioned = [alias.asname or alias.name for alias in node.names]
        for name in mentioned:
            by_name.setdefault(name, []).append(node)
    wanted = {}
    pending = list(names)
    while pending:
        name = pending.pop()
        if name in by_name and name not in wanted:
            wanted[name] = list(map(ast.dump, by_name[name]))
            for node in by_name[name]:
                pending += [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]
    return str(sorted(wanted.items()))


def is_text(node):
    """Whether a statement is a string alone, as docstrings are."""
    text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return text and isinstance(node.value.value, str)


def short_hash(*parts):
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]


def to_json(content):
    """NaN and infinity become null."""
    def plain(value):
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return list(map(plain, value))
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(content), indent=1)


@contextmanager
def write_aside(path):
    """Yields PATH.RANK.part, to write a file or folder there. At the end it takes the place of
    PATH, which is there or is not, whenever the run is killed."""
    part = path.with_name(f"{path.name}.{RANK}.part")
    shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    yield part
    for written in [part, *part.rglob("*")]:
        if written.is_file():
            with open(written, "rb+") as file:  # on disk for good before it is named
                os.fsync(file.fileno())
    if path.is_dir():
        shutil.rmtree(path)
    part.replace(path)


@contextmanager
def lock(out):
    """One run at a time in an output folder. The lock ends with the process, however that ends."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "a+") as file:
        if RANK == 0:
            try:
                if fcntl is not None:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    file.seek(0)
                    raise InputError(f"{out} is in use by {file.read()}: wait for it to end, or "
                                     "give another --out") from error
                print(f"      no lock in {out} ({error.strerror}): start no second run there")
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield


def size(count):
    """1234567 -> "1.23 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def check_disk(folder, needed, what):
    """Say what is to be written and what is free; raises InputError where it does not fit."""
    there = folder.resolve()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    print(f"      {what}: {size(needed)} to write to {folder}, {size(free)} free")
    if needed > free:
        raise InputError(f"not enough disk: {size(needed)} are to go to {folder}, where "
                         f"{size(free)} are free; make room there, or give another --out or "
                         "fewer --layers")


# ---------------------------------------------------------------- processes


def barrier():
    """Until every process of this torchrun is here; if one has failed, and said why, end."""
    if RANKS > 1:
        try:
            torch.distributed.barrier()
        except RuntimeError:
            sys.exit(1)


def start_ranks(device):
    if "RANK" in os.environ and "WORLD_SIZE" not in os.environ:
        raise InputError("RANK is set but WORLD_SIZE is not: start with torchrun, or unset RANK")
    if RANKS > 1:
        local = int(os.environ.get("LOCAL_RANK", 0))
        if device == "cuda":
            if local >= torch.cuda.device_count():
                raise InputError("more processes than GPUs: lower --nproc-per-node")
            torch.cuda.set_device(local)
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))


def keep_freed_memory(keep):
    """Have glibc keep what a training step frees for the next one: from the system it comes page
    by page, which on a CPU is up to 40% of a step. Without keep as usual: scores need less room."""
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
    values = (0, 2**31 - 1, 1 << 28) if keep else (65536, 1 << 17, 1 << 17)
    with suppress(OSError, AttributeError):  # another system
        for name, value in zip((M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD), values):
            ctypes.CDLL("libc.so.6").mallopt(name, value)


def shared_memory():
    """Bytes free for what worker processes send: 64 MB in a container by default."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:  # another system, with other means
        return math.inf


# ---------------------------------------------------------------- errors


def sentence_of(error):
    """What a user can do about an error that is no bug; None for one that is."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    memory = ("out of memory", "can't allocate memory", "not enough memory")
    if isinstance(error, MemoryError) or any(words in str(error) for words in memory):
        return ("out of memory: lower --batch-size or --expansion, choose a smaller --backbone, or "
                "give --device cpu; what is done is kept")
    if "no kernel image" in text:
        return ("this PyTorch has no kernels for this GPU: install a build that has, see "
                "pytorch.org/get-started, or give --device cpu")
    if "DataLoader worker" in text or "DataLoader timed out" in text:
        return f"the processes that read images failed ({text}): give --workers 0"
    if isinstance(error, OSError) and error.errno is not None:
        path = f"{error.filename}: " if error.filename else ""
        ways = {errno.ENOSPC: "the disk is full: make room", errno.EDQUOT: "the quota is used up: "
                "make room", errno.EROFS: "read-only: give a folder to write to as --out",
                errno.EACCES: "not allowed: mend that, or give another folder as --out"}
        return (f"{path}{ways.get(error.errno, error.strerror)}; the same command goes on from "
                "here")
    return None


def plain_streams():
    """Print what the terminal cannot show as \\x.., and lines as soon as they are whole."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # a notebook's
            stream.reconfigure(errors="backslashreplace", line_buffering=True)


def run_as_command(action, settings, expected):
    """action(settings) -> exit code. Errors that users can mend become one sentence and 2: those
    of the expected classes are one already. A bug keeps its traceback."""
    try:
        start_ranks(settings.device)
        action(settings)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as error:
        sentence = str(error) if isinstance(error, (InputError, *expected)) else sentence_of(error)
        if sentence is None:
            raise
        print("\nerror: " + " ".join(sentence.split()), file=sys.stderr)
        return 2
    if RANKS > 1:
        torch.distributed.destroy_process_group()
    return 0
