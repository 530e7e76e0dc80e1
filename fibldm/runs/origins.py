"""A merged configuration as YAML that can be used again, each part with the file or option that it comes from."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from monai.bundle import ConfigParser
from monai.bundle.utils import merge_kv

from fibldm.runs.config_files import ConfigFiles, configs_folder, shown
from fibldm.runs.configuration import Configuration

_Place = tuple[str, ...]
_LINE = 100  # characters of a list that stands on one line


class _Dumper(yaml.SafeDumper):
    """Texts of several lines stay on one, and nothing stands for what was written before."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if re.search(r"[\n\r\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def with_origins(configuration: Configuration, options: Mapping[str, str] | None = None) -> str:
    """The merged configuration as YAML, with comments that say where each part comes from.

    Args:
        configuration: of a stage.
        options: of overrides, what is said in the place of ``--set``: key to text.
    """
    told = options or {}
    contents = [(_name(file), ConfigFiles.load_config_file(file)) for file in configuration.files]
    changes = [(name, key, value) for name, content in contents for key, value in content.items()]
    changes += [(told.get(key, "--set"), key, value) for key, value in configuration.overrides.items()]
    parser, origins = ConfigParser(config={}), dict[_Place, str]()
    for origin, key, value in changes:
        _note(origins, parser, key, value, origin)
        merge_kv(parser, key, value)
    head = "# Merged from these files, a later one changing earlier ones; after each part stands where it comes from."
    files = [f"#   {_printable(str(shown(file)))}" for file in configuration.files]
    return "\n".join([head, *files, *_lines(parser.get(), (), origins)]) + "\n"


def _name(file: Path) -> str:
    """A shipped file by its name alone, one of the user's by its path."""
    return file.name if file.parent == configs_folder() else _printable(str(shown(file)))


def _printable(text: str) -> str:
    return text if text.isprintable() else repr(text)


def _note(origins: dict[_Place, str], parser: ConfigParser, key: str, value: Any, origin: str) -> None:
    """Say where what a key changes comes from, before it is merged as MONAI does it."""
    place = tuple(key.removeprefix("+").replace("#", "::").split("::"))
    before = parser.get("::".join(place))
    if key.startswith("+") and isinstance(before, list):
        changed = [(*place, str(len(before) + number)) for number in range(len(value))]
    elif key.startswith("+") and isinstance(before, dict):
        changed = [(*place, str(name)) for name in value]
    else:
        changed = [place]
    for one in changed:
        for inside in [other for other in origins if other[: len(one)] == one]:
            del origins[inside]
        origins[one] = origin


def _lines(value: Any, place: _Place, origins: Mapping[_Place, str]) -> Iterator[str]:
    """The lines of a mapping or list, without the indentation that it stands in."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in items:
        begin = f"{_flow(key)}:" if isinstance(value, dict) else "-"
        inside = (*place, str(key))
        comment = f"  # {origins[inside]}" if inside in origins else ""
        if not _is_block(part, inside, origins):
            yield f"{begin} {_flow(part)}{comment}"
            continue
        indent = "" if isinstance(value, dict) and isinstance(part, list) else "  "
        yield f"{begin}{comment}"
        yield from (f"{indent}{line}" for line in _lines(part, inside, origins))


def _is_block(value: Any, place: _Place, origins: Mapping[_Place, str]) -> bool:
    """Whether a part takes lines of its own: mappings, lists of them, long lists, and what comes from several files."""
    if not value or not isinstance(value, dict | list):
        return False
    if isinstance(value, dict) or any(isinstance(part, dict) for part in value):
        return True
    several = any(len(other) > len(place) and other[: len(place)] == place for other in origins)
    return several or len(_flow(value)) > _LINE


def _flow(value: Any) -> str:
    text: str = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=math.inf, allow_unicode=True
    )
    return text.removesuffix("...\n").strip("\n")
