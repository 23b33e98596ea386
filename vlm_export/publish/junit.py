"""A report as JUnit's XML, which continuous integration shows: a test case for each dtype, runtime and metric."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from xml.etree import ElementTree

from vlm_export.atomic import write_text
from vlm_export.verify.report import Check, Report

_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_LINES = 20  # failed checks that a test case lists


def write_junit(path: Path, report: Report, failing: Collection[str]) -> None:
    """Write the report as XML; checks of a verdict that is among the `failing` fail their test case."""
    groups: dict[tuple[str, str, str], list[Check]] = {}
    for check in report.checks:
        groups.setdefault((check.dtype, check.runtime, check.metric), []).append(check)
    suite = ElementTree.Element("testsuite", name=f"vlm-export verify {report.recipe}", tests=str(len(groups)))
    failed = 0
    for (dtype, runtime, metric), checks in groups.items():
        case = ElementTree.SubElement(suite, "testcase", classname=f"{report.recipe}.{dtype}.{runtime}", name=metric)
        found = [check for check in checks if check.verdict in failing]
        if found:
            failed += 1
            _add_failure(case, found, len(checks))
    suite.attrib |= {"failures": str(failed), "errors": "0", "skipped": "0"}
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    write_text(path, ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n")


def _add_failure(case: ElementTree.Element, found: Sequence[Check], count: int) -> None:
    failure = ElementTree.SubElement(case, "failure", message=f"{len(found)} of {count} checks", type=found[0].verdict)
    lines = [_line(check) for check in found[:_LINES]]
    if len(found) > _LINES:
        lines.append(f"and {len(found) - _LINES} more")
    failure.text = _NO_XML.sub("\ufffd", "\n".join(lines))


def _line(check: Check) -> str:
    limit = "" if check.limit is None else f" (limit {check.limit:g})"
    return f"{check.component}: {check.value:.3g}{limit}" + (f": {check.detail}" if check.detail else "")
