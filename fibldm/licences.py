"""Licences by their SPDX identifiers (https://spdx.org/licenses), with a name and where the text stands."""

from pathlib import Path

from fibldm.errors import FibldmError

LICENCES = {
    "Apache-2.0": ("Apache License 2.0", "https://www.apache.org/licenses/LICENSE-2.0"),
    "BSD-3-Clause": ("BSD 3-Clause License", "https://opensource.org/license/bsd-3-clause"),
    "CC0-1.0": ("CC0 1.0 Universal", "https://creativecommons.org/publicdomain/zero/1.0/"),
    "CC-BY-3.0": ("Creative Commons Attribution 3.0", "https://creativecommons.org/licenses/by/3.0/"),
    "CC-BY-4.0": ("Creative Commons Attribution 4.0", "https://creativecommons.org/licenses/by/4.0/"),
    "CC-BY-NC-4.0": (
        "Creative Commons Attribution-NonCommercial 4.0",
        "https://creativecommons.org/licenses/by-nc/4.0/",
    ),
    "CC-BY-NC-SA-4.0": (
        "Creative Commons Attribution-NonCommercial-ShareAlike 4.0",
        "https://creativecommons.org/licenses/by-nc-sa/4.0/",
    ),
    "CC-BY-SA-4.0": ("Creative Commons Attribution-ShareAlike 4.0", "https://creativecommons.org/licenses/by-sa/4.0/"),
    "MIT": ("MIT License", "https://opensource.org/license/mit"),
    "OpenRAIL": ("Open Responsible AI License", "https://www.licenses.ai"),
}


def licence_notice(identifier: str, file: Path | None, attribution: str = "") -> str:
    """What the file LICENSE beside weights says.

    Args:
        identifier: of SPDX.
        file: text of the licence; None where it is one of `LICENCES`.
        attribution: of the training data.

    Raises:
        FibldmError: the licence is none of `LICENCES` and there is no text, or that cannot be read.
    """
    if file is None:
        return _known(identifier, attribution)
    try:
        return f"SPDX-License-Identifier: {identifier}\n\n{file.read_text(encoding='utf-8')}"
    except (OSError, UnicodeDecodeError) as error:
        raise FibldmError(f"--license-file must be a text that can be read; {error}", "check the path") from error


def _known(identifier: str, attribution: str) -> str:
    if identifier not in LICENCES:
        raise FibldmError(
            f"--license must be the SPDX identifier of the weights' licence; got {identifier!r}",
            f"choose one of {', '.join(LICENCES)}, or give the text of another one by --license-file",
        )
    name, address = LICENCES[identifier]
    credit = f"\nTrained on: {attribution}\n" if attribution else ""
    return (
        f"SPDX-License-Identifier: {identifier}\n\n"
        f"The weights and configurations of this bundle are under the {name}.\nIts text: {address}\n{credit}"
    )
