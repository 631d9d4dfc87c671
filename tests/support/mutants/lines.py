"""Which lines of the trainer a run executes, its supervised children included.

A ``sitecustomize`` on the private PYTHONPATH records them, so every interpreter that starts there does. A line is
written when it is first executed: of a process that is killed, everything up to its end is known.
"""

from pathlib import Path

_HOOK = '''\
"""Records the lines of {prefix} that this interpreter executes in {out}."""
import os
import sys

PREFIX, OUT = {prefix!r}, {out!r}
_file = os.open(OUT, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
_seen = set()


def _note(code, line):
    if (code.co_filename, line) not in _seen:
        _seen.add((code.co_filename, line))
        try:
            os.write(_file, f"{{code.co_filename[len(PREFIX):]}}:{{line}}\\n".encode())
        except OSError:
            pass  # the program closed every file that it knew of


if sys.version_info >= (3, 12):
    _monitoring = sys.monitoring
    _events = _monitoring.events
    # A forked process inherits the number, and this file is imported once more in it.
    if _monitoring.get_tool(4) is None:
        _monitoring.use_tool_id(4, "q4kd-mutants")

    def _line(code, line):
        _note(code, line)
        return _monitoring.DISABLE

    def _start(code, _offset):
        if code.co_filename.startswith(PREFIX):
            _monitoring.set_local_events(4, code, _events.LINE)
        return _monitoring.DISABLE

    _monitoring.register_callback(4, _events.LINE, _line)
    _monitoring.register_callback(4, _events.PY_START, _start)
    _monitoring.set_events(4, _events.PY_START)
else:
    import threading

    _left = {{}}  # lines of a function that have not been executed yet: without any, it is no longer followed

    def _local(frame, event, _argument):
        if event == "line":
            _note(frame.f_code, frame.f_lineno)
            _left[frame.f_code].discard(frame.f_lineno)
        return _local

    def _global(frame, _event, _argument):
        code = frame.f_code
        if not code.co_filename.startswith(PREFIX):
            return None
        if code not in _left:
            lines = {{line for _, _, line in code.co_lines() if line}}
            # That of ``def`` is executed outside, unless the whole function stands on it.
            _left[code] = lines - {{code.co_firstlineno}} or lines
        return _local if _left[code] else None

    threading.settrace(_global)
    sys.settrace(_global)
'''


def start_recording(path: Path, out: Path) -> None:
    """Record what interpreters with ``path`` first on PYTHONPATH execute of the trainer, in the file ``out``."""
    prefix = f"{path / 'q4kd' / 'trainer'}/"
    (path / "sitecustomize.py").write_text(_HOOK.format(prefix=prefix, out=str(out)), encoding="utf-8")


def stop_recording(path: Path) -> None:
    """Record nothing of interpreters that start from now on."""
    (path / "sitecustomize.py").unlink(missing_ok=True)


def read_lines(out: Path) -> dict[str, list[int]]:
    """Return the recorded lines, sorted, by module (``trainer/loss/fused.py``)."""
    found: dict[str, set[int]] = {}
    for record in out.read_text(encoding="utf-8").splitlines() if out.exists() else []:
        module, _, line = record.rpartition(":")
        if module and line.isdecimal():
            found.setdefault(f"trainer/{module}", set()).add(int(line))
    return {module: sorted(lines) for module, lines in sorted(found.items())}
