"""Each private name of torch that normswap uses, in the installed torch: what fails here names what a new version has moved.

One test per name, each with a message that says what is broken without it.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from normswap.models import torch_private

# module -> name -> what it is for
NAMES: dict[str, dict[str, str]] = {
    "torch": {"_storage_classes": "pickled models cannot be read without running them"},
    "torch.cpu": {"_is_avx512_bf16_supported": "healing does not know whether a CPU multiplies in bfloat16"},
    "torch._C": {"PyTorchFileReader": "pickled models cannot be read without running them"},
    "torch._utils": dict.fromkeys(("NAME_MAPPING", "IMPORT_MAPPING"), "pickles of Python 2 cannot be read"),
    "torch._ops": {"OpOverload": "the operators of an exported program are not known"},
    "torch.fx.graph_module": {
        "_format_import_block": "code in which a norm was replaced cannot be compiled",
        "_forward_from_src": "code in which a norm was replaced cannot be compiled",
    },
    "torch.multiprocessing.reductions": {"StorageWeakRef": "inspect cannot tell what overwrites the output of a norm"},
    "torch.nn.modules.batchnorm": {"_BatchNorm": "BatchNorm is not known"},
    "torch.nn.modules.instancenorm": {"_InstanceNorm": "InstanceNorm is not known"},
    "torch.nn.utils.parametrizations": {"_WeightNorm": "no norm can go into the weight norm of its producer"},
    "torch.utils._python_dispatch": {"TorchDispatchMode": "the streams of a model are not known, so no LayerNorm can become an RMSNorm"},
    "torch.package.importer": {"sys_importer": "code in which a norm was replaced cannot be compiled"},
    "torch.utils._pytree": dict.fromkeys(
        ("MappingKey", "keystr", "tree_flatten", "tree_flatten_with_path", "tree_leaves", "tree_map", "tree_map_only", "tree_unflatten"),
        "the tensors in nested inputs and outputs are not found",
    ),
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in NAMES.items() for name in names])
def test_the_name_is_there(module: str, name: str) -> None:
    found = getattr(importlib.import_module(module), name, None)
    assert found is not None, f"torch {torch.__version__} has no {module}.{name}: {NAMES[module][name]}"


@pytest.mark.parametrize("method", ["get_all_records", "get_record", "get_record_size", "has_record"])
def test_a_file_of_torch_is_read_record_by_record(method: str) -> None:
    has = hasattr(torch._C.PyTorchFileReader, method)  # type: ignore[attr-defined]
    assert has, f"torch {torch.__version__} has no PyTorchFileReader.{method}: every model in a file of torch.save is refused"


@pytest.mark.parametrize("hooks", torch_private.HOOKS)
def test_modules_keep_hooks_there(hooks: str) -> None:
    assert hasattr(nn.Module(), hooks), f"torch {torch.__version__} keeps hooks elsewhere than in {hooks}: a swapped layer loses them"


def test_no_other_attribute_keeps_hooks() -> None:
    of_state_dicts = {"_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"}
    more = {name for name in torch_private.MODULE_STATE if "hook" in name} - {*torch_private.HOOKS} - of_state_dicts
    assert not more, f"torch {torch.__version__} keeps hooks in {more}, too: a swapped layer loses them"


@pytest.mark.parametrize("registry", ["_parameters", "_buffers", "_modules"])
def test_modules_keep_their_parts_there(registry: str) -> None:
    assert registry in torch_private.MODULE_STATE, f"torch {torch.__version__} has no nn.Module.{registry}: nothing can be swapped"


@pytest.mark.parametrize("conv", [nn.Conv1d(3, 5, 1), nn.Conv2d(3, 5, 1), nn.Conv3d(3, 5, 1)])
def test_a_convolution_calls_that_method(conv: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(type(conv), torch_private.CONV_FORWARD, lambda self, *args: called.append("yes"), raising=False)
    conv(torch.zeros(2, 3, *(4,) * int(type(conv).__name__[-2])))
    assert called, f"{type(conv).__name__} of torch {torch.__version__} does not call its {torch_private.CONV_FORWARD}: a subclass may hide"


NORMS = [(torch_private.AnyBatchNorm, "_check_input_dim"), (torch_private.AnyInstanceNorm, "_apply_instance_norm")]


@pytest.mark.parametrize(("cls", "method"), NORMS)
def test_norms_have_the_method_that_ours_override_or_call(cls: type[nn.Module], method: str) -> None:
    assert hasattr(cls, method), f"torch {torch.__version__} has no {cls.__name__}.{method}: calls of F.batch_norm cannot be swapped"


def test_torch_compile_is_known_by_its_module() -> None:
    assert importlib.util.find_spec(torch_private.DYNAMO), f"torch {torch.__version__} has no {torch_private.DYNAMO}"


def test_an_operator_says_what_it_takes_and_returns() -> None:
    operator = torch.ops.aten.native_layer_norm.default
    message = f"the schema of an operator of torch {torch.__version__} reads otherwise: calls in exported programs are not understood"
    assert [p.name for p in torch_private.parameters_of(operator)] == ["input", "normalized_shape", "weight", "bias", "eps"], message
    assert torch_private.returned_by(operator) == 3, message
    assert torch_private.name_in_aten(operator) == "native_layer_norm", message


def test_an_operator_says_what_it_writes_into() -> None:
    x, y, out = torch.ones(2), torch.ones(2), torch.ones(2)
    message = f"the schema of an operator of torch {torch.__version__} does not tell what it writes into: streams may be followed wrongly"
    aten = torch.ops.aten
    cases = ((aten.add_.Tensor, (x, y), {}, [x]), (aten.add.Tensor, (x, y), {}, []), (aten.add.out, (x, y), {"out": out}, [out]))
    for operator, args, kwargs, written in cases:
        found = torch_private.writes_into(operator, args, kwargs)
        assert [id(t) for t in found] == [id(t) for t in written], message


def test_a_dispatch_mode_sees_the_operators_behind_a_linear() -> None:
    seen: list[str] = []

    class Mode(torch_private.TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(torch_private.name_in_aten(func))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Mode():  # type: ignore[no-untyped-call]
        nn.Linear(3, 2)(torch.ones(4, 5, 3))
    assert {"t", "addmm"} <= set(seen), f"a linear of torch {torch.__version__} is made of {seen}: streams are not followed through it"


def test_a_weight_norm_says_its_axis() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 3), dim=1)
    (weight_norm,) = layer.parametrizations["weight"]  # type: ignore[index]
    assert weight_norm.dim == 1, f"torch {torch.__version__} keeps the axis of its weight norm elsewhere"


def test_a_tensor_of_a_vmap_is_known() -> None:
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(torch_private.is_functorch_wrapped(x))
        return x

    torch.vmap(look)(torch.zeros(3, 2))
    assert (seen, torch_private.is_functorch_wrapped(torch.zeros(1))) == ([True], False), (
        f"torch {torch.__version__} does not tell the tensors of a vmap from others"
    )


def test_a_view_knows_its_base() -> None:
    whole = torch.zeros(3, 2)
    message = f"a view of torch {torch.__version__} does not tell its base: a copied model would share memory with the original"
    assert torch_private.base_of_view(whole[0]) is whole, message
    assert torch_private.base_of_view(whole) is None, message


def test_writes_in_place_are_counted_for_all_views() -> None:
    whole = torch.zeros(3, 2)
    before, view = torch_private.written(whole), whole[1:]
    F.relu(view, inplace=True)
    message = f"torch {torch.__version__} does not tell what overwrites a tensor"
    assert torch_private.written(whole) > before, message
    assert torch_private.storage_key(view) == torch_private.storage_key(whole) != torch_private.storage_key(whole.clone()), message
    assert torch_private.StorageWeakRef(whole.untyped_storage()).cdata == torch_private.storage_key(whole), message  # type: ignore[no-untyped-call]


def test_the_code_of_a_graph_can_be_compiled() -> None:
    graph: Any = fx.symbolic_trace(lambda x: torch.relu(x) + 1).graph
    code = graph.python_code("self")
    imports = torch_private.format_import_block(code.globals, torch_private.sys_importer)
    forward = torch_private.forward_from_source(f"{imports}\n{code.src}", {})
    assert torch.equal(forward(None, torch.tensor([-1.0, 2.0])), torch.tensor([1.0, 3.0])), f"of torch {torch.__version__}"


def test_bfloat16_lasts_as_long_as_its_block_and_leaves_float64() -> None:
    x = torch.randn(3, 5)
    with torch_private.in_bfloat16():
        assert (x @ x.T).dtype == torch.bfloat16
        assert (x.double() @ x.T.double()).dtype == torch.float64
        assert not torch.backends.cuda.flash_sdp_enabled()
    assert (x @ x.T).dtype == torch.float32
    assert torch.backends.cuda.flash_sdp_enabled()


def test_it_is_the_cpu_that_says_whether_it_multiplies_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    for has in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        assert torch_private.multiplies_bfloat16() is has
