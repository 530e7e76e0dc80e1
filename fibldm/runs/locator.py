"""MONAI's parser of configurations, which looks for classes where their names say that they are."""

from typing import Any

from monai.bundle import ConfigParser
from monai.bundle.config_item import ComponentLocator


class Locator(ComponentLocator):
    """MONAI's, which lists all of its classes to find a short name, and here does not do so for a dotted one."""

    def get_component_module_name(self, name: str) -> list[str] | str | None:
        """The modules of a short name; None for a name that says its module itself."""
        return None if isinstance(name, str) and "." in name else super().get_component_module_name(name)


def parser_of(config: dict[str, Any]) -> ConfigParser:
    """MONAI's parser of a configuration, by a `Locator`."""
    parser = ConfigParser(config)
    parser.locator = Locator()
    return parser
