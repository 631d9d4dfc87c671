"""The raw evidence of one run, as the checks read it: logs, events, memory samples, exit cause, arrays.

Nothing here unpickles, or allocates what a header merely announces.
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from q4kd.harness.records.json_types import JsonRecord
from q4kd.harness.records.store import MAX_ITEMS, PrefixStore, Store, parse_shallow, read_object
from q4kd.harness.records.tar_archive import REMEDY, safe_name
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import count_items

Arrays: TypeAlias = dict[str, NDArray[Any]]  # by name; of any plain dtype and shape
MAX_LOG = 4 << 20
MAX_ARRAY_FILE = 8 << 20
MAX_ARRAY_BYTES = 64 << 20


def run_names(store: Store) -> list[str]:
    """Return the names of the runs a bundle holds, sorted."""
    return sorted({name.split("/")[1] for name in store.names() if name.startswith("runs/") and name.count("/") > 1})


class RawRun:
    """The raw files of one run, ``runs/<name>/`` of a store, each read once and when first asked for.

    A missing or malformed file raises ``InputError`` from the property that reads it.
    """

    def __init__(self, store: Store, name: str) -> None:
        self.name = safe_name(name, "run name")
        self.store = PrefixStore(store, f"runs/{name}")
        # What is asked for again by every mutation of every claim. What is drawn from other records is kept with these
        # very objects, so that a spoilt copy of the run, which replaces them, finds its own.
        self._arrays: dict[str, Arrays] = {}
        self._named: tuple[list[JsonRecord], dict[object, list[JsonRecord]]] | None = None
        self._pids: tuple[list[JsonRecord], list[JsonRecord], frozenset[object]] | None = None

    def _object(self, name: str) -> JsonRecord:
        return read_object(self.store, name, f"{self.name}/{name}")

    def _lines(self, name: str) -> list[JsonRecord]:
        rows: list[JsonRecord] = []
        data = self.store.read(name)
        if (items := count_items(data)) > MAX_ITEMS:
            raise InputError(
                f"{self.name}/{name}", expected=f"at most {MAX_ITEMS} items", got=str(items), remedy=REMEDY
            )
        for number, line in enumerate(data.split(b"\n"), 1):
            if line.strip():
                origin = f"{self.name}/{name}:{number}"
                row = parse_shallow(line, origin, 1 << 20)
                if not isinstance(row, dict):
                    raise InputError(origin, expected="a JSON object", got="another value", remedy=REMEDY)
                rows.append(row)
        return rows

    @cached_property
    def argv(self) -> JsonRecord:
        """The command as run: ``{"argv": […], "fault": null | name, "cwd": …}``."""
        return self._object("argv.json")

    @cached_property
    def stdout(self) -> str:
        """The program's standard output, at most 4 MB, invalid UTF-8 replaced."""
        return self.store.read("stdout.log", MAX_LOG + 4096).decode("utf-8", "replace")

    @cached_property
    def stderr(self) -> str:
        """The program's standard error, at most 4 MB, invalid UTF-8 replaced."""
        return self.store.read("stderr.log", MAX_LOG + 4096).decode("utf-8", "replace")

    @cached_property
    def events(self) -> list[JsonRecord]:
        """The trainer's events in order. A malformed line is an error, never skipped."""
        return self._lines("events.jsonl")

    @cached_property
    def memory(self) -> list[JsonRecord]:
        """The supervisor's samples in order: ``t`` seconds (monotonic), ``rss`` bytes, …"""
        return self._lines("memory.jsonl")

    @cached_property
    def exit(self) -> JsonRecord:
        """How the run ended, with the evidence for the cause."""
        return self._object("exit.json")

    @cached_property
    def facts(self) -> JsonRecord:
        """What the harness itself measured about inputs and outputs."""
        return self._object("facts.json")

    @cached_property
    def harness_error(self) -> JsonRecord | None:
        """What broke in the harness around this run, or None. With an error there is nothing to judge."""
        return self._object("harness_error.json") if "harness_error.json" in self.store.names() else None

    @property
    def ending(self) -> JsonRecord:
        """How the run ended, ``{"cause", "returncode"}``, as the checks put it into their observations."""
        return {"cause": self.exit.get("cause"), "returncode": self.exit.get("returncode")}

    @property
    def same_boot(self) -> bool:
        """Return whether the machine did not restart during the run."""
        return bool(self.exit.get("boot_id") == self.exit.get("boot_id_end"))

    @property
    def fault(self) -> str | None:
        """The planted fault of this run, or None. A run with one can never support a clean verdict."""
        fault = self.argv.get("fault")
        return None if fault is None else str(fault)

    def event(self, name: str) -> JsonRecord | None:
        """Return the first event of that name, or None."""
        return next(iter(self._events_by_name().get(name, ())), None)

    def events_named(self, name: str) -> list[JsonRecord]:
        """Return all events of that name in order."""
        return list(self._events_by_name().get(name, ()))

    def _events_by_name(self) -> dict[object, list[JsonRecord]]:
        events = self.events
        if self._named is None or self._named[0] is not events:
            by_name: dict[object, list[JsonRecord]] = {}
            for event in events:
                if isinstance(name := event.get("event"), str):
                    by_name.setdefault(name, []).append(event)
            self._named = events, by_name
        return self._named[1]

    def pids(self) -> frozenset[object]:
        """Return the process ids that memory samples and starts of the program name, None where one names none.

        Raises:
            TypeError: a process id that is an array or an object.
        """
        memory, events = self.memory, self.events
        if self._pids is None or self._pids[0] is not memory or self._pids[1] is not events:
            records = (*memory, *self.events_named("process_start"))
            self._pids = memory, events, frozenset(record.get("pid") for record in records)
        return self._pids[2]

    def array(self, name: str) -> Arrays:
        """Return the arrays of ``arrays/<name>.npz`` (or ``name`` itself when it ends in ``.npz``), read-only.

        Raises:
            InputError: missing, over 8 MB packed or 64 MB unpacked, pickled, or not what its headers say.
        """
        file = array_file(name)
        if file not in self._arrays:
            self._arrays[file] = load_arrays(self.store.read(file, MAX_ARRAY_FILE), f"{self.name}/{file}")
            for array in self._arrays[file].values():
                array.flags.writeable = False
        return dict(self._arrays[file])


