"""``python -m mutants``: plant generated faults and report who sees them."""

import argparse
import os
import sys
from pathlib import Path

from mutants.report import LEAST_SEEN, LEAST_TURNED, passes, write_report
from mutants.session import Options, run_session

ROOT = Path(__file__).parents[3]


def main(words: list[str] | None = None) -> int:
    """Run a session and write its report.

    Returns:
        0 when enough mutants are seen and no control is, 1 when not; 2 when the session could not be run, 130 when it
        was interrupted.
    """
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("build/mutants"), help="folder of the session; resumed when it is there")
    add("--sample", type=int, default=200, help="mutants to plant (default 200)")
    add("--seed", type=int, default=1, help="decides which (default 1)")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="mutants at one time (default: the cores)")
    add(
        "--minutes",
        type=float,
        default=600.0,
        help="start no mutant after this time, and end 1 minute later (default 600)",
    )
    add("--module", action="append", default=[], metavar="PATTERN", help="only these, such as trainer/loss; repeatable")
    add("--profile", default="cpu", help="machine profile whose claims are asked (default cpu)")
    add("--reached-only", action="store_true", help="only places that a claim's runs execute")
    add("--tests-always", action="store_true", help="ask the tests also where a claim turned")
    add("--without", action="append", default=[], metavar="EXPERIMENT", help="ask no claim of this one; repeatable")
    add("--experiment", action="append", default=[], metavar="NAME", help="ask only the claims of these; repeatable")
    add("--controls", type=int, default=1, help="times that nothing is changed and every claim asked (default 1)")
    add("--least-turned", type=float, default=LEAST_TURNED, help="share that must turn a claim (default 0.90)")
    add("--least-seen", type=float, default=LEAST_SEEN, help="share that a claim or a test must see (default 0.98)")
    add("--checkout", type=Path, default=ROOT, help="sources to copy (default: those this tool lies in)")
    args = parser.parse_args(words)
    options = Options(
        checkout=args.checkout.resolve(),
        out=args.out.resolve(),
        sample=args.sample,
        seed=args.seed,
        workers=max(1, args.workers),
        minutes=args.minutes,
        modules=tuple(args.module),
        profile=args.profile,
        reached_only=args.reached_only,
        tests_always=args.tests_always,
        without=tuple(args.without),
        only=tuple(args.experiment),
        controls=args.controls,
    )
    try:
        outcome = run_session(options)
    except KeyboardInterrupt:
        print(f"mutants: interrupted; the same command goes on, with --out {args.out}", file=sys.stderr)
        return 130
    except RuntimeError as error:
        print(f"mutants: {error}", file=sys.stderr)
        return 2
    print(write_report(outcome, options.out))
    sound = not any(control.turned for control in outcome.controls)
    return 0 if sound and passes(outcome.trials, args.least_turned, args.least_seen) else 1


if __name__ == "__main__":
    sys.exit(main())
