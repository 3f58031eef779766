"""What runs on CUDA: by the table of kernels, and by the profile of a run. There is no GPU here: other providers stand for it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from benchmarks import cuda_kernels
from normswap.errors import UsageError
from normswap.export import cuda
from normswap.export.to_onnx import Export, export
from normswap.export.verified import with_provider
from normswap.layer.batchless_norm import BatchlessNorm
from normswap.parity.judge import judge
from normswap.parity.result import Comparisons
from normswap.report.onnx import cuda_json, cuda_lines

PAGE = """
## Operators implemented by CPUExecutionProvider

| Op Name | Parameters | OpSet Version | Types Supported |
|**Operator Domain:** *ai.onnx*||||
|Celu|*in* X:**T**<br> *out* Y:**T**|12+|**T** = tensor(float)|

## Operators implemented by CUDAExecutionProvider

| Op Name | Parameters | OpSet Version | Types Supported |
|---------|------------|---------------|-----------------|
|**Operator Domain:** *ai.onnx*||||
|Add|*in* A:**T**<br> *out* C:**T**|14+|**T** = tensor(bfloat16), tensor(double), tensor(int16)|
|||13|**T** = tensor(float), tensor(int32)|
|||[7, 12]|**T** = tensor(float16)|
|And|*in* A:**T**|7+|**T** = tensor(bool)|
|DequantizeLinear|*in* x:**T**<br> *out* y:**tensor(float)**|[13, 18]|**T** = tensor(int8), tensor(uint8)|
|MaxPool|*in* X:**T**<br> *out* Indices:**I**|12+|**I** = tensor(int64)<br/> **T** = tensor(float), tensor(int8)|
|SequenceEmpty|*out* output:**S**|11+|**S** = seq(tensor(float)), seq(tensor(int8))|
| |
|**Operator Domain:** *com.microsoft*||||
|FusedConv|*in* X:**T**<br> *in* W:**T**|1+|**T** = tensor(float)|
| |
|**Operator Domain:** *com.ms.internal.nhwc*||||
|Conv|*in* X:**T**|22+|**T** = tensor(float)|

<a name="dmlexecutionprovider"/>

## Operators implemented by DmlExecutionProvider

