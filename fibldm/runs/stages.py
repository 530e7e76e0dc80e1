"""The table of stages: what a stage is known by stands in its row, and everything else asks the table.

A new stage is a row in `TABLE` and a configuration file. Its place in the table is its place in a run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fibldm.errors import unknown_choice

DEFAULT_RECIPE = "recipe_default"
"""The shipped recipe that is followed where none is named."""


@dataclass(frozen=True)
class StageKind:
    """A row of the table.

    Attributes:
        name: of the stage, of its folder in a run and of its step in a recipe.
        files: configurations that make it, after ``common``; later ones change earlier ones.
        command: what makes it on the command line.
        in_pipeline: whether a run has it. "optional" ones have it unless a recipe says null, "on request" only where a
            recipe names them; what "never" has a place in a run stands elsewhere, such as the segmenter of `evaluate`.
        is_trained: by epochs, or by minutes.
        on_latents: whether it learns from what the stage ``latents`` cached, or else from volumes.
        base: the earlier stage whose network stands in its configuration as ``base``, frozen; None has none.
        stands_on: those of which the last that was begun takes the place of `base`, as the key ``teacher`` of its
            configuration says; its network and conditions are those of that stage.
        share: of the minutes of a run.
        share_of_others: what it takes of the shares of others where it is trained.
        generates: whether volumes are drawn with its network, which are those of the last such stage that was begun.
        brings_mask: whether its network follows masks even where that of ``base`` does not.
        imports: kinds of networks of other programs whose weights it can begin with, see `fibldm.importing`.
    """

    name: str
    files: tuple[str, ...]
    command: str
    in_pipeline: Literal["always", "optional", "on request", "never"] = "always"
    is_trained: bool = True
    on_latents: bool = False
    base: str | None = None
    stands_on: tuple[str, ...] = ()
    share: float = 0.0
    share_of_others: Mapping[str, float] = field(default_factory=dict)
    generates: bool = False
    brings_mask: bool = False
    imports: tuple[str, ...] = ()


_ROWS = (
    StageKind(
        "autoencoder",
        ("common_training", "train_autoencoder"),
        "fibldm train autoencoder",
        share=0.35,
        imports=("autoencoder", "vqvae"),
    ),
    StageKind("latents", ("encode_latents",), "fibldm encode", is_trained=False),
    StageKind(
        "diffusion",
        ("common_training", "train_diffusion"),
        "fibldm train diffusion",
        on_latents=True,
        share=0.65,
        generates=True,
        imports=("unet",),
    ),
    StageKind(
        "controlnet",
        ("common_training", "train_diffusion", "train_controlnet"),
        "fibldm train controlnet",
        in_pipeline="optional",
        on_latents=True,
        base="diffusion",
        share_of_others={"autoencoder": 0.05, "diffusion": 0.15},
        generates=True,
        brings_mask=True,
        imports=("controlnet",),
    ),
    StageKind(
        "distillation",
        ("common_training", "train_diffusion", "train_distillation"),
        "fibldm train distillation",
        in_pipeline="on request",
        on_latents=True,
        share=0.3,
        generates=True,
        stands_on=("diffusion", "controlnet"),
    ),
    StageKind("segmenter", ("common_training", "train_segmenter"), "fibldm evaluate", in_pipeline="never"),
)

TABLE: dict[str, StageKind] = {row.name: row for row in _ROWS}


class _OfRun(Sequence[str]):
    """The names of those that a run may have, in their order, as the table has them when it is asked."""

    def __getitem__(self, place: Any) -> Any:
        return tuple(kind.name for kind in TABLE.values() if kind.in_pipeline != "never")[place]

    def __len__(self) -> int:
        return len(self[:])


STAGES: Sequence[str] = _OfRun()


def kind_of(stage: str) -> StageKind:
    """The row of a stage; "segmenter/<more>" is one of several.

    Raises:
        FibldmError: there is none of that name.
    """
    name = stage.partition("/")[0]
    if name not in TABLE:
        raise unknown_choice("stage", stage, TABLE)
    return TABLE[name]


def begun(run: str | Path) -> list[StageKind]:
    """Those stages that a run folder has, in their order."""
    return [TABLE[stage] for stage in STAGES if (Path(run) / stage).exists()]


def taught(stage: str) -> bool:
    """Whether a stage learns from another one's network, whose architecture and conditions it takes."""
    return bool(kind_of(stage).stands_on)


def trained() -> tuple[str, ...]:
    """Those stages of a run that are trained, in their order."""
    return tuple(stage for stage in STAGES if TABLE[stage].is_trained)


def usual() -> tuple[str, ...]:
    """Those of a run that nobody has to ask for, in their order."""
    return tuple(kind.name for kind in TABLE.values() if kind.in_pipeline in ("always", "optional"))


def files_of_stages() -> tuple[str, ...]:
    """The configurations that make any stage, each once."""
    return tuple(dict.fromkeys(file for kind in TABLE.values() for file in kind.files))
