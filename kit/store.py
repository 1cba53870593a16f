"""Files that survive: one way to write them, and one way to tell whether they may be used again.

What a run makes is written under another name and renamed once it is on disk for good, so that a
kill leaves either the old file or the new. A *record*, a small JSON, says what a thing was made of.
"""
import hashlib
import json
import math
import os
import shutil
import zlib
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm


told = set()  # reasons why things are made again, each said once


class InputError(ValueError):
    """What the run cannot go on with: one sentence that names the thing and the way out."""


class Stale(InputError):
    """A file that is damaged, or was made from something else than is asked for now."""


def fsync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on disk for good."""
    if os.name != "nt":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def atomic_write(path: Path):
    """Yields PATH.part, to write a file or folder there; at the end it takes the place of PATH."""
    part = path.with_name(path.name + ".part")
    shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    yield part
    for written in [part, *part.rglob("*")]:
        fsync(written)
    if path.is_dir():
        shutil.rmtree(path)
    part.replace(path)
    fsync(path.parent)


def to_json(content) -> str:
    """NaN and infinity become null."""
    def plain(value):
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(content), indent=1)


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    crc = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 24):
            crc = zlib.crc32(piece, crc)
    return crc


def hash_of(*paths) -> str:
    """Of the bytes of some files: the code that made a thing."""
    return hashlib.sha256(b"".join(Path(path).read_bytes() for path in paths)).hexdigest()[:16]


def write_record(path: Path, made_from: dict, **content) -> dict:
    """Write what was made, and from what; returns it as it will be read.

    `files`, if given, are the checksums, by name, of files in the same folder.
    """
    record = json.loads(to_json({"made_from": made_from, **content}))
    with atomic_write(path) as part:
        part.write_text(to_json({"crc32": zlib.crc32(to_json(record).encode()), **record}) + "\n")
    return record


def read_record(path: Path, made_from: dict | None = None) -> dict | None:
    """What write_record wrote; None where there is nothing.

    Raises Stale where it or one of its files is damaged, or was made from something else than
    `made_from`, if that is given.
    """
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_bytes())
        intact = record.pop("crc32") == zlib.crc32(to_json(record).encode())
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise Stale(f"{path} is damaged")
    known = record["made_from"]
    asked = known if made_from is None else json.loads(to_json(made_from))
    changes = [f"{key} was {known.get(key)} and is now {asked.get(key)}"
               for key in {**known, **asked} if known.get(key) != asked.get(key)]
    if changes:
        raise Stale(f"{path} was made with other settings ({'; '.join(changes)})")
    for name, crc in record.get("files", {}).items():
        check_file(path.parent / name, crc)
    return record


def check_file(path: Path, crc: int) -> Path:
    """Raises Stale where a file is not the one with that checksum."""
    if not path.is_file() or checksum(path) != crc:
        raise Stale(f"{path} is damaged")
    return path


def reuse(path: Path, made_from: dict) -> dict | None:
    """As read_record, but None where that would be Stale: it says why, and the caller makes the
    thing again. Not for class tokens, which cost hours."""
    try:
        return read_record(path, made_from)
    except Stale as stale:
        reason = str(stale).partition(" was made ")[2]
        if reason not in told:
            others = ", and all else of which this is true" if reason else ""
            tqdm.write(f"      {stale}: it is made again{others}")
        if reason:
            told.add(reason)
        return None
