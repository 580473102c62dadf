"""Renders a template of this folder into one file that needs nothing else. Used by build.py and folder_page.py."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from medgen import __version__
from medgen.report import words
from medgen.report.pictures import colour_of

FOLDER = Path(__file__).parent


def render(template: str, **values: Any) -> str:
    """The page. Every name in the template must be given: an unknown one is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": words.number, "duration": words.duration, "date": words.date, "plain": words.plain, "region_colour": colour_of}
    return environment.get_template(template).render(style=Markup((FOLDER / "style.css").read_text()), made=time.time(), version=__version__, **values)
