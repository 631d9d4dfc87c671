"""Checkpoints written beside the steps: the training thread loses the copy to the host, another thread does the rest.

torch's own asynchronous saver (``torch.distributed.checkpoint.async_save``) does not serve: its folders hold a pickled
index and no digests. Here one thread does what it is given, in order. There is one copy of the state, so a checkpoint
begins when the one before it is on the disk.
"""

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from q4kd.trainer.config.settings import DistillConfig
from q4kd.trainer.device.host_snapshot import HostSnapshot
from q4kd.trainer.errors import RunFolderError
from q4kd.trainer.events import EventLog
from q4kd.trainer.formats.safetensors_writer import WriteFigures
from q4kd.trainer.train.checkpoint import (
    CheckpointState,
    CheckpointTensors,
    checkpoint_path,
    list_checkpoints,
    save_best_weights,
    save_checkpoint,
)
from q4kd.trainer.train.kept_checkpoints import best_value, is_better, prune_checkpoints, record_evaluation
from q4kd.trainer.train.run.folder import kept

# Seconds of waiting that are worth no line.
_QUIET_S = 2.0
Kind = Literal["everything", "weights"]
Part = Literal["model", "optimizer"]


class CheckpointSaver:
    """Writes the checkpoints of a run in a thread of its own; a context manager, whose end waits for the last one.

    What fails there is raised in the training thread: by the next call of ``check``, ``save`` or ``finish``.

    Args:
        config: settings of the run; its folder, what is kept, and which evaluation is the best.
        events: receives ``checkpoint`` when one is on the disk.
        device: where the state is.
        copies: whether the host has memory for a copy of the state. Without it the steps wait for the writing.
    """

    def __init__(self, config: DistillConfig, events: EventLog, device: torch.device, *, copies: bool) -> None:
        self._config, self._events, self._copies = config, events, copies
        # Only the main process writes; another one may run where this folder is not.
        self._folder = os.open(config.out, os.O_RDONLY) if config.out.is_dir() else None
        self._snapshot = HostSnapshot(device) if copies else None
        self._is_cuda = device.type == "cuda"
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._given: list[tuple[int, Future[None]]] = []
        self._is_broken = False
        self._steps = {int(path.name.removeprefix("step-")) for path in list_checkpoints(config.out)}
        self._best = best_value(config.out, config.best_metric)

    def __enter__(self) -> "CheckpointSaver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: BaseException | TracebackType | None) -> None:
        """Wait for what is being written; where the run has failed, what fails here too is said and not raised."""
        try:
            self.finish(say=True)
        except RunFolderError as error:
            if kind is None:
                raise
            print(f"q4kd: {error}", file=sys.stderr, flush=True)
        finally:
            self._thread.shutdown()
            if self._folder is not None:
                os.close(self._folder)

    def has(self, step: int) -> bool:
        """Return whether a checkpoint of this step is written or being written."""
        return step in self._steps

    def is_better(self, figures: Mapping[str, float]) -> bool:
        """Return whether an evaluation is better than those of everything kept."""
        return is_better(self._config.best_metric, figures[self._config.best_metric], self._best)

    def reserve(self, parts: Mapping[Part, Iterable[tuple[str, Tensor]]]) -> None:
        """Take the memory for a copy of the state now, beside the next steps, and not when the copy is due."""
        snapshot = self._snapshot
        if snapshot is not None and self._is_cuda:
            named = [(f"{part}|{name}", tensor) for part, tensors in parts.items() for name, tensor in tensors]
            self._give(0, functools.partial(snapshot.reserve, named))

    def hold(
        self, parts: Mapping[Part, Iterable[tuple[str, Tensor]]], *, is_last: bool
    ) -> dict[Part, dict[str, Tensor]]:
        """Return the state as it is now, for ``save``: copies, or the tensors themselves where no step follows.

        Args:
            parts: the tensors by name.
            is_last: whether no step follows before ``finish`` returns.
        """
        self.finish()
        snapshot = self._snapshot
        if snapshot is None or (is_last and (not self._is_cuda or snapshot.is_empty)):
            return {part: dict(tensors) for part, tensors in parts.items()}
        snapshot.begin()
        held: dict[Part, dict[str, Tensor]] = {}
        for part, tensors in parts.items():
            copies = snapshot.copy((f"{part}|{name}", tensor) for name, tensor in tensors)
            held[part] = {name.removeprefix(f"{part}|"): copy for name, copy in copies.items()}
        return held

    def copied(self) -> Any:
        """Return the event that an update of the state waits for before it changes what is copied; None for nothing."""
        return self._snapshot.copied() if self._snapshot is not None and not self._snapshot.is_empty else None

    def save(
        self,
        state: CheckpointState,
        held: Mapping[Part, Mapping[str, Tensor]],
        random: Mapping[str, Tensor],
        *,
        kind: Kind,
        lost: Mapping[str, float],
    ) -> None:
        """Write a checkpoint of what is held, beside the next steps where it is a copy.

        Args:
            state: what is not a tensor.
            held: what ``hold`` returned.
            random: states of the random number generators.
            kind: everything that a run needs to continue, or the weights alone.
            lost: seconds that the training thread has lost, for the event.

        Raises:
            RunFolderError: when it is written at once and that fails.
        """
        if kind == "everything":
            self._steps.add(state.step)
        if state.evaluation is not None:
            self._note(state.evaluation)
        copied = self.copied()
        self._give(state.step, functools.partial(self._write, state, held, random, kind, lost, copied))
        if not self._copies:
            self.finish()

    def record(self, step: int, figures: Mapping[str, float]) -> None:
        """Add a step's held-out figures to its checkpoint, when it is written."""
        self._note(figures)
        self._give(step, functools.partial(self._record, step, figures))

    def check(self) -> None:
        """Raise what has failed so far; wait for nothing.

        Raises:
            RunFolderError: when a checkpoint could not be written.
        """
        while self._given and self._given[0][1].done():
            step, future = self._given.pop(0)
            self._raise(step, future)

    def settle(self) -> None:
        """Wait for everything that was given; what has failed is raised later."""
        wait([future for _, future in self._given])

    def finish(self, say: bool = False) -> None:
        """Wait for everything that was given; with ``say``, a line says so when it takes long.

        Raises:
            RunFolderError: when a checkpoint could not be written.
        """
        if say and wait([future for _, future in self._given], _QUIET_S).not_done:
            print(f"Waiting for the checkpoint of step {self._given[-1][0]} to be written", flush=True)
        while self._given:
            self._raise(*self._given.pop(0))

    def _raise(self, step: int, future: "Future[None]") -> None:
        try:
            future.result()
        except (OSError, SafetensorError) as error:
            said = f"the checkpoint cannot be written ({getattr(error, 'strerror', None) or error})"
            raise RunFolderError(f"step {step}: {said}; {kept(self._config.out)}") from error

    def _give(self, step: int, work: Callable[[], None]) -> None:
        self._given.append((step, self._thread.submit(self._do, work)))

    def _do(self, work: Callable[[], None]) -> None:
        """Do what was given; nothing after a failure, because what follows builds on what is not there."""
        if self._is_broken:
            return
        try:
            work()
        except BaseException:
            self._is_broken = True
            raise

    def _note(self, figures: Mapping[str, float]) -> None:
        if self.is_better(figures):
            self._best = figures[self._config.best_metric]

    def _write(
        self,
        state: CheckpointState,
        held: Mapping[Part, Mapping[str, Tensor]],
        random: Mapping[str, Tensor],
        kind: Kind,
        lost: Mapping[str, float],
        copied: Any,
    ) -> None:
        if copied is not None:
            copied.synchronize()
        begun, figures, out = time.monotonic(), WriteFigures(), self._find_folder()
        if kind == "weights":
            path = save_best_weights(out, held["model"], state, figures)
        else:
            tensors = CheckpointTensors(held["model"], held["optimizer"], random)
            # Where the host has no room for a copy, it has none for tensors of several files either.
            path = save_checkpoint(out, tensors, state, figures, None if self._copies else 1)
        if out != self._config.out:
            said = f"{self._config.out} was renamed to {out} while the run wrote to it; {path.name} is there"
            raise RunFolderError(f"{said}: continue with --resume --out {out}")
        self._prune()
        seconds = time.monotonic() - begun
        self._events.emit("checkpoint", step=state.step, path=path.name, **lost, **vars(figures), seconds=seconds)

    def _find_folder(self) -> Path:
        """Return where the run's folder is by now, whatever was done with its name.

        Raises:
            RunFolderError: when it was removed.
        """
        out = self._config.out
        if self._folder is None:
            return out
        held = os.fstat(self._folder)
        # Linux says where an open folder is; elsewhere the name is all there is.
        for path in (out, Path(f"/proc/self/fd/{self._folder}")):
            with contextlib.suppress(OSError):
                if os.path.samestat(path.stat(), held) and held.st_nlink:
                    return out if path == out else path.readlink()
        raise RunFolderError(f"{out} was removed or replaced while the run wrote to it; {kept(out)}")

    def _record(self, step: int, figures: Mapping[str, float]) -> None:
        path: Path = checkpoint_path(self._config.out, step)
        record_evaluation(path, figures)
        self._prune()

    def _prune(self) -> None:
        config = self._config
        prune_checkpoints(config.out, config.keep, config.best_metric, config.best_resumable)
