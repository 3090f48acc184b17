# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""One page of HTML with everything in it."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    """A picture with what to see in it, or why there is none.

    Attributes:
        name: Name of the PNG file, without suffix.
        title: Heading.
        text: What is shown and how to read it.
        figure: The picture.
    """

    name: str
    title: str
    text: str
    figure: Figure | None = None


def write_page(
    folder: Path, title: str, facts: Mapping[str, str], sections: Sequence[Section]
) -> Path:
    """Write a page and its pictures.

    Args:
        folder: Folder for ``report.html``, which needs no other file, and for the
            pictures as PNG files.
        title: Heading of the page.
        facts: A table for its top.
        sections: What follows.

    Returns:
        The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = ''.join(
        f'<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>\n'
        for name, value in facts.items()
    )
    parts = [f'<h1>{html.escape(title)}</h1>\n<table>\n{rows}</table>\n']
    for section in sections:
        heading, text = html.escape(section.title), html.escape(section.text)
        if section.figure is None:
            parts.append(f'<h2>{heading}</h2>\n<p class="note">{text}</p>\n')
            continue
        buffer = io.BytesIO()
        section.figure.savefig(buffer, format='png', dpi=110)
        picture = buffer.getvalue()
        (folder / f'{section.name}.png').write_bytes(picture)
        data = base64.b64encode(picture).decode()
        parts.append(
            f'<h2>{heading}</h2>\n<p>{text}</p>\n'
            f'<img alt="{heading}" src="data:image/png;base64,{data}">\n'
        )
    page = folder / 'report.html'
    page.write_text(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n'
        f'<body>\n{"".join(parts)}</body>\n</html>\n',
        encoding='utf-8',
    )
    return page
