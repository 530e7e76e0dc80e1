"""Vectors that are added to the time embedding of a UNet or ControlNet, by the way that MONAI has for classes.

Dhariwal & Nichol 2021, "Diffusion models beat GANs on image synthesis", section 3.1, add an embedding of the class to
that of the time; MONAI looks it up in a table of one class a sample. Here the table gives back what it is given, so
that any sum of vectors takes that way, through every network that knows classes, and no weight has another name.
"""

from torch import nn

from fibldm.errors import FibldmError


class GivenVectors(nn.Identity):
    """Stands where the table of classes would be: what a network is given as classes are vectors ``(B, width)``."""


def time_width(network: nn.Module) -> int:
    """Width of the time embedding."""
    return int(network.time_embed[-1].out_features)  # type: ignore[index,union-attr]


def takes_vectors(network: nn.Module) -> bool:
    """Whether it adds the vectors that it is given as ``class_labels``."""
    return isinstance(getattr(network, "class_embedding", None), GivenVectors)


def take_vectors(network: nn.Module) -> None:
    """Make a network of MONAI, or of monai-generative, add what it is given as ``class_labels``; it then needs some.

    Raises:
        FibldmError: it has a table of classes of its own.
    """
    if takes_vectors(network):
        return
    if network.num_class_embeds is not None:
        raise FibldmError(
            f"{type(network).__name__} must have no table of classes of its own, as conditions are added to its time "
            f"embedding; it has {network.num_class_embeds} classes",
            "leave num_class_embeds out",
        )
    network.num_class_embeds, network.class_embedding = time_width(network), GivenVectors()  # type: ignore[assignment]
