"""SAEs to and from the Hugging Face Hub."""
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from dinov2_hooks import layer_name
from kit.files import InputError
from sae import SAE_FILES, SparseAutoencoder

CARD = """---
license: mit
tags: [sparse-autoencoder, vision, hierarchy]
---
# Sparse autoencoders of class tokens: {title}

{note} One SAE per layer, of the class token after each block, from the reproduction kit of
*Analyzing Hierarchical Structure in Vision Models with Sparse Autoencoders* (arXiv 2505.15970); not
by the paper's authors.

```python
from sae import SparseAutoencoder  # the kit's sae.py
sae = SparseAutoencoder.from_pretrained("{repo}", subfolder="{layer}")
z = sae.encode(x)  # raw class tokens (B, n) -> latents (B, m)
```

{tables}
"""


def publish(repo, saes, results, inputs, backbone):
    """Upload a run's folder of SAEs with a card, and its tables and figures."""
    tables = (results / "tables.md").read_text(encoding="utf-8")
    card = CARD.format(repo=repo, title=backbone, note=inputs.note, tables=tables,
                       layer=layer_name(inputs.layers[-1]))
    (saes / "README.md").write_text(card, encoding="utf-8")
    api = HfApi()
    api.create_repo(repo, exist_ok=True)
    names = map(layer_name, inputs.layers)  # a process that was killed may have left others
    wanted = ["README.md", *(f"{name}/{file}" for name in names for file in SAE_FILES)]
    api.upload_folder(repo_id=repo, folder_path=saes, allow_patterns=wanted)
    wanted = ["*.csv", "figures/*.png"]  # no photographs
    api.upload_folder(repo_id=repo, folder_path=results, path_in_repo="results",
                      allow_patterns=wanted)
    print(f"\nPublished: https://huggingface.co/{repo}")


def find_saes(settings, inputs):
    """The folder of layer_NN of published SAEs, local or fetched; looked at before it is used."""
    source = settings.saes
    folder = Path(source).expanduser()
    width = inputs.model.cls_token.shape[-1]
    if not folder.is_dir():
        names = map(layer_name, inputs.layers)
        wanted = [f"{name}/{file}" for name in names for file in SAE_FILES]
        folder = Path(snapshot_download(source, allow_patterns=wanted))
    for layer in inputs.layers:
        name = layer_name(layer)
        sae = SparseAutoencoder.from_pretrained(folder, subfolder=name)
        about = sae.about if isinstance(sae.about, dict) else {}
        trained_on = about.get("backbone", "an unknown backbone")
        if about.get("layer", layer) != layer:
            raise InputError(f"--saes {source}: {name} was trained on layer {about['layer']}, as "
                             "its config.json says; rename the folder, or change that file")
        if len(sae.b_dec) != width:
            raise InputError(f"--saes {source}: {name} is for tokens of width {len(sae.b_dec)}, "
                             f"not {width}")
        if trained_on != settings.backbone:
            print(f"      {name} was trained on {trained_on}, and is scored on {settings.backbone}")
    return folder
