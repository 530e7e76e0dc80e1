"""What a page is made of, before any of it is HTML: sections with lines, tables and pictures."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row is its heading.

    Attributes:
        caption: says what it shows.
        heads: of the columns.
        rows: texts, as many as there are heads.
    """

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]

    def without_empty(self) -> "Table":
        """The same without the columns in which nothing stands."""
        kept = [place for place in range(len(self.heads)) if not place or any(row[place] for row in self.rows)]
        rows = [[row[place] for place in kept] for row in self.rows]
        return Table(self.caption, [self.heads[place] for place in kept], rows)


@dataclass(frozen=True)
class Picture:
    """A picture in the page itself.

    Attributes:
        alt: what those learn who do not see it.
        caption: stands below it; empty for none.
        png: bytes of a PNG.
        svg: its elements, in place of a PNG.
    """

    alt: str
    caption: str = ""
    png: bytes = b""
    svg: Markup = Markup("")

    @property
    def source(self) -> str:
        """The PNG as an address that holds it."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


@dataclass(frozen=True)
class Part:
    """A section of the page.

    Attributes:
        title: its heading.
        lines: paragraphs.
        tables: below them.
        pictures: below those.
        legend: names of labels with their colours.
        code: lines that are shown as they stand.
        of_another: whether it is a section of the last one that is none of another.
        warnings: what a reader must not miss.
    """

    title: str
    lines: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    legend: Sequence[tuple[str, str]] = ()
    code: Sequence[str] = ()
    of_another: bool = False
    warnings: Sequence[str] = ()
