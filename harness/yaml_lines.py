"""YAML read with the line of every value, YAML 1.2 scalars, and bounds on everything a hostile file could grow.

PyYAML gives the events; the values are built here, without recursion. Three reasons not to use ``safe_load``: it loses
the lines, it keeps the last of two equal keys, and its YAML 1.1 scalars read ``6.0e9`` as a string, ``no`` as false and
``1:30`` as ninety.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from q4kd.trainer.errors import InputError

MAX_BYTES = 4 << 20
MAX_DEPTH = 64
MAX_NODES = 200_000
MAX_ALIAS_NODES = 10_000
_TOO_DEEP = {"expected": f"at most {MAX_DEPTH} levels", "got": "deeper nesting", "remedy": "flatten the document"}

Path_ = tuple[str | int, ...]
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")  # those that a YAML reader counts
_INT = re.compile(r"[-+]?[0-9]{1,40}")
_RADIX = re.compile(r"0o[0-7]{1,40}|0x[0-9a-fA-F]{1,40}")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_WORDS: Mapping[str, object] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}


@dataclass(frozen=True, kw_only=True)
class Document:
    """One parsed YAML document and where its values stand.

    Attributes:
        origin: the file's name as quoted in errors.
        value: the document, made of dict, list, str, int, float, bool and None.
        lines: path of keys and indices → 1-based line, for keys of mappings and items of lists.
        text: the document's lines, for quoting.
    """

    origin: str
    value: Any
    lines: Mapping[Path_, int]
    text: tuple[str, ...]

    def line(self, path: Path_) -> int:
        """Return the line of the value at ``path``, or of its nearest enclosing value that is known."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def error(self, path: Path_, *, expected: str, got: str, remedy: str) -> InputError:
        """Return the error for the value at ``path``, quoting the file, the line and the line's text."""
        return line_error(self.origin, self.line(path), self.text, expected=expected, got=got, remedy=remedy)


def printable(text: str, limit: int = 160) -> str:
    """Return ``text`` on one line with control characters shown as ``?``, cut at ``limit`` characters."""
    clean = "".join(c if c.isprintable() else "?" for c in text.strip())
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def line_error(origin: str, line: int, text: tuple[str, ...], *, expected: str, got: str, remedy: str) -> InputError:
    """Return an ``InputError`` whose subject is ``origin:line`` and whose message quotes that line."""
    quoted = printable(text[line - 1]) if 0 < line <= len(text) else ""
    return InputError(
        f"{printable(origin)}:{line}: `{quoted}`", expected=expected, got=printable(got, 400), remedy=remedy
    )


def parse_yaml(data: bytes, origin: str) -> Document:
    """Parse one YAML document.

    Raises:
        InputError: not UTF-8, not one YAML document, a duplicate key, a merge key or custom tag, or beyond a bound
            (4 MB, depth 64, 200,000 nodes after expanding aliases, 10,000 nodes for one alias).
    """
    if len(data) > MAX_BYTES:
        raise InputError(
            origin, expected=f"at most {MAX_BYTES} bytes of YAML", got=f"{len(data)} bytes", remedy="split the file"
        )
    try:
        source = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(
            f"{origin}:{line}", expected="UTF-8 text", got=f"byte {data[error.start]:#04x}", remedy="save it as UTF-8"
        ) from error
    text = tuple(_LINE_BREAK.split(source))
    builder = _Builder(origin, text)
    try:
        for event in _events(source):
            builder.take(event)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = min(mark.line + 1, len(text)) if mark is not None else 1
        problem = str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)
        if "nesting depth" in problem:  # a libyaml with a limit of its own reads ahead of our count
            raise line_error(origin, line, text, **_TOO_DEEP) from error
        raise line_error(
            origin, line, text, expected="well-formed YAML", got=problem, remedy="fix the syntax of that line"
        ) from error
    if not builder.done:
        raise InputError(
            origin, expected="a YAML document", got="an empty file", remedy="write a contract or remove it"
        )
    return Document(origin=origin, value=builder.value, lines=builder.lines, text=text)


def _events(source: str) -> Iterator[Any]:
    loader = _LOADER(source)
    try:
        while loader.check_event():
            yield loader.get_event()
    finally:
        loader.dispose()


@dataclass
class _Frame:
    """One mapping or list being filled. ``nodes`` counts it and everything below it, aliases expanded."""

    container: Any
    path: Path_
    line: int
    anchor: str | None
    nodes: int = 1
    key: Any = None
    has_key: bool = False


