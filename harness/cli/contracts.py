"""The commands ``q4kd contracts validate``, ``show`` and ``diff``."""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from q4kd.harness.cli.help import Commands, add_contracts, add_path
from q4kd.trainer.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from q4kd.harness.claims.model import Claim, Contract
    from q4kd.harness.claims.profile import Profile

_STYLE = {"loosened": "bold red", "tightened": "green", "changed": "yellow", "added": "cyan"}
_LONG = 4000
_MAX_WARNINGS = 20


def add_commands(subparsers: Commands) -> None:
    """Add ``contracts`` and its three commands to the command line."""
    contracts = subparsers.add_parser("contracts", help="validate, show and compare contracts")
    commands = contracts.add_subparsers(dest="command", required=True, metavar="COMMAND")
    validate = commands.add_parser(
        "validate",
        help="load contracts, look up their names, check that their times are possible; print counts",
        description="Folders are looked through in depth, and what is skipped is named. Exit 0 only if every file "
        "loads, every check, experiment and fault it names exists, and no active claim promises a time below what its "
        "machine was measured to need; 2 otherwise, or without a claim.",
    )
    validate.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="contract files, or folders of them")
    validate.set_defaults(run=_validate)
    show = commands.add_parser("show", help="print a contract's claims, or those of one claim id")
    show.add_argument("name", metavar="NAME", help="a contract's name, or contract::id")
    add_contracts(show)
    show.set_defaults(run=_show)
    diff = commands.add_parser(
        "diff",
        help="name every claim added or removed and every bound that moved",
        description="Exit 1 when anything was loosened: a bound, a check, a fault, the scope, or a claim removed.",
    )
    add_path(diff, "old", "OLD", "contract file or folder")
    add_path(diff, "new", "NEW", "contract file or folder")
    diff.set_defaults(run=_diff)
    schema = commands.add_parser(
        "schema", help="print the JSON Schema for editors, with the checks, experiments and faults registered here"
    )
    add_path(schema, "--out", "FILE", "write it there instead, whole or not at all")
    schema.set_defaults(run=_schema)


def console() -> "Console":
    """Return a console that wraps nothing and colours nothing when its output is not a terminal."""
    from rich.console import Console

    terminal = sys.stdout.isatty()
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=not terminal, width=None if terminal else 200)


def load_paths(paths: list[Path]) -> "list[Contract]":
    """Load contract files and folders of them; claims must be unique over the whole set (InputError)."""
    from q4kd.harness.claims.contract import check_identities, load_contract
    from q4kd.harness.claims.folder import known_profiles

    files, _ = _files(paths)
    return check_identities([load_contract(file, profiles=known_profiles(root)) for file, root in files.items()])


def _files(paths: list[Path]) -> tuple[dict[Path, Path], list[str]]:
    """Return each file once with the folder whose profiles it may name, and what is skipped in the folders given."""
    from q4kd.harness.claims.folder import find_contracts

    files: dict[Path, Path] = {}
    skipped: list[str] = []
    for path in paths:
        if not path.is_dir():
            files.setdefault(path, path.parent)
            continue
        found = find_contracts(path)
        skipped += [f"{path}: {line}" for line in found.skipped]
        for file in found.files:
            files.setdefault(file, path)
    return files, skipped


def _validate(args: argparse.Namespace) -> int:
    from q4kd.harness.claims.contract import check_identities, load_contract
    from q4kd.harness.claims.folder import known_profiles
    from q4kd.harness.claims.profile import load_profiles
    from q4kd.harness.claims.rules import registered_names
    from q4kd.trainer.yaml_lines import printable

    out = console()
    names = registered_names()
    files, skipped = _files(args.paths)
    for line in skipped:
        out.print(f"skipped: {printable(line, 300)}", style="yellow")
    folders = {root: known_profiles(root) for root in files.values()}
    contracts: dict[Path, list[Contract]] = {folder: [] for folder in folders}
    failed = infeasible = 0
    for file, root in files.items():
        try:
            contracts[root].append(load_contract(file, names, folders[root]))
        except InputError as error:  # every broken file is named, not only the first
            failed += 1
            _complain(error)
    for folder, loaded in contracts.items():
        check_identities(loaded)  # by folder: that is what is judged together
        profiles = load_profiles(folder)
        for contract in loaded:
            for warning in contract.warnings[:_MAX_WARNINGS]:
                out.print(f"warning: {contract.path}: {warning}", style="yellow")
            if len(contract.warnings) > _MAX_WARNINGS:
                out.print(f"warning: {contract.path}: {len(contract.warnings) - _MAX_WARNINGS} more", style="yellow")
            infeasible += _audit(out, contract, profiles)
    shown = [contract for loaded in contracts.values() for contract in loaded]
    claims = [claim for contract in shown for claim in contract.claims]
    out.print(_counts(shown, claims, failed, infeasible))
    if failed or infeasible:
        return 2
    if not claims:
        paths = ", ".join(map(str, args.paths))
        remedy = "write entries under falsification_tests; a set without claims would pass everything"
        raise InputError(paths, expected="at least one claim", got="none", remedy=remedy)
    return 0


def _complain(error: InputError) -> None:
    from q4kd.trainer.yaml_lines import printable

    print(f"q4kd: {printable(str(error), 1000)}", file=sys.stderr)


