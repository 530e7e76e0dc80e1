"""The import rule: arrows point only down.

``cli -> demo -> pipeline | doctor | stress -> report -> delivery | editing | evaluation | importing | mask_editing |
planning | serving -> synthesis | training -> datasets | phantoms -> models | volumes -> runs -> ground``. Modules of
one room may import each other; rooms of one level may not. Imports inside functions count.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fibldm

PACKAGE = Path(fibldm.__file__).parent

# A room is a folder or a module of the package; those of one level never import each other.
LEVELS: tuple[dict[str, set[str]], ...] = (
    {
        "ground": {
            "fibldm",
            "errors",
            "files",
            "licences",
            "locks",
            "manifest",
            "typed_settings",
            "shards",
            "workers",
            "cluster",
        }
        | {"out_of_memory", "progress", "surroundings", "verbatim"}
    },
    {"runs": {"runs"}},
    {"models": {"models"}, "volumes": {"volumes"}},
    {"datasets": {"datasets"}, "phantoms": {"phantoms"}},
    {"training": {"training"}, "synthesis": {"synthesis"}},
    {
        room: {room}
        for room in ("delivery", "editing", "evaluation", "importing", "mask_editing", "planning", "serving")
    },
    {"report": {"report"}},
    {"pipeline": {"pipeline", "recipe"}, "doctor": {"doctor"}, "stress": {"stress"}},
    {"demo": {"demo"}},
    {"cli": {"cli"}},
)
ROOM_AND_LEVEL = {
    part: (room, level) for level, rooms in enumerate(LEVELS) for room, parts in rooms.items() for part in parts
}


def part_of(module: str) -> str:
    """The first name below the package: ``models`` of ``fibldm.models.process``, ``fibldm`` of the package itself."""
    return [*module.split("."), "fibldm"][1]


def imported_modules(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Absolute names of the package's own modules that ``source`` imports, wherever in the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            names = [f"fibldm.{alias.name}" for alias in node.names] if base == "fibldm" else [base]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "fibldm")


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What in ``source`` breaks the import rule, one sentence each."""
    room, level = ROOM_AND_LEVEL[part_of(module)]
    found = []
    for imported in imported_modules(source, module, is_package):
        # `from fibldm import UNKNOWN_LABEL` names a value of the package itself, not a module.
        other, other_level = ROOM_AND_LEVEL.get(part_of(imported), ("ground", 0))
        if other != room and other_level >= level:
            found.append(f"{module} ({room}) imports {imported} ({other})")
    return found


def modules() -> list[tuple[str, Path]]:
    paths = sorted(path for path in PACKAGE.rglob("*.py") if "configs" not in path.relative_to(PACKAGE).parts)
    named = [(path.relative_to(PACKAGE.parent).with_suffix("").parts, path) for path in paths]
    return [(".".join(parts).removesuffix(".__init__"), path) for parts, path in named]


def test_every_module_has_a_room() -> None:
    homeless = [module for module, _ in modules() if part_of(module) not in ROOM_AND_LEVEL]
    assert not homeless, f"name the room of {homeless} in LEVELS, and in docs/architecture.md"


def test_imports_point_down() -> None:
    found = [
        sentence
        for module, path in modules()
        if part_of(module) in ROOM_AND_LEVEL
        for sentence in violations(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    ]
    assert len(modules()) > 3
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fibldm.models.process", "from fibldm.volumes.grid import pad"),
        ("fibldm.models.process", "import fibldm.volumes.grid"),
        ("fibldm.models.process", "from fibldm import volumes"),
        ("fibldm.models.process", "from ..volumes import grid"),
        ("fibldm.models.process", "def late():\n    from fibldm.training import losses"),
        ("fibldm.volumes.grid", "from fibldm.models.latents import LatentSpace"),
        ("fibldm.errors", "from fibldm.volumes import grid"),
        ("fibldm", "from fibldm.synthesis import Synthesizer"),
        ("fibldm.synthesis", "from fibldm.evaluation import segmenter"),
        ("fibldm.synthesis", "from fibldm.training import engines"),
        ("fibldm.training.engines", "import fibldm.synthesis"),
        ("fibldm.evaluation.measurements", "from fibldm.delivery import model_card"),
        ("fibldm.delivery.export", "from fibldm import pipeline"),
        ("fibldm.volumes.grid", "from fibldm.datasets import split"),
        ("fibldm.report.report", "from fibldm.demo import demo"),
        ("fibldm.demo.demo", "from fibldm.cli.output import emit_result"),
    ],
)
def test_wrong_imports_are_seen(module: str, source: str) -> None:
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fibldm.models.process", "from fibldm.models.timesteps import shift"),
        ("fibldm.models.process", "from . import timesteps\nfrom .timesteps import shift\nimport torch"),
        ("fibldm.models.process", "from fibldm import UNKNOWN_LABEL\nfrom fibldm.errors import FibldmError"),
        ("fibldm.synthesis", "from fibldm.models import latents\nfrom fibldm.volumes import grid"),
        ("fibldm.delivery.export", "from fibldm.synthesis import Synthesizer"),
        ("fibldm.evaluation.utility", "from fibldm.training import engines"),
        ("fibldm.cli.doctor", "from fibldm.doctor import diagnose"),
    ],
)
def test_right_imports_are_not(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_relative_imports_of_a_package_start_at_itself() -> None:
    assert list(imported_modules("from .process import VP", "fibldm.models", is_package=True)) == [
        "fibldm.models.process"
    ]


def module_level_imports(tree: ast.AST) -> Iterator[str]:
    """Names imported when a file is imported, those in ``if`` and ``try`` included, those in functions not."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from module_level_imports(node)


def is_heavy(name: str) -> bool:
    return name.split(".")[0] in {"torch", "monai", "ignite", "generative"}


def test_command_files_import_nothing_heavy() -> None:
    for path in (PACKAGE / "cli").glob("*.py"):
        heavy = [name for name in module_level_imports(ast.parse(path.read_text(encoding="utf-8"))) if is_heavy(name)]
        assert not heavy, f"{path.name} imports {heavy} before its function is called"


def test_a_heavy_import_would_be_seen() -> None:
    source = "if True:\n    import torch.nn\ndef late():\n    import monai\n"
    assert [name for name in module_level_imports(ast.parse(source)) if is_heavy(name)] == ["torch.nn"]
