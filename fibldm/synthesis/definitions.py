"""Networks and what belongs to them as plain values: a class by its name, and what it is made with.

A definition is JSON: ``{"_target_": "monai.networks.nets.DiffusionModelUNet", "spatial_dims": 3, ...}``, as MONAI's
configurations have it, but without references and expressions. Only the classes named here, and conditions, are made
of it, so that a definition from elsewhere is data and not a program.
"""

from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from importlib import import_module
from typing import Any

from fibldm.errors import FibldmError

TARGETS = frozenset(
    """
    fibldm.models.autoencoder.Autoencoder
    fibldm.models.identity_autoencoder.IdentityAutoencoder
    fibldm.models.maisi.MaisiAutoencoder
    fibldm.models.lean_unet.LeanUNet
    fibldm.models.network.ConditionedNetwork
    fibldm.models.network.steered
    fibldm.models.process.RectifiedFlow
    fibldm.models.process.VariancePreserving
    fibldm.models.spade_autoencoder.SpadeAutoencoder
    fibldm.models.vector_quantised.VectorQuantisedAutoencoder
    generative.networks.nets.AutoencoderKL
    generative.networks.nets.ControlNet
    generative.networks.nets.DiffusionModelUNet
    generative.networks.nets.VQVAE
    monai.apps.generation.maisi.networks.autoencoderkl_maisi.AutoencoderKlMaisi
    monai.networks.nets.AutoencoderKL
    monai.networks.nets.ControlNet
    monai.networks.nets.DiffusionModelUNet
    monai.networks.nets.SPADEAutoencoderKL
    monai.networks.nets.SPADEDiffusionModelUNet
    monai.networks.nets.VQVAE
    """.split()
)
CONDITIONS = "fibldm.models.conditions."
"""Whatever class a file of this folder defines may be made, too."""

_LARGEST_NUMBER = 2**20
_DEEPEST = 32
_MOST_VALUES = 10_000


def build(definition: Any, where: str, *, trust: bool = False) -> Any:
    """What a definition describes.

    Args:
        definition: of JSON.
        where: it stands, for errors.
        trust: take any class that can be imported, too.

    Raises:
        FibldmError: it names a class that is neither in `TARGETS` nor one of `CONDITIONS`, holds a reference or an
            expression, is larger than any definition needs to be, or does not fit its class.
    """
    values = list(_values(definition, where))
    if len(values) > _MOST_VALUES:
        raise FibldmError(f"{where} must hold at most {_MOST_VALUES} values; got {len(values)}")
    for value in values:
        _check(value, where)
    return _built(definition, where, trust)


def _values(definition: Any, where: str, depth: int = 0) -> Iterator[Any]:
    if depth > _DEEPEST:
        raise FibldmError(f"{where} must be nested at most {_DEEPEST} deep; it is deeper")
    if isinstance(definition, Mapping | list):
        inner = definition.values() if isinstance(definition, Mapping) else definition
        for value in inner:
            yield from _values(value, where, depth + 1)
    else:
        yield definition


def _check(value: Any, where: str) -> None:
    if isinstance(value, str) and value[:1] in ("$", "@", "%"):
        raise FibldmError(
            f"{where} must hold plain values, without references and expressions; it holds {value!r}",
            "export the bundle again; do not use one whose origin you do not know",
        )
    if isinstance(value, int | float) and not abs(value) <= _LARGEST_NUMBER:
        raise FibldmError(f"{where} must hold numbers of at most {_LARGEST_NUMBER}; it holds {value}")


def _built(definition: Any, where: str, trust: bool) -> Any:
    if isinstance(definition, list):
        return [_built(value, where, trust) for value in definition]
    if not isinstance(definition, Mapping):
        return definition
    inside = {key: _built(value, f"{where}::{key}", trust) for key, value in definition.items() if key != "_target_"}
    return _made(str(definition["_target_"]), inside, where, trust) if "_target_" in definition else inside


def _is_condition(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    if not module.startswith(CONDITIONS):
        return False
    try:
        found = getattr(import_module(module), attribute, None)
    except ImportError:
        return False
    return isinstance(found, type) and found.__module__ == module


def _made(name: str, arguments: dict[str, Any], where: str, trust: bool) -> Any:
    if not (name in TARGETS or trust or _is_condition(name)):
        raise FibldmError(
            f"{where} must be made of networks that FibLDM knows; {name!r} is none of them",
            "give `trust` if you know who made this bundle: what it names runs on your machine then",
        )
    try:
        module, _, attribute = name.rpartition(".")
        target = getattr(import_module(module), attribute)
        if is_dataclass(target):  # which are compared, and read from JSON no tuples
            arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
        return target(**arguments)
    except FibldmError:
        raise
    except Exception as error:
        raise FibldmError(f"{where} must describe a {name}; {type(error).__name__}: {error}") from error
