"""Files of a run: written aside, locked, and whether there is room for them."""
import errno
import json
import os
import shutil
from contextlib import contextmanager

try:
    import fcntl
except ImportError:  # Windows: there, two runs in one output folder are not told apart
    fcntl = None

RESULTS = "results/*/results.json"  # in a run's folder


class InputError(ValueError):
    """What the run cannot go on with: one sentence that names the thing and the way out."""


def from_torchrun(name, default):
    """A number of torchrun's environment; the default for what is not one (`start_ranks`)."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


RANK = from_torchrun("RANK", 0)


def to_json(content):
    """Arrays and tensors become lists, NaN and infinity null."""
    text = json.dumps(content, default=lambda array: array.tolist())
    return json.dumps(json.loads(text, parse_constant=lambda name: None), indent=1)


def finished_results(out):
    """The results.json of a run's folder, the newest last; not of what was killed, in a .part."""
    finished = [path for path in out.glob(RESULTS) if not path.parent.name.endswith(".part")]
    return sorted(finished, key=lambda path: path.stat().st_mtime)


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
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"--out {out}: {error.filename} is a file; give a folder") from error
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
    """Say what is to be written and what is free; raises InputError if it does not fit."""
    free = shutil.disk_usage(folder).free
    about = f"{needed / 1e9:.2f} GB to write to {folder}, {free / 1e9:.2f} GB free"
    print(f"      {about}")
    if needed > free:
        raise InputError(f"not enough disk: {about}; make room there, or give another --out or "
                         "fewer --layers")
