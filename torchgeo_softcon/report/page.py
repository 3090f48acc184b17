# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""One page of HTML with everything in it."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure
from PIL import Image

from ..evaluation.verdict import Finding, summarize

#: Class and sign of findings.
_MARKS = {True: ('good', '✓'), False: ('bad', '✗ No.'), None: ('unknown', '?')}

#: Qualities and scales of pictures to try, and bytes of all of them that are few enough:
#: base64 adds a third, and a page shall have at most 1 MB.
_QUALITIES, _FEW = ((80, 1), (60, 1), (40, 1), (40, 2), (40, 4)), 600_000

#: At which pictures are shown, so that their letters of 10 points are 12 pixels high. On
#: a phone, they are moved sideways instead of shrunk.
_PIXELS_PER_INCH = 88


@dataclass(frozen=True)
class Line:
    """A curve: points in the panel's coordinates, and its colour and dashes in CSS."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    dash: str = ''


@dataclass(frozen=True)
class Panel:
    """Curves with one vertical axis: positions and texts of its ticks."""

    title: str
    lines: Sequence[Line]
    rows: Sequence[tuple[float, str]]
    columns: Sequence[tuple[float, str]]
    alt: str
    note: str = ''


@dataclass(frozen=True)
class Section:
    """A picture or curves with what to see in it, or why there is none."""

    name: str  # of the WebP file, without suffix
    title: str
    text: str
    figure: Figure | None = None
    alt: str = ''  # the finding, for those who do not see the picture
    panels: Sequence[Panel] = ()
    warning: str = ''


def write_page(
    folder: Path,
    title: str,
    facts: Mapping[str, Sequence[str]],
    sections: Sequence[Section],
    findings: Mapping[str, Sequence[Finding]] | None = None,
    configurations: Mapping[str, str] | None = None,
) -> Path:
    """Write ``report.html``, which needs no other file, and its pictures as WebP files.

    On top is the verdict of the *findings* of each run, below are the *sections*, and at
    the end *facts*, one value per run, and *configurations*.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = _encode({s.name: s.figure for s in sections if s.figure is not None})
    for name, data in pictures.items():
        (folder / f'{name}.webp').write_bytes(data)
    template = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, '.'), autoescape=True
    ).get_template('page.html.j2')
    verdicts = [
        (name if len(findings or {}) > 1 else '', summarize(found), found)
        for name, found in (findings or {}).items()
    ]
    page = folder / 'report.html'
    text = template.render(
        title=title,
        facts=facts,
        sections=sections,
        verdicts=verdicts,
        marks=_MARKS,
        configurations=configurations or {},
        pictures={k: base64.b64encode(v).decode() for k, v in pictures.items()},
        pixels_per_inch=_PIXELS_PER_INCH,
    )
    page.write_text(text, encoding='utf-8')
    return page


def _encode(figures: Mapping[str, Figure]) -> dict[str, bytes]:
    """Write pictures as WebP, as well as few bytes allow."""
    drawn: dict[str, Any] = {}
    for name, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format='png', dpi=110)
        drawn[name] = Image.open(buffer).convert('RGB')
    result: dict[str, bytes] = {}
    for quality, shrink in _QUALITIES:
        for name, image in drawn.items():
            buffer = io.BytesIO()
            image.reduce(shrink).save(buffer, 'WEBP', quality=quality)
            result[name] = buffer.getvalue()
        if sum(map(len, result.values())) <= _FEW:
            break
    return result
