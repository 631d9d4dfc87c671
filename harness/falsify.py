"""Conductor of ``q4kd falsify``: pytest in a process of its own, then the verdict of the findings it left.

The exit code comes from ``findings.json``, never from pytest: pytest counts an all-skipped run as a success.
"""

import importlib.util
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, MutableMapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from q4kd.harness.runs.user_inputs import GivenFiles
from q4kd.trainer.errors import InputError, for_terminal
from q4kd.trainer.files import read_json

if TYPE_CHECKING:
    from q4kd.harness.claims.model import Contract

INCONCLUSIVE_EXIT = 2
_GRACE_S = 30.0
# Both would change what runs: more options, more plugins.
_NOT_PASSED_ON = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS")


def new_bundle_path(profile: str) -> Path:
    """Return ``bundles/<utc>-<profile>-<short id>`` below the working folder; it does not exist yet."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    return Path("bundles") / f"{stamp}-{profile}-{secrets.token_hex(3)}"


def require_packages(contracts: Iterable["Contract"]) -> None:
    """Refuse to start where every run of ours would end at the import of torch: a base install only reads.

    Raises:
        ModuleNotFoundError: which the command line answers with the extra to install.
    """
    from q4kd.harness.runs.experiment import EXPERIMENTS

    if importlib.util.find_spec("torch") is not None:
        return
    claims = [claim for contract in contracts for claim in contract.claims if claim.falsifier is not None]
    names = {claim.falsifier.experiment for claim in claims if claim.falsifier is not None}
    # Another project's experiments may well need no torch.
    if any(name in EXPERIMENTS and EXPERIMENTS.module(name).startswith("q4kd.") for name in names):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")


def refuse_used(folder: Path, what: str = "the bundle", option: str = "--out") -> Path:
    """Return ``folder`` when it does not exist or is an empty one (InputError): nothing is written over."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        expected = f"a new or empty folder for {what}"
        raise InputError(str(folder), expected=expected, got="one in use", remedy=f"name another with {option}")
    return folder


def falsify(
    contracts: Path | None,
    profile: str | None,
    keyword: str | None,
    out: Path | None,
    workers: int | None = None,
    kills: Path | None = None,
    sign: Path | None = None,
    given: GivenFiles | None = None,
    inputs: Path | None = None,
    waivers: Path | None = None,
    changed: str | None = None,
    isolation: str = "fork",
    quiet: bool = False,
) -> int:
    """Run every falsifier of a folder of contracts and return the exit code of the findings.

    Args:
        contracts: folder of contracts; None means the installed ones.
        profile: machine profile; None means that of the GPU present, else ``cpu``.
        keyword: only claims that match, as pytest's ``-k``; the scope is then partial and the gate cannot pass.
        out: folder of the bundle; None means a new one under ``bundles/``.
        workers: cores that runs take together; None or 0 stands for what this machine has.
        kills: folder of kill records; None means the installed ones of the profile.
        sign: file of an Ed25519 private key to sign the bundle with.
        given: files to use in the place of made inputs.
        inputs: folder for made inputs, kept; None means one that is removed.
        waivers: file of waivers for claims that may be inconclusive.
        changed: bundle to carry runs from that nothing has touched since; "" means the newest verified one in
            ``bundles/``, None that everything is run.
        isolation: "fork" forks runs that measure results alone from a process that has imported torch; "process"
            starts every run by itself.
        quiet: print no progress.

    Returns:
        1 when a required claim is falsified; else 2 when one is inconclusive or none ran; else 0.

    Raises:
        InputError: for contracts, a profile, a key, waivers, a base or a bundle folder that cannot be used.
    """
    from q4kd.harness.claims.contract import load_contracts
    from q4kd.harness.claims.folder import default_contracts_folder
    from q4kd.harness.claims.profile import detect_profile, load_profile

    folder = (contracts or default_contracts_folder()).resolve()
    loaded = load_contracts(folder)
    require_packages(loaded)
    if waivers is not None:
        from q4kd.harness.claims.waivers import load_waivers

        load_waivers(waivers, {claim.key for contract in loaded for claim in contract.claims})
    name = profile or detect_profile()
    load_profile(name, folder)
    bundle = refuse_used(out or new_bundle_path(name)).resolve()
    if sign is not None:
        from q4kd.harness.bundle.dsse import load_private_key

        load_private_key(sign)  # refused now, not after everything has run
    with tempfile.TemporaryDirectory(prefix="q4kd-pytest-", ignore_cleanup_errors=True) as root:
        config = Path(root) / "pytest.ini"
        config.write_text("[pytest]\n", encoding="utf-8")
        command = pytest_command(folder, name, keyword, bundle, workers, kills, config)
        command += [word for role, path in (given or GivenFiles()).paths() for word in (f"--given-{role}", str(path))]
        command += ["--inputs", str(inputs.resolve())] if inputs is not None else []
        if waivers is not None:
            command += ["--waivers", str(waivers.resolve())]
        if changed is not None:
            order = Path(root) / "carried.json"
            _order(order, Path(changed) if changed else None, loaded, folder, name, keyword, given or GivenFiles())
            command += ["--carried", str(order)]
        command += ["--isolation", isolation, *(["-q"] if quiet else [])]
        status = _run(command)
    code = exit_code(bundle, status)
    if sign is not None and (bundle / "MANIFEST.sha256").is_file():
        from q4kd.harness.bundle.signing import sign_bundle

        print(f"\nsigned by {sign_bundle(bundle, sign)}")
    shown = for_terminal(Path(os.path.relpath(bundle)) if bundle.is_relative_to(Path.cwd()) else bundle)
    if (bundle / "findings.json").is_file():
        print(f"\nevidence: {shown}\nverify it with: q4kd evidence verify {shown}", flush=True)
    else:
        print(f"q4kd: no findings were written (pytest ended with {status})", file=sys.stderr)
    return code


