"""What the paper's job would take on cards that were not at hand: counted by formula, not measured.

    python tests/paper_cost.py

Floating-point operations of ViT-g on all of ImageNet-1k and of the training of its SAEs, at half of
the bfloat16 rate in a card's data sheet. That half is an assumption.
"""

IMAGES = {"train": 1_281_167, "val": 50_000}
BLOCKS, WIDTH, TOKENS = 40, 1536, 257
LATENTS, BATCH, EPOCHS = 12_288, 4096, 50
CARDS = {"RTX 4090": 165e12, "H100": 989e12}  # operations a second
REACHED = 0.5
PROBE_STEP = 0.5e-3  # seconds: a dozen small kernels, whatever the card; an assumption


def flop_of_an_image():
    """Of a block: projections and MLP 24 n² a token, attention 4 n for each pair of tokens."""
    return BLOCKS * (24 * WIDTH**2 * TOKENS + 4 * WIDTH * TOKENS**2)


def flop_of_a_step():
    """Five products of tokens and weights: two forward, three backward."""
    return 5 * 2 * BATCH * WIDTH * LATENTS


if __name__ == "__main__":
    images = sum(IMAGES.values())
    steps = BLOCKS * EPOCHS * (IMAGES["train"] // BATCH)
    print(f"{2 * images * BLOCKS * WIDTH / 1e9:.0f} GB of class tokens, {steps:,} steps")
    for card, rate in CARDS.items():
        tokens = images * flop_of_an_image() / (REACHED * rate) / 3600
        saes = steps * flop_of_a_step() / (REACHED * rate) / 3600
        print(f"{card}: class tokens {tokens:.1f} h, SAEs {saes:.1f} h")
    probes = BLOCKS * 10 * (IMAGES["train"] // 256)  # ten epochs of 256 tokens, once a layer
    print(f"linear probes: {probes:,} steps, {probes * PROBE_STEP / 3600:.1f} h")
