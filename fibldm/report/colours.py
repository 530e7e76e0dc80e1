"""The colours of labels, the same in every picture."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fibldm import UNKNOWN_LABEL

LABEL_COLOURS = ("#4e79a7", "#76b7b2", "#edc948", "#f28e2b", "#e15759", "#b07aa1")


def label_colour(label: int) -> str:
    """Colour of a label in every picture."""
    return LABEL_COLOURS[(label - 1) % len(LABEL_COLOURS)]


def drawn_labels(labels: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a picture shows a label: neither background nor unknown."""
    return (labels != 0) & (labels != UNKNOWN_LABEL)
