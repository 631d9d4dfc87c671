"""The commands ``q4kd falsify``, ``q4kd sabotage`` and ``q4kd doctor``."""

import argparse

from q4kd.harness.cli.help import Commands, add_contracts, add_path, add_profile


def add_commands(subparsers: Commands) -> None:
    """Add the three commands to the command line."""
    falsify = subparsers.add_parser(
        "falsify",
        help="try to refute every claim; leaves an evidence bundle",
        description="Exit 1: a required claim is falsified; else 2: one is inconclusive, or none ran; else 0.",
    )
    _shared(falsify)
    add_path(falsify, "--out", "DIR", "folder of the bundle (default: a new one in bundles/)")
    falsify.add_argument("-q", "--quiet", action="store_true", help="print no progress")
    add_path(falsify, "--sign", "KEY.pem", "sign the bundle with this Ed25519 private key (see evidence sign)")
    add_path(falsify, "--inputs", "DIR", "make inputs here and leave them (default: a folder removed later)")
    add_path(falsify, "--waivers", "FILE", "claims that may be inconclusive: claim, owner, reason, expires")
    falsify.add_argument(
        "--changed",
        nargs="?",
        const="",
        metavar="BASE",
        help="judge anew, on BASE's runs, what no change can have touched, and run the rest (default: the newest "
        "verified bundle in bundles/)",
    )
    falsify.set_defaults(run=_falsify)

    sabotage = subparsers.add_parser(
        "sabotage",
        help="plant every fault; which falsifiers catch it",
        description="The kill matrix: falsifier x planted fault. Exit 1 when a fault was missed, VOID or a misfire.",
    )
    _shared(sabotage)
    sabotage.add_argument("--changed", action="store_true", help="only faults without a valid kill record")
    add_path(sabotage, "--work", "DIR", "keep the runs here (default: a folder removed later)")
    sabotage.set_defaults(run=_sabotage)

    doctor = subparsers.add_parser(
        "doctor",
        help="what this machine has and lacks, and the remedy",
        description="Exit 1 when something that is needed on this machine is missing.",
    )
    doctor.set_defaults(run=_doctor)


def _shared(parser: argparse.ArgumentParser) -> None:
    add_contracts(parser)
    add_profile(parser)
    parser.add_argument(
        "--workers", type=_count, default=0, metavar="N", help="cores for runs (default: what there are)"
    )
    isolation = "fork: runs that measure results alone start from a process that has imported torch; process: none does"
    parser.add_argument("--isolation", choices=("fork", "process"), default="fork", help=isolation)
    parser.add_argument("-k", dest="keyword", metavar="EXPR", help="only claims whose contract::id matches")
    add_path(
        parser,
        "--kills",
        "DIR",
        "kill records, a folder for each place, such as cpu (default: the installed ones)",
    )
    add_given(parser)


def add_given(parser: argparse.ArgumentParser) -> None:
    """Add ``--teacher``, ``--student`` and ``--data``: real files in the place of the made 7B inputs."""
    group = parser.add_argument_group("real files", "in the place of the random 7B teacher and 0.5B student")
    group.add_argument("--teacher", metavar="FILE", help="GGUF file, or org/name[:file] on the Hugging Face hub")
    group.add_argument("--student", metavar="DIR", help="Hugging Face causal LM folder, or org/name")
    group.add_argument("--data", metavar="PATH", help="text file, JSONL file or folder")


def _count(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 256:
        raise argparse.ArgumentTypeError(f"expected 0 to 256, got {value}")
    return value


def _falsify(args: argparse.Namespace) -> int:
    from q4kd.harness.falsify import falsify
    from q4kd.harness.runs.user_inputs import resolve_given

    given = resolve_given(args.teacher, args.student, args.data)
    return falsify(
        *(args.contracts, args.profile, args.keyword, args.out, args.workers, args.kills, args.sign),
        given=given,
        inputs=args.inputs,
        waivers=args.waivers,
        changed=args.changed,
        isolation=args.isolation,
        quiet=args.quiet,
    )


def _sabotage(args: argparse.Namespace) -> int:
    from q4kd.harness.falsify import one_thread_of_blas

    one_thread_of_blas()
    from q4kd.harness.kill_matrix import sabotage
    from q4kd.harness.runs.user_inputs import resolve_given

    given = resolve_given(args.teacher, args.student, args.data)
    return sabotage(
        *(args.contracts, args.profile, args.keyword, args.kills, args.work),
        changed=args.changed,
        workers=args.workers or None,
        isolation=args.isolation,
        given=given,
    )


def _doctor(_args: argparse.Namespace) -> int:
    from q4kd.harness.doctor import examine, show

    return show(examine())
