"""The commands ``q4kd evidence verify``, ``report``, ``diff`` and ``index``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from q4kd.trainer.errors import InputError

if TYPE_CHECKING:
    from q4kd.harness.raw import Store


def add_commands(subparsers: Any) -> None:
    """Add ``evidence`` and its four commands to the command line."""
    evidence = subparsers.add_parser("evidence", help="verify, show and compare evidence bundles")
    commands = evidence.add_subparsers(dest="command", required=True, metavar="COMMAND")
    verify = commands.add_parser(
        "verify",
        help="draw every verdict again from the raw files",
        description="Exit 0: consistent; 1: something does not match; 2: cannot be verified by this version.",
    )
    verify.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle folder or .tar.gz")
    verify.add_argument("--contracts", type=Path, metavar="DIR", help="the contracts it should have been judged by")
    verify.add_argument("--public-key", type=Path, metavar="K", help="the key its statement should be signed with")
    verify.set_defaults(run=_verify)
    report = commands.add_parser("report", help="render a bundle's report from its raw files")
    report.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle folder or .tar.gz")
    report.add_argument("--out", type=Path, metavar="FILE", help="where to write it (default: BUNDLE-report.html)")
    report.set_defaults(run=_report)
    diff = commands.add_parser(
        "diff",
        help="verdicts that flipped, measurements that moved, bounds that were loosened",
        description="Exit 1 when B is worse than A: a lost corroboration, a lost claim, or a loosened bound.",
    )
    diff.add_argument("old", type=Path, metavar="A", help="bundle folder or .tar.gz")
    diff.add_argument("new", type=Path, metavar="B", help="bundle folder or .tar.gz")
    diff.set_defaults(run=_diff)
    index = commands.add_parser("index", help="write an HTML table of the bundles in a folder")
    index.add_argument("folder", type=Path, metavar="DIR", help="folder of bundles")
    index.add_argument("--out", type=Path, metavar="FILE", help="where to write it (default: DIR/index.html)")
    index.set_defaults(run=_index)


def _verify(args: argparse.Namespace) -> int:
    from q4kd.harness.commands_contracts import console
    from q4kd.harness.verify import verify_bundle

    out = console()
    result = verify_bundle(args.bundle, args.contracts, args.public_key)
    if result.headline:
        out.print(f"the bundle says: {result.headline}")
    for problem in result.problems:
        out.print(f"{result.status}: {problem}", style="red")
    if result.status == "consistent":
        out.print(f"verified: {result.recomputed} verdicts recomputed from raw files, all as recorded", style="green")
    for caveat in result.caveats:
        if result.status == "consistent":
            out.print(f"note: {caveat}")
    out.print(result.status, style="bold")
    return result.exit_code


def _report(args: argparse.Namespace) -> int:
    from q4kd.harness.raw import open_store
    from q4kd.harness.report import render
    from q4kd.trainer.files import write_atomic

    page = render(open_store(args.bundle))
    stem = args.bundle.resolve().name.removesuffix(".tar.gz").removesuffix(".tgz")
    # Beside the bundle, not inside it: the bundle is sealed.
    target = args.out or args.bundle.resolve().parent / f"{stem}-report.html"
    if not target.parent.is_dir():
        raise InputError(
            str(target), expected="an existing folder", got="none", remedy="create it or choose another --out"
        )
    write_atomic(target, page.encode())
    print(target)
    return 0


def _read_findings(store: "Store") -> dict[str, Any]:
    from q4kd.harness.findings import parse_findings

    return parse_findings(store.read("findings.json"), "findings.json")


def _diff(args: argparse.Namespace) -> int:
    from rich.table import Table

    from q4kd.harness.commands_contracts import console
    from q4kd.harness.findings import headline
    from q4kd.harness.loosening import contract_changes
    from q4kd.harness.raw import open_store
    from q4kd.harness.verify import bundle_contracts
    from q4kd.harness.yaml_lines import printable

    stores = open_store(args.old), open_store(args.new)
    old, new = (_read_findings(store) for store in stores)
    out = console()
    out.print(f"A: {headline(old)}")
    out.print(f"B: {headline(new)}")
    rows, worse = compare_findings(old, new)
    if rows:
        table = Table("claim", "A", "B", "measured A", "measured B", box=None, pad_edge=False)
        for row in rows:
            table.add_row(*(printable(cell, 200) for cell in row))
        out.print(table)
    else:
        out.print("no verdict flipped and nothing measured moved")
    changes = contract_changes(bundle_contracts(stores[0]), bundle_contracts(stores[1]))
    for change in changes:
        out.print(f"{change.kind:<9}  {change.key}  {printable(change.text, 400)}")
    return 1 if worse or any(change.kind == "loosened" for change in changes) else 0


def compare_findings(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[tuple[str, str, str, str, str]], bool]:
    """Return the claims whose verdict or measurement differs, and whether a corroboration or a claim was lost."""
    before = {row["key"]: row for row in old["findings"]}
    after = {row["key"]: row for row in new["findings"]}
    rows: list[tuple[str, str, str, str, str]] = []
    worse = False
    for key in dict.fromkeys([*before, *after]):
        a, b = before.get(key), after.get(key)
        cells = (_verdict(a), _verdict(b), _measured(a), _measured(b))
        if cells[0] != cells[1] or cells[2] != cells[3]:
            rows.append((key, *cells))
        if a is not None and (b is None or (a["verdict"] == "corroborated" != b["verdict"])):
            worse = True
    return rows, worse


def _verdict(row: dict[str, Any] | None) -> str:
    if row is None:
        return "absent"
    return f"{row['verdict']}({row['reason']})" if row["reason"] else str(row["verdict"])


def _measured(row: dict[str, Any] | None) -> str:
    return "; ".join(str(check["measured"]) for check in row["checks"] if check["measured"]) if row else ""


def _index(args: argparse.Namespace) -> int:
    from q4kd.harness.report import render_index
    from q4kd.trainer.files import write_atomic

    if not args.folder.is_dir():
        raise InputError(str(args.folder), expected="a folder of bundles", got="none", remedy="check the path")
    page, count = render_index(args.folder)
    if count == 0:
        raise InputError(
            str(args.folder), expected="at least one bundle", got="none", remedy="name a folder that holds bundles"
        )
    target = args.out or args.folder / "index.html"
    write_atomic(target, page.encode())
    print(f"{target}: {count} bundles")
    return 0