def _audit(out: "Console", contract: "Contract", profiles: "list[Profile]") -> int:
    """Report the claims whose time no code can keep, or whose time nothing measured speaks for; count the former."""
    from q4kd.harness.claims.feasibility import assess

    infeasible = 0
    for claim in contract.claims:
        for found in (found for profile in profiles for found in assess(claim, profile)):
            where = f"{contract.path}:{claim.line}: {claim.id} on {found.profile}"
            if found.outcome == "infeasible" and contract.status == "active":
                infeasible += 1
                expected = "a time that this machine's measured rooflines allow"
                remedy = "restate the bound from the roofline, or demote the contract"
                got = f"an infeasible one: {found.arithmetic}"
                _complain(InputError(where, expected=expected, got=got, remedy=remedy))
            elif found.outcome != "feasible":
                out.print(f"warning: {where}: feasibility {found.outcome}: {found.arithmetic}", style="yellow")
    return infeasible


def _counts(contracts: "list[Contract]", claims: "list[Claim]", failed: int, infeasible: int) -> str:
    from q4kd.harness.report.verdict import counted

    executable = sum(claim.falsifier is not None for claim in claims)
    statuses = Counter(contract.status for contract in contracts)
    shown = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items())) or "none"
    kinds = f"{executable} executable, {len(claims) - executable} prose; {failed} failed to load"
    said = f"{counted(len(contracts), 'contract')} ({shown}), {counted(len(claims), 'claim')}: {kinds}"
    return f"{said}; {infeasible} infeasible" if infeasible else said


def _show(args: argparse.Namespace) -> int:
    from q4kd.harness.claims.contract import load_contracts
    from q4kd.harness.claims.folder import default_contracts_folder, skipped_lines
    from q4kd.harness.claims.profile import load_profiles
    from q4kd.trainer.yaml_lines import printable

    folder = args.contracts or default_contracts_folder()
    contracts = load_contracts(folder)
    for line in skipped_lines(folder):
        print(line, file=sys.stderr)
    name, _, claim_id = args.name.partition("::")
    contract = next((found for found in contracts if found.name == name), None)
    claims = [claim for claim in contract.claims if not claim_id or claim.id == claim_id] if contract else []
    if contract is None or (claim_id and not claims):
        known = [claim.key for claim in contract.claims] if contract else [found.name for found in contracts]
        expected, remedy = f"one of {', '.join(known)}", "name one of them"
        raise InputError(args.name, expected=expected, got="no such contract or claim", remedy=remedy)
    out = console()
    superseded = f", superseded by {contract.superseded_by}" if contract.superseded_by else ""
    # What a file says may hold control characters, which must not reach a terminal.
    out.print(f"{contract.name} ({contract.status}{printable(superseded)})", style="bold")
    if contract.description:
        out.print(printable(contract.description, _LONG))
    profiles = load_profiles(args.contracts)
    for claim in claims:
        _show_claim(out, contract.path, claim, profiles)
    return 0


def _show_claim(out: "Console", path: str, claim: "Claim", profiles: "list[Profile]") -> None:
    import json

    from q4kd.harness.claims.feasibility import assess
    from q4kd.trainer.yaml_lines import printable

    out.print()
    out.print(f"{claim.id}  {printable(claim.rule, _LONG)}", style="bold")
    out.print(f"  prediction: {printable(claim.prediction, _LONG)}")
    out.print(f"  if it fails: {printable(claim.if_fails, _LONG)}")
    if claim.falsifier is None:
        out.print("  no falsifier: judged inconclusive(prose)")
    else:
        falsifier = claim.falsifier
        out.print(f"  experiment: {falsifier.experiment}")
        for use in falsifier.checks:
            out.print(f"  check: {use.check} {json.dumps(use.params, sort_keys=True)}")
        for profile in sorted(falsifier.profiles):
            out.print(f"  on {profile}: {json.dumps(falsifier.profiles[profile], sort_keys=True)}")
        out.print(f"  needs: {', '.join(falsifier.needs) or 'any machine'}")
        out.print(f"  at least {falsifier.min_observations} observations, timeout {falsifier.timeout_s or 'default'}")
        out.print(f"  sabotage to catch: {', '.join(falsifier.sabotage) or 'none'}")
        for found in (found for profile in profiles for found in assess(claim, profile)):
            out.print(f"  {found.outcome} on {found.profile}: {found.arithmetic}")
    out.print(f"  {path}:{claim.line}", style="dim")


def _diff(args: argparse.Namespace) -> int:
    from q4kd.harness.claims.changes import contract_changes, profile_changes
    from q4kd.harness.claims.profile import load_profiles
    from q4kd.trainer.yaml_lines import printable

    folders = [path if path.is_dir() else path.parent for path in (args.old, args.new)]
    changes = contract_changes(load_paths([args.old]), load_paths([args.new]))
    changes += profile_changes(*map(load_profiles, folders))
    out = console()
    for change in changes:
        out.print(f"{change.kind:<9}  {change.key}  {printable(change.text, 1000)}", style=_STYLE[change.kind])
    counts: Counter[str] = Counter(change.kind for change in changes)
    out.print(", ".join(f"{counts[kind]} {kind}" for kind in _STYLE if counts[kind]) or "no differences")
    return 1 if counts["loosened"] else 0


def _schema(args: argparse.Namespace) -> int:
    from q4kd.harness.claims.schema import render_schema
    from q4kd.trainer.files import write_atomic

    if args.out is None:
        print(render_schema(), end="")
    else:
        write_atomic(args.out, render_schema().encode())
    return 0
