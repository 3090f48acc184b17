# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""One page of HTML with everything in it."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto;
       padding: 0 1rem; color: #222; background: #fff; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: .15rem 1rem .15rem 0; vertical-align: top;
         overflow-wrap: anywhere; }
th { font-weight: 600; white-space: nowrap; }
h2 { margin: 2.2rem 0 .3rem; font-size: 1.25rem; }
.note { color: #666; }
"""


@dataclass(frozen=True)
class Section:
    """A picture with what to see in it, or why there is none."""

    name: str  # of the PNG file, without suffix
    title: str
    text: str
    figure: Figure | None = None


def write_page(
    folder: Path, title: str, facts: Mapping[str, str], sections: Sequence[Section]
) -> Path:
    """Write ``report.html``, which needs no other file, and its pictures as PNG files.

    On top is a table of *facts*, below are the *sections*.
    """
    folder.mkdir(parents=True, exist_ok=True)
    title = escape(title)
    body = f'<h1>{title}</h1>\n<table>\n'
    for name, value in facts.items():
        body += f'<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>\n'
    body += '</table>\n'
    for section in sections:
        heading, text = escape(section.title), escape(section.text)
        note = ' class="note"' if section.figure is None else ''
        body += f'<h2>{heading}</h2>\n<p{note}>{text}</p>\n'
        if section.figure is not None:
            picture = folder / f'{section.name}.png'
            section.figure.savefig(picture, dpi=110)
            data = base64.b64encode(picture.read_bytes()).decode()
            body += f'<img alt="{heading}" src="data:image/png;base64,{data}">\n'
    page = folder / 'report.html'
    page.write_text(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n'
        f'<body>\n{body}</body>\n</html>\n',
        encoding='utf-8',
    )
    return page
