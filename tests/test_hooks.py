"""Hooks against DINOv2's own get_intermediate_layers, timm and a forward pass by hand."""

import functools
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dinov2_hooks
from dinov2_hooks import (
    HUB,
    BackboneError,
    ImageError,
    blocks_of,
    check_class_token,
    class_tokens,
    eval_transform,
    finish,
    load_backbone,
    record,
    relevancy_maps,
    transform_of,
)
from kit.demo import SmallViT


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return SmallViT(classes=5, size=16, patch=4, width=24, depth=3, heads=2).eval()


def test_tokens_equal_a_forward_pass_by_hand(vit):
    images = torch.randn(3, 3, 16, 16)
    with torch.inference_mode():
        x = vit.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([vit.cls_token.expand(3, -1, -1), x], dim=1) + vit.pos_embed
        by_hand = []
        for block in vit.blocks:
            x = block(x)
            by_hand.append(x[:, 0])
        assert torch.equal(class_tokens(vit, images, range(3)), torch.stack(by_hand))
        assert torch.equal(class_tokens(vit, images, [2, 0]), torch.stack([by_hand[2], by_hand[0]]))
    assert not any(block._forward_hooks for block in vit.blocks)


def test_hooks_are_removed_when_the_forward_pass_fails(vit):
    with pytest.raises(
        BackboneError, match=r"does not take images of \(3, 1, 16, 16\), .* another --transform"
    ):
        class_tokens(vit, torch.randn(3, 1, 16, 16), [0])
    assert not any(block._forward_hooks for block in vit.blocks)


def test_a_model_that_leaves_something_to_chance_is_refused(vit, tmp_path):
    images = Images(torch.rand(4, 3, 16, 16))

    def refuse(words, map_words=None):
        with pytest.raises(BackboneError, match=words):
            record(vit, images, tmp_path, [1])
        with pytest.raises(BackboneError, match=map_words or words):
            relevancy_maps(vit, torch.rand(2, 3, 16, 16), 1, lambda x: x[:, 0])

    vit.train()
    refuse("SmallViT is in training mode.*call model.eval()")
    vit.eval().blocks[1] = nn.Sequential(vit.blocks[1], nn.Dropout(0.1))
    refuse("Dropout is in training mode")
    vit.blocks[1] = nn.Sequential(vit.blocks[1][0], nn.Dropout(0.1)).eval()
    record(vit, images, tmp_path, [1])
    vit.blocks[1][1].forward = lambda x: nn.functional.dropout(x, 0.05)
    (tmp_path / "layer_01.part").unlink()
    refuse("other tokens each time", "dropout that model.eval.* does not turn off")


def test_weights_of_other_precisions_take_images_as_they_come(vit):
    images = torch.rand(2, 3, 16, 16)
    expected = class_tokens(vit, images, [2])
    for dtype in (torch.float64, torch.bfloat16):
        tokens = class_tokens(vit.to(dtype), images, [2])
        assert tokens.dtype == dtype
        torch.testing.assert_close(tokens.float(), expected, atol=0.05, rtol=0.05)
        assert relevancy_maps(vit, images, 1, lambda x: x[:, 0]).shape == (2, 4, 4)


@pytest.mark.parametrize("stride, padding, side", [(2, 0, 7), (4, 2, 5)])
def test_a_map_has_a_number_for_each_patch(vit, stride, padding, side):
    """Of overlapping and of padded patches, too."""
    vit.patch_embed.stride, vit.patch_embed.padding = (stride, stride), (padding, padding)
    vit.pos_embed = nn.Parameter(torch.randn(1, 1 + side**2, 24))
    maps = relevancy_maps(vit, torch.rand(2, 3, 16, 16), 1, lambda x: x[:, 0])
    assert maps.shape == (2, side, side)


def test_layer_out_of_range(vit):
    with pytest.raises(BackboneError, match="no layer 3: the backbone has 0 to 2"):
        class_tokens(vit, torch.randn(1, 3, 16, 16), [0, 3])


