"""Does normalization cost nothing in the ONNX file? Each net is exported twice: with its norms, and with nothing in their place.

    python -m benchmarks.onnx_skeletons                all nets, then benchmarks/results/onnx_skeletons.json and docs/onnx.md
    python -m benchmarks.onnx_skeletons resnet50 vit   some of them, printed

Every norm becomes a BatchlessNorm with random statistics and biases, and weights that are positive, or of mixed signs: each is negative
with probability 0.1. "left" counts the norms of which anything remains; the skeletons are equal if the two files hold the same operators,
with Max(x, a constant) counted as Relu, Gemm as MatMul and FusedConv as Conv and Relu. The files are those for the target "cuda". The error
is that of the file in onnxruntime against the model in float64.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.pages import put
from fixtures import architectures
from normswap.export.norms import alike
from normswap.export.to_onnx import export
from normswap.layer.batchless_norm import BatchlessNorm

ROOT = Path(__file__).resolve().parent.parent
RAW = ROOT / "benchmarks/results/onnx_skeletons.json"
PAGE = ROOT / "docs/onnx.md"
BEGIN, END = "<!-- begin: python -m benchmarks.onnx_skeletons -->", "<!-- end -->"
NEGATIVE = 0.1


class Block(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, inputs, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(torch.relu(self.norm2(self.conv1(torch.relu(self.norm1(x))))))  # type: ignore[no-any-return]


class PreActivation(nn.Module):
    """The basic blocks of a pre-activation ResNet: what follows its ReLUs is padded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 12, 3, padding=1), nn.Sequential(*(Block(12, 10) for _ in range(4)))
        self.norm, self.head = nn.BatchNorm2d(12), nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.blocks(self.stem(x)))).mean((2, 3)))  # type: ignore[no-any-return]


class Whole(nn.Module):
    """One tensor of what a model of transformers gives."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, ids: Tensor) -> Any:
        return getattr(self.model(ids, use_cache=False) if self.name == "logits" else self.model(ids), self.name)


def bert(output: str) -> nn.Module:
    from transformers import BertConfig, BertModel

    options: dict[str, Any] = {"attn_implementation": "sdpa", "intermediate_size": 96}
    config = BertConfig(vocab_size=101, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, **options)
    return Whole(BertModel(config), output)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    options: dict[str, Any] = {"attn_implementation": "sdpa", "bos_token_id": 0, "eos_token_id": 0}
    return Whole(GPT2LMHeadModel(GPT2Config(vocab_size=101, n_embd=48, n_layer=3, n_head=4, **options)), "logits")


def torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from torchvision import models

        return getattr(models, name)(**options)  # type: ignore[no-any-return]

    return make


def timm(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name)

    return make


SMALL, SQUARE, IDS = (2, 3, 24, 20), (2, 3, 64, 64), (2, 11)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "pre-activation": (PreActivation, SMALL),
    "U-Net, LeakyReLU first": (architectures.TurbNetG, (2, 3, 128, 128)),
    "U-Net, norm first": (architectures.DfpNet, (2, 3, 128, 128)),
    "AlphaZero": (architectures.AlphaZero, (2, 5, 6, 8)),
    "ViT": (architectures.ViT, (2, 3, 12, 12)),
    "BERT, pooled": (lambda: bert("pooler_output"), IDS),
    "BERT, hidden state": (lambda: bert("last_hidden_state"), IDS),
    "GPT-2": (gpt2, IDS),
    "ViT-Ti/16 (timm)": (timm("vit_tiny_patch16_224"), (2, 3, 224, 224)),
    "ConvNeXt-A (timm)": (timm("convnext_atto"), SQUARE),
    "ConvNeXt-T": (torchvision("convnext_tiny"), SQUARE),
    "ResNet-50": (torchvision("resnet50"), SQUARE),
    "ResNetV2-50 (timm)": (timm("resnetv2_50"), SQUARE),
    "DenseNet-121": (torchvision("densenet121"), SQUARE),
    "VGG16-BN": (torchvision("vgg16_bn"), SQUARE),
    "MobileNetV3-L": (torchvision("mobilenet_v3_large"), SQUARE),
    "EfficientNet-B0": (torchvision("efficientnet_b0"), SQUARE),
    "RegNetY-400MF": (torchvision("regnet_y_400mf"), SQUARE),
    "Inception-v3": (torchvision("inception_v3", aux_logits=False, init_weights=False), (2, 3, 299, 299)),
}
QUICK = tuple(list(NETS)[:8])


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def with_norms(model: nn.Module, make: Callable[[int, int], nn.Module]) -> nn.Module:
    """`model`, in eval mode, with make(channels, axis) in the place of every norm; an activation that the norm did itself follows."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                new = make(child.num_features, 1)
            elif isinstance(child, nn.LayerNorm):
                first = type(child).__name__ == "LayerNorm2d"  # it is on (N, C, H, W)
                new = make(child.normalized_shape[-1], 1 if first else -1)
            else:
                continue
            act = getattr(child, "act", None)
            if isinstance(act, nn.ReLU | nn.ReLU6 | nn.LeakyReLU | nn.SiLU):
                act.inplace = False  # with nothing in the place of the norm, it would change what others read
            setattr(module, name, new if act is None else nn.Sequential(new, act))
    return model.eval()


