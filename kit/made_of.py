"""What a result was made of, and so whether it is up to date. One policy for all of a run's folder:

Beside each artefact lies made_of.json, with all that its content depends on. A hash of it is in the
folder's name, behind the settings that are not the defaults: what is made of something else has
another name and is recomputed, and nothing takes another's place.

Class tokens take hours and have one folder. Other weights, images, transform or precision than in
their made_of.json stop the run, which says what to put back or delete. So does other code
(dinov2_hooks.py, kit/data.py) while layers are still to be recorded; if all are there it is said
and they are used, and what is made of them carries the record of the code that made them.

Code counts as its text, without blank lines, whole-line comments and docstrings; weights count by
name and bytes of every tensor, a tree by all its arrays, SAEs from elsewhere by the bytes of their
files. Images count by name and size, not by their pixels; the code of a hub does not count.
"""
import dataclasses
import hashlib
import json
import os
import re

import numpy as np
import torch

from kit.files import InputError, to_json, write_aside

TEXT = r'"""\S(?:(?!""")[\s\S])*"""'
NOT_CODE = re.compile(rf"^[ \t]*(#.*|{TEXT})?[ \t]*\n", re.MULTILINE)
NAME = "made_of.json"


def short_hash(content):
    """Of anything that JSON can hold."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def hash_of(*pieces):
    """Of bytes."""
    total = hashlib.sha256()
    for piece in pieces:
        total.update(len(piece).to_bytes(8, "little"))
        total.update(piece)
    return total.hexdigest()[:16]


def code_of(folder, *names, since=""):
    """Of these files, each from the words `since` on."""
    texts = [(folder / name).read_text(encoding="utf-8") for name in names]
    return hash_of(*(NOT_CODE.sub("", text[text.index(since) :]).encode() for text in texts))


def weights_of(model):
    total = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()[:16]


def tree_of(tree):
    return hash_of(*(np.array(value).tobytes() for value in dataclasses.astuple(tree)))


def files_of(folder, names):
    return hash_of(*((folder / name).read_bytes() for name in names))


def read_json(path):
    """Raises InputError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): delete this file, and give the same "
                         "command again") from error


def write_json(path, content):
    with write_aside(path) as part, open(part, "w", encoding="utf-8") as file:
        file.write(to_json(content))
        file.flush()
        os.fsync(file.fileno())


def folder_for(parent, made_of, changed=()):
    """parent/<changed settings>-<hash>, with its made_of.json. Made if it is not there."""
    folder = parent / "-".join([*changed, short_hash(made_of)])
    if not (folder / NAME).exists():
        write_json(folder / NAME, made_of)
    return folder
