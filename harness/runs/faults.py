"""The registry of faults, and the one way to plant one: replace a named object in the child process.

It is closed to contracts. Another project adds faults by an entry point in ``q4kd.faults``: a module that calls
``register``, a ``Fault``, or several.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, TypeVar, Unpack, get_args

from q4kd.harness.runs.extensions import SUBJECTS, blaming, kind_of, load_extensions, subject_modules
from q4kd.trainer.errors import unknown_name

Family = Literal[
    "quantisation", "residency", "memory", "dispatch", "vocabulary", "loss", "loop", "logging", "checkpoint",
    "supervision",
]  # fmt: skip
# A function of the program under test, whose arguments are only passed on.
Call = Callable[..., object]
_Replacement = TypeVar("_Replacement", bound=Call)

VOID_EXIT = 97  # of a child whose fault could not be planted: nothing was tested


class MissingTarget(Exception):  # noqa: N818 - it makes a fault VOID, which is an outcome and not a program error
    """Raised for a fault that names an object that does not exist (any more): it tests nothing."""

    def __init__(self, target: str) -> None:
        self.target = target
        super().__init__(target)


@dataclass(frozen=True)
class Fault:
    """One planted fault.

    Attributes:
        name: name used on the command line and in contracts.
        title: what it breaks, in one line.
        family: the area it belongs to.
        targets: ``module:Qualname`` of every object it replaces; each must exist and must be replaced by ``apply``.
        apply: plants the fault in this process, by calls of ``replace``.
        arms: the arms of an experiment that run with it, ``None`` among them standing for the only arm of another
            experiment; None alone means all. The other arms are the clean control.
        declared_exit: causes of exit other than a normal one that this fault may produce and still count as caught.
    """

    name: str
    title: str
    family: Family
    targets: tuple[str, ...]
    apply: Callable[[], None]
    arms: tuple[str | None, ...] | None = None
    declared_exit: tuple[str, ...] = ()


class _Limits(TypedDict, total=False):
    """The fields of a fault that most leave as they are."""

    arms: tuple[str | None, ...] | None
    declared_exit: tuple[str, ...]


_FAULTS: dict[str, Fault] = {}
_PLANTED: list[str] = []


def register(fault: Fault) -> Fault:
    """Add a fault to the registry and return it.

    Raises:
        ValueError: for a second fault of the same name, an unknown family, or a fault without targets.
    """
    if fault.name in _FAULTS and _FAULTS[fault.name] != fault:
        raise ValueError(f"fault {fault.name!r} is registered twice")
    if fault.family not in get_args(Family):
        raise ValueError(f"fault {fault.name!r}: unknown family {fault.family!r}")
    if not fault.targets or any(target.count(":") != 1 for target in fault.targets):
        raise ValueError(f"fault {fault.name!r}: needs targets of the form module:Qualname")
    _FAULTS[fault.name] = fault
    return fault


def declare(
    family: Family,
    name: str,
    title: str,
    apply: Callable[[], None],
    *targets: str,
    **limits: Unpack[_Limits],
) -> Fault:
    """Register the fault of these parts, which are ``Fault``'s, and return it. Raises as ``register`` does."""
    return register(Fault(name, title, family, targets, apply, **limits))


