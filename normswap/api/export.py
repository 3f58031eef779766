"""`normswap.export_onnx`: writes a model as an ONNX file with its normalization folded away."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from normswap.api.convert import Conversion, given_to
from normswap.api.verify import inputs_of
from normswap.errors import UsageError
from normswap.export.to_onnx import Dynamic, Export, Settings, Target
from normswap.export.verified import main_result, verified_export
from normswap.files import atomic
from normswap.models.inputs import Inputs
from normswap.models.programs import Model
from normswap.parity.result import ParityError, raise_for


def export_onnx(
    model: Model | Conversion[Any],
    example_inputs: Any = None,
    path: str | Path = "model.onnx",
    *,
    target: Target = Settings.target,
    opset: int | None = Settings.opset,
    dynamic: bool | Dynamic = Settings.dynamic,
    half: bool = Settings.half,
    external_data: bool | None = Settings.external_data,
    thorough: bool = False,
) -> Export:
    """Write an ONNX file in which BatchlessNorm layers are folded into their convs and linears, verified in onnxruntime.

    example_inputs: as for `convert`; not needed for a Conversion.
    target: "portable", operators of ONNX alone, in the form that is fastest wherever it was measured; "cuda", also fused operators of
        onnxruntime, each with a definition in ONNX operators for other runtimes.
    opset: of the file; None: 20, or 23 if the model calls scaled_dot_product_attention, which is one operator there, or is in bfloat16.
    dynamic: the dynamic axes: "batch" (True), "spatial" (also height and width, or the length; verified at other sizes than the
        example's), or "none" (False).
    half: weights, inputs and outputs in float16; else dtypes stay.
    external_data: the weights in a file beside it, `<path>.data`; None: only if one file cannot hold them.
    thorough: verify at every optimisation level of onnxruntime, and in onnx's own evaluator.

    Raises ExportError if no file can be made of the model, ParityError if the file computes something else. Neither leaves a file.
    """
    conversion = model if isinstance(model, Conversion) else None
    source: Model = conversion.module if conversion else model  # type: ignore[assignment]
    inputs: Inputs | None
    judgement = None
    if example_inputs is not None:
        inputs = given_to(source, example_inputs)
    else:
        if conversion is not None and conversion.drift is None:  # an approximate model is compared with itself
            judgement = conversion.judgement
        inputs = conversion.inputs if conversion else inputs_of(source, source)
    if inputs is None:
        raise UsageError("no example inputs that the model takes could be inferred", hint="give them: example_inputs=..., or --input")
    with atomic.file(Path(path)) as partial:
        result, compared = verified_export(
            source,
            inputs,
            partial,
            judgement=judgement,
            target=target,
            opset=opset,
            dynamic=dynamic,
            half=half,
            external_data=external_data,
            thorough=thorough,
        )
        try:
            if compared.failed is not None:
                raise_for(compared.failed)
        except ParityError as error:
            if half:
                noise = max((d.noise for d in error.parity.outputs), default=float("nan"))
                error.hint = f"torch's own model.half() is {noise:.1e} away there: if that is as much, write this model in float32"
            raise
    return dataclasses.replace(result, path=Path(path), parity=main_result(compared), comparisons=compared)
