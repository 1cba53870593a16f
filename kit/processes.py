"""Processes of a run, and what goes wrong in one sentence."""
import errno
import os
import sys
import tempfile
from contextlib import suppress
from datetime import timedelta

import torch

from kit.files import InputError, from_torchrun

RANKS = from_torchrun("WORLD_SIZE", 1)
TORCHRUNS = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
AT_FAULT = (  # the disk, or what the user may do there
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM,
    errno.ENAMETOOLONG)
LONGEST_TMPDIR = 70  # names of sockets in it have to fit in 104 bytes
AT_WORK = []  # the group of all processes, once they have found one another


def barrier():
    """Until every process of this torchrun is here; if one has failed, and said why, end."""
    if RANKS > 1:
        try:
            torch.distributed.barrier(AT_WORK[0])
        except RuntimeError:
            sys.exit(1)


def start_ranks(settings):
    """Join the other processes of torchrun, if there are any. Raises InputError for what another
    program left in the environment."""
    folder = tempfile.gettempdir()
    if settings.workers != 0 and len(folder) > LONGEST_TMPDIR:
        raise InputError(f"TMPDIR={folder} is too long for the sockets of the processes that read "
                         "images: set a shorter one, as /tmp, or give --workers 0")
    given = {name: os.environ[name] for name in TORCHRUNS if name in os.environ}
    if not given.keys() & {"RANK", "WORLD_SIZE"}:
        return
    rank, ranks = from_torchrun("RANK", 0), from_torchrun("WORLD_SIZE", 1)
    numbers = [os.environ.get(name, "0") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    needed = TORCHRUNS if ranks > 1 else TORCHRUNS[:2]
    if not given.keys() >= set(needed) or not all(map(str.isdecimal, numbers)) or rank >= ranks:
        names = ", ".join(f"{name}={text!r}" for name, text in given.items())
        raise InputError(f"{names}: this is not all that torchrun sets; start with torchrun, or "
                         "unset RANK, WORLD_SIZE and LOCAL_RANK")
    if ranks == 1:
        return
    local = from_torchrun("LOCAL_RANK", 0)
    if settings.device == "cuda":
        if local >= torch.cuda.device_count():
            raise InputError("more processes than GPUs: lower --nproc-per-node")
        torch.cuda.set_device(local)
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    try:
        torch.distributed.init_process_group("gloo", timeout=timedelta(minutes=1))
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"the {ranks} processes of torchrun do not find one another ({reason}): "
                         "start them again, or unset RANK and WORLD_SIZE") from error
    # what they do between two barriers may take days
    AT_WORK.append(torch.distributed.new_group(timeout=timedelta(days=30)))


# ---------------------------------------------------------------- errors


def sentence_of(error):
    """What a user can do about an error that is not a bug; None for one that is."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    memory = ("out of memory", "can't allocate memory", "not enough memory")
    if isinstance(error, MemoryError) or any(words in str(error) for words in memory):
        return ("out of memory: lower --batch-size or --expansion, choose a smaller --backbone, or "
                "give --device cpu; class tokens are kept")
    if "no kernel image" in text:
        return ("this PyTorch has no kernels for this GPU: install a build that has, see "
                "pytorch.org/get-started, or give --device cpu")
    if type(error).__module__.startswith(("huggingface_hub", "httpx", "httpcore", "requests")):
        return f"Hugging Face: {text} (`hf auth login` sets a token)"
    if "DataLoader worker" in text or "DataLoader timed out" in text:
        return f"the processes that read images failed ({text}): give --workers 0"
    no_room = ("No space left", "No usable temporary directory")
    if getattr(error, "errno", None) in AT_FAULT or any(words in text for words in no_room):
        return (f"{text}: make room, ask for the right to write there, or give another folder as "
                "--out; the same command goes on from here")
    return None


def plain_streams():
    """Print what the terminal cannot show as \\x.., and lines as soon as they are whole."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as `2>&-` does
            setattr(sys, name, open(os.devnull, "w"))
        with suppress(AttributeError):  # a notebook's
            getattr(sys, name).reconfigure(errors="backslashreplace", line_buffering=True)


def run_as_command(action, settings, expected):
    """action(settings) -> exit code. Errors that users can mend become one sentence and 2: those
    of the expected classes are one already. A bug keeps its traceback."""
    try:
        start_ranks(settings)
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