|**Operator Domain:** *ai.onnx*||||
|Acos|*in* input:**T**|7+|**T** = tensor(float)|
"""


def test_the_page_is_read() -> None:
    content = cuda_kernels.table(PAGE, "c0ffee", "one version")
    assert content["source"] == "https://github.com/microsoft/onnxruntime/blob/c0ffee/docs/OperatorKernels.md"
    assert content["kernels"] == {
        "Add": [[14, None, ["bfloat16", "float64"]], [13, 13, ["float32"]], [7, 12, ["float16"]]],
        "DequantizeLinear": [[13, 18, ["float32"]]],
        "MaxPool": [[12, None, ["float32"]]],
        "SequenceEmpty": [[11, None, ["float32"]]],
        "com.microsoft::FusedConv": [[1, None, ["float32"]]],
    }


def test_the_committed_table_is_of_its_form() -> None:
    content = cuda._table()
    assert cuda_kernels.TARGET.read_text() == cuda_kernels.text(content)
    assert content["version"]
    assert content["source"].startswith("https://github.com/microsoft/onnxruntime/blob/")
    assert len(content["kernels"]) > 150
    floats = set(cuda_kernels.FLOATS.values())
    for name, rows in content["kernels"].items():
        for first, last, dtypes in rows:
            assert dtypes == sorted(set(dtypes)), name
            assert set(dtypes) <= floats, name
            assert last is None or last >= first, name
    # A kernel is registered for the opset that an operator came or changed with. The two forms that come from TensorFlow are older.
    versions: dict[str, set[int]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        versions.setdefault(f"{schema.domain}::{schema.name}" if schema.domain else schema.name, set()).add(schema.since_version)
    known = {name: rows for name, rows in content["kernels"].items() if name in versions}
    assert len(known) > 120
    assert {name for name, rows in known.items() if not {first for first, _, _ in rows} & versions[name]} == set()


@pytest.mark.parametrize(
    ("op", "since", "dtype"),
    [
        ("Conv", 11, "float32"),
        ("Conv", 22, "bfloat16"),
        ("Relu", 14, "bfloat16"),
        ("MaxPool", 12, "float16"),
        ("Attention", 23, "float16"),
        ("BatchNormalization", 15, "float64"),
        ("Max", 13, "bfloat16"),
        ("Gelu", 20, "float32"),
    ],
)
def test_there_is_a_kernel(op: str, since: int, dtype: str) -> None:
    assert cuda.has_kernel(op, since, dtype)
    assert cuda.has_kernel(op, since, dtype, "ai.onnx")


@pytest.mark.parametrize(
    ("op", "since", "dtype", "domain"),
    [
        ("Conv", 11, "bfloat16", ""),  # the older kernel has no bfloat16
        ("MaxPool", 22, "float32", ""),  # "12+" is for the operator of opset 12, not for that of 22
        ("GlobalAveragePool", 22, "float32", ""),
        ("ConvTranspose", 22, "float32", ""),
        ("BatchNormalization", 15, "bfloat16", ""),
        ("Attention", 23, "float64", ""),
        ("Attention", 25, "float32", ""),
        ("Celu", 12, "float32", ""),
        ("FusedConv", 1, "float32", ""),  # not an operator of ONNX
        ("FusedConv", 1, "float16", "com.microsoft"),
        ("Conv", 11, "float32", "com.microsoft"),
    ],
)
def test_there_is_no_kernel(op: str, since: int, dtype: str, domain: str) -> None:
    assert not cuda.has_kernel(op, since, dtype, domain)


def test_a_contrib_operator_has_a_kernel() -> None:
    assert cuda.has_kernel("FusedConv", 1, "float32", "com.microsoft")


# -- whole files -------------------------------------------------------------------------------------------------------------------


def norm(channels: int) -> Any:
    layer = BatchlessNorm(channels)
    with torch.no_grad():
        layer.set_statistics(torch.randn(channels), torch.rand(channels) + 0.5)
        layer.bias.normal_()
    return layer


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 3), norm(5), nn.GELU(), norm(5), nn.MaxPool2d(2), nn.ConvTranspose2d(5, 4, 2)).eval()


def made(path: Path, opset: int | None = None) -> Export:
    return export(net(), (torch.randn(2, 3, 9, 8),), {}, path, opset=opset)


def test_every_node_of_the_default_file_has_a_kernel(tmp_path: Path) -> None:
    result = made(tmp_path / "m.onnx")
    assert result.target == "portable"
    assert result.cuda is not None
    assert result.cuda.floating == sum(result.nodes.values()) == 5
    assert result.cuda.without_kernel == ()
    assert result.cuda.status == "not run"  # nothing ran, so nothing passed


def test_a_node_without_a_kernel_is_named(tmp_path: Path) -> None:
    found = made(tmp_path / "m.onnx", opset=22).cuda
    assert found is not None
    assert [(m.op, m.dtype, m.opset) for m in found.without_kernel] == [("MaxPool", "float32", 22), ("ConvTranspose", "float32", 22)]
    names = {node.name for node in onnx.load(tmp_path / "m.onnx").graph.node}
    assert {m.node for m in found.without_kernel} <= names
    assert str(found.without_kernel[0]) == f"MaxPool {found.without_kernel[0].node} (float32, opset 22)"
    assert cuda_lines(dataclasses.replace(found, why="onnxruntime has no CUDAExecutionProvider here"))[1] == (
        f"without a kernel: {found.without_kernel[0]}, {found.without_kernel[1]}"
    )


def model(nodes: list[Any], *, opset: int = 20, dtype: int = TensorProto.FLOAT) -> Any:
    inputs = [helper.make_tensor_value_info("x", dtype, [2, 3])]
    outputs = [helper.make_tensor_value_info("y", dtype, [2, 3])]
    return helper.make_model(helper.make_graph(nodes, "g", inputs, outputs), opset_imports=[helper.make_opsetid("", opset)])


def test_shapes_may_be_computed_anywhere() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], name="shape"),
        helper.make_node("Mod", ["s", "s"], ["m"], name="mod"),  # integers
        helper.make_node("Add", ["s", "m"], ["t"], name="add"),
        helper.make_node("Reshape", ["x", "t"], ["y"], name="reshape"),
    ]
    found = cuda.of_file(model(nodes))
    assert (found.floating, found.without_kernel) == (2, ())


def test_an_inner_graph_is_looked_into() -> None:
    inner = helper.make_graph(
        [helper.make_node("Celu", ["x"], ["z"], name="celu")], "inner", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, 3])]
    )
    condition = helper.make_node("Constant", [], ["c"], value=helper.make_tensor("c", TensorProto.BOOL, [], [True]))
    found = cuda.of_file(model([condition, helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner, name="if")]))
    assert {m.node for m in found.without_kernel} == {"celu"}


def test_the_dtype_is_that_of_the_result() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.DOUBLE, name="cast"),
        helper.make_node("Attention", ["h", "h", "h"], ["a"], q_num_heads=1, kv_num_heads=1, name="attention"),
    ]
    found = cuda.of_file(model([*nodes, helper.make_node("Relu", ["x"], ["y"])], opset=23))
    assert [(m.op, m.dtype) for m in found.without_kernel] == [("Attention", "float64")]


# -- running it --------------------------------------------------------------------------------------------------------------------


def placed(path: Path, provider: str) -> tuple[Export, dict[str, Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.GELU(), norm(5), nn.Linear(5, 4), norm(4), nn.GELU(), norm(4)).eval()
    x = torch.randn(2, 7)
    result, found = with_provider(export(model, (x,), {}, path), Comparisons(), judge(model, (x,), {}), provider)
    return result, dict(found.parities)


def test_a_run_where_every_node_is_on_the_provider(tmp_path: Path) -> None:
    result, parities = placed(tmp_path / "m.onnx", "CPUExecutionProvider")
    assert result.cuda is not None
    assert result.cuda.run is not None
    assert (result.cuda.status, result.cuda.why, result.cuda.run.elsewhere) == ("passed", "", ())
    assert result.cuda.run.floating >= 5
    assert {name: left for site in result.sites for name, left in [(site.name, len(site.left))]} == result.cuda.run.kernels
    assert result.cuda.run.kernels == {"2": 0, "4": 0, "6": 1}
    assert list(parities) == ["onnxruntime (CPUExecutionProvider)"]
    assert all(parities.values())


@pytest.mark.skipif("AzureExecutionProvider" not in onnxruntime.get_available_providers(), reason="another build of onnxruntime")
def test_a_run_that_fell_back_does_not_count_as_passed(tmp_path: Path) -> None:
    result, _ = placed(tmp_path / "m.onnx", "AzureExecutionProvider")  # it is there, starts, and has no kernel for any of this
    assert result.cuda is not None
    assert result.cuda.run is not None
    assert result.cuda.status == "partly"
    assert len(result.cuda.run.elsewhere) == result.cuda.run.floating
    told = cuda_lines(result.cuda)
    assert told[0].startswith("ran, but not on CUDA: ")


@pytest.mark.skipif(cuda.PROVIDER in onnxruntime.get_available_providers(), reason="there is one")
def test_without_a_provider_nothing_is_run_and_it_says_so(tmp_path: Path) -> None:
    result, parities = placed(tmp_path / "m.onnx", cuda.PROVIDER)
    assert parities == {}
    assert result.cuda is not None
    assert (result.cuda.status, result.cuda.why) == ("not run", "onnxruntime has no CUDAExecutionProvider here")
    told = cuda_json(result.cuda)
    assert (told["status"], told["elsewhere"], told["kernels"]) == ("not run", [], {})
    assert cuda_lines(result.cuda)[0].startswith("not run: onnxruntime has no CUDAExecutionProvider here; ")


def test_a_run_without_floating_point_nodes_does_not_count() -> None:
    empty = cuda.Placement("p", 0, (), {})
    assert cuda.Cuda("t", 0, run=empty).status == "partly"
    assert cuda.Cuda("t", 1, run=dataclasses.replace(empty, floating=1)).status == "passed"
    assert cuda.Cuda("t", 1, run=dataclasses.replace(empty, floating=1, elsewhere=("Conv c",))).status == "partly"


def test_integers_elsewhere_are_no_matter(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    nodes = [helper.make_node("Shape", ["x"], ["s"], name="shape"), helper.make_node("Reshape", ["x", "s"], ["y"], name="reshape")]
    onnx.save(model(nodes), path)
    found = cuda.run(path, [np.zeros((2, 3), np.float32)], {}, provider="CPUExecutionProvider")
    assert found.elsewhere == ()


def test_a_target_that_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the target is 'gpu'; expected one of 'portable', 'cuda'"):
        export(net(), (torch.randn(2, 3, 9, 8),), {}, tmp_path / "m.onnx", target="gpu")  # type: ignore[arg-type]
