"""A run among others: its folders, its processes, and what goes wrong in one sentence."""
import ast
import errno
import hashlib
import json
import os
import shutil
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
    definitions, and all that is no definition: imports and constants."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):
            node.body = [part for part in node.body if not is_text(part)]
    wanted = []
    for node in tree.body:  # what is no definition has no name
        if not names or getattr(node, "name", names[0]) in names:
            wanted.append(ast.dump(node))
    return "\n".join(wanted)


def is_text(node):
    """Whether a statement is a constant alone, as docstrings are."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def short_hash(*parts):
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]


def to_json(content):
    """Arrays and tensors become lists, NaN and infinity null."""
    text = json.dumps(content, default=lambda array: array.tolist())
    return json.dumps(json.loads(text, parse_constant=lambda name: None), indent=1)


@contextmanager
def write_aside(path):
    """Yields PATH.RANK.part, to write a file or folder there. At the end it takes the place of
    PATH, which is therefore never half-written."""
    part = path.with_name(f"{path.name}.{RANK}.part")
    shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    yield part
    if path.is_dir():
        shutil.rmtree(path)
    part.replace(path)


@contextmanager
def lock(out):
    """One run at a time in an output folder. The lock ends with the process, however that ends."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "w") as file:
        try:
            if RANK == 0 and fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise InputError(f"another run is at work in {out}: wait for it to end, or give "
                                 "another --out") from error
            print(f"      no lock in {out} ({error.strerror}): start no second run there")
        yield


def check_disk(folder, needed):
    """Say what is to be written and what is free; raises InputError where it does not fit."""
    free = shutil.disk_usage(folder).free
    about = f"{needed / 1e9:.2f} GB to write to {folder}, {free / 1e9:.2f} GB free"
    print(f"      {about}")
    if needed > free:
        raise InputError(f"not enough disk: {about}; make room there, or give another --out or "
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
    if ("RANK" in os.environ) != ("WORLD_SIZE" in os.environ):
        raise InputError("only one of RANK and WORLD_SIZE is set: start with torchrun, or unset it")
    if RANKS > 1:
        local = int(os.environ.get("LOCAL_RANK", 0))
        if device == "cuda":
            if local >= torch.cuda.device_count():
                raise InputError("more processes than GPUs: lower --nproc-per-node")
            torch.cuda.set_device(local)
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))


# ---------------------------------------------------------------- errors


def sentence_of(error):
    """What a user can do about an error that is no bug; None for one that is."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    memory = ("out of memory", "can't allocate memory", "not enough memory")
    if isinstance(error, MemoryError) or any(words in str(error) for words in memory):
        return ("out of memory: lower --batch-size or --expansion, choose a smaller --backbone, or "
                "give --device cpu; class tokens are kept")
    if "no kernel image" in text:
        return ("this PyTorch has no kernels for this GPU: install a build that has, see "
                "pytorch.org/get-started, or give --device cpu")
    if type(error).__module__.partition(".")[0] in ("huggingface_hub", "httpx", "requests"):
        return f"Hugging Face: {text} (`hf auth login` sets a token)"
    if "DataLoader worker" in text or "DataLoader timed out" in text:
        return f"the processes that read images failed ({text}): give --workers 0"
    if (isinstance(error, OSError) and error.errno is not None) or "No space left" in text:
        return (f"{text}: mend that, make room, or give another folder as --out; the same command "
                "goes on from here")
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
