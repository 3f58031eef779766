"""The step of a batch of 64 from micro-batches of 4: the same gradients, where BatchNorm has other ones."""

import copy

import torch
from digits import images, labels, pretrained
from torch import nn
from torch.nn.functional import cross_entropy

import normswap

original = pretrained()
x, y = 1 - images[:64], labels[:64]


def gradient(model: nn.Module, size: int) -> torch.Tensor:
    """Of the first convolution's weight, from micro-batches of `size`."""
    model = copy.deepcopy(model).train()
    for rows in torch.arange(64).split(size):
        (cross_entropy(model(x[rows]), y[rows]) * len(rows) / 64).backward()
    return model[0].weight.grad


swapped = normswap.convert(original, images[:5]).model
off = {}
for name, model in (("BatchNorm", original), ("normswap", swapped)):
    whole, parts = gradient(model, 64), gradient(model, 4)
    off[name] = ((parts - whole).norm() / whole.norm()).item()
    print(f"{name}: the gradient of 16 micro-batches is {off[name]:.1%} away from that of the whole batch")
assert off["normswap"] < 0.01 < off["BatchNorm"]

# In a loop, say how many backward passes make a step:
optimizer = torch.optim.SGD(normswap.param_groups(swapped.train(), lr=1e-2), momentum=0.9)
normswap.attach(swapped, accumulate=16)
for rows in torch.arange(64).split(4):
    (cross_entropy(swapped(x[rows]), y[rows]) / 16).backward()
optimizer.step()
