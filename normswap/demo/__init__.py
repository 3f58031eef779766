"""A trained network that travels with normswap, and digits to try it on: what `normswap demo` and the examples of the documentation use.

    digits()    the trained network, with three BatchNorm2d and one BatchNorm1d; also a SRC on the command line: normswap.demo:digits
    build()     its architecture, untrained
    images()    the 450 test images and their labels, which it has not seen in training

Data: the optical recognition of handwritten digits by Alpaydin and Kaynak, UCI Machine Learning Repository, CC BY 4.0, here as in
scikit-learn: grey images of 8 x 8 pixels. `fixtures/train_digits_cnn.py` of the repository trains the network and writes both files.
May import torch, and nothing of ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

SOURCE = "normswap.demo:digits"
WEIGHTS = Path(__file__).with_name("digits.safetensors")
IMAGES = Path(__file__).with_name("digits.npz")


class Images(NamedTuple):
    images: Tensor  # (N, 1, 8, 8) float32 in [0, 1]
    labels: Tensor  # (N,) int64


def build() -> nn.Sequential:
    """The architecture, untrained: three BatchNorm2d after convolutions and one BatchNorm1d after a Linear."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 40, 3, padding=1, bias=False),
        nn.BatchNorm2d(40),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(160, 48),
        nn.BatchNorm1d(48),
        nn.ReLU(inplace=True),
        nn.Dropout(0.2),
        nn.Linear(48, 10),
    )


def digits() -> nn.Sequential:
    """The trained network, in eval mode: images (N, 1, 8, 8) to logits (N, 10), float32."""
    model = build()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def images() -> Images:
    """The test images and their labels."""
    with np.load(IMAGES) as stored:
        grey, labels = torch.from_numpy(stored["images"]), torch.from_numpy(stored["labels"])
    return Images(grey.float().unsqueeze(1) / 16, labels.long())


def accuracy(answers: Tensor, labels: Tensor) -> float:
    """The share of images whose largest logit, of answers (N, 10), is that of their label."""
    return float((answers.argmax(1) == labels).double().mean())
