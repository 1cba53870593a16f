"""SAEs to and from the Hugging Face Hub."""
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from kit.runs import InputError
from sae import SAE_FILES, SparseAutoencoder

CARD = """---
license: mit
tags: [sparse-autoencoder, vision, hierarchy]
---
# Sparse autoencoders of class tokens: {title}

{note} One SAE a layer, of the class token after each block, from the reproduction kit of *Analyzing
Hierarchical Structure in Vision Models with Sparse Autoencoders* (arXiv 2505.15970); not by the
paper's authors.

```python
from sae import SparseAutoencoder  # the kit's sae.py
sae = SparseAutoencoder.from_pretrained("{repo}", subfolder="{layer}")
z = sae.encode(x)  # raw class tokens (B, n) -> latents (B, m)
```

{tables}
"""


def on_the_hub(option, action, *given, **more):
    """action(...), or why the Hub would not, in its own words."""
    try:
        return action(*given, **more)
    except Exception as error:  # huggingface_hub's own, and those of its HTTP library
        reason = str(error) or type(error).__name__
        raise InputError(f"{option}: {reason} (`hf auth login` sets a token)") from error


def check_token(repo):
    """Before the hours are spent: is there a token, and does the Hub know it?"""
    on_the_hub(f"--push-to-hub {repo}", HfApi().whoami)


def publish(repo, saes, results):
    """Upload a run's folder of SAEs, with the card in it, and its tables and figures."""
    option = f"--push-to-hub {repo}"
    api = HfApi()
    on_the_hub(option, api.create_repo, repo, exist_ok=True)
    for folder, inside, patterns in (
            (saes, None, ["README.md", *(f"layer_*/{file}" for file in SAE_FILES)]),
            (results, "results", ["*.csv", "figures/*.png"])):  # no photographs
        on_the_hub(option, api.upload_folder, repo_id=repo, folder_path=folder,
                   path_in_repo=inside, allow_patterns=patterns)
    print(f"\nPublished: https://huggingface.co/{repo}")


def find_saes(source, layers, width, backbone):
    """The folder of layer_NN of published SAEs, local or fetched; looked at before it is used."""
    folder = Path(source).expanduser()
    option = f"--saes {source}"
    if not folder.is_dir():
        wanted = [f"layer_{layer:02d}/{file}" for layer in layers for file in SAE_FILES]
        folder = Path(on_the_hub(option, snapshot_download, source, allow_patterns=wanted))
    for layer in layers:
        name = f"layer_{layer:02d}"
        try:
            sae = SparseAutoencoder.from_pretrained(folder, subfolder=name)
        except Exception as error:  # what a file from elsewhere may hold
            raise InputError(f"{option}: {name} is no SAE of this kit ({error})") from error
        if len(sae.b_dec) != width:
            raise InputError(f"{option}: {name} is for tokens of width {len(sae.b_dec)}, not "
                             f"{width}")
        trained_on = (sae.about or {}).get("backbone", "an unknown backbone")
        if trained_on != backbone:
            print(f"      {name} was trained on {trained_on}, and is scored on {backbone}")
    return folder


def write_card(folder, repo, inputs, backbone, tables):
    """The README.md of a folder of SAEs, so that it can be published as it is."""
    card = CARD.format(repo=repo, title=backbone, note=inputs.note, tables=tables,
                       layer=f"layer_{inputs.layers[-1]:02d}")
    (folder / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
