"""Are synthetic volumes as good as real ones to learn from? A segmenter trained on them alone, measured on real scans.

Esteban et al. 2017, "Real-valued (medical) time series generation with recurrent conditional GANs", section 4.3: train
on synthetic, test on real.
"""

from collections.abc import Callable, Sequence

import numpy as np

from fibldm.errors import FibldmError
from fibldm.evaluation.cases import Case, Evaluated, need_masks
from fibldm.evaluation.faithfulness import Measured, described, mean_estimates, measure_overlaps, values_of
from fibldm.evaluation.results import Section
from fibldm.evaluation.segmenter import Segmenter
from fibldm.evaluation.statistics import Estimate, estimate

Train = Callable[[Sequence[Case]], Segmenter]


def measure_utility(evaluated: Evaluated, synthetic: Sequence[Case], segmenter: Segmenter, train: Train) -> Section:
    """How well a segmenter that saw synthetic volumes only finds the labels of real test scans.

    Figures are those of `faithfulness.measure_faithfulness` over the real test scans, by the segmenter of the synthetic
    volumes; ``real_vs_real`` is the same by the one of the real training scans, trained in the same way for as many
    steps. ``utility`` is the ratio of their Dice, 1 where nothing is lost.

    Args:
        evaluated: run and work folder.
        synthetic: volumes with their masks; those of the masks of validation and test patients are left out.
        segmenter: trained on the training split of the work folder.
        train: trains such a segmenter on other cases.

    Raises:
        FibldmError: a volume has no mask, or none was made from a mask that may be learned from.
    """
    need_masks(list(synthetic), "utility")
    usable = [case for case in synthetic if case.split in ("training", None)]
    if not usable:
        raise FibldmError(
            "utility needs volumes of masks that may be learned from; all of these are of validation or test patients",
            "synthesize from the masks of the training split, which datalist.json lists",
        )
    test = [(case, case) for case in evaluated.real("test")]
    of_real, of_synthetic = (measure_overlaps(evaluated, test, used) for used in (segmenter, train(usable)))
    ceiling = {name: part.value for name, part in mean_estimates(of_real).items()}
    figures = {"utility": _ratio(of_synthetic, of_real), **mean_estimates(of_synthetic, ceiling)}
    left_out = len(synthetic) - len(usable)
    notes = [f"{left_out} volumes of masks of validation or test patients were left out."] if left_out else []
    facts = {
        "volumes": len(usable),
        "patients": len({case.subject for case in usable}),
        "real_training_scans": len(evaluated.real("training")),
        "segmenter": segmenter.fingerprint,
    }
    return Section(figures, facts, described(of_synthetic), notes)


def _ratio(one: Sequence[Measured], other: Sequence[Measured]) -> Estimate:
    """The mean Dice of one over that of the other, on the same patients."""
    ours, theirs = (
        np.array([np.mean(values) for values in values_of(measured, "dice").values()]) for measured in (one, other)
    )
    return estimate(lambda chosen: float(ours[chosen].mean() / theirs[chosen].mean()), len(ours), real_vs_real=1.0)
