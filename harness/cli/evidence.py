"""The commands ``q4kd evidence verify``, ``sign``, ``pack``, ``report``, ``diff`` and ``index``."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from q4kd.harness.cli.help import Commands, add_path
from q4kd.trainer.errors import InputError, for_terminal

# A damaged bundle may have thousands of problems; a screen of them says as much.
_SHOWN = 50


def add_commands(subparsers: Commands) -> None:
    """Add ``evidence`` and its six commands to the command line."""
    evidence = subparsers.add_parser("evidence", help="verify, sign, pack, show and compare evidence bundles")
    commands = evidence.add_subparsers(dest="command", required=True, metavar="COMMAND")
    verify = commands.add_parser(
        "verify",
        help="draw every verdict again from the raw files",
        description="Exit 0: consistent; 1: something does not match; 2: cannot be verified by this version.",
    )
    add_path(verify, "bundle", "BUNDLE", "bundle folder or archive")
    add_path(verify, "--contracts", "DIR", "the contracts it should have been judged by")
    verify.add_argument(
        "--public-key",
        type=Path,
        action="append",
        default=[],
        metavar="K",
        help="Ed25519 key that must have signed it, PEM or OpenSSH; repeat it for several",
    )
    verify.set_defaults(run=_verify)
    sign = commands.add_parser(
        "sign",
        help="sign a bundle that verifies",
        description="Writes a DSSE envelope over the manifest, so over every file. A key: `openssl genpkey -algorithm "
        "ed25519 -out key.pem; openssl pkey -in key.pem -pubout -out key.pub`, or `ssh-keygen -t ed25519`.",
    )
    add_path(sign, "bundle", "BUNDLE", "bundle folder or archive, signed in place")
    sign.add_argument(
        "--key", type=Path, required=True, metavar="KEY.pem", help="Ed25519 private key without a passphrase"
    )
    sign.set_defaults(run=_sign)
    pack = commands.add_parser(
        "pack",
        help="write a bundle as one file",
        description="The same bundle always gives the same bytes. A signature is kept.",
    )
    add_path(pack, "bundle", "BUNDLE", "bundle folder or archive")
    add_path(pack, "--out", "FILE", "archive to write, .tar.xz or .tar.gz (default: BUNDLE.tar.xz beside it)")
    pack.set_defaults(run=_pack)
    report = commands.add_parser("report", help="render a bundle's report from its raw files")
    add_path(report, "bundle", "BUNDLE", "bundle folder or archive")
    report.add_argument(
        "--format", choices=("html", "md"), default="html", help="a page, or Markdown for a pull request's comment"
    )
    add_path(report, "--out", "FILE", "where to write it (default: BUNDLE-report.html; Markdown is printed)")
    report.set_defaults(run=_report)
    diff = commands.add_parser(
        "diff",
        help="verdicts that flipped, measurements that moved, bounds that were loosened",
        description="Exit 1 when B is worse than A: a verdict got worse, a claim was lost, or a bound was loosened.",
    )
    add_path(diff, "old", "A", "bundle folder or archive")
    add_path(diff, "new", "B", "bundle folder or archive")
    diff.set_defaults(run=_diff)
    index = commands.add_parser(
        "index",
        help="write a static site over the bundles in a folder",
        description="One page for each profile with trends, verdict history and loosened bounds; a report for each "
        "bundle. The exit code says whether the site was written.",
    )
    add_path(index, "folder", "DIR", "folder of bundles: folders or archives")
    add_path(index, "--out", "SITE", "folder to write it to (default: DIR)")
    index.set_defaults(run=_index)


def _verify(args: argparse.Namespace) -> int:
    from q4kd.harness.bundle.verify import verify_bundle
    from q4kd.harness.cli.contracts import console

    out = console()
    result = verify_bundle(args.bundle, args.contracts, args.public_key)
    if result.headline:
        out.print(f"the bundle says: {result.headline}")
    for problem in result.problems[:_SHOWN]:
        out.print(f"{result.status}: {problem}", style="red")
    if len(result.problems) > _SHOWN:
        out.print(f"{result.status}: {len(result.problems) - _SHOWN} more problems", style="red")
    if result.status == "consistent":
        out.print(f"verified: {result.recomputed} verdicts recomputed from raw files, all as recorded", style="green")
        for name in result.signed_by:
            out.print(f"signed by {name}: it covers every file", style="green")
        for caveat in result.caveats:
            out.print(f"note: {caveat}")
    out.print(result.status, style="bold")
    return result.exit_code


def _sign(args: argparse.Namespace) -> int:
    from q4kd.harness.bundle.signing import sign_bundle

    print(f"{for_terminal(args.bundle)}: signed by {sign_bundle(args.bundle, args.key)}")
    return 0


def _pack(args: argparse.Namespace) -> int:
    from q4kd.harness.bundle.writer import MANIFEST, pack

    if args.bundle.is_dir() and not (args.bundle / MANIFEST).is_file():
        remedy = "name the folder that `q4kd falsify` finished"
        raise InputError(str(args.bundle), expected="a sealed bundle", got=f"no {MANIFEST}", remedy=remedy)
    target = pack(args.bundle.resolve(), args.out)
    print(f"{for_terminal(target)}: {target.stat().st_size:,} bytes")
    return 0


def _report(args: argparse.Namespace) -> int:
    from q4kd.harness.records.packing import stem_of
    from q4kd.harness.records.store import open_store
    from q4kd.trainer.files import write_atomic

    store, bundle = open_store(args.bundle), args.bundle.resolve()
    # Beside the bundle, not inside it: the bundle is sealed.
    target = args.out or bundle.parent / f"{stem_of(bundle)}-report.html"
    if not target.parent.is_dir():
        remedy = "create it or choose another --out"
        raise InputError(str(target), expected="an existing folder", got="none", remedy=remedy)
    if args.format == "md":
        from q4kd.harness.report.markdown import render_markdown

        text = render_markdown(store)
        if args.out is None:
            print(text, end="")
            return 0
    else:
        from q4kd.harness.report.html import render

        raw = os.path.relpath(bundle, target.resolve().parent) + "/" if bundle.is_dir() else None
        text = render(store, raw)
    write_atomic(target, text.encode())
    print(for_terminal(target))
    return 0


def _diff(args: argparse.Namespace) -> int:
    from rich.table import Table

    from q4kd.harness.bundle.diff import compare_bundles
    from q4kd.harness.cli.contracts import console
    from q4kd.harness.records.store import open_store
    from q4kd.trainer.yaml_lines import printable

    out = console()
    diff = compare_bundles(open_store(args.old), open_store(args.new))
    for side, headline in zip("AB", diff.headlines, strict=True):
        out.print(f"{side}: {printable(headline, 300)}")

    def show(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
        if rows:
            table = Table(*columns, box=None, pad_edge=False)
            for row in rows:
                table.add_row(*(printable(cell, 200) for cell in row))
            out.print(f"\n{title}", style="bold")
            out.print(table)

    flips = [(flip.key, flip.old, flip.new, "worse" if flip.worse else "") for flip in diff.flips]
    show("verdicts", ("claim", "A", "B", ""), flips)
    moved = [(row.key, row.check, row.old, row.new, row.relative) for row in diff.moved]
    show("measurements", ("claim", "check", "A", "B", "change"), moved)
    show("contracts", ("change", "claim", "what"), [(item.kind, item.key, item.text) for item in diff.bounds])
    show("environment", ("A → B",), [(line,) for line in diff.environment])
    if not flips and not moved:
        out.print("no verdict flipped and nothing measured moved")
    out.print("B is worse than A" if diff.worse else "B is not worse than A", style="bold")
    return 1 if diff.worse else 0


def _index(args: argparse.Namespace) -> int:
    from q4kd.harness.report.site import write_site

    if not args.folder.is_dir():
        remedy = "name the folder they lie in"
        raise InputError(str(args.folder), expected="a folder of bundles", got="no such folder", remedy=remedy)
    site = args.out or args.folder
    count, unreadable = write_site(args.folder, site)
    left_out = f", {unreadable} unreadable" if unreadable else ""
    print(f"{for_terminal(site / 'index.html')}: {count} bundles{left_out}")
    return 0