def array_file(name: str) -> str:
    """Return the file within a run that holds an array, by the name that a check gives it."""
    file = name if name.endswith(".npz") else f"{name}.npz"
    return file if file.startswith("arrays/") else f"arrays/{file}"


def load_arrays(data: bytes, origin: str) -> Arrays:
    """Read an npz without pickle, after checking that each header announces what its member really holds.

    Raises:
        InputError: see ``RawRun.array``.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            if len(infos) > 256 or sum(info.file_size for info in infos) > MAX_ARRAY_BYTES:
                raise ValueError("more arrays or bytes than allowed")
            if len({info.filename for info in infos}) != len(infos):
                raise ValueError("a repeated array name")
            return {info.filename.removesuffix(".npy"): _array(archive, info) for info in infos}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error, struct.error,
            NotImplementedError, RuntimeError, SyntaxError) as error:  # fmt: skip
        raise InputError(origin, expected="an npz of plain arrays", got=str(error)[:200], remedy=REMEDY) from error


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as file:
        content = file.read(info.file_size + 1)
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"npy version {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream, max_header_size=10_000)
    if dtype.hasobject or dtype.names is not None or dtype.kind not in "biufSU":
        raise ValueError(f"dtype {dtype}")
    size = dtype.itemsize
    for length in shape:
        size *= length
    if size != len(content) - stream.tell() or any(length < 0 for length in shape):
        raise ValueError(f"{info.filename} announces {size} bytes and holds {len(content) - stream.tell()}")
    return np.load(io.BytesIO(content), allow_pickle=False)  # type: ignore[no-any-return]


def read_runs(store: Store) -> Mapping[str, RawRun]:
    """Return every run of a bundle by name."""
    return {name: RawRun(store, name) for name in run_names(store)}


def runs_of(experiment: str, runs: Mapping[str, RawRun]) -> dict[str, RawRun]:
    """Return the runs of one experiment: ``<experiment>`` itself, or its arms ``<experiment>.<arm>``."""
    return {name: run for name, run in runs.items() if name == experiment or name.startswith(f"{experiment}.")}
