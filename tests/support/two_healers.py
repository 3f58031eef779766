"""One of the processes of test_heal.py:  torchrun sets the variables;  python two_healers.py DIRECTORY

Heals the network of test_heal.py, and writes the weights and the curve in DIRECTORY/RANK.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from normswap.api.heal import Healing, heal
from normswap.healing.processes import joined
from tests.api.test_heal import CONVERSION, HELD_OUT, NET, batches


def healed() -> Healing[torch.nn.Module]:
    return heal(CONVERSION, NET, batches(40), tokens=32 * 40, lr=3e-3, held_out=HELD_OUT, accumulate=2)


def main() -> None:
    torch.set_num_threads(1)
    with joined() as rank:
        found = healed()
        torch.save((found.model.state_dict(), [point.distance for point in found.curve]), Path(sys.argv[1]) / f"{rank}.pt")


if __name__ == "__main__":
    main()
