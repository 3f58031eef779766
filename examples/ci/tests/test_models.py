"""A test of the repository's own: what is shipped computes what was trained."""

from __future__ import annotations

from pathlib import Path

from normswap.demo import images

MODELS = Path(__file__).parents[1] / "models"


def test_what_is_shipped_is_what_was_trained(normswap_verify):
    parity = normswap_verify(MODELS / "digits.pt", MODELS / "digits" / "model.onnx", images().images[:7])
    assert parity.max_rel < 1e-5
