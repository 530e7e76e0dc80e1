"""NiiVue from an installed package, for 3-D in the page; without it there are slices.

The package is a widget for notebooks, whose one program holds NiiVue. What of it is NiiVue's class has another name in
every version, so that it is looked for by how the widget uses it.
"""

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "ipyniivue"
_PROGRAM = "static/widget.js"
_USED = re.compile(r"\b([\w$]+)\.attachToCanvas\(")


@dataclass(frozen=True)
class NiiVue:
    """NiiVue as it is put into a page.

    Attributes:
        program: a module that ends with a constant ``FibldmNiivue``, the class.
        version: of the package.
        licence: its text, which goes with every copy.
    """

    program: str
    version: str
    licence: str


def find_niivue() -> NiiVue | None:
    """NiiVue; None where the package is not installed, or not as it is known."""
    found = find_spec(PACKAGE)
    if found is None or found.origin is None:
        return None
    file = Path(found.origin).parent / _PROGRAM
    program = module_of(file.read_text(encoding="utf-8")) if file.is_file() else None
    return None if program is None else NiiVue(program, *_about())


def module_of(widget: str) -> str | None:
    """The program of the widget for a page, with a name for NiiVue's class; None where that is not found."""
    for used in _USED.finditer(widget):
        if made := re.search(rf"(?<![\w$.]){re.escape(used[1])}=new ([\w$]+)\(", widget):
            return inlined(f"{widget}\nconst FibldmNiivue = {made[1]};\n")
    return None


def inlined(program: str) -> str:
    """A program without what would end the element that it stands in, or be read as another text by HTML."""
    return program.replace("\r", "").replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _about() -> tuple[str, str]:
    try:
        known = distribution(PACKAGE)
    except PackageNotFoundError:
        return "", ""
    return known.version, known.read_text("licenses/LICENSE") or known.read_text("LICENSE") or ""
