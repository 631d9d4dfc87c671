"""The command ``q4kd export``: a distilled model as a Hugging Face folder or as a GGUF file.

It belongs to the harness because the card may cite an evidence bundle, which the harness alone can verify.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from q4kd.harness.cli.help import Commands, add_path
from q4kd.trainer.errors import InputError, for_terminal

if TYPE_CHECKING:
    from q4kd.trainer.export.model_card import Evidence
    from q4kd.trainer.export.run_record import ExportSource, RunRecord

_TYPES: tuple[str, ...] = (
    "f32",
    "f16",
    "bf16",
    "q8_0",
    "q6_k",
    "q5_k_m",
    "q5_0",
    "q4_k_m",
    "q4_k_s",
    "iq4_nl",
    "iq4_xs",
    "q4_0",
)
_TYPES += ("q3_k_m", "q3_k_s", "q2_k")
_DENSE = ("f32", "f16", "bf16")
_HELP = """RUN is a folder of `q4kd distill` (its final model, or one of its checkpoints), or any Hugging Face folder
of a dense family that q4kd reads. What is written is read back and compared before it takes its name; nothing that is
already there is replaced. Does quantising hurt? `q4kd fidelity RUN-q4_k_m.gguf RUN/model` answers.
"""


def add_commands(subparsers: Commands) -> None:
    """Add ``export`` to the command line."""
    export = subparsers.add_parser(
        "export",
        help="a distilled model as a Hugging Face folder or a GGUF file",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_path(export, "source", "RUN", "run folder, or Hugging Face model folder")
    export.add_argument("--format", choices=("hf", "gguf"), required=True, help="what to write")
    export.add_argument(
        "--quantize",
        choices=_TYPES,
        metavar="TYPE",
        help=f"one of {', '.join(_TYPES)}; default: f16 for gguf, as stored for hf (which takes {', '.join(_DENSE)})",
    )
    add_path(export, "--out", "PATH", "file or folder to write (default: RUN-TYPE.gguf or RUN-hf)")
    export.add_argument(
        "--checkpoint",
        metavar="NAME",
        help="best (by the run's best_metric, held out), last, or a name like step-000120 (default: the final model)",
    )
    add_path(
        export, "--imatrix", "FILE", "importance matrix of llama-imatrix, as GGUF, that weighs quantisation errors"
    )
    add_path(export, "--student", "DIR", "the run's student folder, if it is no longer where it was")
    add_path(export, "--bundle", "BUNDLE", "evidence bundle, folder or .tar.gz, that the model card cites")
    export.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    if args.format == "hf" and args.quantize not in (None, *_DENSE):
        subject, expected = f"--quantize {args.quantize}", f"{', '.join(_DENSE)} for --format hf"
        remedy = "use --format gguf for quantised weights"
        raise InputError(subject, expected=expected, got=args.quantize, remedy=remedy)
    if args.format == "gguf" and args.bundle is not None:
        expected, remedy = "--format hf, whose model card cites it", "leave it out, or export a Hugging Face folder too"
        raise InputError("--bundle", expected=expected, got="--format gguf", remedy=remedy)
    if args.imatrix is not None and (args.format == "hf" or args.quantize in (None, *_DENSE)):
        expected, remedy = "--format gguf with a quantised type", "leave it out, or choose a type with --quantize"
        raise InputError("--imatrix", expected=expected, got=args.quantize or args.format, remedy=remedy)
    evidence = None if args.bundle is None else read_evidence(args.bundle)

    from q4kd.trainer.export.run_record import find_source

    source = find_source(args.source, args.checkpoint, args.student)
    recipe = args.quantize or "f16"
    default = f"{source.title}-{recipe}.gguf" if args.format == "gguf" else f"{source.title}-hf"
    out: Path = args.out or args.source.resolve().parent / default
    _refuse_existing(out)
    for line in () if source.record is None else source.record.missing:
        print(f"note: {for_terminal(line)}")
    try:
        if args.format == "gguf":
            return _export_gguf(source, out, recipe, args.imatrix)
        return _export_hf(source, out, args.quantize, evidence)
    except OSError as error:
        expected, got = "a writable folder with room for the model", str(error.strerror or error)
        remedy = "choose another folder, or make room"
        raise InputError(f"--out {out}", expected=expected, got=got, remedy=remedy) from error


def _refuse_existing(out: Path) -> None:
    if out.exists() or out.is_symlink():
        remedy = "choose another, or remove it"
        raise InputError(f"--out {out}", expected="a name that is free", got="something there", remedy=remedy)
    if not out.parent.is_dir():
        remedy = "make it, or choose another"
        raise InputError(f"--out {out}", expected=f"the folder {out.parent}", got="none", remedy=remedy)


def _export_hf(source: "ExportSource", out: Path, dtype: str | None, evidence: "Evidence | None") -> int:
    from q4kd.trainer.export.to_huggingface import export_hf

    report = export_hf(source, out, dtype=dtype, evidence=evidence)
    num_bytes = sum(size for size, _ in report.files.values())
    print(f"{for_terminal(out)}: {report.dtype}, {num_bytes:,} bytes of weights, model card")
    for name, (_size, digest) in report.files.items():
        print(f"sha256 {digest}  {for_terminal(name)}")
    return 0


def _export_gguf(source: "ExportSource", out: Path, recipe: str, imatrix: Path | None) -> int:
    from q4kd.trainer.export.to_gguf import export_gguf
    from q4kd.trainer.files import sha256_file
    from q4kd.trainer.formats.blocks.layout import FORMATS, SUPERBLOCK
    from q4kd.trainer.formats.gguf.importance import read_importance

    notes, importance = _notes(source.record), None
    if imatrix is not None:
        importance = read_importance(imatrix)
        notes |= {"q4kd.imatrix.file": imatrix.name, "q4kd.imatrix.sha256": sha256_file(imatrix)}
    report = export_gguf(source, out, recipe=recipe, notes=notes, importance=importance, progress=_progress())
    types = ", ".join(f"{count} x {name}" for name, count in sorted(report.tensors.items()))
    print(f"{for_terminal(out)}: {recipe}, {report.num_bytes:,} bytes, tensors {types}")
    wants_superblocks = "_k" in recipe or recipe == "iq4_xs"
    if wants_superblocks and all(FORMATS[name].block_size < SUPERBLOCK for name in report.tensors):
        print(f"note: no row is a multiple of 256 weights, so {recipe} holds no superblock; see the types above")
    for line in report.differences:
        print(f"note: {line}")
    lossy = {name: worst for name, worst in sorted(report.round_trip.items()) if worst[0]}
    errors = "; ".join(f"{name} at most {error:.2%} ({tensor})" for name, (error, tensor) in lossy.items())
    print(f"read back: tokens and dimensions equal; relative error of a tensor: {errors or 'none'}")
    print(f"sha256 {report.sha256}  {for_terminal(out.name)}")
    return 0


def _notes(record: "RunRecord | None") -> dict[str, str | int]:
    """Return the metadata of a GGUF that say where the model comes from."""
    from q4kd.trainer.export.model_card import program_version

    notes: dict[str, str | int] = {"q4kd.version": program_version()}
    if record is not None:
        found = {f"q4kd.teacher.{key}": record.teacher.get(key) for key in ("file", "sha256")}
        found |= {"q4kd.data.sha256": record.data_sha256, "q4kd.step": record.step}
        notes |= {key: value for key, value in found.items() if value is not None}
    return notes


def _progress() -> Callable[[int, int], None]:
    """Return a callback that says on stderr, at most every five seconds, how far the file is."""
    started = last = time.monotonic()

    def say(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= 5 and done < total:
            last, left = now, (now - started) * (total - done) / done
            print(f"export: {done / total:.0%}, about {left:.0f} s left", file=sys.stderr, flush=True)

    return say


def read_evidence(bundle: Path) -> "Evidence":
    """Verify a bundle and return its verdicts for a model card.

    Raises:
        InputError: when it does not verify: a card cites nothing that cannot be drawn again.
    """
    from q4kd.harness.bundle.findings import read_findings
    from q4kd.harness.bundle.verify import verify_store
    from q4kd.harness.records.store import open_store, read_object, snapshot
    from q4kd.trainer.export.model_card import Evidence

    store = snapshot(open_store(bundle), str(bundle))
    result = verify_store(store)
    if result.status != "consistent":
        got, remedy = f"{result.status}: {next(iter(result.problems), '')}", "see q4kd evidence verify"
        raise InputError(f"--bundle {bundle}", expected="a bundle that verifies", got=got, remedy=remedy)
    findings, environment = read_findings(store), read_object(store, "environment.json")
    verdicts = [
        (row.key, row.verdict, "; ".join(check.measured or "" for check in row.checks)) for row in findings.rows
    ]
    return Evidence(
        bundle=bundle.resolve().name,
        profile=findings.profile,
        commit=str(environment.get("commit") or "unknown"),
        headline=result.headline or "",
        caveats=result.caveats,
        verdicts=verdicts,
    )
