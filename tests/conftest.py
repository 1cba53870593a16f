"""What tests share: a local torch.hub repository, small images, WordNet, DINOv2's own code."""

import functools
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from kit.demo import SmallViT
from metrics import linear_probe
from taxonomy import SHIPPED, read_graph

torch.set_num_threads(1)  # tensors are small: more threads would wait for each other
# goldfinch, Chihuahua, tabby, airliner
WNIDS = ["n01531178", "n02085620", "n02123045", "n02690373"]


def imagenet1k():
    """The 1,000 wnids of ImageNet-1k, sorted: the shipped nodes that nothing is below."""
    graph = read_graph(SHIPPED)
    return sorted(graph.keys() - {wnid for synset in graph.values() for wnid in synset.hypernyms})


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
    """A torch.hub repository: a small random ViT, 3 blocks of width 16, and what is none."""
    folder.mkdir(exist_ok=True)
    (folder / "hubconf.py").write_text(
        f"""import sys, torch
sys.path.insert(0, {str(ROOT)!r})
from kit.demo import SmallViT

def small_vit(size=224):
    torch.manual_seed(0)
    return SmallViT(classes=2, size=size, patch=56, width=16, depth=3, heads=2)

class Chunk(torch.nn.ModuleList):
    def forward(self, x):
        for block in self:
            x = block(x)
        return x

def chunked_vit():
    vit = small_vit()
    vit.blocks = torch.nn.ModuleList([Chunk(vit.blocks[:1]), Chunk(vit.blocks[1:])])
    return vit

def fails():
    return small_vit(96)

def exits():
    sys.exit('no licence')

def no_vit():
    return torch.nn.Linear(2, 2)

def needs_package():
    import a_package_that_is_missing
"""
    )
    return folder


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return SmallViT(classes=5, size=16, patch=4, width=24, depth=3, heads=2).eval()


def no_figure(path, *shown):
    path.with_suffix(".png").write_bytes(b"")
    return path.with_suffix(".png")


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty folder to run in, with short probes and no figures, and without ImageNet."""
    from kit import scores

    quick = functools.partial(linear_probe, least_steps=3)
    monkeypatch.setattr(scores, "linear_probe", quick)
    monkeypatch.setattr("kit.figures.save", no_figure)
    monkeypatch.delenv("IMAGENET_DIR", raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def small_run(data, hub, *more) -> list[str]:
    """Arguments for reproduce.py; of an option given twice, the later holds."""
    options = "--backbone small_vit --out out --top-k 4 --epochs 3 --device cpu --workers 0"
    return ["--data", str(data), "--hub", str(hub), *options.split(), *map(str, more)]


def refused(capsys, arguments, *words):
    """The run ends with exit code 2 and one sentence, which holds the words."""
    import reproduce

    capsys.readouterr()
    try:
        code = reproduce.main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse's
        code = stop.code
    said = capsys.readouterr().err
    sentences = [line for line in said.splitlines() if "error: " in line]
    assert code == 2 and len(sentences) == 1 and "Traceback" not in said, said
    for word in words:
        assert word in sentences[0]


def results(out="out"):
    """What runs alike must have alike, to the byte: tables, SAEs and tokens by name."""
    files = {}
    for pattern in ("results/*/*.csv", "saes/*/*/model.safetensors", "tokens/*/*"):
        for path in Path(out).glob(pattern):
            files[str(path.relative_to(out))] = path.read_bytes()
    assert files
    return files


def same_sae(a, b) -> bool:
    """To the bit."""
    states = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in states)


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
