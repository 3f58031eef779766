"""Comparisons as a JUnit file, which CI services read: a suite for each comparison, a case for each output and each layer."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass

from normswap.errors import shown
from normswap.parity.result import Difference, Parity
from normswap.report.parity import failure_text, properties
from normswap.report.words import ROOT, figure


@dataclass(frozen=True)
class Compared:
    """One comparison, made or not.

    parity  the measurement; None if there is none, and then `not_run` or `error` says why
    """

    reference: str
    candidate: str
    parity: Parity | None = None
    not_run: str | None = None
    error: str | None = None
    seconds: float = 0.0


def junit(comparisons: Sequence[Compared]) -> str:
    """The text of a JUnit file."""
    root = ET.Element("testsuites")
    for compared in comparisons:
        _suite(root, compared)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _suite(root: ET.Element, compared: Compared) -> None:
    parity = compared.parity
    name = f"{compared.candidate} against {compared.reference}"
    suite = ET.SubElement(root, "testsuite", name=shown(name, line=True), time=f"{compared.seconds:.3f}")
    if parity is None:
        case = _case(suite, "comparison", "normswap")
        kind = "skipped" if compared.error is None else "error"
        said = compared.error or compared.not_run or ""
        ET.SubElement(case, kind, message=shown(said.partition("\n")[0], line=True)).text = shown(said)
    else:
        listed = ET.SubElement(suite, "properties")
        for key, value in properties(parity).items():
            ET.SubElement(listed, "property", name=f"normswap_{key}", value=value)
        text = failure_text(compared.reference, compared.candidate, parity)
        if parity.failure is not None or not parity.outputs:
            case = _case(suite, "comparison", parity.candidate)
            ET.SubElement(case, "failure", message=shown(parity.failure or "nothing was compared", line=True)).text = text
        for kind, rows in (("layer", parity.sites), ("output", parity.outputs)):
            for d in rows:
                case = _case(suite, f"{kind} {shown(d.name or ROOT, line=True)}", parity.candidate)
                if not d.passed:
                    ET.SubElement(case, "failure", message=_message(d)).text = text
    cases = suite.findall("testcase")
    counts = {"tests": len(cases)} | {f"{tag}s": len(suite.findall(f"testcase/{tag}")) for tag in ("failure", "error")}
    for key, count in (*counts.items(), ("skipped", len(suite.findall("testcase/skipped")))):
        suite.set(key, str(count))


def _case(suite: ET.Element, name: str, of: str) -> ET.Element:
    return ET.SubElement(suite, "testcase", name=name, classname=shown(of, line=True), time="0")


def _message(d: Difference) -> str:
    measured = d.problem or f"error {figure(d.max_rel)}, {figure(d.tolerance)} is allowed"
    return shown(f"{measured}, at the probe {d.probe}", line=True)
