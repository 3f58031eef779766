"""What reading `normswap.drift` costs in a step of ResNet-18: `python -m benchmarks.drift_cost`.

The step is forward, loss, backward and SGD, at batch 8 of 224 x 224, in processor time of one thread; drift is read between backward and
step, and its figures are copied to the host.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch.nn import functional as F

import normswap

STEPS = 7


def main() -> None:
    import torchvision

    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = normswap.convert(torchvision.models.resnet18().eval(), torch.randn(2, 3, 64, 64)).model.train()
    optimizer = torch.optim.SGD(normswap.param_groups(network, lr=1e-3, batch=8), momentum=0.9)
    images, labels = torch.randn(8, 3, 224, 224), torch.randint(0, 1000, (8,))
    steps, reads = [], []
    for _ in range(STEPS + 1):
        started = time.process_time()
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(network(images), labels))
        passed = time.process_time()
        normswap.drift(network).to_dict()
        read = time.process_time()
        optimizer.step()
        steps.append(time.process_time() - started - (read - passed))
        reads.append(read - passed)
    step, of_drift = (statistics.median(values[1:]) for values in (steps, reads))  # the first step is a warm-up
    print(f"step {1e3 * step:.0f} ms, drift {1e3 * of_drift:.2f} ms: {of_drift / step:.2%}")


if __name__ == "__main__":
    main()
