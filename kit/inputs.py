"""What a run works on: images, their taxonomy, a backbone. What is wrong with them is said here."""
import os
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets.utils import download_and_extract_archive

from dinov2_hooks import HUB, blocks_of, eval_transform, load_backbone, transform_of
from kit import demo
from kit.data import Split, find_images
from kit.files import InputError
from sae import top_k_of
from taxonomy import Taxonomy

TINY_IMAGENET = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


class Inputs(NamedTuple):
    """What a run works on, found before anything is computed."""

    model: object
    transform: object
    train: Split
    val: Split
    tree: Taxonomy
    layers: list
    note: str  # what is run, in a sentence


def where_to(settings):
    """Fill in data, backbone and hub; returns the output folder."""
    data = settings.data or os.environ.get("IMAGENET_DIR")
    data = data or ("imagenet" if Path("imagenet").is_dir() else "demo")
    if data == "demo":
        if settings.backbone or settings.hub:
            raise InputError("--backbone and --hub need images: give --data (the demo has its own "
                             "ViT)")
        settings.data = "demo"
        settings.backbone = "demo"
        return Path(settings.out or "runs/demo")
    if data == "tiny-imagenet" and not Path(data).exists():
        data = fetch_tiny_imagenet()
    settings.data = data
    settings.hub = settings.hub or HUB
    settings.backbone = settings.backbone or "dinov2_vitg14"
    return Path(settings.out or f"runs/{Path(data).resolve().name}-{settings.backbone}")


def fetch_tiny_imagenet():
    """The folder of Tiny ImageNet's 200 classes in data/, fetched unless it is there."""
    folder = Path("data", TINY_IMAGENET.rpartition("/")[2]).with_suffix("")
    if not folder.is_dir():
        try:
            download_and_extract_archive(TINY_IMAGENET, "data", md5=MD5)
        except (OSError, RuntimeError) as error:
            raise InputError(f"{TINY_IMAGENET} could not be fetched ({error}): fetch it elsewhere, "
                             "unpack it, and give the folder as --data") from error
    return str(folder)


def find_inputs(settings, out):
    """Images, taxonomy and model; what is wrong with them is raised here."""
    folder = settings.data
    if settings.data == "demo":
        print(demo.NOTE)
        untrained = demo.SmallViT()  # what is wrong is said before the ViT is trained
        check_model(settings, untrained, len(demo.CLASSES) * demo.IMAGES["train"])
        model, transform = find_model(settings, out)
        folder = demo.folder_of(out) / "images"
    train, val, classes = find_images(folder, settings.images_per_class)
    tree = Taxonomy.from_wnids(classes)
    counts = len(train.names), len(val.names), len(classes)
    note = "{:,} training and {:,} validation images of {:,} classes.".format(*counts)
    print(f"      {note}")
    if len(tree.hypernyms_to_find) == 0:
        raise InputError(f"--data {settings.data}: no hypernym has two of these {len(classes)} "
                         "classes and at most half of them, so none can be found; give more")
    if settings.top_k > counts[1]:
        raise InputError(f"--top-k {settings.top_k} is above the {counts[1]} validation images")
    if settings.data != "demo":
        model, transform = find_model(settings, out)
    layers = check_model(settings, model, counts[0])
    return Inputs(model, transform, train, val, tree, layers, note)


def find_model(settings, out):
    """The backbone, and the transform of its images. The demo's lie in `out`."""
    if settings.data == "demo":
        transform = eval_transform(demo.SIZE, demo.SIZE)
        return demo.open_demo(out, transform.transforms[-1]), transform
    model = load_backbone(settings.backbone, settings.hub)
    return model, transform_of(model) if settings.transform == "model" else eval_transform()


def check_model(settings, model, images):
    """The layers that are asked for; raises for settings that do not fit them or the images."""
    top_k_of(settings.activation, settings.expansion * model.cls_token.shape[-1])  # or raises
    if (settings.batch_size or 0) > images:
        raise InputError(f"--batch-size {settings.batch_size} is above the {images} training "
                         "images")
    return parse_layers(settings.layers, len(blocks_of(model)))


def parse_layers(text, depth):
    """"all", "last", "0-3", "1,4-6" -> layer numbers, in order and each once."""
    text = {"all": f"0-{depth - 1}", "last": f"{depth - 1}"}.get(text, text)
    layers = set()
    for part in text.split(","):
        first, *last = map(int, part.split("-"))
        numbers = range(first, (last or [first])[0] + 1)
        if not numbers or numbers[-1] >= depth:
            raise InputError(f"--layers {text}: {part} is empty or out of range, the backbone has "
                             f"layers 0 to {depth - 1}")
        layers |= set(numbers)
    return sorted(layers)
