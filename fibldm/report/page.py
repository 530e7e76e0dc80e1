"""Sections as one HTML file that fetches nothing: all it needs is inside, and a policy forbids the rest."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

import fibldm
from fibldm.errors import FibldmError
from fibldm.files import write_text
from fibldm.report.niivue import NiiVue, find_niivue
from fibldm.report.parts import Part
from fibldm.report.payload import Payload
from fibldm.volumes.pictures import PLANES

LARGEST = 25_000_000  # bytes
_FOR_VOLUMES = 16_000_000

VOLUMES = "Volumes"


@dataclass(frozen=True)
class Script:
    """A program in the page."""

    text: Markup
    module: bool = False

    @property
    def hash(self) -> str:
        """As a content security policy names it."""
        digest = hashlib.sha256(self.text.encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode()}'"


@dataclass(frozen=True)
class Page:
    """A report before it is written.

    Attributes:
        title: what it is of.
        banner: what everybody must read, on top.
        parts: the sections.
        payload: volumes for the viewer; None has none.
        warnings: below the banner.
    """

    title: str
    banner: Sequence[str]
    parts: Sequence[Part]
    payload: Payload | None = None
    warnings: Sequence[str] = ()

    def html(self) -> str:
        """The whole file."""
        niivue = None if self.payload is None else find_niivue()
        scripts = [] if self.payload is None else _scripts(niivue)
        environment = Environment(
            loader=PackageLoader("fibldm.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
        )
        return environment.get_template("report.html.j2").render(
            version=fibldm.__version__,
            title=self.title,
            banner=self.banner,
            warnings=self.warnings,
            parts=[(f"part-{number}", part) for number, part in enumerate(self.parts)],
            policy=_policy(scripts),
            style=Markup(_template("report.css")),
            scripts=scripts,
            viewer_in=VOLUMES,
            planes=PLANES,
            niivue=niivue,
            index=Markup(self.payload.contents) if self.payload else "",
            volumes=self.payload.volumes if self.payload else {},
        )

    def write(self, path: Path) -> int:
        """Write the file; its size in bytes.

        Raises:
            FibldmError: it does not end in .html, would be too large to be sent around, or cannot be written.
        """
        if path.suffix.lower() != ".html":
            raise FibldmError(f"a report is written to an .html file; got {path.name}", "change --out")
        html = self.html()
        size = len(html.encode())
        if size > LARGEST:
            raise FibldmError(
                f"a report must be at most {LARGEST / 1e6:g} MB; this one would be {size / 1e6:.1f} MB",
                "show fewer --cases",
            )
        write_text(path, html)
        return size


def room_for_volumes() -> int:
    """Bytes that the volumes of a page may take."""
    programs = sum(len(script.text) for script in _scripts(find_niivue()))
    return min(_FOR_VOLUMES, LARGEST - programs - 5_000_000)


def _scripts(niivue: NiiVue | None) -> list[Script]:
    more = [] if niivue is None else [Script(Markup(f"{niivue.program}{_template('space.js')}"), module=True)]
    return [Script(Markup(_template("viewer.js"))), *more]


def _policy(scripts: Sequence[Script]) -> str:
    """Nothing but what is inside: no address, no frame, no form, and no program but these."""
    programs = " ".join(script.hash for script in scripts) or "'none'"
    more = " 'wasm-unsafe-eval'; worker-src blob:; connect-src data: blob:" if len(scripts) > 1 else ""
    return (
        f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src {programs}{more}; "
        "base-uri 'none'; form-action 'none'"
    )


def _template(name: str) -> str:
    return (files("fibldm.report") / "templates" / name).read_text(encoding="utf-8")
