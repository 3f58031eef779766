"""How many LayerNorms of real architectures become RMSNorm, and how exact is that?

    python -m benchmarks.rmsnorm            measures everything, writes benchmarks/results/rmsnorm.json and the table of docs/rmsnorm.md
    python -m benchmarks.rmsnorm --table    only writes the table again

Small configurations with random weights, whose one-dimensional tensors (weights and biases of norms, LayerScale, biases) are drawn from
a normal distribution, and whose other weights have a mean that is not 0. The error of a conversion is measured in float64 and in float32.
"""

# ruff: noqa: E402  torchvision, which timm needs, can only be imported after the shim

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests/support")] if str(ROOT / "tests/support") not in sys.path else []
importlib.import_module("torchvision_shim")  # before torchvision, which does not import without it on a CPU build of torch

import timm
import transformers as library

from fixtures import streams
from normswap.api.convert import convert_unchecked
from normswap.api.request import Request

KEPT, PAGE = ROOT / "benchmarks/results/rmsnorm.json", ROOT / "docs/rmsnorm.md"
BEGIN, END = "<!-- begin: python -m benchmarks.rmsnorm -->", "<!-- end -->"
VOCABULARY = 97
transformers: Any = library
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 80}
VISION = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 80, "image_size": 32, "patch_size": 8}


class Case(NamedTuple):
    """A model and its inputs. kind: "pre-norm", "post-norm", "res-post-norm" (x + LN(f(x))) or "convolutional"."""

    name: str
    kind: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], Any]


def _tokens(length: int = 11) -> Tensor:
    return torch.randint(3, VOCABULARY, (2, length))


def _timm(name: str, kind: str, size: int, **options: Any) -> Case:
    return Case(f"timm {name}", kind, lambda: timm.create_model(name, **options), lambda: torch.randn(2, 3, size, size))


def _hf(name: str, kind: str, cls: str, config: Mapping[str, Any], inputs: Callable[[], Any] | None = None) -> Case:
    stem = cls.removesuffix("Model").removesuffix("LMHead").removesuffix("ForCausalLM").removesuffix("ForConditionalGeneration")
    configuration = getattr(transformers, f"{stem.removesuffix('ForMaskedLM')}Config")
    return Case(
        f"transformers {name}",
        kind,
        lambda: getattr(transformers, cls)(configuration(**config)),
        inputs or (lambda: {"input_ids": _tokens()}),
    )


def _whisper() -> Mapping[str, Tensor]:
    return {"input_features": torch.randn(2, 16, 20), "decoder_input_ids": _tokens(7)}


WHISPER = {
    "vocab_size": VOCABULARY,
    "num_mel_bins": 16,
    "d_model": 48,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 72,
    "max_source_positions": 10,
    "max_target_positions": 20,
    "use_cache": False,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
}
CASES = (
    _timm("vit_tiny_patch16_224", "pre-norm", 32, img_size=32, depth=4),
    _timm("vit_tiny_patch16_224", "pre-norm", 32, img_size=32, depth=4, init_values=0.1)._replace(
        name="timm vit_tiny_patch16_224, LayerScale"
    ),
    _timm("deit_tiny_distilled_patch16_224", "pre-norm", 32, img_size=32, depth=4),
    _timm("swin_tiny_patch4_window7_224", "pre-norm", 56, img_size=56),
    _timm("swinv2_tiny_window8_256", "res-post-norm", 64, img_size=64),
    _timm("convnext_atto", "convolutional", 64),
    _hf(
        "GPT-2",
        "pre-norm",
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 4, "n_head": 4, "use_cache": False, "bos_token_id": 1, "eos_token_id": 1},
    ),
    _hf(
        "OPT",
        "pre-norm",
        "OPTForCausalLM",
        {
            **{k: v for k, v in SIZES.items() if k != "intermediate_size"},
            "ffn_dim": 80,
            "word_embed_proj_dim": 48,
            "use_cache": False,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
        },
    ),
    _hf("Phi", "pre-norm", "PhiForCausalLM", {**SIZES, "use_cache": False, "num_key_value_heads": 2, "pad_token_id": 0}),
    _hf("GPT-NeoX", "pre-norm", "GPTNeoXForCausalLM", {**SIZES, "use_cache": False}),
    _hf(
        "CLIP",
        "pre-norm",
        "CLIPModel",
        {"text_config": {**SIZES, "max_position_embeddings": 20, "eos_token_id": 2}, "vision_config": VISION, "projection_dim": 24},
        lambda: {"input_ids": _tokens(), "pixel_values": torch.randn(2, 3, 32, 32)},
    ),
    _hf("Whisper", "pre-norm", "WhisperForConditionalGeneration", WHISPER, _whisper),
    _hf("BERT", "post-norm", "BertModel", SIZES),
)