@dataclass
class _Builder:
    origin: str
    text: tuple[str, ...]
    value: Any = None
    done: bool = False
    lines: dict[Path_, int] = field(default_factory=dict)
    stack: list[_Frame] = field(default_factory=list)
    anchors: dict[str, tuple[Any, int] | None] = field(default_factory=dict)
    nodes: int = 0

    def refuse(self, line: int, *, expected: str, got: str, remedy: str) -> InputError:
        return line_error(self.origin, line, self.text, expected=expected, got=got, remedy=remedy)

    def take(self, event: Any) -> None:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.ScalarEvent):
            self.count(1, line)
            value = self.scalar(event, line)
            if event.anchor:
                self.anchors[event.anchor] = (value, 1)
            self.place(value, 1, line)
        elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            self.open(event, line)
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            frame = self.stack.pop()
            if frame.anchor:
                self.anchors[frame.anchor] = (frame.container, frame.nodes)
            self.place(frame.container, frame.nodes, frame.line)
        elif isinstance(event, yaml.AliasEvent):
            self.alias(event.anchor, line)

    def open(self, event: Any, line: int) -> None:
        self.count(1, line)
        mapping = isinstance(event, yaml.MappingStartEvent)
        if event.tag not in (None, "!", "tag:yaml.org,2002:map" if mapping else "tag:yaml.org,2002:seq"):
            raise self.refuse(line, expected="plain YAML", got=f"the tag {event.tag}", remedy="remove the tag")
        if len(self.stack) >= MAX_DEPTH:
            raise self.refuse(line, **_TOO_DEEP)
        path: Path_ = ()
        if self.stack:
            parent = self.stack[-1]
            if isinstance(parent.container, dict) and not parent.has_key:
                raise self.refuse(line, expected="a scalar key", got="a collection as key", remedy="use a plain key")
            path = (*parent.path, parent.key if parent.has_key else len(parent.container))
        if event.anchor:
            self.anchors[event.anchor] = None
        self.stack.append(_Frame({} if mapping else [], path, line, event.anchor))

    def alias(self, anchor: str | None, line: int) -> None:
        if anchor is None or anchor not in self.anchors:
            raise self.refuse(line, expected="a known anchor", got=f"*{anchor}", remedy="define the anchor before it")
        known = self.anchors[anchor]
        if known is None:
            raise self.refuse(
                line, expected="an alias to a finished value", got=f"*{anchor} inside itself", remedy="write it out"
            )
        value, nodes = known
        if nodes > MAX_ALIAS_NODES:
            raise self.refuse(
                line,
                expected=f"an alias of at most {MAX_ALIAS_NODES} nodes",
                got=f"*{anchor}, which expands to {nodes}",
                remedy="write the values out",
            )
        self.count(nodes, line)
        self.place(value, nodes, line)

    def count(self, nodes: int, line: int) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            raise self.refuse(line, expected=f"at most {MAX_NODES} values", got="more", remedy="split the file")

    def place(self, value: Any, nodes: int, line: int) -> None:
        """Put a finished value where it belongs: the document, a list, or a mapping's key or value."""
        if not self.stack:
            if self.done:
                raise self.refuse(
                    line, expected="one YAML document", got="a second one", remedy="use one file for each"
                )
            self.value, self.done = value, True
            return
        frame = self.stack[-1]
        frame.nodes += nodes
        if isinstance(frame.container, list):
            self.lines[(*frame.path, len(frame.container))] = line
            frame.container.append(value)
        elif frame.has_key:
            frame.container[frame.key] = value
            frame.has_key = False
        else:
            self.put_key(frame, value, line)

    def put_key(self, frame: _Frame, key: Any, line: int) -> None:
        if isinstance(key, (dict, list)):
            raise self.refuse(line, expected="a scalar key", got="a collection as key", remedy="use a plain key")
        if key == "<<":
            raise self.refuse(line, expected="plain keys", got="a merge key `<<`", remedy="write the keys out")
        if key in frame.container:
            first = self.lines.get((*frame.path, key), line)
            raise self.refuse(
                line,
                expected="each key once",
                got=f"the key {key!r} again (first on line {first})",
                remedy="keep one of the two",
            )
        self.lines[(*frame.path, key)] = line
        frame.key, frame.has_key = key, True

    def scalar(self, event: Any, line: int) -> Any:
        if event.tag not in (None, "!", "tag:yaml.org,2002:str"):
            raise self.refuse(line, expected="plain YAML", got=f"the tag {event.tag}", remedy="remove the tag")
        text: str = event.value
        if event.tag is not None or event.style not in (None, ""):
            return text
        return plain_scalar(text)


def plain_scalar(text: str) -> Any:
    """Return the value of an unquoted YAML 1.2 core-schema scalar: null, bool, int, float, else the text itself."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _RADIX.fullmatch(text):
        return int(text, 0)
    if len(text) <= 64 and _FLOAT.fullmatch(text):
        return float(text)
    return text
