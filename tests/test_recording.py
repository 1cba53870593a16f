"""Class tokens of many images on the disk: interrupted, shared, damaged, killed, not finite."""

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest import raises

import dinov2_hooks
from dinov2_hooks import BackboneError, ImageError, class_tokens, finish, record


class Stop(Exception):
    pass


class Images(list):
    """A dataset of images that can be read; that of number `fails_at` raises."""

    fails_at = None

    def __init__(self, items):
        super().__init__(item if isinstance(item, tuple) else (item, "") for item in items)

    def __getitem__(self, i):
        if i == self.fails_at:
            raise Stop
        return super().__getitem__(i)


def some_images(count):
    return Images(torch.randn(count, 3, 16, 16))


def tokens_of(vit, images, layers):
    with torch.inference_mode():
        return class_tokens(vit, torch.stack([image for image, _ in images]), layers).half().numpy()


def check_recorded(folder, expected, layers):
    finish(folder, layers)
    for layer, tokens in zip(layers, expected, strict=True):
        recorded = np.load(folder / f"layer_{layer:02d}.npy", mmap_mode="r")
        assert recorded.dtype == np.float16 and recorded.shape == tokens.shape
        np.testing.assert_allclose(recorded, tokens, atol=2e-3)


def test_recording_goes_on_where_it_was_interrupted(vit, tmp_path, monkeypatch):
    monkeypatch.setattr(dinov2_hooks, "BATCH", 2)
    monkeypatch.setattr(dinov2_hooks, "CHUNK", 2)
    images, layers, shared = some_images(11), [0, 2], tmp_path / "shared"
    expected = tokens_of(vit, images, layers)
    images.fails_at = 9
    with raises(Stop):
        record(vit, images, tmp_path, layers)
    with open(tmp_path / "layer_02.part", "r+b") as file:  # a kill between rows and marks
        file.seek(-6, 2)
        file.write(bytes(6))
    monkeypatch.setattr(dinov2_hooks, "BATCH", 3)  # as after a card ran out of memory
    images.fails_at = 3  # the first rows are there: they are not asked for again
    record(vit, images, tmp_path, layers)
    images.fails_at = None
    record(vit, images, shared, layers, rank=0, ranks=2)
    with raises(ImageError, match="5 rows of .*layer_00.part are not recorded yet"):
        finish(shared, layers)
    record(vit, images, shared, layers, rank=1, ranks=2)
    for folder in (tmp_path, shared):
        check_recorded(folder, expected, layers)
        assert {path.name for path in folder.glob("layer*")} == {"layer_00.npy", "layer_02.npy"}


def test_a_dataset_with_labels(vit, tmp_path):
    """As torchvision's ImageFolder has them."""
    images = Images((image, 7) for image in torch.randn(3, 3, 16, 16))
    record(vit, images, tmp_path, [1])
    check_recorded(tmp_path, tokens_of(vit, images, [1]), [1])


def test_images_that_cannot_be_read(vit, tmp_path, capsys):
    images, blank = some_images(6), torch.zeros(3, 16, 16)
    readable = [images[i] for i in (0, 2, 3, 5)]
    images[1], images[4] = (blank, "one is\nbroken"), (blank, "four is broken")
    with raises(ImageError, match="one is\nbroken"):
        record(vit, images, tmp_path, [1])
    record(vit, images, tmp_path, [1], skip_bad=True)
    assert "left out: one is broken" in capsys.readouterr().err
    with raises(ImageError, match="one is\nbroken"):  # asked again, without being told so
        record(vit, images, tmp_path, [1])
    check_recorded(tmp_path, tokens_of(vit, readable, [1]), [1])
    assert (tmp_path / "left_out.json").read_text() == "[1, 4]"
    images[4] = readable[0]
    record(vit, images, tmp_path, [2], skip_bad=True)
    with raises(ImageError, match="other images could be read"):
        finish(tmp_path, [2])
    record(vit, Images([(blank, "all are")] * 3), tmp_path / "none", [2], skip_bad=True)
    with raises(ImageError, match="none of the 3 images can be read"):
        finish(tmp_path / "none", [2])


def test_a_damaged_file_is_named(vit, tmp_path):
    images, path = some_images(5), tmp_path / "layer_01.part"
    record(vit, images, tmp_path, [0, 1])
    whole = path.read_bytes()
    for content in (b"", whole[:50], whole[:300], whole[:-1], whole + b"\0", whole[:-1] + b"\7"):
        path.write_bytes(content)
        for action in (partial(record, vit, images), finish):
            with raises(ImageError, match="layer_01.part is damaged: delete this one file"):
                action(tmp_path, [1])
    path.write_bytes(whole)
    with raises(ImageError, match="layer_00.part is of 5 images .* not 4 and 24: delete"):
        record(vit, some_images(4), tmp_path, [0, 1])
    path.unlink()  # the way out
    record(vit, images, tmp_path, [0, 1])
    check_recorded(tmp_path, tokens_of(vit, images, [0, 1]), [0, 1])


class Kill(BaseException):
    pass


@pytest.mark.parametrize("unreadable", [[], [1, 4]])
def test_killed_while_finishing(vit, tmp_path, monkeypatch, unreadable):
    """Before each renaming and cutting in turn: the same files in the end."""
    images, whole, killed = some_images(6), tmp_path / "whole", tmp_path / "killed"
    for i in unreadable:
        images[i] = torch.zeros(3, 16, 16), "broken"
    for folder in (whole, killed):
        record(vit, images, folder, [1, 2], skip_bad=True)
    finish(whole, [1, 2])
    left, kills = [0], 0

    def dying(real):
        def called(*given):
            left[0] -= 1
            if left[0] < 0:
                raise Kill
            return real(*given)

        return called

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dying(Path.replace))
        patch.setattr("os.truncate", dying(os.truncate))
        for left[0] in range(9):
            missing = [n for n in (1, 2) if not (killed / f"layer_{n:02d}.npy").exists()]
            try:
                record(vit, images, killed, missing, skip_bad=True)
                finish(killed, missing)
            except Kill:
                kills += 1
    assert kills >= 3
    for path in whole.iterdir():
        assert path.read_bytes() == (killed / path.name).read_bytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_tokens_that_are_not_finite_name_layer_and_image(vit, tmp_path, value):
    def spoil(block, given, output):
        output[2, 0, 5] = value

    vit.blocks[1].register_forward_hook(spoil)
    with raises(BackboneError, match="layer 1, image 2: the class token is not finite"):
        record(vit, some_images(4), tmp_path, [0, 1])
