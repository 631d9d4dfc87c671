"""Why a process died: what the exit status says, and what it takes before the word "OOM" may be used.

SIGKILL (or a shell's 137) has many senders. Only two observers can name the out-of-memory killer: the memory cgroup's
own ``oom_kill`` counter, and a kernel log record that names the process id. With neither, the cause stays unknown.
"""

import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Cause = Literal["exited", "signalled", "timeout", "stalled", "oom_killed", "killed_cause_unknown"]
SupervisorAction = Literal["timeout", "stalled"]

_KERNEL_RECORDS = 4096
_SHELL_KILLED = 128 + signal.SIGKILL


def classify(
    returncode: int | None,
    oom_before: int | None,
    oom_after: int | None,
    kernel_line: str | None,
    supervisor_action: SupervisorAction | None,
) -> Cause:
    """Name the cause of an exit from recorded evidence alone.

    Args:
        returncode: exit status, or minus the signal number, as ``subprocess`` gives it.
        oom_before: the cgroup's ``oom_kill`` count when the run began; None when not readable.
        oom_after: the same when it ended.
        kernel_line: a kernel log record that says the out-of-memory killer chose this process id.
        supervisor_action: why the supervisor itself killed the process, when it did.
    """
    if supervisor_action is not None:
        return supervisor_action
    if returncode in (-signal.SIGKILL, _SHELL_KILLED):
        counted = oom_before is not None and oom_after is not None and oom_after > oom_before
        return "oom_killed" if counted or kernel_line is not None else "killed_cause_unknown"
    if returncode is None:
        return "killed_cause_unknown"
    return "signalled" if returncode < 0 else "exited"


@dataclass(frozen=True)
class MemoryCgroup:
    """The memory cgroup of one process: its ``version``, 1 or 2, and its folder under the cgroup file system."""

    version: int
    folder: Path

    def oom_kills(self) -> int | None:
        """Return the kernel's count of processes killed in this cgroup, or None when it cannot be read."""
        name = "memory.events" if self.version == 2 else "memory.oom_control"
        try:
            text = (self.folder / name).read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError):
            return None
        found = re.search(r"^oom_kill (\d{1,18})$", text, re.MULTILINE)
        return int(found.group(1)) if found else None


def memory_cgroup(pid: int | str = "self") -> MemoryCgroup | None:
    """Find the memory cgroup of a process: the v1 memory controller where one is mounted, else v2.

    Returns None when the process is gone, or no memory controller can be read from here.
    """
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8").splitlines()
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    members = dict(line.split(":", 2)[1:] for line in lines if line.count(":") >= 2)
    for controllers, path in members.items():
        if "memory" in controllers.split(","):
            return _mounted(1, path, mounts)
    return _mounted(2, members[""], mounts) if "" in members else None


def _mounted(version: int, path: str, mounts: list[str]) -> MemoryCgroup | None:
    kind, counter = ("cgroup2", "memory.events") if version == 2 else ("cgroup", "memory.oom_control")
    for line in mounts:
        left, _, right = line.partition(" - ")
        fields, tail = left.split(" "), right.split(" ")
        if len(fields) < 5 or tail[0] != kind or (version == 1 and "memory" not in tail[-1].split(",")):
            continue
        root, mount = fields[3], Path(fields[4])
        # In a container the mount may show only a subtree, whose root is then a prefix of the process's path.
        inside = os.path.relpath(path, root) if path.startswith(root.rstrip("/") + "/") or path == root else path
        folder = mount / inside.lstrip("/")
        if (folder / counter).is_file():
            return MemoryCgroup(version, folder)
    return None


class OomCounter:
    """Follows the ``oom_kill`` counter of one process's cgroup while the process lives, even if it is moved.

    ``before`` and ``after`` belong to the same cgroup: the one the process was last seen in.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._cgroup = memory_cgroup(pid)
        self.before = self._cgroup.oom_kills() if self._cgroup else None
        self._moved: tuple[MemoryCgroup, int | None] | None = None

    def poll(self) -> None:
        """Look where the process is now; after a move, count anew there.

        A dying process is shown in the root cgroup (v1) for a moment before it is shown dead, so a move counts only
        when the next look, by then at a living process, confirms it.
        """
        now = memory_cgroup(self._pid)
        if now is None or now == self._cgroup or not _alive(self._pid):
            self._moved = None
        elif self._moved is not None and self._moved[0] == now:
            self._cgroup, self.before = self._moved
            self._moved = None
        else:
            self._moved = now, now.oom_kills()

    def record(self) -> dict[str, str | int | None]:
        """Return ``{"source", "before", "after"}``; source is None when no counter could be read."""
        after = self._cgroup.oom_kills() if self._cgroup else None
        if self._cgroup is None or self.before is None or after is None:
            return dict.fromkeys(("source", "before", "after"))
        return {"source": f"cgroup v{self._cgroup.version} oom_kill", "before": self.before, "after": after}


def _alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[:1] not in (["Z"], ["X"], [])


class KernelLog:
    """The kernel log from now on, where this user may read it; otherwise nothing, and ``readable`` is False."""

    def __init__(self) -> None:
        self._handle: int | None = None
        try:
            self._handle = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._handle, 0, os.SEEK_END)
        except OSError:
            self.close()

    @property
    def readable(self) -> bool:
        """Return whether the log could be opened."""
        return self._handle is not None

    def oom_line(self, pid: int) -> str | None:
        """Return the first new record in which the out-of-memory killer names ``pid``, or None. Bounded."""
        wanted = oom_pattern(pid)
        for _ in range(_KERNEL_RECORDS if self._handle is not None else 0):
            try:
                record = os.read(self._handle or 0, 8192).decode("utf-8", "replace")
            except BlockingIOError:
                return None
            except OSError:
                continue  # EPIPE: records were overwritten before we read them; the next read goes on after the gap
            text = record.partition(";")[2].splitlines()[:1]
            if text and wanted.search(text[0]):
                return text[0][:400]
        return None

    def close(self) -> None:
        """Close the log."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def oom_pattern(pid: int) -> re.Pattern[str]:
    """Match both kernel wordings that name a victim: ``oom-kill:…,pid=N`` and ``Killed process N``."""
    return re.compile(rf"oom-kill:[^\n]{{0,300}}\bpid={pid}\b|Killed process {pid}\b")
