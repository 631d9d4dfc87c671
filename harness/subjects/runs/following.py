"""Measurements of settings that change no loss: what is recomputed, what is compiled, what trackers are told."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from q4kd.harness.records.json_types import JsonObject

# Two steps, an evaluation and an event that is no tracker's business, as a run emits them.
_EVENTS: tuple[tuple[str, Mapping[str, object]], ...] = (
    ("step", {"step": 1, "steps": 2, "loss": 2.5, "lr": 0.25}),
    ("phase", {"step": 1, "seconds": 9.0}),
    ("step", {"step": 2, "steps": 2, "loss": 1.5, "lr": 0.125}),
    ("eval", {"step": 2, "loss": 1.75, "kl": 0.5}),
)


class Passes:
    """Counts the forward passes that a module begins; what is done again ends as soon as it has what was missing."""

    def __init__(self, module: Any) -> None:
        self.count = 0
        module.register_forward_pre_hook(self._count)

    def _count(self, *_given: object) -> None:
        self.count += 1


@contextmanager
def recorded_compiler() -> Iterator[list[object]]:
    """Put in the place of ``torch.compile`` a function that compiles nothing and notes the calls of what it is given.

    Code is compiled only when it is first called, so what must be known is which function goes through the compiler.
    """
    from unittest import mock  # which brings asyncio; whoever verifies a bundle loads this module too

    calls: list[object] = []

    def note(function: Callable[..., object], **_options: object) -> Callable[..., object]:
        def called(*arguments: object, **options: object) -> object:
            calls.append(getattr(function, "__self__", function))
            return function(*arguments, **options)

        return called

    with mock.patch("torch.compile", note):
        yield calls


def tracked() -> JsonObject:
    """Start trackers as a run does, with one that only listens, and say what it hears of a few events."""
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

    from q4kd.trainer.config.settings import make_config
    from q4kd.trainer.events import EventLog
    from q4kd.trainer.train.run.tracking import start_trackers

    heard: list[str] = []
    told: dict[str, Any] = {}

    class Listener(GeneralTracker):  # type: ignore[misc]
        name, requires_logging_directory, tracker = "listener", False, None

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            told.update(values)

        def log(self, values: dict[str, Any], step: int | None = None, **_options: object) -> None:
            heard.append(f"{step}: " + ", ".join(f"{key} {value:g}" for key, value in sorted(values.items())))

    folder = "/home/someone"
    paths = {"teacher": f"{folder}/t.gguf", "student": f"{folder}/s", "data": f"{folder}/d", "out": f"{folder}/o"}
    config = make_config({**paths, "lr": 0.5, "trackers": "tensorboard"})
    events = EventLog(None)
    start_trackers(Accelerator(cpu=True, log_with=[Listener(_blank=True)]), config, events)
    for name, fields in _EVENTS:
        events.emit(name, **fields)
    return {
        "heard": "; ".join(heard),
        "settings told": len(told),
        "with a folder": sum("someone" in str(value) for value in told.values()),
        "the rate among them": told.get("lr") == config.lr,
    }