@functools.cache
def load_dinov2(folder, shape):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if shape in ("dinov2_vits14", "dinov2_vits14_reg"):
            return torch.hub.load(str(folder), shape, source="local", pretrained=False).eval()
        sys.path.insert(0, str(folder))
        try:
            from dinov2.models.vision_transformer import DinoVisionTransformer
        finally:
            sys.path.remove(str(folder))
        return DinoVisionTransformer(  # what makes vitg14 differ, at a small size
            img_size=518,
            patch_size=14,
            embed_dim=96,
            depth=4,
            num_heads=3,
            ffn_layer="swiglufused",
            init_values=1.0,
            block_chunks=2 if shape == "swiglu_chunked" else 0,
        ).eval()


@pytest.mark.parametrize(
    "shape", ["dinov2_vits14", "dinov2_vits14_reg", "swiglu", "swiglu_chunked"]
)
def test_dinov2_tokens_equal_its_intermediate_layers_to_the_bit(dinov2, shape, tmp_path):
    model = load_dinov2(dinov2, shape)
    images, depth = torch.randn(2, 3, 224, 224), len(blocks_of(model))
    with torch.inference_mode():
        theirs = model.get_intermediate_layers(images, n=depth, return_class_token=True, norm=False)
        theirs = torch.stack([token for _, token in theirs])
        assert torch.equal(class_tokens(model, images, range(depth)), theirs)
    record(model, Images(images), tmp_path, range(depth))
    finish(tmp_path, range(depth))
    for layer in range(depth):
        recorded = np.load(tmp_path / f"layer_{layer:02d}.npy")
        assert torch.equal(torch.from_numpy(recorded), theirs[layer].half())


class Stop(Exception):
    pass


class Images(list):
    """A dataset of images that can be read; that of number `fails_at` raises."""

    fails_at = None

    def __getitem__(self, i):
        if i == self.fails_at:
            raise Stop
        item = super().__getitem__(i)
        return item if isinstance(item, tuple) else (item, "")


def test_recording_goes_on_where_it_was_interrupted(vit, tmp_path, monkeypatch):
    monkeypatch.setattr(dinov2_hooks, "BATCH", 2)
    monkeypatch.setattr(dinov2_hooks, "CHUNK", 2)
    images = Images(torch.randn(11, 3, 16, 16))
    with torch.inference_mode():
        expected = class_tokens(vit, torch.stack([images[i][0] for i in range(11)]), [0, 2])
    images.fails_at = 9
    with pytest.raises(Stop):
        record(vit, images, tmp_path, [0, 2])
    with open(tmp_path / "layer_02.part", "r+b") as file:  # a kill between rows and marks
        file.seek(-6, 2)
        file.write(bytes(6))
    monkeypatch.setattr(dinov2_hooks, "BATCH", 3)  # as after a card ran out of memory
    images.fails_at = 3  # the first rows are there: they are not asked for again
    record(vit, images, tmp_path, [0, 2])
    images.fails_at = None
    for rank in (0, 1):
        record(vit, images, tmp_path / "shared", [0, 2], rank=rank, ranks=2)
        if rank == 0:
            with pytest.raises(ImageError, match="5 rows of .*layer_00.part are not recorded yet"):
                finish(tmp_path / "shared", [0, 2])
    for folder in (tmp_path, tmp_path / "shared"):
        finish(folder, [0, 2])
        assert {path.name for path in folder.glob("layer*")} == {"layer_00.npy", "layer_02.npy"}
        for layer, tokens in zip((0, 2), expected.half().numpy()):
            recorded = np.load(folder / f"layer_{layer:02d}.npy", mmap_mode="r")
            assert recorded.dtype == np.float16 and recorded.shape == (11, 24)
            np.testing.assert_allclose(recorded, tokens, atol=2e-3)


def test_a_dataset_with_labels(vit, tmp_path):
    """As torchvision's ImageFolder has them."""
    images = torch.rand(3, 3, 16, 16)
    record(vit, Images((image, 7) for image in images), tmp_path, [1])
    finish(tmp_path, [1])
    expected = class_tokens(vit, images, [1])[0].detach().half()
    assert np.array_equal(np.load(tmp_path / "layer_01.npy"), expected)


