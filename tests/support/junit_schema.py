"""Checks a JUnit file against junit.xsd, and that its counts are those of its cases."""

from __future__ import annotations

from pathlib import Path

from lxml import etree

SCHEMA = etree.XMLSchema(etree.parse(Path(__file__).with_name("junit.xsd")))


def cases_of(path: Path) -> dict[str, str]:
    """ "passed", "failure", "error" or "skipped" of each case, by name. Fails the test if the file is not valid."""
    document = etree.parse(path)
    assert SCHEMA.validate(document), SCHEMA.error_log
    found = {}
    for suite in document.iter("testsuite"):
        cases = suite.findall("testcase")
        assert int(suite.get("tests")) == len(cases)
        for key, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert int(suite.get(key)) == len(suite.findall(f"testcase/{tag}"))
        for case in cases:
            told = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
            found[f"{suite.get('name')}: {case.get('name')}"] = told[0] if told else "passed"
    return found
