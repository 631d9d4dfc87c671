"""A matplotlib figure as one inline ``<svg>`` that needs no style of its own and takes the page's colours.

The page's policy refuses style attributes, so matplotlib's become presentation attributes. Colours are stand-ins until
the figure is written: the page's custom properties then decide them, in light and in dark.
"""

import io
import re
import xml.etree.ElementTree as ElementTree
from typing import TYPE_CHECKING, Any

from q4kd.harness.report.page import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"
SOFT = "#010204"
LIMIT = "#010205"
PAPER = "#010206"
SERIES = ("#010211", "#010212", "#010213", "#010214", "#010215")
_PAGE_COLOURS = {
    INK: "currentColor",
    SOFT: "var(--soft)",
    LIMIT: "var(--bad)",
    PAPER: "var(--paper)",
    **{stand_in: f"var(--s{number})" for number, stand_in in enumerate(SERIES, 1)},
}
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_DECIMALS = re.compile(r"(-?\d+\.\d\d)\d+")  # hundredths of a point are more than a screen shows
_FONT_SIZE = re.compile(r"([\d.]+)px")


def new_figure(x_label: str, y_label: str, *, height: float = 2.7) -> tuple["Figure", "Axes"]:
    """Return a figure of 4.5 x ``height`` inches and its axes, both labelled, in stand-in colours."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_style()):
        figure = Figure(figsize=(4.5, height), layout="constrained")
        axes = figure.subplots()
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(visible=True, linewidth=0.5, alpha=0.18)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_alpha(0.5)
        axes.tick_params(length=3, width=0.6)
    return figure, axes


def _style() -> Any:
    return {
        "axes.edgecolor": INK,
        "axes.labelcolor": SOFT,
        "axes.labelsize": 8.5,
        "font.family": "sans-serif",
        "font.size": 8.5,
        "grid.color": INK,
        "svg.fonttype": "none",
        "svg.hashsalt": "q4kd",
        "text.color": INK,
        "text.parse_math": False,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
    }


def to_svg(figure: "Figure", name: str, title: str) -> str:
    """Write the figure as an ``<svg>`` element with its own ids, ``role="img"`` and a title."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(_style()):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())  # noqa: S314 - matplotlib wrote it a line above
    for parent in root.iter():
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    prefix = re.sub(r"[^A-Za-z0-9]", "-", name)
    for element in root.iter():
        _restyle(element, prefix)
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.attrib |= {"role": "img", "aria-label": shown(title)}
    described = ElementTree.Element(f"{{{_SVG}}}title")
    described.text, described.tail = shown(title), "\n"
    root.insert(0, described)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return re.sub(r"\n\s*", "\n", ElementTree.tostring(root, encoding="unicode"))


def _restyle(element: ElementTree.Element, prefix: str) -> None:
    """Turn the style attribute into presentation attributes, and make ids and references this figure's own."""
    for declaration in element.attrib.pop("style", "").split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name == "font":  # a shorthand, which attributes do not have; the family is the page's
            found = _FONT_SIZE.search(value)
            name, value = "font-size", found[1] if found else "8.5"
        if name:
            element.set(name, _PAGE_COLOURS.get(value, value))
    for name, value in list(element.attrib.items()):
        if name in ("d", "transform", "x", "y"):
            element.set(name, " ".join(_DECIMALS.sub(r"\1", value).split()))
        elif name == "id":
            element.set(name, f"{prefix}-{value}")
        elif name == f"{{{_XLINK}}}href":
            del element.attrib[name]
            element.set("href", f"#{prefix}-{value[1:]}")
        elif value.startswith("url(#"):
            element.set(name, f"url(#{prefix}-{value[5:]}")
    if element.tag == f"{{{_SVG}}}text" and "fill" not in element.attrib:
        element.set("fill", "currentColor")