def _order(
    order: Path,
    base: Path | None,
    contracts: Sequence["Contract"],
    folder: Path,
    profile: str,
    keyword: str | None,
    given: GivenFiles,
) -> None:
    """Decide what is carried from the base, say so, and write it down for the session."""
    from q4kd.harness.bundle.environment import environment
    from q4kd.harness.changed.base import find_base
    from q4kd.harness.changed.carry import decide, experiments_of, lines, write_order
    from q4kd.harness.changed.dependencies import sources_stamp
    from q4kd.harness.claims.plan import make_plan
    from q4kd.harness.claims.profile import find_extras, load_profile

    stamp, machine = sources_stamp(), environment(profile)
    found = find_base(base, profile, machine)
    plan = make_plan(
        contracts, load_profile(profile, folder), keyword, given=given.names(), extras=find_extras(given=given.names())
    )
    decisions = decide(found, experiments_of(plan, contracts), machine, given)
    for line in lines(found, decisions):
        print(line, flush=True)
    write_order(order, found, decisions, stamp)


def pytest_command(
    folder: Path,
    profile: str,
    keyword: str | None,
    bundle: Path,
    workers: int | None,
    kills: Path | None,
    config: Path,
) -> list[str]:
    """Return the pytest command: our plugin, nothing else that is installed, and no module of the current folder.

    Contracts come from others, and the folder they lie in may hold a ``yaml.py`` (``-P``, as wherever a module is run).
    """
    command = [sys.executable, "-P", "-m", "pytest", "-c", str(config), "--rootdir", str(Path.cwd()), "--noconftest"]
    command += ["-p", "no:cacheprovider", "-p", "q4kd.harness.plugin", "--contracts", str(folder)]
    command += ["--profile", profile, "--bundle", str(bundle), "-ra"]
    if workers:
        command += ["--run-workers", str(workers)]
    if keyword is not None:
        command += ["-k", keyword]
    if kills is not None:
        command += ["--kills", str(kills.resolve())]
    # Named, it is all that is collected: no test of the current folder is.
    return [*command, str(folder)]


def one_thread_of_blas(env: MutableMapping[str, str] = os.environ) -> None:
    """Let NumPy's products in this process take one thread, before NumPy is imported.

    References are computed beside runs that hold the cores: more threads would wait for each other, spinning. Runs get
    an environment of their own (``supervise.child_environment``).
    """
    env.setdefault("OPENBLAS_NUM_THREADS", "1")


def _run(command: list[str]) -> int:
    env = {key: value for key, value in os.environ.items() if key not in _NOT_PASSED_ON}
    env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    one_thread_of_blas(env)
    sys.stdout.flush()
    process = subprocess.Popen(command, env=env)
    main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, _stop) if main_thread else None
    try:
        return process.wait()
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, previous)
        if process.poll() is None:  # interrupted: let pytest kill its runs and write what it has
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _stop(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def exit_code(bundle: Path, pytest_status: int) -> int:
    """Return the findings' exit code; a pytest that crashed, or left no findings, is never better than inconclusive."""
    try:
        code = read_json(bundle / "findings.json")["exit_code"]
    except (InputError, KeyError, TypeError):
        return INCONCLUSIVE_EXIT
    if code not in (0, 1, 2):
        return INCONCLUSIVE_EXIT
    crashed = pytest_status not in (0, 1, 2, 5)
    return INCONCLUSIVE_EXIT if crashed and code == 0 else int(code)
