"""The command ``q4kd nightly``."""

import argparse
from pathlib import Path

from q4kd.harness.cli.help import Commands, add_contracts, add_path, add_profile

UNITS = ("service", "timer")
_GB = 10**9


def add_commands(subparsers: Commands) -> None:
    """Add ``nightly`` to the command line."""
    nightly = subparsers.add_parser(
        "nightly",
        help="all of it in one resumable run, for a timer",
        description="Preflight, sabotage, falsify, bundle, verify, index, each a process of its own. A night that a "
        "crash or a reboot cut off goes on where it stopped. The exit code is that of falsify; 2 when the preflight "
        "finds something missing, or another night is running.",
    )
    nightly.add_argument("--out", type=Path, default=Path("nightly"), metavar="DIR", help="results (default: nightly)")
    add_profile(nightly)
    add_contracts(nightly)
    nightly.add_argument(
        "--sabotage",
        choices=("all", "changed", "none"),
        default="all",
        help="faults planted: all, those without a valid kill record, or none (default: all)",
    )
    nightly.add_argument("--keep", type=_positive, default=30, metavar="N", help="bundles kept (default: 30)")
    nightly.add_argument(
        "--max-gb", type=_positive, default=5, metavar="GB", help="10^9 bytes of bundles kept (default: 5)"
    )
    add_path(nightly, "--sign", "KEY.pem", "sign the bundle with this Ed25519 private key")
    nightly.add_argument("--again", action="store_true", help="begin another night although today's is finished")
    nightly.add_argument("--preflight", action="store_true", help="only say what is missing; exit 1 if anything is")
    nightly.add_argument("--print-unit", choices=UNITS, help="print the systemd unit or its timer, and do nothing else")
    from q4kd.harness.cli.falsify import add_given

    add_given(nightly)
    nightly.set_defaults(run=_nightly)


def _positive(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text[:40]!r}")
    return value


def _nightly(args: argparse.Namespace) -> int:
    if args.print_unit:
        print(unit_text(args.print_unit), end="")
        return 0
    from q4kd.harness.claims.profile import detect_profile, load_profile
    from q4kd.harness.doctor import show
    from q4kd.harness.nightly.disk import Bounds, preflight
    from q4kd.harness.nightly.night import NightlyOptions, run_nightly
    from q4kd.harness.runs.user_inputs import resolve_given

    profile = args.profile or detect_profile()
    machine = load_profile(profile, args.contracts)
    given = resolve_given(args.teacher, args.student, args.data)
    if args.preflight:
        existing = next(path for path in (args.out, *args.out.resolve().parents) if path.exists())
        return show(preflight(machine, given, existing))
    options = NightlyOptions(
        out=args.out,
        profile=profile,
        contracts=args.contracts,
        given=given,
        faults=args.sabotage,
        bounds=Bounds(keep=args.keep, max_bytes=args.max_gb * _GB),
        sign=args.sign,
        again=args.again,
    )
    return run_nightly(options)


def unit_text(kind: str) -> str:
    """Return the shipped systemd ``service`` or ``timer``."""
    import importlib.resources

    deploy = importlib.resources.files("q4kd.harness.nightly") / "deploy"
    return (deploy / f"q4kd-nightly.{kind}").read_text(encoding="utf-8")
