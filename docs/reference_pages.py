"""Makes the reference pages from parsers, dataclasses, registries and schemas when the documentation is built."""

import argparse
import ast
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_ENOUGH = 240


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to those of the folder (a hook of mkdocs)."""
    from mkdocs.structure.files import File

    for name, make in PAGES.items():
        files.append(File.generated(config, f"reference/{name}.md", content=make()))
    return files


def _cell(value: object) -> str:
    text = " ".join(str(value).split())
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _code(value: object) -> str:
    return f"`{' '.join(str(value).split())}`" if str(value) else ""


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


# --- the command line ---


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield every parser that runs something, depth first, in the order of the help."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        yield parser
    for action in inner:
        for child in action.choices.values():
            yield from commands(child)


def cli_page() -> str:
    """Return the page of every command with its options."""
    from q4kd.harness.__main__ import build_parser

    parts = [
        "# Command line\n",
        "This page is generated from the parsers. Every command takes `--help`; `--debug`, anywhere, shows the "
        "traceback of an error. Exit code 0 means done, 1 that a claim is falsified or that the command answers no, "
        "2 bad input or an inconclusive verdict, 3 a defect of q4kd, 130 that it was interrupted.\n",
    ]
    for parser in commands(build_parser()):
        parts.append(f"## {parser.prog}\n")
        parts += [f"{_cell(text)}\n" for text in [parser.description] if text]
        usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
        parts.append(f"```text\n{usage}\n```\n")
        rows = [
            (
                _code(", ".join(action.option_strings) or action.metavar or action.dest),
                _cell(action.help or ""),
                _code("" if action.default in (None, False, argparse.SUPPRESS, []) else action.default),
            )
            for action in parser._actions
            if action.dest != "help" and action.help != argparse.SUPPRESS
        ]
        if rows:
            parts.append(_table(("argument", "meaning", "default"), rows))
        if parser.epilog:
            parts.append(f"```text\n{parser.epilog.strip()}\n```\n")
    return "\n".join(parts)


# --- the settings of a run ---


def settings_page() -> str:
    """Return the page of ``DistillConfig``, one table by group of fields."""
    from q4kd.trainer.config.settings import settings

    groups: dict[str, list[tuple[str, ...]]] = {}
    for setting in settings().values():
        accepted = ", ".join(setting.choices)
        if setting.low is not None:
            accepted = f"{setting.low:g} to {setting.high:g}"
        default = "required" if setting.is_required else _code(setting.default)
        kind = ("text" if setting.choices else setting.kind.__name__) + (" | None" if setting.is_optional else "")
        row = (_code(setting.name), _cell(kind), default, _cell(setting.unit), _cell(accepted), _cell(setting.help))
        groups.setdefault(setting.group, []).append(row)
    parts = [
        "# Settings of a run\n",
        "This page is generated from `q4kd.trainer.config.settings.DistillConfig`. Each setting is a key of RUN.yaml "
        "and of `--set KEY=VALUE`. RUN.yaml comes first, then the options, then `--set`: the last one wins. An unknown "
        "key is refused. [Why the defaults are what they are](../explanation/defaults.md).\n",
    ]
    for group, rows in groups.items():
        parts += [f"## {group}\n", _table(("key", "type", "default", "unit", "accepted", "meaning"), rows)]
    return "\n".join(parts)


# --- schemas ---


def _schema_rows(schema: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, ...]]:
    for name, entry in schema.get("properties", {}).items():
        if not isinstance(entry, Mapping):
            continue
        kind = entry.get("type") or entry.get("$ref", "").rsplit("/", 1)[-1] or ("one of" if "enum" in entry else "")
        kinds = " or ".join(kind) if isinstance(kind, list) else str(kind)
        values = ", ".join(map(str, entry.get("enum", entry.get("examples", []))))
        needed = "yes" if name in schema.get("required", ()) else ""
        yield _code(prefix + name), _cell(kinds), needed, _cell(entry.get("description", "")), _cell(values[:_ENOUGH])
        yield from _schema_rows(entry, f"{prefix}{name}.")
        if isinstance(entry.get("items"), Mapping):
            yield from _schema_rows(entry["items"], f"{prefix}{name}[].")


def _schema_page(title: str, intro: str, path: Path) -> str:
    schema = json.loads(path.read_text(encoding="utf-8"))
    head = ("key", "type", "required", "meaning", "values or examples")
    parts = [f"# {title}\n", f"{intro}\n", f"{_cell(schema.get('description', ''))}\n"]
    parts.append(_table(head, list(_schema_rows(schema))))
    for name, entry in schema.get("$defs", {}).items():
        rows = list(_schema_rows(entry))
        if rows:
            parts += [f"## {name}\n", f"{_cell(entry.get('description', ''))}\n", _table(head, rows)]
        elif entry.get("description"):
            accepted = entry.get("pattern") or ", ".join(map(str, entry.get("enum", [])))
            parts += [f"## {name}\n", f"{_cell(entry['description'])} {_code(accepted[:_ENOUGH])}\n"]
    return "\n".join(parts)


def contracts_page() -> str:
    """Return the page of the contracts' schema."""
    intro = (
        "This page is generated from `contracts/contract.schema.json`; `q4kd contracts schema` prints it for an editor."
    )
    return _schema_page("Contracts", intro, ROOT / "contracts" / "contract.schema.json")


