"""A small convolutional network, pretrained on the spot on drawn letters, that goes with the digits."""

from __future__ import annotations

import string
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmask.backbones import drawing
from fastmask.backbones.transform import Transform

LETTERS = string.ascii_letters
WIDTHS = (12, 24, 48, 64)
DRAWINGS = 60
EPOCHS = 5
SEED = 20230825
_BATCH = 64
# Highest learning rate of the one-cycle schedule; 1e-3 leaves the loss at 0.9 after five epochs, 3e-3 at 0.4.
_RATE = 3e-3
RECIPE = (
    f"letters {LETTERS}, {DRAWINGS} drawings each, {EPOCHS} epochs of {_BATCH}, AdamW one-cycle {_RATE}, "
    f"widths {WIDTHS}, seed {SEED}, 1"
)
TRANSFORM = Transform(drawing.SIZE, (127.5, 127.5, 127.5), (127.5, 127.5, 127.5))


class DigitsCNN(nn.Sequential):
    """Four 3x3 convolutions with batch norm, pooled to 2 x 2 x 64 = 256 features of a 32 x 32 picture."""

    dim = WIDTHS[-1] * 4

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        wide = 3
        for step, width in enumerate(WIDTHS):
            layers += [
                nn.Conv2d(wide, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            if step < len(WIDTHS) - 1:
                layers.append(nn.MaxPool2d(2))
            wide = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())


def untrained(seed: int = SEED) -> DigitsCNN:
    """Make the network with initial values that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DigitsCNN()


def pretrain(
    seed: int = SEED,
    drawings: int = DRAWINGS,
    epochs: int = EPOCHS,
    progress: Callable[[str, int, int], None] | None = None,
) -> DigitsCNN:
    """Train the network to tell letters apart: no digit and nothing handwritten is among the pictures.

    Args:
        seed: of the pictures, the initial values and the order of the batches.
        drawings: pictures of each letter.
        epochs: passes over them.
        progress: called with a label, batches done and batches in all.

    Returns:
        The network in eval mode. Equal for equal arguments and an equal number of threads.
    """
    pictures, labels = draw_letters(seed, drawings)
    network = untrained(seed).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        head = nn.Linear(network.dim, len(LETTERS))
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        [*network.parameters(), *head.parameters()], lr=_RATE, weight_decay=0.01
    )
    batches = len(pictures) // _BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=epochs * batches)
    with torch.enable_grad():
        for epoch in range(epochs):
            shuffled = torch.randperm(len(pictures), generator=order)
            for batch, rows in enumerate(shuffled[: batches * _BATCH].split(_BATCH), start=1):
                # What the transform does to one picture, on a batch.
                loss = F.cross_entropy(
                    head(network(pictures[rows].float() / 127.5 - 1)), labels[rows]
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                if progress:
                    progress("pretraining digits_cnn", epoch * batches + batch, epochs * batches)
    return network.eval()


def draw_letters(seed: int, drawings: int) -> tuple[Tensor, Tensor]:
    """Draw letters in random fonts, dark on light or light on dark: uint8 (n, 3, 32, 32), labels (n,)."""
    rng = np.random.default_rng(seed)
    fonts = drawing.LETTER_FONTS
    shapes = np.stack(
        [
            drawing.glyph(fonts[int(rng.integers(len(fonts)))], letter)
            for letter in LETTERS
            for _ in range(drawings)
        ]
    )
    labels = torch.arange(len(LETTERS)).repeat_interleave(drawings)
    n = len(labels)
    warped = drawing.warp(
        torch.from_numpy(shapes)[:, None],
        rng,
        degrees=15,
        shear=0.2,
        scale=(0.7, 1.1),
        shift=0.12,
        wave=0.03,
    )
    light, dark = drawing.colour(rng, n, 0.7, 1.0), drawing.colour(rng, n, 0.0, 0.45)
    inverted = torch.from_numpy(rng.random((n, 1, 1, 1)) < 0.5)
    ink, ground = torch.where(inverted, light, dark), torch.where(inverted, dark, light)
    painted = drawing.paint(drawing.finish(warped), ink, ground)
    painted = painted + 0.04 * drawing.grain(rng, n, drawing.SIZE) + 0.04 * drawing.grain(rng, n, 4)
    return drawing.to_bytes(painted), labels
