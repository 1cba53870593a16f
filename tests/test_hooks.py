"""Hooks against DINOv2's own get_intermediate_layers, timm and a forward pass by hand; recording against both."""
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from dinov2_hooks import (
    HUB, BackboneError, SmallViT, blocks_of, class_tokens, eval_transform, load_backbone, record_class_tokens,
)


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return SmallViT(classes=5, size=16, patch=4, width=24, depth=3, heads=2).eval()


def batches(images, batch_size=4):
    ids = torch.arange(len(images))
    return [(images[rows], rows % 3, rows) for rows in ids.split(batch_size)]


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
    with pytest.raises(RuntimeError):
        class_tokens(vit, torch.randn(3, 1, 16, 16), [0])
    assert not any(block._forward_hooks for block in vit.blocks)


def test_layer_out_of_range(vit):
    with pytest.raises(BackboneError, match="layer 3 is out of range, the backbone has layers 0 to 2"):
        class_tokens(vit, torch.randn(1, 3, 16, 16), [0, 3])


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
        return DinoVisionTransformer(  # what makes vitg14 differ, at a small size; also as training code leaves it
            img_size=518, patch_size=14, embed_dim=96, depth=4, num_heads=3, ffn_layer="swiglufused", init_values=1.0,
            block_chunks=2 if shape == "swiglu_chunked" else 0,
        ).eval()


@pytest.mark.parametrize("shape", ["dinov2_vits14", "dinov2_vits14_reg", "swiglu", "swiglu_chunked"])
def test_dinov2_tokens_equal_its_intermediate_layers_to_the_bit(dinov2, shape, tmp_path):
    model = load_dinov2(dinov2, shape)
    images, depth = torch.randn(2, 3, 224, 224), len(blocks_of(model))
    with torch.inference_mode():
        theirs = model.get_intermediate_layers(images, n=depth, return_class_token=True, norm=False)
        theirs = torch.stack([token for _, token in theirs])
        assert torch.equal(class_tokens(model, images, range(depth)), theirs)
    record_class_tokens(model, batches(images), range(depth), tmp_path)
    for layer in range(depth):
        recorded = np.load(tmp_path / f"layer_{layer:02d}.npy")
        assert torch.equal(torch.from_numpy(recorded), theirs[layer].half())


def test_timm_tokens_equal_its_intermediates_to_the_bit():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0).eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        theirs = model.forward_intermediates(images, return_prefix_tokens=True, norm=False, intermediates_only=True)
        theirs = torch.stack([prefix[:, 0] for _, prefix in theirs])
        assert torch.equal(class_tokens(model, images, range(12)), theirs)


def test_recording(vit, tmp_path):
    images = torch.randn(10, 3, 16, 16)
    assert record_class_tokens(vit, batches(images), [0, 2], tmp_path) == 10
    assert {path.name for path in tmp_path.iterdir()} == {"layer_00.npy", "layer_02.npy", "labels.npy", "ids.npy"}
    for place, layer in enumerate([0, 2]):
        tokens = np.load(tmp_path / f"layer_{layer:02d}.npy", mmap_mode="r")
        assert isinstance(tokens, np.memmap) and tokens.dtype == np.float16 and tokens.shape == (10, 24)
        with torch.inference_mode():
            expected = torch.cat([class_tokens(vit, x, [layer])[0] for x, _, _ in batches(images)])
        assert (tokens == expected.half().numpy()).all()
    assert np.load(tmp_path / "labels.npy").tolist() == [i % 3 for i in range(10)]
    assert np.load(tmp_path / "ids.npy").tolist() == list(range(10))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_tokens_that_are_not_finite_name_layer_and_image(vit, tmp_path, value):
    class Spoil(nn.Module):
        def forward(self, x):
            x = x.clone()
            x[2, 0, 5] = value  # in the second batch that is image 6
            return x if self.calls else setattr(self, "calls", 1) or x.nan_to_num(0, 0, 0).clamp(-9, 9)

        calls = 0

    vit.blocks[1] = nn.Sequential(vit.blocks[1], Spoil())
    with pytest.raises(BackboneError, match=r"layer 1, image pictures/6\.png: the class token is not finite in fp16"):
        record_class_tokens(vit, batches(torch.randn(8, 3, 16, 16)), [0, 1], tmp_path, [f"pictures/{i}.png" for i in range(8)])
    assert not list(tmp_path.glob("*.npy"))  # nothing that could be taken for whole


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


def test_load_backbone_from_a_local_folder(hub):
    model = load_backbone("small_vit", str(hub))
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    for name, message in [
        ("dinov2_vitx14", r"has no such model; it has needs_package, no_vit, small_vit"),
        ("no_vit", "is no vision transformer"),
        ("needs_package", "pip install a_package_that_is_missing"),
    ]:
        with pytest.raises(BackboneError, match=message):
            load_backbone(name, str(hub))


def test_hub_that_is_none(tmp_path):
    with pytest.raises(BackboneError, match="has no hubconf.py"):
        load_backbone("small_vit", str(tmp_path))
    with pytest.raises(BackboneError, match="no such folder, and not of the form owner/name"):
        load_backbone("small_vit", str(tmp_path / "nowhere"))


def test_hub_out_of_reach(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for scheme in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(scheme, "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(BackboneError, match="could not be fetched .* pass a local copy of the repository as --hub"):
        load_backbone("dinov2_vits14", HUB)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_tokens_are_the_cpus_up_to_autocast(vit, tmp_path):
    images = torch.randn(10, 3, 16, 16)
    for device in ("cpu", "cuda"):
        record_class_tokens(vit.to(device), batches(images), [2], tmp_path / device)
    cpu, gpu = (np.load(tmp_path / device / "layer_02.npy").astype(np.float32) for device in ("cpu", "cuda"))
    assert np.linalg.norm(gpu - cpu) < 0.02 * np.linalg.norm(cpu)