def findings_page() -> str:
    """Return the page of the findings' schema."""
    intro = "This page is generated from `harness/bundle/findings.schema.json`, which every `findings.json` must match."
    return _schema_page("Findings", intro, ROOT / "harness" / "bundle" / "findings.schema.json")


# --- registries ---


def _paragraph(text: str | None) -> str:
    return _cell((inspect.cleandoc(text or "")).split("\n\n")[0])


def checks_page() -> str:
    """Return the page of the checks and their parameters."""
    from q4kd.harness.checks import CHECKS

    parts = [
        "# Checks\n",
        "This page is generated from `q4kd.harness.checks`. These are what `falsifier.check` may name.\n",
    ]
    for name in CHECKS:
        check: Any = CHECKS[name]
        parts += [f"## {name}\n", f"{_paragraph(check.__doc__)}\n"]
        rows = list(_schema_rows(check.PARAMS))
        if rows:
            parts.append(_table(("parameter", "type", "required", "meaning", "values or examples"), rows))
    return "\n".join(parts)


def experiments_page() -> str:
    """Return the page of experiments and planted faults."""
    from q4kd.harness.runs.experiment import EXPERIMENTS
    from q4kd.harness.runs.faults import all_faults

    experiments = [
        (
            _code(name),
            _cell(EXPERIMENTS[name].title),
            _cell(", ".join(arm.name or "one" for arm in EXPERIMENTS[name].arms)),
            _cell(", ".join(EXPERIMENTS[name].needs)),
        )
        for name in EXPERIMENTS
    ]
    faults = [(_code(name), _cell(fault.title), _cell(fault.family)) for name, fault in all_faults().items()]
    return "\n".join(
        [
            "# Experiments and faults\n",
            "This page is generated from the registries. A contract names an experiment and the faults that its "
            "falsifier must catch; it can pass neither arguments nor paths.\n",
            "## Experiments\n",
            _table(("experiment", "what it runs", "arms", "needs"), experiments),
            "## Planted faults\n",
            _table(("fault", "what it breaks", "family"), faults),
        ]
    )


# --- events ---


def emitted_events(folder: Path) -> dict[str, dict[str, set[str]]]:
    """Return event → field → modules, from the calls of ``emit`` in the sources; ``…`` stands for unpacked fields."""
    found: dict[str, dict[str, set[str]]] = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or getattr(node.func, "attr", "") != "emit" or not node.args:
                continue
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                fields = found.setdefault(name.value, {})
                module = path.relative_to(folder.parent).as_posix()
                for keyword in node.keywords or [ast.keyword(arg="", value=name)]:
                    fields.setdefault("…" if keyword.arg is None else keyword.arg, set()).add(module)
    return found


def events_page() -> str:
    """Return the page of the events that the trainer emits."""
    rows = [
        (
            _code(name),
            ", ".join(_code(field) for field in fields if field),
            _cell(", ".join(sorted(set().union(*fields.values())))),
        )
        for name, fields in sorted(emitted_events(ROOT / "trainer").items())
    ]
    return "\n".join(
        [
            "# Events\n",
            "This page is generated from the calls in `trainer/`. The run's `events.jsonl` has one JSON object a line: "
            '`{"v": 1, "event": NAME, "t": seconds of CLOCK_MONOTONIC, "unix": seconds, …}`. The monotonic clock is '
            "the same in every process of a machine, so an observer's samples can be laid beside these times. `…` "
            "stands for the fields of a dataclass.\n",
            _table(("event", "fields", "emitted by"), rows),
        ]
    )


PAGES: Mapping[str, Callable[[], str]] = {
    "cli": cli_page,
    "settings": settings_page,
    "contracts": contracts_page,
    "checks": checks_page,
    "experiments": experiments_page,
    "findings": findings_page,
    "events": events_page,
}
