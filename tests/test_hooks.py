"""Hooks against DINOv2's own get_intermediate_layers, timm and a forward pass by hand."""

import importlib
import os
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from pytest import raises
from test_recording import Images
from torch import nn
from torch.testing import assert_close

from dinov2_hooks import (
    HUB,
    BackboneError,
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


def first_number(x):
    """A score of class tokens, which maps are of."""
    return x[:, 0]


def test_tokens_equal_a_forward_pass_by_hand(vit):
    images = torch.randn(3, 3, 16, 16)
    with torch.inference_mode():
        x = vit.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([vit.cls_token.expand(3, -1, -1), x], dim=1) + vit.pos_embed
        by_hand = [(x := block(x))[:, 0] for block in vit.blocks]
        assert torch.equal(class_tokens(vit, images, [2, 0]), torch.stack(by_hand)[[2, 0]])
    assert not any(block._forward_hooks for block in vit.blocks)


def test_images_of_another_shape_and_layers_that_are_not_there(vit):
    with raises(
        BackboneError, match=r"does not take images of \(3, 1, 16, 16\), .* another --transform"
    ):
        class_tokens(vit, torch.randn(3, 1, 16, 16), [0])
    assert not any(block._forward_hooks for block in vit.blocks)
    with raises(BackboneError, match="no layer 3: the backbone has 0 to 2"):
        class_tokens(vit, torch.randn(1, 3, 16, 16), [0, 3])
    with raises(BackboneError, match="no layer -1: the backbone has 0 to 2"):
        relevancy_maps(vit, torch.randn(1, 3, 16, 16), -1, first_number)


def test_a_model_that_leaves_something_to_chance_is_refused(vit, tmp_path):
    images = Images(torch.rand(4, 3, 16, 16))

    def refuse(words, map_words=None):
        with raises(BackboneError, match=words):
            record(vit, images, tmp_path, [1])
        with raises(BackboneError, match=map_words or words):
            relevancy_maps(vit, torch.rand(2, 3, 16, 16), 1, first_number)

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
        assert_close(tokens.float(), expected, atol=0.05, rtol=0.05)
        assert relevancy_maps(vit, images, 1, first_number).shape == (2, 4, 4)


@pytest.mark.parametrize("stride, padding, side", [(2, 0, 7), (4, 2, 5)])
def test_a_map_has_a_number_for_each_patch(vit, stride, padding, side):
    """Of overlapping and of padded patches, too."""
    vit.patch_embed.stride, vit.patch_embed.padding = (stride, stride), (padding, padding)
    vit.pos_embed = nn.Parameter(torch.randn(1, 1 + side**2, 24))
    maps = relevancy_maps(vit, torch.rand(2, 3, 16, 16), 1, first_number)
    assert maps.shape == (2, side, side)


@pytest.mark.parametrize("shape", ["dinov2_vits14", "dinov2_vits14_reg", "swiglu_chunked"])
@pytest.mark.filterwarnings("ignore:xFormers")
def test_dinov2_tokens_equal_its_intermediate_layers_to_the_bit(dinov2, shape, tmp_path):
    if shape == "swiglu_chunked":  # what makes vitg14 differ, at a small size
        vision_transformer = of_dinov2(dinov2, "models.vision_transformer")
        size = dict(img_size=518, patch_size=14, embed_dim=96, depth=4, num_heads=3)
        different = dict(ffn_layer="swiglufused", init_values=1.0, block_chunks=2)
        model = vision_transformer.DinoVisionTransformer(**size, **different).eval()
    else:
        model = load_backbone(shape, str(dinov2), pretrained=False)
    images, depth = torch.randn(2, 3, 112, 112), len(blocks_of(model))
    with torch.inference_mode():
        theirs = model.get_intermediate_layers(images, n=depth, return_class_token=True, norm=False)
        theirs = torch.stack([token for _, token in theirs])
        assert torch.equal(class_tokens(model, images, range(depth)), theirs)
    record(model, Images(images), tmp_path, range(depth))
    finish(tmp_path, range(depth))
    for layer in range(depth):
        recorded = np.load(tmp_path / f"layer_{layer:02d}.npy")
        assert torch.equal(torch.from_numpy(recorded), theirs[layer].half())
    check_explicit_attention(model.requires_grad_(False), images, (8, 8))


def of_dinov2(folder, module):
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(f"dinov2.{module}")
    finally:
        sys.path.remove(str(folder))


def test_a_patch_is_not_taken_for_the_class_token(vit):
    image = torch.randn(3, 16, 16)
    before = vit.cls_token.clone()
    check_class_token(vit, image, [0, 2])
    assert torch.equal(vit.cls_token, before)
    # as in CaiT the class token joins after this block
    vit.blocks[0].forward = lambda x: torch.cat([x[:, 1:2], x[:, 1:]], dim=1)
    with raises(BackboneError, match="token 0 is not the class token in layers .0, 1. of this"):
        check_class_token(vit, image, [0, 1])
    vit.cls_token = None
    with raises(BackboneError, match="has no cls_token"):
        class_tokens(vit, image[None], [0])


def test_a_bug_in_a_block_keeps_its_traceback(vit):
    def fail(x):
        raise RuntimeError("a student's mistake")

    vit.blocks[1].forward = fail
    with raises(RuntimeError, match="a student's mistake"):
        class_tokens(vit, torch.randn(1, 3, 16, 16), [0])


def test_eval_transform_is_dinov2s(dinov2):
    theirs = of_dinov2(dinov2, "data.transforms").make_classification_eval_transform()
    for shape in [(300, 500), (64, 64), (256, 224)]:
        picture = picture_of(*shape)
        assert torch.equal(eval_transform()(picture), theirs(picture))


def picture_of(*shape):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8))


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_small_patch14_dinov2", "deit3_small_patch16_224"]
)
def test_transform_is_the_one_timm_makes(name):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    theirs = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    picture = picture_of(300, 500)
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
    with raises(BackboneError, match="resized to 256 and cropped to 518"):
        eval_transform(256, 518)


