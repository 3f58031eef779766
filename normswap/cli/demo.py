"""`normswap demo`: converts a trained network that travels with normswap, and says what was done."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from normswap.cli.options import Debug
from normswap.cli.terminal import Progress, say, work

if TYPE_CHECKING:
    from normswap.report.conversion import Report

OUTPUT = Path("normswap-demo")


def demo(
    *,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The directory to write.")] = OUTPUT,
    debug: Debug = False,
) -> None:
    """Try it on a network that comes along.

    Converts a trained network that reads handwritten digits, proves that the result is the same function, exports it to ONNX, tries all
    three on digits, and writes the report. Needs no network and no data.
    """
    with work(debug) as progress:
        text = demonstrated(output, progress)
    say(text)


def demonstrated(output: Path, progress: Progress = lambda stage, done, total: None) -> str:
    """Convert the network of `normswap.demo` into the directory `output`; returns what was done, as plain text.

    Raises ParityError if the result is not the same function; UsageError if `output` holds files that normswap did not write.
    """
    import time

    from normswap import demo
    from normswap.cli.convert import convert_to_directory

    report, directory = convert_to_directory(demo.SOURCE, output, progress=progress)
    progress("try digits", 0, None)
    answers = _answers(directory)
    return _text(report, directory, answers, time.process_time())


def _answers(directory: Path) -> dict[str, list[int]]:
    """The digit that the original, the converted model and its ONNX file each read in each test image."""
    import onnxruntime
    import torch

    import normswap
    from normswap import demo
    from normswap.cli.convert import ONNX

    images = demo.images().images
    model = normswap.load(directory, demo.build)
    assert isinstance(model, torch.nn.Module)
    session = onnxruntime.InferenceSession(directory / ONNX, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        logits = {
            "before": demo.digits()(images),
            "after": model.eval()(images),
            "onnxruntime": torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]),
        }
    return {name: values.argmax(1).tolist() for name, values in logits.items()}


def _text(report: Report, directory: Path, answers: dict[str, list[int]], seconds: float) -> str:
    from normswap import demo
    from normswap.cli.convert import ONNX, PAGE, REPORT
    from normswap.report.words import figure

    torch_parity, exported, labels = report.parities["torch"], report.onnx, demo.images().labels.tolist()
    assert exported is not None
    before, after, in_onnx = answers.values()
    right = [sum(a == b for a, b in zip(answer, labels, strict=True)) for answer in (before, after, in_onnx)]
    same = sum(a == b == c for a, b, c in zip(before, after, in_onnx, strict=True))
    left = len(exported.residue)
    where = f"{directory}{os.sep}"
    facts = [
        ("model", "a small network that reads handwritten digits, trained with BatchNorm"),
        ("swapped", f"{len(report.plan.swaps)} of {len(report.plan.swaps) + len(report.plan.skips)} BatchNorm layers"),
        ("proved", f"the same outputs: the largest error is {figure(torch_parity.max_rel)} of an output,"),
        ("", f"where the original itself rounds by {figure(torch_parity.noise)}"),
        ("exported", f"{ONNX}: {sum(exported.nodes.values())} operators, {left or 'none'} of them normalization,"),
        ("", "proved in onnxruntime to have the same outputs"),
        ("tried", f"{len(labels)} digits that it has not seen: the same answer for {same}; right are"),
        ("", f"{right[0]} before, {right[1]} after, {right[2]} in onnxruntime"),
        ("took", f"{seconds:.0f} s of processor time"),
    ]
    files = [
        (PAGE, "what was done, layer by layer: open it in a browser"),
        (REPORT, "the same for programs"),
        (ONNX, "the network without normalization"),
        ("recipe.json", "to load it: normswap.load(DIR, normswap.demo.build)"),
    ]
    own = [
        ("normswap inspect MODEL.pt", "what is in it, what would be swapped"),
        ("normswap convert MODEL.pt -o out", "swap, prove, export, report"),
        ("normswap verify MODEL.pt out", "measure again that both are the same"),
    ]
    return "\n".join(
        [
            *(f"{name:<9} {text}" for name, text in facts),
            *("", f"written to {where}"),
            *(f"  {name:<13} {text}" for name, text in files),
            *("", 'Next, with a model of your own, as torch.save(model, "MODEL.pt") writes it:'),
            *(f"  {command:<34} {text}" for command, text in own),
        ]
    )
