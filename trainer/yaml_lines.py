"""YAML read with the line of every value, YAML 1.2 scalars, and bounds on everything a hostile file could grow.

PyYAML gives the events; the values are built here, without recursion. Three reasons not to use ``safe_load``: it loses
the lines, it keeps the last of two equal keys, and its YAML 1.1 scalars read ``6.0e9`` as a string, ``no`` as false and
``1:30`` as ninety.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import yaml

from q4kd.trainer.errors import InputError, for_terminal

MAX_BYTES = 4 << 20
MAX_DEPTH = 64
MAX_NODES = 200_000
MAX_ALIAS_NODES = 10_000
_MAX_SCALAR = 400
_TOO_DEEP = {"expected": f"at most {MAX_DEPTH} levels", "got": "deeper nesting", "remedy": "flatten the document"}

ValuePath: TypeAlias = tuple[str | int, ...]
# Keys are almost always text, and typed so; a file may also use another scalar, so a reader of unchecked keys asks.
YamlValue: TypeAlias = "str | int | float | bool | list[YamlValue] | dict[str, YamlValue] | None"
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")  # those that a YAML reader counts
_INT = re.compile(r"[-+]?[0-9]{1,40}")
_RADIX = re.compile(r"0o[0-7]{1,40}|0x[0-9a-fA-F]{1,40}")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_WORDS: Mapping[str, bool | float | None] = {
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
    value: YamlValue
    lines: Mapping[ValuePath, int]
    text: tuple[str, ...]

    def line(self, path: ValuePath) -> int:
        """Return the line of the value at ``path``, or of its nearest enclosing value that is known."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def error(self, path: ValuePath, *, expected: str, got: str, remedy: str) -> InputError:
        """Return the error for the value at ``path``, quoting the file, the line and the line's text."""
        return line_error(self.origin, self.line(path), self.text, expected=expected, got=got, remedy=remedy)


def printable(text: str, limit: int = 160) -> str:
    """Return ``text`` on one line with control characters shown as ``?``, cut at ``limit`` characters."""
    clean = for_terminal(text.strip())
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def line_error(origin: str, line: int, text: tuple[str, ...], *, expected: str, got: str, remedy: str) -> InputError:
    """Return an ``InputError`` whose subject is ``origin:line`` and whose message quotes that line."""
    quoted = printable(text[line - 1]) if 0 < line <= len(text) else ""
    subject = f"{printable(origin)}:{line}: `{quoted}`"
    return InputError(subject, expected=expected, got=printable(got, 400), remedy=remedy)


def plain_scalar(text: str) -> YamlValue:
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


def scalar_of_yaml_1_1(text: str) -> YamlValue:
    """Return the value of an unquoted YAML 1.1 scalar, as ``yaml.safe_load`` reads it: ``yes`` is true.

    A longer text than any number of use is text: ``1:1:1`` is a number to the base 60, and takes the square of its
    length to read.

    Raises:
        yaml.YAMLError: a YAML 1.1 scalar without a value, such as ``=``.
    """
    if len(text) > _MAX_SCALAR:
        return text
    loader: Any = yaml.SafeLoader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    return cast("YamlValue", loader.construct_object(yaml.ScalarNode(tag, text)))


def parse_yaml(data: bytes, origin: str, scalar: Callable[[str], YamlValue] = plain_scalar) -> Document:
    """Parse one YAML document.

    Args:
        data: the file's bytes.
        origin: how to name the file in errors.
        scalar: gives the value of an unquoted scalar's text.

    Raises:
        InputError: not UTF-8, not one YAML document, a duplicate key, a merge key or custom tag, or beyond a bound
            (4 MB, depth 64, 200,000 nodes after expanding aliases, 10,000 nodes for one alias).
    """
    if len(data) > MAX_BYTES:
        expected, got = f"at most {MAX_BYTES} bytes of YAML", f"{len(data)} bytes"
        raise InputError(origin, expected=expected, got=got, remedy="split the file")
    try:
        source = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, got = data[: error.start].count(b"\n") + 1, f"byte {data[error.start]:#04x}"
        raise InputError(f"{origin}:{line}", expected="UTF-8 text", got=got, remedy="save it as UTF-8") from error
    text = tuple(_LINE_BREAK.split(source))
    builder = _Builder(origin, text, scalar)
    try:
        for event in _events(source):
            builder.take(event)
    except (yaml.YAMLError, ValueError) as error:  # a date such as 2026-13-01 is no day
        mark = getattr(error, "problem_mark", None)
        line = min(mark.line + 1, len(text)) if mark is not None else builder.line
        problem = str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)
        if "nesting depth" in problem:  # a libyaml with a limit of its own reads ahead of our count
            raise line_error(origin, line, text, **_TOO_DEEP) from error
        remedy = "fix the syntax of that line"
        raise line_error(origin, line, text, expected="well-formed YAML", got=problem, remedy=remedy) from error
    if not builder.done:
        remedy = "write its first keys, or remove the file"
        raise InputError(origin, expected="a YAML document", got="an empty file", remedy=remedy)
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

    container: dict[str, YamlValue] | list[YamlValue]
    path: ValuePath
    line: int
    anchor: str | None
    nodes: int = 1
    key: str = ""
    has_key: bool = False


