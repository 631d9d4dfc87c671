"""The nightly run: preflight, every planted fault, every falsifier, the bundle, its verification and the index.

Each stage is a process of its own, so that one that dies takes nothing with it. A night that a crash or a reboot cut
off goes on where it stopped; a stage that was cut off begins again, because evidence of two boots must not mix.
"""

import hashlib
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

from filelock import FileLock, Timeout

from q4kd.harness.bundle.environment import git_state
from q4kd.harness.claims.profile import load_profile
from q4kd.harness.doctor import doctor_lines
from q4kd.harness.nightly.disk import Bounds, packed_in, preflight, prune_bundles
from q4kd.harness.nightly.stage import StageRunner
from q4kd.harness.nightly.state import read_night, take_up
from q4kd.harness.runs.supervise import boot_id
from q4kd.harness.runs.user_folder import lock_folder
from q4kd.harness.runs.user_inputs import GivenFiles
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import sha256_file
from q4kd.trainer.made import MadeThings

Faults = Literal["all", "changed", "none"]
LAST_STAGE = "index"
INCONCLUSIVE_EXIT = 2
_INTERRUPTED = 130
# Folders that each night leaves in the place of the last one's, and what they are while they are made.
_PUBLISHED = ("kills", "site")
_DRAFTS = {name: f".{name}.tmp" for name in _PUBLISHED}


@dataclass(frozen=True, kw_only=True)
class NightlyOptions:
    """What a night does, with its state, bundles, logs and index in the folder ``out``.

    ``faults`` is ``all`` to plant every fault anew, ``changed`` for those without a valid record, ``none`` to trust the
    records. ``again`` begins a new night although this one is finished. ``contracts`` is None for the installed ones.
    """

    out: Path
    profile: str
    contracts: Path | None
    given: GivenFiles
    faults: Faults
    bounds: Bounds
    sign: Path | None = None
    again: bool = False