def test_weights_are_asked_for_and_the_process_stays_as_it_was(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("XFORMERS_DISABLED", raising=False)
    (tmp_path / "hubconf.py").write_text(
        f"""import os, sys, torch
sys.path.insert(0, {str(ROOT)!r})
from kit.demo import SmallViT
assert 'XFORMERS_DISABLED' in os.environ
def vit(pretrained=False):
    os.chdir('/')
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device('meta')
    return SmallViT(classes=2 + pretrained).to(torch.bfloat16)
def other():
    return SmallViT()
"""
    )
    before = os.getcwd()
    model = load_backbone("vit", str(tmp_path))
    assert len(model.head.bias) == 3 and model.head.bias.dtype == torch.float32
    assert not model.training and not any(each.requires_grad for each in model.parameters())
    assert os.getcwd() == before and torch.is_grad_enabled()
    assert torch.zeros(1).dtype == torch.float32 and torch.zeros(1).device.type == "cpu"
    assert len(load_backbone("vit", str(tmp_path), pretrained=False).head.bias) == 2
    load_backbone("other", str(tmp_path))
    assert "other of" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, words",
    [
        ("dinov2_vitx14", "Cannot find callable dinov2_vitx14"),
        ("no_vit", "no_vit is not a vision transformer with a class token"),
        ("needs_package", "No module named 'a_package_that_is_missing'; a package may be missing"),
        ("exits", "no licence"),
    ],
)
def test_entry_points_that_give_no_backbone(hub, name, words):
    with raises(BackboneError, match=words):
        load_backbone(name, str(hub))


def test_hub_that_is_none(tmp_path):
    for hub in (tmp_path, tmp_path / "nowhere"):
        with raises(BackboneError, match="is not a folder with a hubconf.py, nor owner/"):
            load_backbone("small_vit", str(hub))


