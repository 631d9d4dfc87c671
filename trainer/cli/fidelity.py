"""The command ``q4kd fidelity``: what quantising a model cost, in nats, agreement and perplexity."""

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from q4kd.trainer.data.tokenizing import Encode, file_begin, put_before
from q4kd.trainer.errors import InputError, for_terminal, unwritable

SCHEMA = "q4kd-fidelity/1"
_DENSE_RECIPES = {"torch.float32": "f32", "torch.float16": "f16", "torch.bfloat16": "bf16"}
_HELP = """Does quantising hurt? The statistics are those of llama.cpp's llama-perplexity --kl-divergence (second half
of each window scored). KL near 0, agreement near 100 % and a perplexity ratio within two errors of 1: it does not.
"""
# Beyond this, two files are more likely different models than one model in two precisions.
_SUSPICIOUS_KL = 0.5
_SHOWN_QUANTILES = ("median", "90%", "99%", "99.9%", "max")


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``fidelity`` to the command line."""
    fidelity = subparsers.add_parser("fidelity", help="what quantising a model cost: KL, agreement, perplexity")
    fidelity.epilog, fidelity.formatter_class = _HELP, argparse.RawDescriptionHelpFormatter
    fidelity.set_defaults(run=_fidelity)
    add = fidelity.add_argument
    add("a", type=Path, metavar="A", help="the quantised model: GGUF or .apr file")
    add("b", type=Path, metavar="B", help="its original: a GGUF or .apr file, or a Hugging Face folder")
    text = "text file, JSONL, folder, or .npy of token ids (default: held-out files of Python's standard library)"
    add("--data", type=Path, metavar="PATH", help=text)
    add("--tokens", type=int, default=16_384, metavar="N", help="tokens of text to run over (default 16384)")
    add("--seq-len", type=int, default=512, metavar="T", help="tokens of a window (default 512, as llama.cpp's)")
    add("--tokenizer", type=Path, metavar="DIR", help="Hugging Face folder with the tokenizer (default: B's own)")
    add("--device", default="cpu", help="cpu or cuda (default cpu)")
    text = "of matrix products (default: float32 on the CPU, auto on CUDA); bfloat16 adds noise of its own to both"
    add("--dtype", choices=("auto", "float32", "bfloat16"), help=text)
    add("--json", action="store_true", help="print JSON")
    add("--out", type=Path, metavar="FILE", help="also write the JSON to this file")


def _fidelity(args: argparse.Namespace) -> int:
    for option, low, value in (("--seq-len", 4, args.seq_len), ("--tokens", 4, args.tokens)):
        if value < low:
            raise InputError(option, expected=f"at least {low}", got=str(value), remedy="choose a larger number")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="q4kd-fidelity-") as scratch:
        report = _compare(args, Path(scratch))
    report["seconds"] = round(time.monotonic() - started, 3)
    if args.out:
        from q4kd.trainer.files import write_json

        try:
            write_json(args.out, report)
        except OSError as error:
            raise unwritable(f"--out {args.out}", error, "a writable path") from error
    print(json.dumps(report, indent=1, sort_keys=True) if args.json else describe(report))
    return 0


def _compare(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    from q4kd.trainer.data.sources.account import SourceAccount
    from q4kd.trainer.device.placement import place_teacher
    from q4kd.trainer.events import EventLog
    from q4kd.trainer.export.fidelity import check_comparable, score, summarise
    from q4kd.trainer.export.fidelity_text import read_sample
    from q4kd.trainer.formats.open import open_model
    from q4kd.trainer.teacher.teacher import load_teacher

    paths = {name: _as_file(getattr(args, name), scratch / f"{name}.gguf") for name in ("a", "b")}
    files = {name: open_model(path) for name, path in paths.items()}
    check_comparable(files["a"], files["b"])
    encode, end, begin = _tokenizer(args, files["b"])
    account = SourceAccount()
    options = {"tokens": args.tokens, "length": args.seq_len, "account": account}
    sample = read_sample(args.data, encode=encode, end=end, **options)
    for line in account.lines():
        _say(line)
    _note_order(files)
    dtype = args.dtype or ("float32" if args.device == "cpu" else "auto")
    place = functools.partial(place_teacher, device=args.device, dtype=dtype)
    # What each would announce is left out, because the report says it for both.
    load = functools.partial(load_teacher, events=EventLog(None), announce=lambda _line: None)
    # Each is placed when the one before it is loaded, in the room that is left.
    a, b = (load(place(files[name])) for name in ("a", "b"))
    scores = score(a, b, sample.windows, begin=begin, progress=_progress(sample.windows.size))
    return {
        "schema": SCHEMA,
        "a": _identity(args.a, files["a"]),
        "b": _identity(args.b, files["b"]),
        "data": {"name": sample.name, "sha256": sample.sha256, "windows": len(sample.windows), "length": args.seq_len},
        "device": args.device,
        "dtype": a.dtype,
        **summarise(scores),
    }


def _as_file(path: Path, temporary: Path) -> Path:
    """Return a model file; a Hugging Face folder is written as one, in the dtype that it holds, so without loss."""
    if not path.is_dir():
        return path
    from collections import Counter

    from q4kd.trainer.export.run_record import find_source
    from q4kd.trainer.export.source_model import read_model, read_vocabulary
    from q4kd.trainer.formats.gguf.writer import write_gguf

    source = find_source(path)
    config, state = read_model(source)
    dtype = str(Counter(tensor.dtype for tensor in state.values()).most_common(1)[0][0])
    if dtype not in _DENSE_RECIPES:
        expected = f"weights in {', '.join(_DENSE_RECIPES)}"
        raise InputError(str(path), expected=expected, got=dtype, remedy="name a folder of the original weights")
    _say(f"{path.name}: written as a temporary {dtype.removeprefix('torch.')} file")
    tokenizer, recipe = read_vocabulary(source, config), _DENSE_RECIPES[dtype]
    try:
        write_gguf(temporary, config=config, state=state, tokenizer=tokenizer, recipe=recipe, name=source.title)
    except OSError as error:
        subject, remedy = f"temporary folder {temporary.parent}", "set TMPDIR to a folder with more room"
        got = str(error.strerror)
        raise InputError(subject, expected="room for the dense model", got=got, remedy=remedy) from error
    return temporary


def _tokenizer(args: argparse.Namespace, model: Any) -> tuple[Encode, Any, Any]:
    """Return (encode, id after a document, id before a window): B's own tokenizer, or the one that is named."""

    def special(role: str) -> int | None:
        index = model.metadata.get(f"tokenizer.ggml.{role}_token_id")
        return index if isinstance(index, int) and 0 <= index < len(model.tokens) else None

    begin = file_begin(model.metadata)
    if begin is not None and begin >= len(model.tokens):
        begin = None

    def begun(encode: Encode) -> Encode:  # as distill puts it before every text
        return lambda texts: [put_before([] if begin is None else [begin], ids) for ids in encode(texts)]

    if args.data is not None and args.data.suffix == ".npy":
        return lambda _texts: [], None, begin  # the data are ids already
    if args.tokenizer is not None:
        from q4kd.trainer.formats.gguf.vocabulary import is_same_token
        from q4kd.trainer.student.model import encoder, load_tokenizer

        tokenizer = load_tokenizer(args.tokenizer)
        for token, index in tokenizer.get_vocab().items():
            if index >= len(model.tokens) or not is_same_token(model.tokens[index], token):
                expected, got = "the models' token at every id", f"{token!r} as {index}"
                remedy = "name the models' own tokenizer"
                raise InputError(f"--tokenizer {args.tokenizer}", expected=expected, got=got, remedy=remedy)
        return begun(encoder(tokenizer)), special("eos"), begin
    from q4kd.trainer.formats.gguf.tokenizer import read_tokenizer

    own = read_tokenizer(model)
    encode = begun(lambda texts: [own.encode(text, add_special_tokens=False).ids for text in texts])
    return encode, special("eos"), begin


