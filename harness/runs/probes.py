"""The registry of probes: measurements inside the child that no user command offers.

A probe calls the trainer's real functions and only records: it computes no reference and draws no conclusion, which the
harness does in another process. It is a function with typed arguments, and its command line is made from them.
"""

import argparse
import functools
import importlib
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeVar

from q4kd.harness.runs.extensions import subject_modules

Run = Callable[[list[str]], int]
_Probe = TypeVar("_Probe", bound=Callable[..., int | None])


class _Registry(Mapping[str, Run]):
    """Probes by name, as functions of their arguments; the modules that hold them are imported at the first look."""

    def __init__(self) -> None:
        self._known: dict[str, Run] = {}
        self._loaded = False

    def add(self, name: str, run: Run) -> None:
        if name in self._known:
            raise ValueError(f"probe {name!r} is registered twice")
        self._known[name] = run

    def _load(self) -> dict[str, Run]:
        if not self._loaded:
            for module in subject_modules("probes"):
                importlib.import_module(module)
            self._loaded = True
        return self._known

    def __getitem__(self, name: str) -> Run:
        return self._load()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._load()))

    def __len__(self) -> int:
        return len(self._load())


PROBES = _Registry()


def probe(name: str) -> Callable[[_Probe], _Probe]:
    """Register the decorated function as the probe ``name``, and return it as it is.

    Each parameter is an option: ``warm_up: int`` becomes ``--warm-up``, required without a default. A ``Literal`` is a
    choice, ``tuple[X, ...]`` takes one value or more, a ``bool`` is a switch. Positional-only parameters come first on
    the command line, without a name. ``*words`` takes what follows ``--``, or, without options, all the rest.

    The function returns the exit code, or None for 0.

    Raises:
        ValueError: for a second probe of the same name.
    """

    def register(function: _Probe) -> _Probe:
        PROBES.add(name, functools.partial(_run, name, function))
        return function

    return register


def _run(name: str, function: Callable[..., int | None], arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(f"probe {name}", description=inspect.getdoc(function), allow_abbrev=False)
    kinds = typing.get_type_hints(function)
    positional, options, takes_words = [], [], False
    for parameter in inspect.signature(function).parameters.values():
        settings = _settings(kinds[parameter.name])
        if parameter.kind is parameter.VAR_POSITIONAL:
            takes_words = True
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            parser.add_argument(parameter.name, **settings)
            positional.append(parameter.name)
        else:
            is_optional = parameter.default is not parameter.empty
            needed = {"default": parameter.default} if is_optional else {"required": True}
            parser.add_argument(f"--{parameter.name.replace('_', '-')}", **settings, **needed)
            options.append(parameter.name)
    words: list[str] = []
    if takes_words:
        if options and "--" not in arguments:
            parser.error("expected -- before the words that are passed on")
        cut = arguments.index("--") if options else len(positional)
        arguments, words = arguments[:cut], arguments[cut + bool(options) :]
    found = vars(parser.parse_args(arguments))
    first = [found[parameter] for parameter in positional]
    return function(*first, *words, **{parameter: found[parameter] for parameter in options}) or 0


def _settings(kind: Any) -> dict[str, Any]:
    """Return what argparse must know of a parameter's type."""
    if kind is bool:
        return {"action": "store_true"}
    if typing.get_origin(kind) is Literal:
        return {"choices": typing.get_args(kind)}
    if typing.get_origin(kind) is tuple:
        return {"type": typing.get_args(kind)[0], "nargs": "+"}
    return {"type": kind}
