"""Sessions: falsify (the gate), tests, lint, types, kernels, docs;
portability, nightly, sabotage, mutants, bench, parity, real, fuzz, package, wheels.

One environment for all, keyed by pyproject.toml, the constraints and the interpreter: it is made once and reused by
every session until one of them changes. The package is installed in place: edits take effect without installing again.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tomllib
from pathlib import Path

import nox

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "tests" / "support"))
import portability as portable  # noqa: E402 - it lies with the tests, which test it

nox.options.sessions = ["falsify", "tests", "lint", "types", "kernels", "docs"]
nox.options.error_on_missing_interpreters = True

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
LLAMA_CPP_PYTHON = "0.3.36"
# What a GB10 installs; its system Python is 3.12.
AARCH64 = (
    "--python-version",
    "3.12",
    "--platform=manylinux2014_aarch64",
    *(f"--platform=manylinux_2_{n}_aarch64" for n in range(17, 40)),
)
PACKAGES = ("harness", "trainer", "contracts", "evidence")


def has_nvidia_device() -> bool:
    """Return whether a GPU is there for CUDA, by the driver's own files."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()


def environment(session: nox.Session, interpreter: str = sys.executable) -> Path:
    """Return the bin folder of the shared environment of an interpreter, made on first use."""
    cuda, version = has_nvidia_device(), sys.version
    if interpreter != sys.executable:
        asked = [interpreter, "-c", "import sys; print(sys.version)"]
        version = str(session.run(*asked, external=True, silent=True)).strip()
    # An interpreter that already has torch on a GPU machine keeps it: nothing better could be downloaded.
    inherit = cuda and interpreter == sys.executable and importlib.util.find_spec("torch") is not None
    constraints = ROOT / ("constraints-cuda.txt" if cuda else "constraints-cpu.txt")
    key = hashlib.sha256()
    texts = ((ROOT / "pyproject.toml").read_bytes(), constraints.read_bytes(), version.encode(), bytes([inherit]))
    for part in texts:
        key.update(hashlib.sha256(part).digest())
    folder = Path(session.cache_dir) / f"q4kd-{key.hexdigest()[:12]}"
    bin_folder = folder / "bin"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        options = ["--system-site-packages"] if inherit else []
        session.run(interpreter, "-m", "venv", *options, str(folder), external=True)
        extras = "train,dev,docs,cuda13" if cuda and not inherit else "train,dev,docs"
        limits = [] if inherit else ["-c", str(constraints)]
        pip = str(bin_folder / "pip")
        session.run(pip, "install", "--quiet", *limits, "-e", f"{ROOT}[{extras}]", external=True)
        (folder / "complete").touch()
    return bin_folder


def on_every_core() -> list[str]:
    """Return pytest's options for a process a core, each with one stretch of the tests: few set a module up twice."""
    return ["-n", str(len(os.sched_getaffinity(0))), "--dist", "worksteal"]


def q4kd(session: nox.Session, *arguments: str, codes: tuple[int, ...] = (0,)) -> None:
    session.run(
        str(environment(session) / "python"), "-m", "q4kd.harness", *arguments, external=True, success_codes=list(codes)
    )


@nox.session(venv_backend="none")
def falsify(session: nox.Session) -> None:
    """Try to refute every claim; leaves an evidence bundle. Options after ``--`` go to ``q4kd falsify``."""
    q4kd(session, "falsify", "--contracts", "contracts", *session.posargs)


