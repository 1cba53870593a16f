"""SAEs to and from the Hugging Face Hub."""
import re
from pathlib import Path

from huggingface_hub import HfApi, get_token, snapshot_download

from kit.store import InputError
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
REASONS = {
    401: "the token is not valid, or there is no such repository: log in with `hf auth login`",
    403: "the token may not do that: make one that may write, at huggingface.co/settings/tokens",
    404: "there is no such repository",
}


def on_the_hub(option: str, repo: str, action, *of, **how):
    """action(*of, **how), or one sentence on why the Hub would not."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise InputError(f"{option} {repo}: give USER/NAME on the Hub (there is no such folder)")
    try:
        return action(*of, **how)
    except Exception as error:  # huggingface_hub's own, and those of its version's HTTP library
        status, said = getattr(getattr(error, "response", None), "status_code", None), str(error)
        reason = f"the Hub cannot be reached, or refuses ({said.partition(chr(10))[0]})"
        raise InputError(f"{option} {repo}: {REASONS.get(status, reason)}") from error


def check_token(repo: str) -> None:
    """Try the right to write, before the hours are spent."""
    if get_token() is None:
        raise InputError(f"--push-to-hub {repo}: there is no token; log in with `hf auth login`")
    on_the_hub("--push-to-hub", repo, HfApi().whoami)
    on_the_hub("--push-to-hub", repo, HfApi().create_repo, repo, exist_ok=True)


def publish(repo: str, saes: Path, results: Path) -> None:
    """Upload a run's folder of SAEs, with the card in it, and its tables and figures."""
    files = ["README.md", *(f"layer_*/{file}" for file in SAE_FILES)]
    tables = ["*.csv", "figures/*.png"]  # not the latents' .webp, which show photographs
    for folder, at, patterns in ((saes, None, files), (results, "results", tables)):
        on_the_hub("--push-to-hub", repo, HfApi().upload_folder, repo_id=repo, folder_path=folder,
                   path_in_repo=at, allow_patterns=patterns)
    print(f"\nPublished: https://huggingface.co/{repo}")


def find_saes(source: str, layers: list[int], width: int, backbone: str) -> Path:
    """The folder of layer_NN of published SAEs, local or fetched; looked at before it is used."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        wanted = [f"layer_{layer:02d}/{file}" for layer in layers for file in SAE_FILES]
        fetched = on_the_hub("--saes", source, snapshot_download, source, allow_patterns=wanted)
        folder = Path(fetched)
    for layer in layers:
        name = f"layer_{layer:02d}"
        try:
            sae = SparseAutoencoder.from_pretrained(folder, subfolder=name)
        except Exception as error:  # what a file from elsewhere may hold
            raise InputError(f"--saes {source}: {name} is no SAE of this kit ({error})") from error
        known = len(sae.b_dec)
        if known != width:
            raise InputError(f"--saes {source}: {name} is for tokens of width {known}, not {width}")
        trained_on = (sae.about or {}).get("backbone", "an unknown backbone")
        if trained_on != backbone:
            print(f"      {name} was trained on {trained_on}, and is scored on {backbone}")
    return folder


def write_card(folder: Path, repo: str, title: str, note: str, layer: int, tables: str) -> None:
    """The README.md of a folder of SAEs, so that it can be published as it is."""
    name = f"layer_{layer:02d}"
    card = CARD.format(repo=repo, title=title, note=note, layer=name, tables=tables)
    (folder / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