def test_images_that_cannot_be_read(vit, tmp_path, capsys):
    images, blank = Images(torch.randn(6, 3, 16, 16)), torch.zeros(3, 16, 16)
    images[1], images[4] = (blank, "one is\nbroken"), (blank, "four is broken")
    with pytest.raises(ImageError, match="one is\nbroken"):
        record(vit, images, tmp_path, [1])
    record(vit, images, tmp_path, [1], skip_bad=True)
    assert "left out: one is broken" in capsys.readouterr().err
    with pytest.raises(ImageError, match="one is\nbroken"):  # asked again, without being told so
        record(vit, images, tmp_path, [1])
    finish(tmp_path, [1])
    with torch.inference_mode():
        expected = class_tokens(vit, torch.stack([images[i][0] for i in (0, 2, 3, 5)]), [1])[0]
    np.testing.assert_allclose(np.load(tmp_path / "layer_01.npy"), expected.half(), atol=2e-3)
    assert (tmp_path / "left_out.json").read_text() == "[1, 4]"
    images[4] = torch.randn(3, 16, 16)
    record(vit, images, tmp_path, [2], skip_bad=True)
    with pytest.raises(ImageError, match="other images could be read"):
        finish(tmp_path, [2])
    record(vit, Images([(blank, "all are")] * 3), tmp_path / "none", [2], skip_bad=True)
    with pytest.raises(ImageError, match="none of the 3 images can be read"):
        finish(tmp_path / "none", [2])


def test_a_damaged_file_is_named(vit, tmp_path):
    images = Images(torch.randn(5, 3, 16, 16))
    record(vit, images, tmp_path, [0, 1])
    path = tmp_path / "layer_01.part"
    whole = path.read_bytes()
    for content in (b"", whole[:50], whole[:300], whole[:-1], whole + b"\0", whole[:-1] + b"\7"):
        path.write_bytes(content)
        for action in (
            lambda: record(vit, images, tmp_path, [0, 1]),
            lambda: finish(tmp_path, [1]),
        ):
            with pytest.raises(ImageError, match="layer_01.part is damaged: delete this one file"):
                action()
    path.write_bytes(whole)
    with pytest.raises(ImageError, match="layer_00.part is of 5 images .* not 4 and 24: delete"):
        record(vit, Images(torch.randn(4, 3, 16, 16)), tmp_path, [0, 1])
    path.unlink()  # the way out
    record(vit, images, tmp_path, [0, 1])
    finish(tmp_path, [0, 1])
    assert len(np.load(tmp_path / "layer_01.npy")) == 5


@pytest.mark.parametrize("unreadable", [[], [1, 4]])
def test_killed_while_finishing(vit, tmp_path, monkeypatch, unreadable):
    """Before each renaming and cutting in turn: the same files in the end."""
    images = Images(torch.randn(6, 3, 16, 16))
    for i in unreadable:
        images[i] = torch.zeros(3, 16, 16), "broken"
    for folder in ("whole", "killed"):
        record(vit, images, tmp_path / folder, [1, 2], skip_bad=True)
    finish(tmp_path / "whole", [1, 2])

    class Kill(BaseException):
        pass

    left = [0]

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
        kills = 0
        for left[0] in range(9):
            made = {path.name for path in (tmp_path / "killed").glob("*.npy")}
            missing = [n for n in (1, 2) if f"layer_{n:02d}.npy" not in made]
            try:
                record(vit, images, tmp_path / "killed", missing, skip_bad=True)
                finish(tmp_path / "killed", missing)
            except Kill:
                kills += 1
    assert kills >= 3
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_tokens_that_are_not_finite_name_layer_and_image(vit, tmp_path, value):
    class Spoil(nn.Module):
        def forward(self, x):
            x = x.clone()
            x[2, 0, 5] = value
            return x

    vit.blocks[1] = nn.Sequential(vit.blocks[1], Spoil())
    with pytest.raises(BackboneError, match="layer 1, image 2: the class token is not finite"):
        record(vit, Images(torch.randn(4, 3, 16, 16)), tmp_path, [0, 1])