@nox.session(venv_backend="none")
def sabotage(session: nox.Session) -> None:
    """Plant every fault for real and refresh the kill records. Options after ``--`` go to ``q4kd sabotage``."""
    q4kd(session, "sabotage", "--contracts", "contracts", *session.posargs)


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Unit, property and command-line tests. Arguments after ``--`` go to pytest."""
    python = str(environment(session) / "python")
    arguments = session.posargs or on_every_core()
    # One thread each: two processes with two threads each would fight for two cores.
    session.run(python, "-m", "pytest", *arguments, env={"OMP_NUM_THREADS": "1"}, external=True)


@nox.session(venv_backend="none")
def portability(session: nox.Session) -> None:
    """Tests and gate under forced instruction sets, numbers of threads, other Pythons. ``-- --list`` names them."""
    options, flags = portable.parse(session.posargs), portable.processor_flags()
    pythons = portable.find_pythons()
    variants = portable.make_variants(flags, pythons)
    if options.list:
        session.log(", ".join(variant.name for variant in variants))
        return
    outcomes, chosen = [], portable.select(variants, options, portable.levels(flags))
    if not chosen:
        session.log("this processor has one instruction set, which the other sessions use")
        return
    for variant in chosen:
        python = environment(session, pythons[variant.python] if variant.python else sys.executable) / "python"
        outcomes.append(portable.run_variant(variant, str(python), numeric=options.numeric))
    print("\n".join(portable.table(outcomes)))
    if not all(outcome.is_green for outcome in outcomes):
        session.error("not every variant is green")


@nox.session(venv_backend="none")
def nightly(session: nox.Session) -> None:
    """A night: preflight, sabotage, falsify, bundle, verify, index. Options after ``--`` go to ``q4kd nightly``."""
    q4kd(session, "nightly", "--contracts", "contracts", *session.posargs)


@nox.session(venv_backend="none")
def docs(session: nox.Session) -> None:
    """Build the documentation into build/site; a broken link is an error. Arguments after ``--`` go to mkdocs."""
    python, arguments = str(environment(session) / "python"), session.posargs or ["build", "--strict"]
    session.run(python, "-m", "mkdocs", *arguments, env={"NO_MKDOCS_2_WARNING": "1"}, external=True)


@nox.session(venv_backend="none")
def package(session: nox.Session) -> None:
    """Sdist and wheel; base and [train] installs in empty environments, run outside the checkout. About 1.5 GB."""
    work = Path(session.create_tmp()).resolve()
    dist = work / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    session.run(str(environment(session) / "python"), "-m", "build", "--outdir", str(dist), str(ROOT), external=True)
    (wheel,) = dist.glob("q4kd-*.whl")
    committed = [str(path) for path in sorted((ROOT / "evidence" / "bundles").glob("*.tar.*"))]
    size = "expected: {Q4_K: 144, Q6_K: 210}"
    for extra in ("", "[train]"):
        folder, place = work / f"venv{extra.strip('[]')}", work / f"empty{extra.strip('[]')}"
        for path in (folder, place):
            shutil.rmtree(path, ignore_errors=True)
        place.mkdir()
        session.run(sys.executable, "-m", "venv", str(folder), external=True)
        limits = ["-c", str(ROOT / "constraints-cpu.txt")] if extra else []
        session.run(str(folder / "bin/pip"), "install", "--quiet", *limits, f"{wheel}{extra}", external=True)
        command = str(folder / "bin/q4kd")
        with session.chdir(place):
            # Without torch the doctor has something to say; with it, nothing may be missing.
            session.run(command, "doctor", external=True, success_codes=[0] if extra else [1])
            session.run(command, "contracts", "show", "kd-signal-v1", external=True, silent=True)
            for bundle in committed:
                session.run(command, "evidence", "verify", bundle, external=True)
            if extra:
                text = (ROOT / "README.md").read_text(encoding="utf-8").partition("```yaml\n")[2].partition("```")[0]
                Path("claims").mkdir()
                Path("claims/size.yaml").write_text(text.replace("Q4_K: 143", "Q4_K: 144"), encoding="utf-8")
                assert size in Path("claims/size.yaml").read_text(encoding="utf-8")
                shared = ["--contracts", "claims", "--profile", "cpu", "--kills", "kills"]
                session.run(command, "sabotage", *shared, external=True)
                session.run(command, "falsify", *shared, "--out", "bundle", external=True)
                session.run(command, "evidence", "verify", "bundle", external=True)


@nox.session(venv_backend="none")
def wheels(session: nox.Session) -> None:
    """Ask the package index for an aarch64 wheel of everything a GB10 installs. Downloads none of them."""
    needed = [*PROJECT["dependencies"], *EXTRAS["train"], *EXTRAS["cuda13"], *EXTRAS["bnb"]]
    report = Path(session.create_tmp()) / "wheels.json"
    pip = [str(environment(session) / "python"), "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    options = ["--no-deps", "--only-binary=:all:", "--target", str(report.parent / "nowhere"), *AARCH64]
    session.run(*pip, *options, "--report", str(report), *needed, external=True)
    found = json.loads(report.read_text(encoding="utf-8"))["install"]
    for item in sorted(item["download_info"]["url"].rsplit("/", 1)[-1] for item in found):
        session.log(item)
    if len(found) != len(needed):
        session.error(f"{len(needed)} needed, {len(found)} found")


@nox.session(venv_backend="none")
def real(session: nox.Session) -> None:
    """The way of a pair of yours: ``-- --teacher T.gguf --student FOLDER --data TEXTS``; leaves an evidence bundle.

    Logits beside transformers, plan and need, 200 steps, a stop and a resumption, export to GGUF and back.
    """
    folder = Path(session.create_tmp()) / "contracts"
    folder.mkdir(exist_ok=True)
    # The contract by itself: a selection out of all of them could not end with 0.
    shutil.copyfile(ROOT / "contracts" / "real-pair-v1.yaml", folder / "real-pair-v1.yaml")
    q4kd(session, "falsify", "--contracts", str(folder), *session.posargs)


@nox.session(venv_backend="none")
def parity(session: nox.Session) -> None:
    """Beside llama.cpp, file by file: build it once (about 11 minutes on two cores; the wheel is kept), run both.

    Options after ``--`` go to pytest, such as ``--parity-out evidence/logs/parity/x86_64.json``, and
    ``--parity-file FILE.gguf`` for files of yours, which it also runs decoded to F32.
    """
    folder = environment(session)
    pip, wheels = str(folder / "pip"), Path(session.cache_dir) / "wheels"
    built, requirement = f"llama_cpp_python-{LLAMA_CPP_PYTHON}-*.whl", f"llama-cpp-python=={LLAMA_CPP_PYTHON}"
    if not any(wheels.glob(built)):
        session.run(pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(wheels), requirement, external=True)
    session.run(pip, "install", "--quiet", str(next(wheels.glob(built))), external=True)
    files = [str(path) for path in sorted((ROOT / "tests/trainer/llamacpp").glob("test_*.py"))]
    session.run(str(folder / "python"), "-m", "pytest", *files, *session.posargs, external=True)


@nox.session(venv_backend="none")
def kernels(session: nox.Session) -> None:
    """Every CUDA kernel compiled for every architecture, and the decoders run on the host. Needs no GPU."""
    folder = environment(session)
    # CuPy for its NVRTC binding, and NVRTC itself: both install and compile without a GPU.
    session.run(str(folder / "pip"), "install", "--quiet", *EXTRAS["cuda13"], external=True)
    # Without this variable a missing compiler skips the tests; here it fails them.
    files = [f"tests/trainer/kernels/test_{name}.py" for name in ("compile", "kernels_host")]
    session.run(
        *(str(folder / "python"), "-m", "pytest", *files, *(session.posargs or on_every_core())),
        env={"Q4KD_REQUIRE_KERNELS": "1", "OMP_NUM_THREADS": "1"},
        external=True,
    )


@nox.session(venv_backend="none")
def browser(session: nox.Session) -> None:
    """The reviewer's pages in Chromium. It installs none: without one the tests fail here and skip in ``tests``."""
    python = str(environment(session) / "python")
    arguments = ("-m", "pytest", "tests/harness/report/test_browser.py", *session.posargs)
    session.run(python, *arguments, env={"Q4KD_REQUIRE_BROWSER": "1"}, external=True)