def _note_order(files: dict[str, Any]) -> None:
    bits = {name: 8 * model.tensor_bytes / model.num_weights for name, model in files.items()}
    if bits["a"] > bits["b"]:
        _say(f"note: A has {bits['a']:.1f} bits per weight and B {bits['b']:.1f}; is A really the quantised one?")


def _identity(given: Path, model: Any) -> dict[str, Any]:
    return {
        "file": given.resolve().name,
        "sha256": model.sha256(),
        "bytes": model.file_bytes,
        "tensor_bytes_by_type": dict(sorted(model.bytes_by_type().items())),
        "bits_per_weight": round(8 * model.tensor_bytes / model.num_weights, 3),
    }


def _say(line: str) -> None:
    print(for_terminal(line), file=sys.stderr, flush=True)


def _progress(tokens: int) -> Callable[[int, int, float], None]:
    """Return a callback that reports on stderr, at most every two seconds."""
    started = last = time.monotonic()

    def say(done: int, total: int, kl: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= 2 and done < total:
            last, rate = now, tokens * done / total / (now - started)
            left = (now - started) * (total - done) / done
            _say(f"fidelity: {done}/{total} windows, KL {kl:.5f}, {rate:.0f} tok/s, about {left:.0f} s left")

    return say


def describe(report: dict[str, Any]) -> str:
    """Return a report as text: the two files, the statistics, the answer."""
    a, b, data, kl = report["a"], report["b"], report["data"], report["kl"]
    agreement, ratio, change = report["top1_agreement"], report["perplexity_ratio"], report["probability_change"]
    pa, pb = report["perplexity"]["a"], report["perplexity"]["b"]
    lines = [
        *(
            f"{name}: {file['file']}, {file['bytes']:,} bytes, {file['bits_per_weight']:.2f} bits per weight, "
            f"sha256 {file['sha256'][:16]}…"
            for name, file in (("A", a), ("B", b))
        ),
        f"text: {data['name']}, {data['windows']} windows of {data['length']} tokens, the second half of each scored: "
        f"{report['tokens']:,} tokens; {report['dtype']} products on {report['device']}",
        "",
        f"KL(B || A)          {kl['mean']:.4g} ± {kl['error']:.2g} nats per token "
        f"(± {kl['error_over_windows']:.2g} over windows)",
        "                    " + ", ".join(f"{name} {kl[name]:.4g}" for name in _SHOWN_QUANTILES),
        f"top-1 agreement     {agreement['mean']:.3%} ± {agreement['error']:.3%}",
        f"perplexity          A {pa['mean']:.4f} ± {pa['error']:.4f}, B {pb['mean']:.4f} ± {pb['error']:.4f}",
        f"perplexity A/B      {ratio['mean']:.6f} ± {ratio['error']:.6f}",
        f"probability change  mean {change['mean']:+.4%} ± {change['error']:.4%}, root mean square {change['rms']:.4%}",
        "",
        _answer(report),
    ]
    return "\n".join(map(for_terminal, lines))


def _answer(report: dict[str, Any]) -> str:
    kl, ratio = report["kl"]["mean"], report["perplexity_ratio"]
    if report["kl"]["max"] == 0:
        return "A and B are the same function on this text."
    if kl > _SUSPICIOUS_KL:
        return "This far apart, A and B are hardly one model in two precisions: check that they belong together."
    change, error = ratio["mean"] - 1, ratio["error"]
    clear = "" if abs(change) > 2 * error else ", within two standard errors of none"
    return (
        f"A costs {kl:.3g} nats per token against B, {change:+.2%} ± {error:.2%} of perplexity{clear}; "
        f"at {report['top1_agreement']['mean']:.1%} of tokens both prefer the same next one."
    )