def run_nightly(options: NightlyOptions) -> int:
    """Run a night, or what is left of it, and return the exit code of ``falsify``; 2 when it came to no verdict.

    Raises:
        InputError: when another night is running, or the state or the options cannot be used.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for lock in (options.out / ".nightly.lock", host_lock()):
            _hold(stack, lock)
        previous = signal.signal(signal.SIGTERM, _stop)
        stack.callback(signal.signal, signal.SIGTERM, previous)
        return _Run(options).to_the_end()


def host_lock() -> Path:
    """Return the lock file that keeps two nights of one user off this machine at once, whatever their folders."""
    return lock_folder() / "q4kd-nightly.lock"


def _hold(stack: ExitStack, path: Path) -> None:
    try:
        stack.enter_context(FileLock(path, timeout=0))
    except Timeout as error:
        got, remedy = "another that runs", f"wait for it ({path})"
        raise InputError("q4kd nightly", expected="to be the only one", got=got, remedy=remedy) from error


def _stop(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def night_key(options: NightlyOptions) -> dict[str, Any]:
    """Return what makes two nights the same work. Reads every given file and every source once, for their digests."""
    from q4kd.harness.claims.folder import contract_files, default_contracts_folder

    package = Path(__file__).resolve().parents[1]
    contracts = options.contracts or default_contracts_folder()
    return {
        "commit": git_state(package)[0],
        # A commit says nothing of what was edited since.
        "code": _digest([*package.rglob("*.py"), *(package.parent / "trainer").rglob("*.py")]),
        "contracts": _digest([*contract_files(contracts), *contracts.glob("profiles/*.yaml")]),
        "profile": options.profile,
        "faults": options.faults,
        "given": {name: entry["sha256"] for name, entry in options.given.digests().items()},
    }


def _digest(paths: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(f"{path.name} {sha256_file(path)}\n".encode())
    return total.hexdigest()


class _Run:
    """A night in progress."""

    def __init__(self, options: NightlyOptions) -> None:
        self.options, self.out = options, options.out.resolve()
        self.state_path = self.out / "state.json"
        recorded, now = read_night(self.state_path), time.time()
        name = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(now))}-{options.profile}"
        recorded = None if recorded is not None and options.again and recorded.done(LAST_STAGE) else recorded
        self.night = take_up(recorded, night_key(options), name, LAST_STAGE, now)
        self.work = self.out / "work" / self.night.name
        self.bundle = self.work / self.night.name
        self.packed = self.out / "bundles" / f"{self.night.name}.tar.xz"
        log = self.out / "logs" / f"{self.night.name}.log"
        # The folder may hold other things: of these names alone anything is removed, and now is the time to say no.
        self.made = MadeThings(self.out)
        self.made.check(*_PUBLISHED)
        self.made.own(*(path.relative_to(self.out).as_posix() for path in (self.work, self.packed, log)))
        for folder in (self.work, self.packed.parent, log.parent):
            folder.mkdir(parents=True, exist_ok=True)
        self.stages = StageRunner(self.out / ".stage.lock", log)

    def to_the_end(self) -> int:
        """Run the stages that are not finished."""
        begun = bool(self.night.boots)
        if self.night.done(LAST_STAGE):
            self._clear_work()
            self.stages.say("nightly", f"{self.night.name}: nothing left to do; --again begins another")
            return self._verdict()
        boot = boot_id()
        if self.night.boots[-1:] != [boot]:
            self.night.boots.append(boot)
        self.night.save(self.state_path)
        done = ", ".join(self.night.stages) or "nothing"
        self.stages.say(
            "nightly", f"{self.night.name}, boot {boot}: " + (f"goes on after {done}" if begun else "begins")
        )
        self.stages.wait_for_orphan()
        self._sweep()
        if not self._preflight():
            return INCONCLUSIVE_EXIT
        stages: tuple[tuple[str, Callable[[], int]], ...] = (
            ("sabotage", self._sabotage),
            ("falsify", self._falsify),
            ("bundle", self._pack),
            ("verify", self._verify),
            (LAST_STAGE, self._index),
        )
        for name, run in stages:
            if self.night.done(name):
                self.stages.say(name, f"finished before, code {self.night.code(name)}")
                continue
            started = time.monotonic()
            code = run()
            if code in (_INTERRUPTED, -signal.SIGTERM, -signal.SIGKILL):
                self.stages.say(name, f"was killed (code {code}); the next start repeats it")
                return INCONCLUSIVE_EXIT
            code = code if 0 <= code < 256 else INCONCLUSIVE_EXIT
            self.night.finish(name, code, time.monotonic() - started, self.state_path)
            self.stages.say(name, f"ended with code {code} after {time.monotonic() - started:.0f} s")
        self._clear_work()
        self.stages.say("nightly", f"exit code {self._verdict()}: {self.packed}")
        return self._verdict()

    def _verdict(self) -> int:
        """The gate's own code; a bundle that is missing or does not verify is never better than inconclusive."""
        code = self.night.code("falsify")
        sound = self.night.code("bundle") == 0 and self.night.code("verify") == 0
        return code if code in (1, 2) or (code == 0 and sound) else INCONCLUSIVE_EXIT

    def _sweep(self) -> None:
        """Remove what earlier nights left half done, and their logs beyond the number kept."""
        mine = self.work.relative_to(self.out).as_posix()
        self.made.remove(*(name for name in self.made.names("work") if name != mine))
        self.made.remove(*self.made.names("logs")[: -self.options.bounds.keep])

    def _clear_work(self) -> None:
        self.made.remove(self.work.relative_to(self.out).as_posix())

    def _preflight(self) -> bool:
        lines = preflight(load_profile(self.options.profile, self.options.contracts), self.options.given, self.out)
        missing = [line.subject for line in lines if line.state == "missing"]
        for text in doctor_lines(lines):
            self.stages.say("preflight", text)
        self.stages.say("preflight", f"missing: {', '.join(missing)}" if missing else "nothing is missing")
        return not missing

    def _shared(self) -> list[str]:
        contracts = ["--contracts", str(self.options.contracts.resolve())] if self.options.contracts else []
        kills = [] if self.options.faults == "none" else ["--kills", str(self._kills())]
        return [*contracts, "--profile", self.options.profile, *kills, *self.options.given.options()]

    def _kills(self) -> Path:
        """Return the night's own kill records: none at first, or for ``changed`` a copy of the installed ones."""
        from q4kd.harness.judging.kills import default_kills

        folder = self.work / "kills"
        if not folder.exists():
            installed = default_kills()
            if self.options.faults == "changed" and installed.is_dir():
                shutil.copytree(installed, self.work / ".kills")
                (self.work / ".kills").rename(folder)
            else:
                folder.mkdir()
        return folder

    def _sabotage(self) -> int:
        if self.options.faults == "none":
            return 0
        # In a night taken up again the records of its first part are valid, and --changed leaves them alone.
        changed = ["--changed"] if (self.work / "kills").exists() or self.options.faults == "changed" else []
        shared, runs = self._shared(), self.work / "sabotage"
        shutil.rmtree(runs, ignore_errors=True)
        code = self.stages.spawn("sabotage", [*shared, *changed, "--work", str(runs)])
        shutil.rmtree(runs, ignore_errors=True)
        if code in (0, 1):
            self._publish_kills()
        return code

    def _publish_kills(self) -> None:
        """Leave the night's kill records in ``kills``, from where they can be committed."""
        shutil.copytree(self.work / "kills", self.made.begin(_DRAFTS["kills"]))
        self.made.publish(_DRAFTS["kills"], "kills")

    def _falsify(self) -> int:
        shutil.rmtree(self.bundle, ignore_errors=True)
        sign = ["--sign", str(self.options.sign)] if self.options.sign else []
        inputs = self.work / "inputs"
        code = self.stages.spawn(
            "falsify", [*self._shared(), "--out", str(self.bundle), "--inputs", str(inputs), *sign]
        )
        shutil.rmtree(inputs, ignore_errors=True)
        return code

    def _pack(self) -> int:
        from q4kd.harness.bundle.writer import MANIFEST, pack

        if not (self.bundle / MANIFEST).is_file():
            self.stages.say("bundle", "falsify left no sealed bundle")
            return INCONCLUSIVE_EXIT
        pack(self.bundle, self.packed)
        self.stages.say("bundle", f"{self.packed.name}, {self.packed.stat().st_size:,} bytes")
        bundles = [self.out / name for name in self.made.names("bundles")]
        for path in prune_bundles(bundles, self.options.bounds):
            self.stages.say("bundle", f"removed {path.name}: at most {self.options.bounds.keep} are kept")
        return 0

    def _verify(self) -> int:
        if not self.packed.is_file():
            return INCONCLUSIVE_EXIT
        return self.stages.spawn("verify", [str(self.packed)], ("evidence", "verify"))

    def _index(self) -> int:
        if not packed_in(self.packed.parent):
            return INCONCLUSIVE_EXIT
        # A new one each night: it has no pages of bundles that were pruned.
        draft = self.made.begin(_DRAFTS["site"])
        code = self.stages.spawn("index", [str(self.packed.parent), "--out", str(draft)], ("evidence", "index"))
        if code == 0:
            self.made.publish(_DRAFTS["site"], "site")
        return code
