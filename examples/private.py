"""Fine-tune a BatchNorm network with differential privacy: Opacus refuses BatchNorm, and takes the converted network as it is."""

import warnings

import torch
from digits import TRAIN, images, labels, pretrained, right
from opacus import PrivacyEngine
from opacus.validators import ModuleValidator
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import normswap

warnings.filterwarnings("ignore", module="opacus")
original = pretrained()  # on public data
dark = 1 - images  # the private data
print(f"Opacus on the original: {len(ModuleValidator.validate(original))} errors")

torch.manual_seed(0)
conversion = normswap.convert(original, torch.zeros(2, 1, 8, 8))
model = normswap.for_opacus(conversion.model)
print(f"Opacus on the converted network: {len(ModuleValidator.validate(model))} errors")

optimizer = torch.optim.SGD(normswap.param_groups(model, lr=0.3))
loader = DataLoader(TensorDataset(dark[TRAIN], labels[TRAIN]), batch_size=64)
engine = PrivacyEngine()
private, optimizer, loader = engine.make_private(
    module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
)
for _ in range(2):
    for x, y in loader:
        optimizer.zero_grad()
        cross_entropy(private(x), y).backward()
        optimizer.step()

before, after = right(original, dark), right(private.to_standard_module(), dark)
print(f"right: {before:.0%} before, {after:.0%} after, at epsilon {engine.get_epsilon(1e-4):.1f}")
assert after > before + 0.2