def random_norm(signs: bool) -> Callable[[int, int], nn.Module]:
    """A BatchlessNorm that hides nothing; `signs`: whether some of its weights are negative."""

    def make(channels: int, axis: int) -> nn.Module:
        norm = BatchlessNorm(channels, channel_axis=axis)
        with torch.no_grad():
            norm.set_statistics(torch.randn(channels) * 0.3, torch.rand(channels) + 0.5)
            assert norm.weight is not None
            assert norm.bias is not None
            norm.weight.uniform_(0.5, 1.5)
            if signs:
                norm.weight.mul_(torch.where(torch.rand(channels) < NEGATIVE, -1.0, 1.0))
            norm.bias.normal_(0, 0.3)
        return norm

    return make


def inputs(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape) if len(shape) > 2 else torch.randint(100, shape)


def leaves(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def error(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest, relative to the largest value of its output."""
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True))


def measure(name: str, signs: bool) -> dict[str, Any]:
    """One row of the table."""
    import onnxruntime

    make, shape = NETS[name]
    torch.manual_seed(0)
    original = make()
    model = with_norms(copy.deepcopy(original), random_norm(signs))
    x = inputs(shape)
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        started = time.perf_counter()
        path = Path(directory) / "model.onnx"
        result = export(model, (x,), {}, path, target="cuda")
        seconds = time.perf_counter() - started
        bare = export(with_norms(original, lambda channels, axis: Nothing()), (x,), {}, Path(directory) / "bare.onnx", target="cuda")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        other = inputs((3, *shape[1:]))
        got = [torch.from_numpy(array) for array in session.run(None, {session.get_inputs()[0].name: other.numpy()})]
    with torch.no_grad():
        own = leaves(model(other))
        want = leaves(model.double()(other.double() if other.is_floating_point() else other))
    return {
        "net": name,
        "signs": "mixed" if signs else "positive",
        "sites": len(result.sites),
        "left": len(result.residue),
        "ways": dict(Counter(site.how for site in result.sites if not site.left)),
        "reasons": dict(Counter(site.reason for site in result.sites if site.left)),
        "equal": alike(Counter(result.nodes)) == alike(Counter(bare.nodes)),
        "predicted": alike(Counter(result.skeleton)) == alike(Counter(bare.nodes)),
        "more": dict(alike(Counter(result.nodes)) - alike(Counter(bare.nodes))),
        "error": error(got, want),
        "own_error": error(own, want),
        "seconds": round(seconds, 1),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| net | weights | norms | left | same operators as without norms | error | of torch |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        same = "yes" if row["equal"] else "and " + ", ".join(f"{count} {name}" for name, count in row["more"].items())
        numbers = f"{row['error']:.1e} | {row['own_error']:.1e}"
        lines.append(f"| {row['net']} | {row['signs']} | {row['sites']} | {row['left']} | {same} | {numbers} |")
    return "\n".join(lines)


def without_its_operators() -> None:
    """torchvision and what imports it, on a build of torch for CPUs: before the first of the nets."""
    sys.path.insert(0, str(ROOT / "tests/support"))
    importlib.import_module("torchvision_shim")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="*", choices=[*NETS, []], metavar="NET")
    asked = parser.parse_args().nets
    without_its_operators()
    rows = []
    for name in asked or NETS:
        for signs in (False, True):
            rows.append(measure(name, signs))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(table(rows))
    if not asked:
        RAW.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        put(PAGE, BEGIN, table(rows), END)


if __name__ == "__main__":
    main()
