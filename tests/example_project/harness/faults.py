"""Two ways to break the program from outside."""

from collections.abc import Callable

from q4kd.harness.runs.faults import Fault, replace

_MERGE = "harness.sorting:merge"
_Merge = Callable[[list[int], list[int]], list[int]]


def _drop_duplicates() -> None:
    def make(original: _Merge) -> _Merge:
        return lambda left, right: sorted(set(original(left, right)))

    replace(_MERGE, make)


def _append() -> None:
    replace(_MERGE, lambda _original: lambda left, right: left + right)


FAULTS = (
    Fault("drops-duplicates", "loses equal numbers", "loop", (_MERGE,), _drop_duplicates),
    Fault("does-not-merge", "appends instead of merging", "loop", (_MERGE,), _append),
)
