"""What several test files share: a local torch.hub repository, folders of small images, WordNet, DINOv2's own code."""
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WNIDS = ["n01531178", "n02085620", "n02123045", "n02690373"]  # goldfinch, Chihuahua, tabby, airliner


@pytest.fixture(scope="session")
def wordnet():
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except LookupError:
        pytest.skip("NLTK's WordNet is not installed: python -m nltk.downloader wordnet")
    return wordnet


@pytest.fixture(scope="session")
def dinov2():
    """The folder of DINOv2's own code: $DINOV2_REPO, or torch.hub's cache of it."""
    cached = sorted(Path(torch.hub.get_dir()).glob("facebookresearch_dinov2_*"))
    folder = Path(os.environ.get("DINOV2_REPO", cached[-1] if cached else ""))
    if not (folder / "hubconf.py").is_file() or not (folder / "dinov2").is_dir():
        pytest.skip("no copy of facebookresearch/dinov2: set DINOV2_REPO to a clone")
    return folder


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    return write_hub(tmp_path_factory.mktemp("hub"))


def write_hub(folder: Path) -> Path:
    """A torch.hub repository with one small random ViT for 224 x 224 images, 3 blocks of width 16, and what is none."""
    folder.mkdir(exist_ok=True)
    (folder / "hubconf.py").write_text(
        "import sys, torch\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from dinov2_hooks import SmallViT\n"
        "def small_vit():\n"
        "    torch.manual_seed(0)\n"
        "    return SmallViT(classes=2, size=224, patch=56, width=16, depth=3, heads=2)\n"
        "class Chunk(torch.nn.ModuleList):\n"
        "    def forward(self, x):\n"
        "        for block in self:\n"
        "            x = block(x)\n"
        "        return x\n"
        "def chunked_vit():\n"
        "    vit = small_vit()\n"
        "    vit.blocks = torch.nn.ModuleList([Chunk(vit.blocks[:1]), Chunk(vit.blocks[1:])])\n"
        "    return vit\n"
        "def spoilt():\n"
        "    vit = small_vit()\n"
        "    vit.blocks[1].norm1.weight.data[3] = float('nan')\n"
        "    return vit\n"
        "def fails():\n"
        "    return SmallViT(classes=2, size=96, patch=56, width=16, depth=3, heads=2)\n"
        "def exits():\n"
        "    sys.exit('no licence')\n"
        "def no_vit():\n"
        "    return torch.nn.Linear(2, 2)\n"
        "def needs_package():\n"
        "    import a_package_that_is_missing\n"
        "def raises():\n"
        "    raise RuntimeError('the weights\\nare gone')\n"
    )
    return folder


def make_quick(set_attribute=setattr, figures=False):
    """A small run's time is mostly that of its figures and of the 3,000 steps of its probes."""
    import metrics
    import reproduce

    set_attribute(metrics, "probe_steps", lambda rows, least=None: (3, max(1, rows // 256)))
    if not figures:
        set_attribute(reproduce, "draw_figures", lambda *of: {})


@pytest.fixture
def quick(monkeypatch):
    make_quick(monkeypatch.setattr)


def small_run(data, hub, *more) -> list[str]:
    """Arguments for reproduce.py; of an option given twice, the later holds."""
    return ["--data", str(data), "--hub", str(hub), "--backbone", "small_vit", "--out", "out", "--top-k", "4", "--epochs", "3",
            "--device", "cpu", *map(str, more)]


def copied(state: dict) -> dict:
    """A training's state as it is now."""
    return {name: tensor.clone() for name, tensor in state.items()}


def same_sae(a, b) -> bool:
    """To the bit."""
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def results(out="out", aside=()):
    """results.json without seconds and the settings `aside`, and SAEs and tokens by name: what runs alike must have alike."""
    record = json.loads(Path(out, "results/results.json").read_text())
    for where, keys in [(record, ["seconds"]), (record["settings"], aside)]:
        for key in keys:
            del where[key]
    files = [*Path(out).glob("saes/*/*/model.safetensors"), *Path(out).glob("tokens/*/*.npy")]
    return record, {str(path.relative_to(out)): path.read_bytes() for path in files}


def write_images(folder: Path, count: int, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, *folder.name.encode()])
    tint = rng.integers(0, 256, 3)
    for i in range(count):
        pixels = (rng.integers(0, 256, (20, 24, 3)) + tint) // 2
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02d}.png")


@pytest.fixture
def data(tmp_path):
    """train/ and val/ of four wnid folders, 12 and 5 images each."""
    for split, count in [("train", 12), ("val", 5)]:
        for wnid in WNIDS:
            write_images(tmp_path / "data" / split / wnid, count)
    return tmp_path / "data"