def test_a_patch_is_not_taken_for_the_class_token(vit):
    image = torch.randn(3, 16, 16)
    before = vit.cls_token.clone()
    check_class_token(vit, image, [0, 2])
    assert torch.equal(vit.cls_token, before)

    class Late(nn.Module):  # as in CaiT the class token joins after this block
        def forward(self, x):
            return torch.cat([x[:, 1:2], x[:, 1:]], dim=1)

    vit.blocks[0] = Late()
    with pytest.raises(
        BackboneError, match="token 0 is not the class token in layers .0, 1. of this"
    ):
        check_class_token(vit, image, [0, 1])
    with pytest.raises(BackboneError, match="has no cls_token"):
        class_tokens(
            nn.ModuleDict({"blocks": nn.ModuleList([nn.Identity(), nn.Linear(1, 1)])}),
            torch.zeros(1, 3, 4, 4),
            [0],
        )


def test_a_bug_in_a_block_keeps_its_traceback(vit):
    def fail(x):
        raise RuntimeError("a student's mistake")

    vit.blocks[1].forward = fail
    with pytest.raises(RuntimeError, match="a student's mistake"):
        class_tokens(vit, torch.randn(1, 3, 16, 16), [0])


def test_eval_transform_is_dinov2s(dinov2):
    from PIL import Image

    sys.path.insert(0, str(dinov2))
    try:
        from dinov2.data.transforms import make_classification_eval_transform
    finally:
        sys.path.remove(str(dinov2))
    for shape in [(300, 500, 3), (64, 64, 3), (256, 224, 3)]:
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
        assert torch.equal(eval_transform()(picture), make_classification_eval_transform()(picture))


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "vit_small_patch14_dinov2",
        "vit_small_patch16_dinov3",
        "deit3_small_patch16_224",
    ],
)
def test_transform_is_the_one_timm_makes(name):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    from PIL import Image

    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    theirs = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 500, 3), np.uint8))
    assert torch.equal(transform_of(model)(picture), theirs(picture))


def test_transform_is_dinov2s_where_the_model_says_nothing(vit):
    assert str(transform_of(vit)) == str(eval_transform())
    vit.pretrained_cfg = {"mean": (0.1, 0.2, 0.3)}
    assert eval_transform().transforms[0].interpolation.value == "bicubic"
    assert str(transform_of(vit)) == str(eval_transform(mean=(0.1, 0.2, 0.3)))
    vit.pretrained_cfg = {"input_size": (3, 48, 48), "crop_pct": 1.0, "crop_mode": "squash"}
    assert transform_of(vit).transforms[0].size == (48, 48)


def test_a_crop_is_never_padded():
    assert eval_transform(crop=518).transforms[0].size == 592
    with pytest.raises(BackboneError, match="resized to 256 and cropped to 518"):
        eval_transform(256, 518)


def test_weights_are_asked_for_and_the_process_stays_as_it_was(tmp_path, capsys):
    (tmp_path / "hubconf.py").write_text(
        f"import os, sys, torch\nsys.path.insert(0, {str(dinov2_hooks.__file__[:-16])!r})\n"
        "from kit.demo import SmallViT\n"
        "def vit(pretrained=False):\n"
        "    os.chdir('/')\n    torch.set_grad_enabled(False)\n"
        "    torch.set_default_dtype(torch.float64)\n    torch.set_default_device('meta')\n"
        "    return SmallViT(classes=2 + pretrained).to(torch.bfloat16)\n"
        "def other():\n    return SmallViT()\n"
    )
    before = os.getcwd()
    model = load_backbone("vit", str(tmp_path))
    assert len(model.head.bias) == 3 and model.head.bias.dtype == torch.float32
    assert os.getcwd() == before and torch.is_grad_enabled()
    assert torch.zeros(1).dtype == torch.float32 and torch.zeros(1).device.type == "cpu"
    assert len(load_backbone("vit", str(tmp_path), pretrained=False).head.bias) == 2
    load_backbone("other", str(tmp_path))
    assert "other of" in capsys.readouterr().out


def test_load_backbone_from_a_local_folder(hub):
    model = load_backbone("small_vit", str(hub))
    assert not model.training and not any(
        parameter.requires_grad for parameter in model.parameters()
    )
    for name, message in [
        ("dinov2_vitx14", "Cannot find callable dinov2_vitx14"),
        ("no_vit", "is not a vision transformer with a class token"),
        ("needs_package", "No module named 'a_package_that_is_missing'; a package may be missing"),
    ]:
        with pytest.raises(BackboneError, match=message):
            load_backbone(name, str(hub))


