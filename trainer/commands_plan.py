"""``q4kd plan``: the memory that a run will take, before it is started."""

import argparse
import json

from q4kd.trainer.run_arguments import add_run_arguments, read_run_arguments


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register ``plan``, which takes the arguments of ``distill``."""
    plan = subparsers.add_parser("plan", help="memory that a run will take here; refuses what cannot fit")
    add_run_arguments(plan)
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> int:
    config = read_run_arguments(args)

    from q4kd.trainer.memory_plan import format_plan
    from q4kd.trainer.run_plan import check_plan, place_run_teacher, plan_run
    from q4kd.trainer.training_data import check_sources

    check_sources(config)
    placement = place_run_teacher(config)
    plan = plan_run(config, placement)
    print(json.dumps(plan.to_json(), indent=1) if args.json else format_plan(plan))
    check_plan(config, plan, placement)
    return 0
