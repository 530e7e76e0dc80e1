"""The audit of a run or a bundle as one of its measurements, for ``metrics.json`` and the model card."""

from collections.abc import Mapping, Sequence
from typing import Any

from fibldm.evaluation.audit.audit import audit, scans_of_work
from fibldm.evaluation.audit.lookup import Scan
from fibldm.evaluation.cases import Case, Evaluated
from fibldm.evaluation.results import Section
from fibldm.evaluation.statistics import Estimate
from fibldm.synthesis import Synthesizer
from fibldm.volumes.datalist import read_datalist

FOLDER = "audit"
"""Where it lies, in the folder of the measurements."""


def measure_audit(evaluated: Evaluated, synthetic: Sequence[Case], synthesizer: Synthesizer | None) -> Section:
    """`audit` of synthetic volumes, in ``evaluation/audit``; validation and test patients are held out.

    Args:
        evaluated: the run or bundle.
        synthetic: the volumes.
        synthesizer: the generator that they are of; None leaves out what its weights tell.

    Returns:
        Figures ``copy_rate`` (real: of held-out scans), authenticity and the like, and ``membership_auc`` where it was
        measured; none where the audit was not possible, which a note says.

    Raises:
        FibldmError: see `audit`.
    """
    channels = len(evaluated.channels)
    result = audit(
        scans_of_work(evaluated.work, "training"),
        scans_of_work(evaluated.work, "validation", "test"),
        [Scan(case.name, case.subject, case.image, channels=channels) for case in synthetic],
        evaluated.folder / FOLDER,
        synthesizer=synthesizer,
        data=str(read_datalist(evaluated.work)["content"]),
        engine=evaluated.engine,
    )
    told = ("verdict", "threshold", "held_out_named", "memorised_patients", "membership", "own_masks", "of", "facts")
    facts = {name: result[name] for name in told if name in result}
    picture = {"picture": f"{FOLDER}/closest.png"} if "threshold" in result else {}
    return Section(figures_of(result), facts | picture, result.get("copies", []), sentences(result))


def figures_of(result: Mapping[str, Any]) -> dict[str, Estimate]:
    """The figures of an audit by name."""
    if result["copy_rate"] is None:
        return {}
    rate, others, membership = result["copy_rate"], result["figures"], result["membership"]
    real = result["held_out_named"]["value"]
    figures = {"copy_rate": Estimate(rate["value"], rate["low"], rate["high"], rate["of"], real)}
    figures |= {name: Estimate(**figure) for name, figure in others.items()}
    if not isinstance(membership, str):
        count = membership["training"] + membership["held_out"]
        ends = (membership["low"], membership["high"])
        figures["membership_auc"] = Estimate(membership["auc"], *ends, count)
        figures["membership_tpr"] = Estimate(membership["tpr_at_1_percent_fpr"], None, None, count)
    return figures


def sentences(result: Mapping[str, Any]) -> list[str]:
    """What an audit says, in words."""
    said = [f"{result['verdict'][0].upper()}{result['verdict'][1:]}."]
    if "threshold" in result:
        false = result["held_out_named"]
        said.append(
            "The threshold, similarity {:.3f}, comes from one half of the held-out patients; of the other half it "
            "names {count} of {of} scans [{low:.2g}, {high:.2g}].".format(result["threshold"], **false)
        )
    membership = result["membership"]
    if isinstance(membership, str):
        return [*said, f"{membership[0].upper()}{membership[1:]}."]
    return [
        *said,
        "Its weights tell training scans from others with an area under the curve of {auc:.2f} [{low:.2f}, {high:.2f}] "
        "(0.5 is chance), and {tpr_at_1_percent_fpr:.0%} of them at 1 % false ones.".format(**membership),
    ]