def test_xformers_is_off_before_the_hubs_code_is_imported(tmp_path, monkeypatch):
    monkeypatch.delenv("XFORMERS_DISABLED", raising=False)
    (tmp_path / "hubconf.py").write_text(
        "import os\noff = 'XFORMERS_DISABLED' in os.environ\n"
        "def vit(): raise ValueError(f'off: {off}')"
    )
    with pytest.raises(BackboneError, match="off: True"):
        load_backbone("vit", str(tmp_path))


def test_hub_that_is_none(tmp_path):
    for hub in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            BackboneError, match="is not a folder with a hubconf.py, nor owner/name"
        ):
            load_backbone("small_vit", str(hub))


def test_hub_out_of_reach(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for scheme in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(scheme, "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(BackboneError, match="could not be fetched .* give a local copy"):
        load_backbone("dinov2_vits14", HUB)


# ---------------------------------------------------------------- relevancy maps


def check_explicit_attention(model, images, grid):
    """The explicit attention's tokens are the fused one's, and the model is left as it was."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = range(len(blocks_of(model)))
    with torch.no_grad():
        before = class_tokens(model, images, layers)
    for layer in (0, layers[-1]):
        seen = []
        maps = relevancy_maps(
            model, images, layer, lambda x: seen.append(x.detach()) or x[:, :5].sum(1)
        )
        assert (seen[0] - before[layer]).abs().max() <= 1e-5 * before[layer].abs().max()
        assert (
            maps.shape == (len(images), *grid)
            and (maps >= 0).all()
            and (maps.amax((1, 2)) > 0).all()
        )
    with pytest.raises(ZeroDivisionError):
        relevancy_maps(model, images, 0, lambda x: 1 / 0)
    with torch.no_grad():
        assert torch.equal(class_tokens(model, images, layers), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "shape", ["dinov2_vits14", "dinov2_vits14_reg", "swiglu", "swiglu_chunked"]
)
def test_explicit_attention_on_dinov2(dinov2, shape):
    model = load_dinov2(dinov2, shape).requires_grad_(False)
    check_explicit_attention(model, torch.randn(2, 3, 112, 112), (8, 8))


def test_blocks_that_hand_on_lists(vit):  # as DINOv3's
    class Listed(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x):
            return [self.block(x[0] if isinstance(x, list) else x)]

    images = torch.randn(2, 3, 16, 16)
    tokens = class_tokens(vit, images, range(3))
    maps = relevancy_maps(vit, images, 1, lambda x: x[:, 0])
    vit.blocks = nn.ModuleList(Listed(block) for block in vit.blocks)
    vit.norm = vit.head = nn.Identity()
    vit.norm.forward = lambda x: x[0]
    assert torch.equal(class_tokens(vit, images, range(3)), tokens)
    assert torch.equal(relevancy_maps(vit, images, 1, lambda x: x[:, 0]), maps)


def test_layers_out_of_range_of_a_map(vit):
    with pytest.raises(BackboneError, match="no layer -1: the backbone has 0 to 2"):
        relevancy_maps(vit, torch.randn(1, 3, 16, 16), -1, lambda x: x[:, 0])


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "deit3_small_patch16_224",
        "eva02_tiny_patch14_224",
        "vit_small_patch14_reg4_dinov2",
        "vit_small_patch16_dinov3",
    ],
)
def test_timms_models(name):
    """Tokens are those of timm's own intermediate layers, to the bit."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    size = 4 * (14 if "patch14" in name else 16)
    model = timm.create_model(name, pretrained=False, num_classes=0, img_size=size, depth=3).eval()
    images = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        theirs = model.forward_intermediates(
            images, return_prefix_tokens=True, norm=False, intermediates_only=True
        )
        theirs = torch.stack([prefix[:, 0] for _, prefix in theirs])
        assert torch.equal(class_tokens(model, images, range(len(theirs))), theirs)
    check_explicit_attention(model.requires_grad_(False), images, (4, 4))


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224", "samvit_base_patch16"])
def test_a_model_without_class_token_is_refused_by_name(name, tmp_path):
    pytest.importorskip("timm", reason="timm is not installed")
    (tmp_path / "hubconf.py").write_text(
        f"import timm, torch\ndef {name}():\n    with torch.device('meta'):\n"
        f"        return timm.create_model({name!r}, pretrained=False)\n"
    )
    with pytest.raises(BackboneError, match=f"{name} is not a vision transformer with a class token"):
        load_backbone(name, str(tmp_path))


def test_attention_of_another_kind_is_refused(vit):
    vit.blocks[1].forward = lambda x: x
    with pytest.raises(BackboneError, match="there are 2 softmax attentions in 3 blocks"):
        relevancy_maps(vit, torch.randn(1, 3, 16, 16), 2, lambda x: x[:, 0])
    attend = nn.functional.scaled_dot_product_attention
    vit.blocks[1].forward = lambda x: attend(x, x, x, is_causal=True)
    with pytest.raises(BackboneError, match="has a mask"):
        relevancy_maps(vit, torch.randn(1, 3, 16, 16), 2, lambda x: x[:, 0])


def test_relevancy_against_finite_differences():
    """The rollout by its formula, with dscore/dA by nudging every entry of every attention."""
    torch.manual_seed(1)
    vit = (
        SmallViT(classes=2, size=8, patch=4, width=8, depth=3, heads=2)
        .double()
        .eval()
        .requires_grad_(False)
    )
    for parameter in vit.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.4)
    image, direction, layer = (
        torch.randn(1, 3, 8, 8, dtype=torch.float64),
        torch.randn(8, dtype=torch.float64),
        1,
    )

    def forward(nudge=None):  # -> score, attentions; nudge = (block, head, row, column, by)
        x = vit.patch_embed(image).flatten(2).transpose(1, 2)
        x = torch.cat([vit.cls_token, x], dim=1) + vit.pos_embed
        attentions = []
        for i, block in enumerate(vit.blocks[: layer + 1]):
            q, k, v = block.qkv(block.norm1(x)).view(1, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
            attention = torch.softmax(q @ k.transpose(2, 3) / 2, dim=3)
            attentions.append(attention[0].clone())
            if nudge and nudge[0] == i:
                attention[0][nudge[1:4]] += nudge[4]
            x = x + block.proj((attention @ v).transpose(1, 2).reshape(1, 5, 8))
            x = x + block.mlp(x)
        return torch.tanh(x[0, 0] @ direction), attentions

    attentions, R, step = forward()[1], torch.eye(5, dtype=torch.float64), 1e-5
    for i, attention in enumerate(attentions):
        weighted = torch.zeros(5, 5, dtype=torch.float64)
        for h in range(2):
            for row in range(5):
                for column in range(5):
                    up, down = (forward((i, h, row, column, by))[0] for by in (step, -step))
                    weighted[row, column] += (
                        torch.relu((up - down) / (2 * step) * attention[h, row, column]) / 2
                    )
        R = R + weighted @ R
    ours = relevancy_maps(vit, image, layer, lambda x: torch.tanh(x @ direction))
    torch.testing.assert_close(ours[0].flatten(), R[0, 1:], rtol=1e-5, atol=1e-9)


def test_relevancy_in_a_batch_is_relevancy_one_by_one(vit):
    images = torch.randn(4, 3, 16, 16)
    together = relevancy_maps(vit, images, 2, lambda x: torch.relu(x[:, 3]))
    alone = torch.cat(
        [relevancy_maps(vit, image[None], 2, lambda x: torch.relu(x[:, 3])) for image in images]
    )
    torch.testing.assert_close(together, alone)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_tokens_are_the_cpus_up_to_autocast(vit, tmp_path):
    images = Images(torch.randn(10, 3, 16, 16))
    tokens = []
    for device, precision in (("cpu", "float32"), ("cuda", "float16")):
        record(vit.to(device), images, tmp_path / device, [2], precision)
        finish(tmp_path / device, [2])
        tokens.append(np.load(tmp_path / device / "layer_02.npy").astype(np.float32))
    cpu, gpu = tokens
    assert np.linalg.norm(gpu - cpu) < 0.02 * np.linalg.norm(cpu)
