"""The pytest plugin: ``pytest --contracts DIR`` compiles every claim of the contracts in DIR into a test item.

Without ``--contracts`` it adds its options and does nothing. With it, the claims run beside the tests that pytest would
run without it. A contract is data: no Python file of the folder of contracts is run, a conftest no more than a test.
"""

import functools
import types
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # at run time these come with the first contract, not with every pytest that has q4kd installed
    from q4kd.harness.claims.model import Claim, Contract
    from q4kd.harness.progress import Ticker
    from q4kd.harness.session import Outcome, Session

_SESSION = pytest.StashKey["Session"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("q4kd", "q4kd contracts")
    group.addoption(
        "--contracts", metavar="DIR", help="falsify the contracts in DIR beside the tests; its Python files are not run"
    )
    group.addoption("--profile", metavar="P", help="machine profile (default: that of the GPU present, else cpu)")
    group.addoption("--bundle", metavar="OUT", help="folder of the evidence bundle (default: a new one in bundles/)")
    group.addoption(
        "--kills", metavar="DIR", help="folder of kill records (default: the installed ones of the profile)"
    )
    group.addoption("--inputs", metavar="DIR", help="make inputs here and leave them (default: a folder removed later)")
    for role in ("teacher", "student", "data"):
        group.addoption(f"--given-{role}", metavar="PATH", help=f"{role} to use in the place of the made 7B inputs")
    group.addoption("--carried", metavar="FILE", help="what `q4kd falsify --changed` decided to carry from where")
    group.addoption("--run-workers", type=int, default=0, metavar="N", help="cores for runs (default: what there are)")
    group.addoption("--isolation", choices=("fork", "process"), default="fork", help="see q4kd falsify --help")
    group.addoption("--waivers", metavar="FILE", help="claims that may be inconclusive, by owner, reason and last day")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Keep the conftest files of the folder of contracts from being loaded, before the first one is looked for."""
    contracts = getattr(early_config.known_args_namespace, "contracts", None)
    if contracts and not _without_conftests_of(early_config.pluginmanager, Path(str(contracts)).resolve()):
        early_config.known_args_namespace.noconftest = True


def _without_conftests_of(manager: Any, folder: Path) -> bool:
    """Let a plugin manager take an empty module for each conftest in ``folder``; return whether it could be told to."""
    original = getattr(manager, "_importconftest", None)
    if original is None:  # another pytest than those we know
        return False

    def load(conftestpath: Path, *arguments: object, **options: object) -> object:
        if folder in Path(conftestpath).resolve().parents or folder in Path(conftestpath).absolute().parents:
            return types.ModuleType("conftest")
        return original(conftestpath, *arguments, **options)

    manager._importconftest = load
    return True


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Load the contracts, make the plan and, in the controlling process, open the bundle."""
    if not config.getoption("contracts", None):
        return
    from q4kd.harness.runs.user_inputs import resolve_given
    from q4kd.harness.session import Session
    from q4kd.trainer.errors import InputError

    folder = Path(str(config.getoption("contracts"))).resolve()
    given = [Path(arg.partition("::")[0]) for arg in config.args]
    places = [(config.invocation_params.dir / path).resolve() for path in given]
    if not any(place == folder or folder in place.parents for place in places):
        config.args.append(str(folder))  # beside the tests that were asked for, or that the project names
    worker: dict[str, str] | None = getattr(config, "workerinput", None)
    try:
        session = Session.open(
            folder,
            profile=config.getoption("profile", None),
            keyword=str(config.getoption("keyword", "") or ""),
            bundle=config.getoption("bundle", None),
            kills=config.getoption("kills", None),
            waivers=config.getoption("waivers", None),
            worker=worker,
            dry=bool(config.getoption("collectonly", False)),
            inputs=config.getoption("inputs", None),
            carried=config.getoption("carried", None),
            workers=config.getoption("run_workers", 0) or None,
            isolation=config.getoption("isolation", "fork"),
            given=resolve_given(*(config.getoption(f"given_{role}", None) for role in ("teacher", "student", "data"))),
        )
    except InputError as error:
        raise pytest.UsageError(f"q4kd: {error}") from error
    config.addinivalue_line("markers", "claim: a claim of a contract")
    for name in sorted(
        {name for claim in session.claims.values() if claim.falsifier for name in claim.falsifier.needs}
    ):
        config.addinivalue_line("markers", f"needs_{name}: a claim that needs {name}")
    config.stash[_SESSION] = session
    config.pluginmanager.register(_Running(session, config.args), "q4kd-running")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove what the session kept outside the bundle."""
    session = config.stash.get(_SESSION, None)
    if session is not None:
        session.close()


class _Running:
    """The hooks that only a session with contracts has."""

    def __init__(self, session: "Session", args: list[str]) -> None:
        self._session = session
        self._alone = args == [str(session.folder)]
        self._other_failures = 0
        self._has_line = False

    def pytest_report_header(self) -> list[str]:
        """Name what lies among the contracts and is not loaded."""
        from q4kd.harness.claims.folder import skipped_lines

        return skipped_lines(self._session.folder)

    @pytest.hookimpl(tryfirst=True)
    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        """Ignore whatever else lies in the folder of contracts, Python files above all."""
        if self._session.folder in collection_path.parents:
            return collection_path not in self._session.by_path and collection_path not in self._session.folders
        return None

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        """Keep folders of contracts from being taken for packages, whose ``__init__.py`` pytest would import."""
        if path in self._session.folders or (self._alone and path in self._session.folder.parents):
            folder: pytest.Dir = pytest.Dir.from_parent(parent, path=path)
            return folder
        return None

    def pytest_collect_file(self, file_path: Path, parent: pytest.Collector) -> "ContractFile | None":
        """Make a node of each contract."""
        contract = self._session.by_path.get(file_path)
        if contract is None:
            return None
        # The identity of a claim is contract::id, wherever the file lies.
        file: ContractFile = ContractFile.from_parent(parent, path=file_path, name=contract.name, nodeid=contract.name)
        file.contract, file.running = contract, self._session
        return file

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tell an xdist worker which bundle it works for."""
        node.workerinput.update(self._session.for_worker())

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        """Run the experiments of all items ahead, and say how far they are."""
        config = session.config
        # Under xdist each worker runs what its items ask for; who stops at a failure wants nothing run beyond it.
        alone = self._session.assembles and getattr(config.option, "dist", "no") == "no"
        alone = alone and not config.option.maxfail
        if not alone or config.option.collectonly or session.testsfailed:
            return (yield)
        self._session.run_ahead([item.claim.key for item in session.items if isinstance(item, ClaimItem)])
        ticker = self._open_ticker(config)
        try:
            return (yield)
        finally:
            if ticker is not None:
                ticker.close()
                self._has_line = False

    def _open_ticker(self, config: pytest.Config) -> "Ticker | None":
        """Return what tells the progress; on a terminal its line takes the place of the letters."""
        from q4kd.harness.progress import Ticker

        terminal = config.pluginmanager.get_plugin("terminalreporter")
        if terminal is None or config.option.verbose < 0 or self._session.progress is None:
            return None
        writer = config.get_terminal_writer()
        self._has_line = terminal.isatty and config.option.verbose == 0
        if self._has_line:
            terminal.showfspath = False
        width = writer.fullwidth if self._has_line else None
        return Ticker(self._session.progress, functools.partial(writer.write, flush=True), width)

    @pytest.hookimpl(wrapper=True)
    def pytest_report_teststatus(self) -> Generator[None, Any, Any]:
        """Keep the letter of an item off the line that is written over."""
        status = yield
        return (status[0], "", "") if self._has_line and status else status

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count failures of ordinary tests that run in the same session."""
        if report.failed and report.nodeid not in self._session.claims:
            self._other_failures += 1

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Assemble the bundle; the exit code is that of the findings."""
        if not self._session.assembles:
            return
        code = self._session.finish()
        if exitstatus in (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERRUPTED):
            code = code or 2
        session.exitstatus = code or int(self._other_failures > 0)

    def pytest_terminal_summary(self, terminalreporter: "pytest.TerminalReporter") -> None:
        """Print the verdict of every claim."""
        if not self._session.assembles:
            return
        terminalreporter.section("claims")
        for text, colour in self._session.summary_lines():
            terminalreporter.write_line(text, **({colour: True} if colour else {}))


class ContractFile(pytest.File):
    """One contract file."""

    contract: "Contract"
    running: "Session"

    def collect(self) -> Iterator["ClaimItem"]:
        """Yield an item for each claim in the plan."""
        for claim in self.contract.claims:
            item: ClaimItem = ClaimItem.from_parent(self, name=claim.id)
            item.claim, item.running = claim, self.running
            item.add_marker("claim")
            for name in claim.falsifier.needs if claim.falsifier else ():
                item.add_marker(f"needs_{name}")
            yield item


class ClaimNotCorroborated(Exception):  # noqa: N818 - it is a verdict
    """Raised in an item whose claim was falsified or is inconclusive."""

    def __init__(self, outcome: "Outcome") -> None:
        self.outcome = outcome
        super().__init__(outcome.line)


class ClaimItem(pytest.Item):
    """One claim: running it runs its experiment, if no other item has, and judges what was recorded."""

    claim: "Claim"
    running: "Session"

    def runtest(self) -> None:
        """Evaluate the claim. Falsified and inconclusive both fail: green means corroborated, nothing less."""
        reason = self.running.out_of_scope(self.claim)
        if reason is not None:
            pytest.skip(f"out of scope: {reason}")
        outcome = self.running.evaluate(self.claim)
        if outcome.verdict != "corroborated":
            if not outcome.gating:
                pytest.xfail(f"not gating: {outcome.line}")
            if outcome.waived:
                pytest.xfail(outcome.line)
            raise ClaimNotCorroborated(outcome)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Show what was measured, what it was held against and where the raw evidence lies."""
        if isinstance(excinfo.value, ClaimNotCorroborated):
            return excinfo.value.outcome.text
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        """Point to the claim's line in its contract."""
        return self.path, self.claim.line - 1, self.claim.key
