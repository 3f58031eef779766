"""The data of the examples, and a network that was trained on them: scikit-learn's digits, 8 x 8 pixels.

The examples fine-tune it for another task: dark digits on a light ground.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)
TRAIN, TEST = slice(0, 1300), slice(1300, None)


def network() -> nn.Sequential:
    """An ordinary network with BatchNorm."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(512, 10)),
    )


def pretrained() -> nn.Sequential:
    """`network`, trained for five epochs with a batch of 64: two seconds."""
    torch.manual_seed(0)
    model = network().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(5):
        for rows in torch.randperm(1300).split(64):
            optimizer.zero_grad()
            cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def right(model: nn.Module, x: Tensor) -> float:
    """The share of the test images that a model gets right, shown as x."""
    return (model.eval()(x[TEST]).argmax(1) == labels[TEST]).float().mean().item()