class Logits(nn.Module):
    """CLIP without its other outputs, one of which is the stream."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.model(**inputs).logits_per_image  # type: ignore[no-any-return]


def _logits(case: Case) -> Case:
    return case._replace(name=f"{case.name}, logits alone", model=lambda: Logits(case.model()))


def prepare(model: nn.Module, seed: int) -> nn.Module:
    """Give a model tensors in which no gain is 1, no bias 0, and no weight without a mean, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(noise)
            else:
                parameter.add_(0.02 + 0.02 * noise)
    return model.eval()


def measure(case: Case) -> dict[str, Any]:
    torch.manual_seed(0)
    model, inputs = prepare(case.model(), 0), case.inputs()
    found: dict[str, Any] = {"name": case.name, "kind": case.kind}
    for dtype in (torch.float32, torch.float64):
        given = {name: _cast(value, dtype) for name, value in inputs.items()} if isinstance(inputs, Mapping) else _cast(inputs, dtype)
        conversion = convert_unchecked(model.to(dtype), Request(example_inputs=given, to="rmsnorm"))
        # In float64, of the runs in which everything is float64: GPT-NeoX and Phi compute their rotations in float32.
        outputs = [d.max_rel for d in conversion.parity.all_outputs if d.float64 == (dtype is torch.float64)]
        found[str(dtype).removeprefix("torch.")] = {"error": max(outputs), "passed": conversion.parity.passed}
    found["exact"] = [swap.name for swap in conversion.plan.swaps]
    found["kept"] = {skip.name: skip.reason for skip in conversion.plan.skips}
    return found


def measure_random(count: int = 300) -> dict[str, Any]:
    """The random networks of `fixtures/streams.py` in float64: how many are wrong, and the largest error."""
    errors, exact, called = [], 0, 0
    for seed in range(count):
        model, x = streams.net(seed)
        conversion = convert_unchecked(model.double(), Request(example_inputs=x.double(), to="rmsnorm"))
        errors.append(max(d.max_rel for d in conversion.parity.outputs) if conversion.parity else float("inf"))
        exact += len(conversion.plan.swaps)
        called += len(conversion.plan.swaps) + sum(skip.calls != 0 for skip in conversion.plan.skips)
    return {"networks": count, "wrong": sum(e > 1e-12 for e in errors), "error": max(errors), "exact": exact, "LayerNorms": called}


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def table(records: list[dict[str, Any]]) -> str:
    lines = ["| model | | LayerNorms | exact | error, float64 | error, float32 | why the others stay |", "|---|---|--:|--:|--:|--:|---|"]
    for r in records:
        why = "; ".join(f"{count}: {reason}" for reason, count in Counter(_short(text) for text in r["kept"].values()).most_common())
        passed = "" if r["float32"]["passed"] and r["float64"]["passed"] else " (failed)"
        total = len(r["exact"]) + len(r["kept"])
        errors = f"{r['float64']['error']:.1e} | {r['float32']['error']:.1e}{passed}"
        lines.append(f"| {r['name']} | {r['kind']} | {total} | {len(r['exact'])} | {errors} | {why} |")
    return "\n".join(lines)


def _short(reason: str) -> str:
    """The reason, without the names of modules and without the advice."""
    words = reason.removesuffix("; leave it").split(": its stream", 1)[-1].removeprefix("its stream ").split(",")[0].strip()
    kept = [word for word in words.split() if "." not in word]
    return " ".join(kept)


ALL = tuple(each for case in CASES for each in ([case, _logits(case)] if case.name.endswith(" CLIP") else [case]))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--table", action="store_true", help="only write the table again")
    if not options.parse_args().table:
        torch.set_num_threads(1)
        records = []
        for case in ALL:
            records.append(measure(case))
            print(records[-1]["name"], len(records[-1]["exact"]), "of", len(records[-1]["exact"]) + len(records[-1]["kept"]), flush=True)
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "transformers": transformers.__version__,
        }
        content = {"versions": versions, "models": records, "random": measure_random()}
        KEPT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    content = json.loads(KEPT.read_text(encoding="utf-8"))
    r = content["random"]
    said = (
        f"{r['networks']} random networks: {r['wrong']} wrong, {r['exact']} of {r['LayerNorms']} LayerNorms exact, error {r['error']:.1e}."
    )
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(content['models'])}\n\n{said}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