def fault(
    family: Family,
    name: str,
    title: str,
    *targets: str,
    **limits: Unpack[_Limits],
) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Declare the decorated function, which calls ``replace``, as what plants a fault (see ``register``)."""

    def declare_fault(apply: Callable[[], None]) -> Callable[[], None]:
        declare(family, name, title, apply, *targets, **limits)
        return apply

    return declare_fault


def patch(
    family: Family,
    name: str,
    title: str,
    *targets: str,
    **limits: Unpack[_Limits],
) -> Callable[[_Replacement], _Replacement]:
    """Declare a fault under which each call of a target calls the decorated function instead (see ``register``).

    The function is given the original first, then the arguments of the call. In a target that is a table of functions,
    the targets before it are exchanged for their replacements.
    """

    def declare_patch(function: _Replacement) -> _Replacement:
        @functools.wraps(function)
        def apply() -> None:
            replacements: dict[int, object] = {}

            def make(original: Any) -> object:
                if isinstance(original, Mapping):
                    return {key: replacements.get(id(value), value) for key, value in original.items()}

                def patched(*arguments: object, **options: object) -> object:
                    return function(original, *arguments, **options)

                replacements[id(original)] = patched
                return patched

            for target in targets:
                replace(target, make)

        declare(family, name, title, apply, *targets, **limits)
        return function

    return declare_patch


def all_faults() -> Mapping[str, Fault]:
    """Import the fault modules and return every fault by name."""
    for module in subject_modules("faults"):
        importlib.import_module(module)
    for extension in load_extensions("q4kd.faults"):
        with blaming(extension.origin):
            value = extension.value
            faults = () if inspect.ismodule(value) else (value,) if isinstance(value, Fault) else tuple(value)
            for fault in faults:
                register(fault)
    return dict(sorted(_FAULTS.items()))


def tested_packages() -> frozenset[str]:
    """Return the top-level packages whose programs are under test here: ours, and those that bring faults."""
    return frozenset({"q4kd", *(extension.package for extension in load_extensions("q4kd.faults"))})


def get_fault(name: str) -> Fault:
    """Return one fault (InputError for an unknown one)."""
    faults = all_faults()
    if name not in faults:
        raise unknown_name(f"fault {name!r}", name, faults, "fault")
    return faults[name]


def resolve(target: str) -> tuple[object, str, Any]:
    """Find ``module:Qual.name``; return its holder (module or class), the attribute's name, and the raw attribute.

    Raises:
        MissingTarget: when the module cannot be imported or any part of the name is not defined there. A name that a
            class only inherits is missing too: it belongs to the class that defines it.
    """
    module_name, _, qualname = target.partition(":")
    try:
        holder: object = importlib.import_module(module_name)
    except ImportError as error:
        raise MissingTarget(target) from error
    *path, name = qualname.split(".")
    for part in path:
        if part not in vars(holder):
            raise MissingTarget(target)
        holder = vars(holder)[part]
    if not hasattr(holder, "__dict__") or name not in vars(holder):
        raise MissingTarget(target)
    return holder, name, vars(holder)[name]


def replace(target: str, make: Callable[[Any], Any]) -> None:
    """Put ``make(original)`` in the place of ``target``, also where a module under test imported it by name.

    A static or class method is handed to ``make`` as its plain function and is wrapped again afterwards. Raises
    MissingTarget when the target does not exist.
    """
    holder, name, raw = resolve(target)
    kind = type(raw) if isinstance(raw, staticmethod | classmethod) else None
    new = make(raw) if kind is None else kind(make(raw.__func__))
    setattr(holder, name, new)
    if inspect.ismodule(holder):
        packages = tested_packages()
        for module_name, module in list(sys.modules.items()):
            # Faults keep their originals: what is planted is for the program under test, not for what plants it.
            tested = module_name.partition(".")[0] in packages
            if tested and module_name != __name__ and not _holds_faults(module_name):
                for copy in [key for key, value in vars(module).items() if value is raw]:
                    setattr(module, copy, new)
    _PLANTED.append(target)


def _holds_faults(module: str) -> bool:
    return module.startswith(f"{SUBJECTS}.") and kind_of(module) == "faults"


def plant(fault: Fault) -> None:
    """Apply a fault in this process.

    Raises:
        MissingTarget: when a declared target does not exist, or ``apply`` left one of them as it was.
    """
    for target in fault.targets:
        resolve(target)
    before = len(_PLANTED)
    fault.apply()
    planted = set(_PLANTED[before:])
    for target in fault.targets:
        if target not in planted:
            raise MissingTarget(target)