@dataclass
class _Builder:
    """Builds the document from its events. ``line`` is where the value at hand begins."""

    origin: str
    text: tuple[str, ...]
    plain: Callable[[str], YamlValue]
    value: YamlValue = None
    done: bool = False
    lines: dict[ValuePath, int] = field(default_factory=dict)
    stack: list[_Frame] = field(default_factory=list)
    anchors: dict[str, tuple[YamlValue, int] | None] = field(default_factory=dict)
    nodes: int = 0
    line: int = 1

    def refuse(self, expected: str, got: str, remedy: str) -> InputError:
        return line_error(self.origin, self.line, self.text, expected=expected, got=got, remedy=remedy)

    def take(self, event: Any) -> None:
        self.line = event.start_mark.line + 1
        if isinstance(event, yaml.ScalarEvent):
            self.count(1)
            value = self.scalar(event)
            if event.anchor:
                self.anchors[event.anchor] = (value, 1)
            self.place(value, 1)
        elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            self.open(event)
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            frame = self.stack.pop()
            if frame.anchor:
                self.anchors[frame.anchor] = (frame.container, frame.nodes)
            self.line = frame.line
            self.place(frame.container, frame.nodes)
        elif isinstance(event, yaml.AliasEvent):
            self.alias(event.anchor)

    def open(self, event: yaml.MappingStartEvent | yaml.SequenceStartEvent) -> None:
        self.count(1)
        mapping = isinstance(event, yaml.MappingStartEvent)
        self.check_tag(event.tag, "map" if mapping else "seq")
        if len(self.stack) >= MAX_DEPTH:
            raise self.refuse(**_TOO_DEEP)
        path: ValuePath = ()
        if self.stack:
            parent = self.stack[-1]
            if isinstance(parent.container, dict) and not parent.has_key:
                raise self.refuse("a scalar key", "a collection as key", "use a plain key")
            path = (*parent.path, parent.key if parent.has_key else len(parent.container))
        if event.anchor:
            self.anchors[event.anchor] = None
        self.stack.append(_Frame({} if mapping else [], path, self.line, event.anchor))

    def alias(self, anchor: str | None) -> None:
        if anchor is None or anchor not in self.anchors:
            raise self.refuse("a known anchor", f"*{anchor}", "define the anchor before it")
        known = self.anchors[anchor]
        if known is None:
            raise self.refuse("an alias to a finished value", f"*{anchor} inside itself", "write it out")
        value, nodes = known
        if nodes > MAX_ALIAS_NODES:
            limit = f"an alias of at most {MAX_ALIAS_NODES} nodes"
            raise self.refuse(limit, f"*{anchor}, which expands to {nodes}", "write the values out")
        self.count(nodes)
        self.place(value, nodes)

    def count(self, nodes: int) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            raise self.refuse(f"at most {MAX_NODES} values", "more", "split the file")

    def check_tag(self, tag: str | None, kind: str) -> None:
        if tag not in (None, "!", f"tag:yaml.org,2002:{kind}"):
            raise self.refuse("plain YAML", f"the tag {tag}", "remove the tag")

    def place(self, value: YamlValue, nodes: int) -> None:
        """Put a finished value where it belongs: the document, a list, or a mapping's key or value."""
        if not self.stack:
            if self.done:
                raise self.refuse("one YAML document", "a second one", "use one file for each")
            self.value, self.done = value, True
            return
        frame = self.stack[-1]
        frame.nodes += nodes
        if isinstance(frame.container, list):
            self.lines[(*frame.path, len(frame.container))] = self.line
            frame.container.append(value)
        elif frame.has_key:
            frame.container[frame.key] = value
            frame.has_key = False
        elif isinstance(value, (dict, list)):
            raise self.refuse("a scalar key", "a collection as key", "use a plain key")
        elif value == "<<":
            raise self.refuse("plain keys", "a merge key `<<`", "write the keys out")
        elif value in frame.container:
            first = self.lines.get((*frame.path, value), self.line)
            raise self.refuse(
                "each key once", f"the key {value!r} again (first on line {first})", "keep one of the two"
            )
        else:
            frame.key, frame.has_key = cast("str", value), True
            self.lines[(*frame.path, frame.key)] = self.line

    def scalar(self, event: yaml.ScalarEvent) -> YamlValue:
        self.check_tag(event.tag, "str")
        quoted = event.tag is not None or event.style not in (None, "")
        return event.value if quoted else self.plain(event.value)
