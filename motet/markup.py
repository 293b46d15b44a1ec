"""HTML without templates: elements that escape by construction, and the colours of all pages. Pure.

A text becomes markup only in ``tag``, which escapes whatever is not ``Html`` already; so nothing that a user wrote can
be more than text.
"""

from __future__ import annotations

from html import escape

#: Colours by name, for light and dark: paper and ink, states of cells, and p0 … p5 for things told apart.
PALETTE = """\
:root{color-scheme:light dark;--paper:#fff;--ink:#1c2127;--soft:#59626d;--line:#e2e6ea;--wash:#f5f6f8;--link:#1d5fa8;
--curve:#5d7186;--ok:#2c8a62;--reused:#7fbf9f;--error:#c43d4b;--skipped:#b3841a;--open:#cdd3da;
--p0:#3f75b5;--p1:#c08a1e;--p2:#2f9488;--p3:#8d62ad;--p4:#9a6a43;--p5:#5b8a3a}
@media(prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e6e9ed;--soft:#9ba5b1;--line:#2b3138;--wash:#1b1f24;
--link:#82b4ec;--curve:#8fa3b8;--ok:#46ab7f;--reused:#2c6b50;--error:#e8707b;--skipped:#d3a63f;--open:#3a424b;
--p0:#6a9fdd;--p1:#d9a845;--p2:#4fb5a8;--p3:#b28bd1;--p4:#c2926b;--p5:#86b765}}
"""


class Html(str):
    """Markup: made by ``tag`` and ``join`` alone."""

    __slots__ = ()


_VOID = frozenset({"br", "link", "meta"})


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element. ``class_`` is the attribute class, ``view_box`` viewBox, ``aria_label`` aria-label; None leaves an
    attribute out, True gives it no value."""
    said = "".join(
        f" {_attribute(key)}" + ("" if value is True else f'="{escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Html(f"<{name}{said}>")
    return Html(f"<{name}{said}>{join(*children)}</{name}>")


def join(*children: object) -> Html:
    """Children one after the other: markup as it is, None as nothing, lists in turn, all else escaped."""
    return Html("".join(_child(c) for c in children))


def _child(child: object) -> str:
    match child:
        case Html():
            return child
        case None:
            return ""
        case list() | tuple():
            return join(*child)
        case _:
            return escape(str(child))


#: SVG writes these two in its own way.
_CAMEL = {
    "view_box": "viewBox",
    "preserve_aspect_ratio": "preserveAspectRatio",
    "pattern_units": "patternUnits",
}


def _attribute(key: str) -> str:
    return _CAMEL.get(key) or key.rstrip("_").replace("_", "-")