def test_hub_out_of_reach(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for scheme in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(scheme, "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.delenv("no_proxy", raising=False)
    with raises(BackboneError, match="could not be fetched .* give a local copy"):
        load_backbone("dinov2_vits14", HUB)


# ---------------------------------------------------------------- relevancy maps


def check_explicit_attention(model, images, grid):
    """The explicit attention's tokens are the fused one's, and the model is left as it was."""
    layers = range(len(blocks_of(model)))
    with torch.no_grad():
        before = class_tokens(model, images, layers)
    for layer in (0, layers[-1]):
        seen = []
        maps = relevancy_maps(
            model, images, layer, lambda x: seen.append(x.detach()) or x[:, :5].sum(1)
        )
        assert (seen[0] - before[layer]).abs().max() <= 1e-5 * before[layer].abs().max()
        assert maps.shape == (len(images), *grid)
        assert (maps >= 0).all() and (maps.amax((1, 2)) > 0).all()
    with raises(ZeroDivisionError):
        relevancy_maps(model, images, 0, lambda x: 1 / 0)
    with torch.no_grad():
        assert torch.equal(class_tokens(model, images, layers), before)
    assert not any(module._forward_hooks for module in model.modules())


def test_blocks_that_hand_on_lists(vit):  # as DINOv3's
    images = torch.randn(2, 3, 16, 16)
    tokens = class_tokens(vit, images, range(3))
    maps = relevancy_maps(vit, images, 1, first_number)
    for block in [*vit.blocks[1:], vit.norm]:
        block.register_forward_pre_hook(lambda block, given: given[0][0])
    for block in vit.blocks:
        block.register_forward_hook(lambda block, given, output: [output])
    assert torch.equal(class_tokens(vit, images, range(3)), tokens)
    assert torch.equal(relevancy_maps(vit, images, 1, first_number), maps)


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


def test_a_model_that_says_it_has_no_class_token_is_refused_by_name(tmp_path):
    pytest.importorskip("timm", reason="timm is not installed")
    (tmp_path / "hubconf.py").write_text(
        """import timm, torch
def siglip():
    with torch.device('meta'):
        return timm.create_model('vit_base_patch16_siglip_224', pretrained=False)
"""
    )
    with raises(BackboneError, match="siglip is not a vision transformer with a class"):
        load_backbone("siglip", str(tmp_path))


def test_attention_of_another_kind_is_refused(vit):
    vit.blocks[1].forward = lambda x: x
    with raises(BackboneError, match="there are 2 softmax attentions in 3 blocks"):
        relevancy_maps(vit, torch.randn(1, 3, 16, 16), 2, first_number)
    attend = nn.functional.scaled_dot_product_attention
    vit.blocks[1].forward = lambda x: attend(x, x, x, is_causal=True)
    with raises(BackboneError, match="has a mask"):
        relevancy_maps(vit, torch.randn(1, 3, 16, 16), 2, first_number)


def test_relevancy_against_finite_differences():
    """The rollout by its formula, with dscore/dA by nudging every entry of every attention."""
    torch.manual_seed(1)
    vit = SmallViT(classes=2, size=8, patch=4, width=8, depth=3, heads=2).double().eval()
    for parameter in vit.requires_grad_(False).parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.4)
    image = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    direction = torch.randn(8, dtype=torch.float64)
    layer, step = 1, 1e-5

    def forward(nudged=None, entry=None, by=0):  # -> score, attentions
        x = vit.patch_embed(image).flatten(2).transpose(1, 2)
        x = torch.cat([vit.cls_token, x], dim=1) + vit.pos_embed
        attentions = []
        for i, block in enumerate(vit.blocks[: layer + 1]):
            q, k, v = block.qkv(block.norm1(x)).view(1, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
            attention = torch.softmax(q @ k.transpose(2, 3) / 2, dim=3)
            attentions.append(attention[0].clone())
            if nudged == i:
                attention[0][entry] += by
            x = x + block.proj((attention @ v).transpose(1, 2).reshape(1, 5, 8))
            x = x + block.mlp(x)
        return torch.tanh(x[0, 0] @ direction), attentions

    R = torch.eye(5, dtype=torch.float64)
    for i, attention in enumerate(forward()[1]):
        slope = torch.zeros_like(attention)  # (heads, 5, 5)
        for entry in np.ndindex(2, 5, 5):
            slope[entry] = forward(i, entry, step)[0] - forward(i, entry, -step)[0]
        R = R + torch.relu(slope / (2 * step) * attention).mean(0) @ R
    ours = relevancy_maps(vit, image, layer, lambda x: torch.tanh(x @ direction))
    assert_close(ours[0].flatten(), R[0, 1:], rtol=1e-5, atol=1e-9)


def test_relevancy_in_a_batch_is_relevancy_one_by_one(vit):
    images = torch.randn(4, 3, 16, 16)
    together, *alone = (
        relevancy_maps(vit, some, 2, lambda x: torch.relu(x[:, 3]))
        for some in (images, *images.split(1))
    )
    assert_close(together, torch.cat(alone))
