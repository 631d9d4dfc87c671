"""The findings in other tools' formats: JUnit XML, CTRF, and an in-toto test-result statement.

None of the three knows "inconclusive". It is an error in JUnit, ``other`` in CTRF and a failed test in in-toto: never
something that a reader could take for a pass or a skip.
"""

import hashlib
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from q4kd.harness.bundle.findings import read_findings
from q4kd.harness.judging.results import Findings
from q4kd.harness.records.json_types import JsonObject, JsonRecord
from q4kd.harness.records.store import Store, read_object
from q4kd.trainer.files import write_atomic, write_json

_STATUS = {"corroborated": "passed", "falsified": "failed", "inconclusive": "other"}
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_interchange(folder: Path, store: Store) -> None:
    """Write ``junit.xml``, ``ctrf.json`` and ``statement.intoto.json`` beside a bundle's findings."""
    findings = read_findings(store)
    write_atomic(folder / "junit.xml", junit(findings))
    write_json(folder / "ctrf.json", ctrf(findings, read_object(store, "environment.json")))
    write_json(folder / "statement.intoto.json", statement_of(store, findings))


def statement_of(store: Store, findings: Findings) -> JsonRecord:
    """Return the statement about a bundle's findings (see ``intoto_statement``)."""
    environment, inputs = (read_object(store, name) for name in ("environment.json", "inputs.json"))
    return intoto_statement(findings, environment, inputs, digest_of(store, "findings.json"))


def signed_statement(statement: JsonRecord, manifest: bytes) -> JsonObject:
    """Return a bundle's statement as it is signed: its manifest, and so every file of it, is the first subject."""
    subject = {"name": "MANIFEST.sha256", "digest": {"sha256": hashlib.sha256(manifest).hexdigest()}}
    return {**statement, "subject": [subject, *statement["subject"]]}


def digest_of(store: Store, name: str) -> str:
    """Return the SHA-256 of one file of a store."""
    return hashlib.sha256(store.read(name)).hexdigest()


def junit(findings: Findings) -> bytes:
    """Return JUnit XML: falsified is a failure, inconclusive an error, claims out of scope are not emitted."""
    rows = findings.rows
    root = ElementTree.Element("testsuites", {"name": "q4kd"})
    for contract in dict.fromkeys(row.contract for row in rows):
        cases = [row for row in rows if row.contract == contract]
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            {
                "name": _xml(contract),
                "tests": str(len(cases)),
                "failures": str(sum(row.verdict == "falsified" for row in cases)),
                "errors": str(sum(row.verdict == "inconclusive" for row in cases)),
                "skipped": "0",
                "time": f"{math.fsum(row.seconds or 0.0 for row in cases):.3f}",
                "timestamp": findings.created,
            },
        )
        for row in cases:
            case = ElementTree.SubElement(
                suite,
                "testcase",
                {"classname": _xml(contract), "name": _xml(row.id), "time": f"{row.seconds or 0.0:.3f}"},
            )
            if row.verdict != "corroborated":
                kind = "failure" if row.verdict == "falsified" else "error"
                text = _xml(row.message)
                problem = ElementTree.SubElement(case, kind, {"type": row.verdict, "message": text})
                problem.text = _xml(f"{row.prediction}\n{text}\nif it fails: {row.if_fails}")
    ElementTree.indent(root)
    document: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return document + b"\n"


def _xml(text: object) -> str:
    return _NOT_XML.sub("?", str(text))


def ctrf(findings: Findings, environment: JsonRecord) -> JsonObject:
    """Return a CTRF 1.0.0 report. Our own data is in ``extra`` only."""
    rows = findings.rows
    stop = int(datetime.fromisoformat(findings.created).timestamp() * 1000)
    took = int(math.fsum(row.seconds or 0.0 for row in rows) * 1000)  # sum() of floats differs between Pythons
    counts = {status: sum(_STATUS[row.verdict] == status for row in rows) for status in _STATUS.values()}
    return {
        "reportFormat": "CTRF",
        "specVersion": "1.0.0",
        "timestamp": findings.created,
        "generatedBy": "q4kd",
        "results": {
            "tool": {"name": "q4kd", "version": str(environment.get("packages", {}).get("q4kd", "unknown"))},
            "summary": {
                "tests": len(rows),
                **counts,
                "skipped": 0,
                "pending": 0,
                "start": stop - took,
                "stop": stop,
                "duration": took,
                "extra": {"exit_code": findings.exit_code, **findings.summary},
            },
            "tests": [
                {
                    "name": row.key,
                    "status": _STATUS[row.verdict],
                    "rawStatus": row.stated,
                    "duration": int((row.seconds or 0.0) * 1000),
                    "suite": [row.contract],
                    "message": row.message,
                    "extra": {
                        "scope": row.scope,
                        "prediction": row.prediction,
                        "sabotage": [kill.to_json() for kill in row.sabotage],
                    },
                }
                for row in rows
            ],
            "environment": {
                "commit": str(environment.get("commit")),
                "testEnvironment": findings.profile,
                "osPlatform": str(environment.get("platform", {}).get("system", "unknown")).lower(),
            },
        },
    }


def intoto_statement(
    findings: Findings, environment: JsonRecord, inputs: JsonRecord, findings_sha256: str
) -> JsonRecord:
    """Return an in-toto Statement v1 with a test-result v0.1 predicate.

    Its subjects are the findings, the inputs by digest and, when the checkout was clean, the commit. The manifest
    cannot be one: it covers this file. An inconclusive claim is among the failed tests, since a policy may accept a
    warned test ("passed with warnings"); the findings say which of them it is. Only a waived one is a warned test.
    """
    subjects = [{"name": "findings.json", "digest": {"sha256": findings_sha256}}]
    subjects += [
        {"name": str(name), "digest": {"sha256": entry["sha256"]}}
        for name, entry in sorted(inputs.items())
        if isinstance(entry, Mapping) and "sha256" in entry
    ]
    if environment.get("commit") and environment.get("dirty") is False:
        subjects.append({"name": "q4kd", "digest": {"gitCommit": environment["commit"]}})
    required = [row for row in findings.rows if row.required]

    passed = [row.key for row in required if row.verdict == "corroborated"]
    waived = [row.key for row in required if row.waiver is not None]
    good = "WARNED" if waived else "PASSED"
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": subjects,
        "predicateType": "https://in-toto.io/attestation/test-result/v0.1",
        "predicate": {
            "result": good if findings.exit_code == 0 else "FAILED",
            "configuration": [{"name": f"profile {findings.profile}"}],
            "passedTests": passed,
            "warnedTests": waived,
            "failedTests": [row.key for row in required if row.key not in {*passed, *waived}],
        },
    }
