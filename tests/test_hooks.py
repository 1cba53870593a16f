"""Hooks against DINOv2's own get_intermediate_layers, timm and a forward pass by hand; recording against both."""
import os
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from dinov2_hooks import (
    HUB, BackboneError, SmallViT, blocks_of, checksum, class_tokens, eval_transform, load_backbone, record_class_tokens,
    relevancy_maps,
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
    with pytest.raises(BackboneError, match="the backbone fails on images of 1 x 16 x 16"):
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
    checksums = record_class_tokens(vit, batches(images), [0, 2], tmp_path)
    assert checksums == {path.name: checksum(path) for path in tmp_path.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {"layer_00.npy", "layer_02.npy", "labels.npy", "ids.npy"}
    for place, layer in enumerate([0, 2]):
        tokens = np.load(tmp_path / f"layer_{layer:02d}.npy", mmap_mode="r")
        assert isinstance(tokens, np.memmap) and tokens.dtype == np.float16 and tokens.shape == (10, 24)
        with torch.inference_mode():
            expected = torch.cat([class_tokens(vit, x, [layer])[0] for x, _, _ in batches(images)])
        assert (tokens == expected.half().numpy()).all()
    assert np.load(tmp_path / "labels.npy").tolist() == [i % 3 for i in range(10)]
    assert np.load(tmp_path / "ids.npy").tolist() == list(range(10))


@pytest.mark.parametrize("stop_at, committed", [(1, 1), (2, 1), (2, 2), (3, 0)])
def test_recording_goes_on_from_the_last_commit(vit, tmp_path, stop_at, committed):
    images = torch.randn(10, 3, 16, 16)
    expected = record_class_tokens(vit, batches(images), [0, 2], tmp_path / "at once")
    states = [None]

    def killed():
        for i, batch in enumerate(batches(images)):
            if i == stop_at:  # what was written after the last commit is there, in part, and must not matter
                raise InterruptedError
            yield batch

    if stop_at < 3:
        with pytest.raises(InterruptedError):
            commit = lambda sync: states.append(sync()) if len(states) <= committed else None
            record_class_tokens(vit, killed(), [0, 2], tmp_path / "killed", commit=commit)
        (tmp_path / "killed/layer_00.npy.part").open("ab").write(b"half a row")
        assert not list((tmp_path / "killed").glob("*.npy"))
    else:  # killed while the files were given their names: the last one has not got it
        record_class_tokens(vit, batches(images), [0, 2], tmp_path / "killed", commit=lambda sync: states.append(sync()))
        (tmp_path / "killed/ids.npy").rename(tmp_path / "killed/ids.npy.part")
    seen = states[-1]["ids.npy"][0] if states[-1] else 0
    assert seen == min(4 * (committed or 3), 10)
    rest = [batch for batch in batches(images) if batch[2][0] >= seen]
    assert record_class_tokens(vit, rest, [0, 2], tmp_path / "killed", resume=states[-1]) == expected
    for name in expected:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "at once" / name).read_bytes()
    assert len(list((tmp_path / "killed").iterdir())) == len(expected)


def test_a_part_that_was_cut_short_is_refused(vit, tmp_path):
    states = []
    record_class_tokens(vit, batches(torch.randn(8, 3, 16, 16)), [0], tmp_path, commit=lambda sync: states.append(sync()))
    (tmp_path / "labels.npy").rename(tmp_path / "labels.npy.part")
    os.truncate(tmp_path / "labels.npy.part", 150)
    with pytest.raises(BackboneError, match=r"labels\.npy\.part is shorter than was recorded: delete it"):
        record_class_tokens(vit, [], [0], tmp_path, resume=states[-1])


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
        ("dinov2_vitx14", r"no such model; it has chunked_vit, exits, fails, needs_package, no_vit, raises, small_vit, spoilt"),
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


# ---------------------------------------------------------------------------------------------------------------------
# relevancy maps


def check_explicit_attention(model, images, grid):
    """The explicit attention's tokens are the fused one's, and the model is afterwards what it was before."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = range(len(blocks_of(model)))
    with torch.no_grad():
        before = class_tokens(model, images, layers)
    for layer in (0, layers[-1]):
        seen = []
        maps = relevancy_maps(model, images, layer, lambda x: seen.append(x.detach()) or x[:, :5].sum(1))
        assert (seen[0] - before[layer]).abs().max() <= 1e-5 * before[layer].abs().max()
        assert maps.shape == (len(images), *grid) and (maps >= 0).all() and (maps.amax((1, 2)) > 0).all()
    with pytest.raises(ZeroDivisionError):
        relevancy_maps(model, images, 0, lambda x: 1 / 0)
    with torch.no_grad():
        assert torch.equal(class_tokens(model, images, layers), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("shape", ["dinov2_vits14", "dinov2_vits14_reg", "swiglu", "swiglu_chunked"])
def test_explicit_attention_on_dinov2(dinov2, shape):
    model = load_dinov2(dinov2, shape).requires_grad_(False)
    check_explicit_attention(model, torch.randn(2, 3, 112, 112), (8, 8))


def test_explicit_attention_on_timm():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    for name in ("vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"):
        model = timm.create_model(name, pretrained=False, num_classes=0, img_size=112).eval().requires_grad_(False)
        check_explicit_attention(model, torch.randn(2, 3, 112, 112), (112 // model.patch_embed.patch_size[0],) * 2)


def test_explicit_attention_on_attention_returned_beside_the_output(vit):
    class Beside(nn.Module):  # as DINO v1's blocks have it
        def __init__(self, attn):
            super().__init__()
            self.qkv, self.proj, self.num_heads = attn.qkv, attn.proj, attn.num_heads

        def forward(self, x):
            q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
            attention = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
            return self.proj((attention @ v).transpose(1, 2).flatten(2)), attention

    images = torch.randn(2, 3, 16, 16)
    plain = relevancy_maps(vit, images, 2, lambda x: x[:, 0])
    for block in vit.blocks:
        block.attn, block.forward = Beside(block.attn), lambda x, b=block: (y := x + b.attn(b.norm1(x))[0]) + b.mlp(b.norm2(y))
    check_explicit_attention(vit.requires_grad_(False), images, (4, 4))
    torch.testing.assert_close(relevancy_maps(vit, images, 2, lambda x: x[:, 0]), plain)


def test_attention_of_another_kind_is_refused(vit):
    vit.blocks[1].attn.register_forward_hook(lambda attn, inputs, output: output * 1.1)
    with pytest.raises(BackboneError, match="no plain softmax attention"):
        relevancy_maps(vit, torch.randn(1, 3, 16, 16), 2, lambda x: x[:, 0])


def test_relevancy_against_finite_differences():
    """The rollout by its formula, with dscore/dA by nudging every entry of every attention matrix."""
    torch.manual_seed(1)
    vit = SmallViT(classes=2, size=8, patch=4, width=8, depth=3, heads=2).double().requires_grad_(False)
    for parameter in vit.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.4)
    image, direction, layer = torch.randn(1, 3, 8, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64), 1

    def forward(nudge=None):  # -> score, attentions; nudge = (block, head, row, column, by)
        x = vit.patch_embed(image).flatten(2).transpose(1, 2)
        x = torch.cat([vit.cls_token, x], dim=1) + vit.pos_embed
        attentions = []
        for i, block in enumerate(vit.blocks[: layer + 1]):
            q, k, v = block.attn.qkv(block.norm1(x)).view(1, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
            attention = torch.softmax(q @ k.transpose(2, 3) / 2, dim=3)
            attentions.append(attention[0].clone())
            if nudge and nudge[0] == i:
                attention[0][nudge[1:4]] += nudge[4]
            x = x + block.attn.proj((attention @ v).transpose(1, 2).reshape(1, 5, 8))
            x = x + block.mlp(block.norm2(x))
        return torch.tanh(x[0, 0] @ direction), attentions

    attentions, R, step = forward()[1], torch.eye(5, dtype=torch.float64), 1e-5
    for i, attention in enumerate(attentions):
        weighted = torch.zeros(5, 5, dtype=torch.float64)
        for h in range(2):
            for row in range(5):
                for column in range(5):
                    up, down = (forward((i, h, row, column, by))[0] for by in (step, -step))
                    weighted[row, column] += torch.relu((up - down) / (2 * step) * attention[h, row, column]) / 2
        R = R + weighted @ R
    ours = relevancy_maps(vit, image, layer, lambda x: torch.tanh(x @ direction))
    torch.testing.assert_close(ours[0].flatten(), R[0, 1:], rtol=1e-5, atol=1e-9)


def test_relevancy_in_a_batch_is_relevancy_one_by_one(vit):
    images = torch.randn(4, 3, 16, 16)
    together = relevancy_maps(vit, images, 2, lambda x: torch.relu(x[:, 3]))
    alone = torch.cat([relevancy_maps(vit, image[None], 2, lambda x: torch.relu(x[:, 3])) for image in images])
    torch.testing.assert_close(together, alone)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_tokens_are_the_cpus_up_to_autocast(vit, tmp_path):
    images = torch.randn(10, 3, 16, 16)
    for device in ("cpu", "cuda"):
        record_class_tokens(vit.to(device), batches(images), [2], tmp_path / device)
    cpu, gpu = (np.load(tmp_path / device / "layer_02.npy").astype(np.float32) for device in ("cpu", "cuda"))
    assert np.linalg.norm(gpu - cpu) < 0.02 * np.linalg.norm(cpu)
