"""A static site over many bundles: what each found, the history of every claim, trends, loosened bounds.

Bundles are hostile: each is read within the bounds of its store, one at a time; one that cannot be read is listed with
the reason. Reports are rendered anew, never copied out of a bundle.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import lru_cache
from importlib import resources
from pathlib import Path

from q4kd.harness.bundle.findings import read_findings
from q4kd.harness.bundle.recheck import bundle_contracts, read_plan
from q4kd.harness.bundle.writer import manifest_of, manifest_text
from q4kd.harness.claims.model import Contract
from q4kd.harness.records.packing import SUFFIXES, stem_of
from q4kd.harness.records.store import Store, open_store, read_object
from q4kd.harness.report.html import render
from q4kd.harness.report.site_collection import Collection, Entry
from q4kd.harness.report.site_pages import render_site
from q4kd.harness.report.trends import measures_of
from q4kd.harness.report.verdict import commit_of, moment_of, verdict_of
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import write_atomic
from q4kd.trainer.made import MadeThings

MAX_BUNDLES = 1000


def write_site(folder: Path, site: Path) -> tuple[int, int]:
    """Write ``index.html``, a page for each profile and a report for each bundle directly inside ``folder``.

    A report that is there already for the same bundle and program is kept; one of a bundle that is gone is removed.

    Args:
        folder: folders and archives of bundles; anything else in it is left out.
        site: where to write; created when its parent exists.

    Returns:
        How many bundles were read, and how many could not be.

    Raises:
        InputError: no bundle can be read, there are more than 1,000, or ``site`` cannot be a folder or has pages that
            are not of such a site.
    """
    if site.exists() and not site.is_dir():
        raise InputError(str(site), expected="a folder for the site", got="a file", remedy="choose another --out")
    if not site.parent.is_dir():
        raise InputError(str(site), expected="an existing parent folder", got="none", remedy="create it first")
    reports = site / "reports"
    for folder_made in (site, reports):
        folder_made.mkdir(exist_ok=True)
    made = MadeThings(site)
    made.check("index.html")
    found = collect(folder, reports)
    if not found.entries:
        why = f"; {found.unreadable[0][0]}: {found.unreadable[0][1]}" if found.unreadable else ""
        remedy = "name a folder that holds bundles"
        raise InputError(str(folder), expected="at least one bundle", got=f"none{why}", remedy=remedy)
    pages = render_site(found)
    made.own(*pages)
    for name, page in pages.items():
        write_atomic(site / name, page.encode())
    current = {entry.report for entry in found.entries}
    made.keep(*pages, *current)
    made.remove(*(name for name in made.names("reports") if name not in current))
    return len(found.entries), len(found.unreadable)


def collect(folder: Path, reports: Path) -> Collection:
    """Read the bundles directly inside ``folder`` and write the report of each into ``reports``."""
    found = Collection()
    paths = list(_bundles(folder))
    if len(paths) > MAX_BUNDLES:
        expected, remedy = f"at most {MAX_BUNDLES} bundles", "move older ones away"
        raise InputError(str(folder), expected=expected, got=str(len(paths)), remedy=remedy)
    for path in paths:
        try:
            found.entries.append(_read(path, reports, found.contracts))
        except InputError as error:
            found.unreadable.append((path.name, str(error).replace(str(path), path.name)))
        except (ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError) as error:
            # Any other error that a hostile file causes concerns that bundle alone.
            found.unreadable.append((path.name, f"cannot be read: {type(error).__name__}: {error}"))
    found.entries.sort(key=lambda entry: (entry.when, entry.name))
    return found


def _bundles(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        archive = path.is_file() and path.name.endswith(SUFFIXES)
        if archive or (path.is_dir() and (path / "findings.json").is_file()):
            yield path


def _read(path: Path, reports: Path, contracts: dict[str, list[Contract] | str]) -> Entry:
    store = open_store(path)
    findings = read_findings(store)
    environment, plan = read_object(store, "environment.json"), read_plan(store)[0]
    digest = _contracts_digest(store)
    if digest not in contracts:
        try:
            contracts[digest] = bundle_contracts(store)
        except InputError as error:
            contracts[digest] = str(error)
    untested = {entry.key: "untested" for entry in plan.entries if entry.scope == "out_of_scope"}
    when = datetime.fromisoformat(findings.created)
    return Entry(
        name=path.name,
        when=(when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp(),
        made=moment_of(findings),
        profile=findings.profile,
        commit=commit_of(environment),
        verdict=verdict_of(findings, plan, environment),
        counts=findings.summary,
        verdicts=untested | {row.key: row.verdict for row in findings.rows},
        measures=tuple(measures_of(findings)),
        contracts=digest,
        report=_write_report(path, store, reports),
    )


def _contracts_digest(store: Store) -> str:
    names = [name for name in store.names() if name.startswith("contracts/") and name.count("/") == 1]
    return hashlib.sha256(b"".join(hashlib.sha256(store.read(name)).digest() for name in names)).hexdigest()


def _write_report(path: Path, store: Store, reports: Path) -> str:
    """Render the report of a bundle unless it is there; return its link. Its name has a digest of all it is made of."""
    raw = os.path.relpath(path.resolve(), reports.resolve()) + "/" if path.is_dir() else None
    key = hashlib.sha256(manifest_text(manifest_of(store)))
    key.update(f"{raw}\n{_program()}".encode())
    stem = re.sub(r"[^A-Za-z0-9]+", "-", stem_of(path)).strip("-")[:40]
    target = reports / f"{stem or 'bundle'}-{key.hexdigest()[:12]}.html"
    if not target.exists():
        write_atomic(target, render(store, raw).encode())
    return f"reports/{target.name}"


@lru_cache(maxsize=1)
def _program() -> str:
    """Return a digest of what renders a report, so that another version of it renders again."""
    root = resources.files("q4kd.harness.report")
    files = [file for folder in (root, root / "templates") for file in folder.iterdir() if file.is_file()]
    made_of = [file for file in files if not file.name.startswith(("site", "trends"))]
    digests = (hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(made_of, key=lambda file: file.name))
    return "".join(digests)
