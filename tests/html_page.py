"""A page as a browser sees it. Used by the tests of the report and of two folders."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "input", "img", "br", "line", "path", "circle", "rect", "polygon", "link"}


class Page(HTMLParser):
    """What a browser would see: text, pictures, addresses; and whether every tag is closed."""

    def __init__(self, html: str):
        super().__init__()
        self.html = html
        self.open_tags: list[str] = []
        self.addresses: list[str] = []
        self.labels: list[str] = []
        self.words: list[str] = []
        self.identifiers: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open_tags, f"not closed: {self.open_tags}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.addresses += [value for name, value in attributes if name in ("src", "href") and value]
        if tag == "img":
            self.labels.append(values["alt"] or "")
        if values.get("id"):
            self.identifiers.append(values["id"] or "")
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Self-closed tags stay out of the stack."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open_tags and self.open_tags[-1] not in ("style", "pre"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def require_self_contained(self) -> None:
        """Nothing but what is in the file, and every link leads somewhere in it; every picture has words."""
        assert self.addresses
        assert all(address.startswith(("data:image/png;base64,", "#")) for address in self.addresses)
        assert not re.search(r"url\(|@import|<script|https?://", self.html)
        assert all(address[1:] in self.identifiers for address in self.addresses if address.startswith("#"))
        assert all(self.labels)
