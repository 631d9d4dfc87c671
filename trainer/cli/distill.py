"""The commands that take a run's settings: ``q4kd distill`` trains, ``q4kd plan`` says what memory that will take."""

import argparse
import json
from pathlib import Path

from q4kd.trainer.cli.arguments import add_run_arguments, read_run_arguments


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register both commands, which take the same arguments."""
    distill = subparsers.add_parser("distill", help="train a student from a frozen quantised teacher")
    add_run_arguments(distill)
    distill.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --out")
    distill.add_argument("--events", type=Path, help="append events to this file instead of OUT/events.jsonl")
    distill.add_argument("--print-config", action="store_true", help="print the settings as RUN.yaml and stop")
    distill.add_argument("--print-schema", action="store_true", help="print the JSON Schema of RUN.yaml and stop")
    distill.set_defaults(run=_distill)
    plan = subparsers.add_parser("plan", help="memory that a run will take here; refuses what cannot fit")
    add_run_arguments(plan)
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(run=_plan)


def _distill(args: argparse.Namespace) -> int:
    from q4kd.trainer.config.run_file import format_config, run_schema

    if args.print_schema:
        print(run_schema(), end="")
        return 0
    config = read_run_arguments(args)
    if args.print_config:
        print(format_config(config), end="")
        return 0

    from q4kd.trainer.starting import wake_gpu, without_collection
    from q4kd.trainer.wall import process_began

    if config.device == "cuda":
        wake_gpu()
    with without_collection():
        from q4kd.trainer.distill import distill

    distill(config, resume=args.resume, events_path=args.events, begun=process_began())
    return 0


def _plan(args: argparse.Namespace) -> int:
    config = read_run_arguments(args)

    from q4kd.trainer.data.training_data import check_sources
    from q4kd.trainer.train.memory.plan import format_plan
    from q4kd.trainer.train.memory.planner import check_plan, place_run_teacher, plan_run

    check_sources(config)
    placement = place_run_teacher(config)
    plan = plan_run(config, placement)
    print(json.dumps(plan.to_json(), indent=1) if args.json else format_plan(plan))
    check_plan(config, plan, placement)
    return 0