@nox.session(venv_backend="none")
def fuzz(session: nox.Session) -> None:
    """100,000 mutated model files against the readers: about ten minutes. Options after ``--`` replace the count."""
    options = session.posargs or ["--cases", "100000"]
    session.run(str(environment(session) / "python"), "tests/support/fuzz_models.py", *options, external=True)


@nox.session(venv_backend="none")
def mutants(session: nox.Session) -> None:
    """Generated faults in the trainer's source: who sees them? Resumable. ``-- --help`` lists options."""
    python = str(environment(session) / "python")
    env = {"PYTHONPATH": str(ROOT / "tests" / "support")}
    session.run(python, "-m", "mutants", *session.posargs, env=env, external=True)


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """``q4kd bench`` with the options after ``--``, such as ``teacher --against llama.cpp``."""
    q4kd(session, "bench", *session.posargs)


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """Ruff, rules and format; then import-linter: the layers of ARCHITECTURE.md, and no circle of imports."""
    folder = environment(session)
    ruff = str(folder / "ruff")
    session.run(ruff, "check", ".", external=True)
    session.run(ruff, "format", "--check", ".", external=True)
    imports = [str(folder / "lint-imports"), "--no-logo", "--cache-dir", str(Path(session.cache_dir) / "imports")]
    session.run(*imports, external=True)


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Mypy, strict, under the names the packages are installed by."""
    mypy = (environment(session) / "mypy").resolve()
    view = Path(session.cache_dir).resolve() / "types" / "q4kd"
    view.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        link = view / package
        if not link.is_symlink():
            link.symlink_to(ROOT / package)
    with session.chdir(view.parent):
        session.run(
            str(mypy),
            "--config-file",
            str(ROOT / "pyproject.toml"),
            "--cache-dir",
            str(view.parent / "cache"),
            *[word for package in ("harness", "trainer") for word in ("-p", f"q4kd.{package}")],
            external=True,
        )
