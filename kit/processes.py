"""Processes of a run, and what goes wrong in one sentence."""
import os
import sys
from contextlib import suppress
from datetime import timedelta

import torch

from kit.files import RANK, InputError

RANKS = int(os.environ.get("WORLD_SIZE", 1))  # torchrun's


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
