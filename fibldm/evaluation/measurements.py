"""All that is measured of a run, by name; what `fibldm evaluate` and the demo call."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fibldm.errors import FibldmError, unknown_choice
from fibldm.evaluation.audit.section import measure_audit
from fibldm.evaluation.cases import Case, Evaluated, need_masks
from fibldm.evaluation.ct import measure_ct
from fibldm.evaluation.faithfulness import measure_faithfulness
from fibldm.evaluation.gate import measure_gate
from fibldm.evaluation.masks import masks_of, measure_masks
from fibldm.evaluation.memorisation import measure_copies
from fibldm.evaluation.perceptual import PlaneDistance
from fibldm.evaluation.provenance import Provenance, read_provenance
from fibldm.evaluation.realism import measure_realism
from fibldm.evaluation.reconstruction import Reconstructor, measure_reconstruction
from fibldm.evaluation.results import Section, record
from fibldm.evaluation.seed_spread import measure_spread
from fibldm.evaluation.segmenter import Segmenter, trained_segmenter
from fibldm.evaluation.utility import measure_utility
from fibldm.runs import hash_weights, load_facts
from fibldm.runs.values import require_switches
from fibldm.synthesis import Synthesizer
from fibldm.synthesis.bundle import open_bundle
from fibldm.synthesis.loading import generating_weights, knows_masks
from fibldm.volumes.gate import Gate, gate_of_bundle, read_gate, required
from fibldm.volumes.label_images import check_what_is_drawn
from fibldm.workers import engine_of


@dataclass(frozen=True)
class Measurements:
    """What is measured, as `evaluate` is asked, with what all of it shares made once and only where it is needed."""

    evaluated: Evaluated
    synthetic_folder: Path | None = None
    segmenter_settings: Mapping[str, Any] | None = None
    device: str | None = None
    bundle: Path | None = None
    trust: bool = False
    weights: str | None = None
    perceptual: Path | None = None
    lungs: Sequence[str] | None = None
    of_masks: bool = False

    @cached_property
    def synthetic(self) -> list[Case]:
        if self.synthetic_folder is None:
            raise FibldmError("this measurement needs synthetic volumes; none were given", "give --synthetic FOLDER")
        of = masks_of if self.of_masks else self.evaluated.synthetic
        return of(self.synthetic_folder)

    @cached_property
    def provenance(self) -> Provenance:
        """How the synthetic volumes were drawn."""
        files = [case.written for case in self.synthetic]
        return read_provenance(files, self._own_weights, of=self.bundle or self.evaluated.run_dir, weights=self.weights)

    @cached_property
    def segmenter(self) -> Segmenter:
        return self._trained()

    @cached_property
    def reconstructor(self) -> Reconstructor:
        if self.bundle is not None:
            return Reconstructor.from_bundle(self.bundle, device=self._device, trust=self.trust)
        return Reconstructor.from_run(self.evaluated.run_dir, device=self._device)

    @cached_property
    def planes(self) -> PlaneDistance | None:
        return None if self.perceptual is None else PlaneDistance(self.perceptual, device=self._device)

    def reconstruction(self) -> Section:
        return measure_reconstruction(
            self.evaluated, self.segmenter, self.reconstructor, pictures=self.evaluated.folder, planes=self.planes
        )

    def faithfulness(self) -> Section:
        return measure_faithfulness(self.evaluated, self.synthetic, self.segmenter)

    def realism(self) -> Section:
        return measure_realism(self.evaluated, self.synthetic, self.segmenter, planes=self.planes)

    def copies(self) -> Section:
        return measure_copies(
            self.evaluated, self.synthetic, reconstruct=self.reconstructor, pictures=self.evaluated.folder
        )

    def audit(self) -> Section:
        return measure_audit(self.evaluated, self.synthetic, self._generator())

    def utility(self) -> Section:
        return measure_utility(self.evaluated, self.synthetic, self.segmenter, self._trained)

    def gate(self) -> Section:
        return measure_gate(self.evaluated, self.synthetic, self._ranges())

    def ct(self) -> Section:
        return measure_ct(self.evaluated, self.synthetic, lungs=self.lungs)

    def masks(self) -> Section:
        return measure_masks(self.evaluated, self.synthetic)

    def spread(self) -> Section:
        return measure_spread(self.evaluated, self.synthetic)

    def _ranges(self) -> Gate:
        if self.bundle is None:
            gate = read_gate(self.evaluated.run_dir, load_facts(self.evaluated.run_dir))
        else:
            with open_bundle(self.bundle, trust=self.trust) as opened:
                gate = gate_of_bundle(opened.facts)
        return required(gate)

    def _trained(self, cases: Sequence[Case] | None = None) -> Segmenter:
        return trained_segmenter(self.evaluated, cases=cases, overrides=self.segmenter_settings, device=self._device)

    def _generator(self) -> Synthesizer | None:
        """What the volumes were drawn with; None where that is not here, or knows no masks."""
        if self.provenance.other:
            return None
        if self.bundle is not None:
            return Synthesizer.from_bundle(self.bundle, trust=self.trust, device=self._device)
        run = self.evaluated.run_dir
        return Synthesizer.from_run(run, device=self._device) if knows_masks(run) else None

    def _own_weights(self) -> set[str]:
        if self.bundle is None:
            return generating_weights(self.evaluated.run_dir)
        with open_bundle(self.bundle, trust=self.trust) as opened:
            return {hash_weights(opened.network("network").state_dict())}

    @property
    def _device(self) -> str:
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")


MEASUREMENTS: Mapping[str, Callable[[Measurements], Section]] = {
    "faithfulness": Measurements.faithfulness,
    "realism": Measurements.realism,
    "reconstruction": Measurements.reconstruction,
    "audit": Measurements.audit,
    "copies": Measurements.copies,
    "utility": Measurements.utility,
    "gate": Measurements.gate,
    "ct": Measurements.ct,
    "spread": Measurements.spread,
    "masks": Measurements.masks,
}
NOT_BY_DEFAULT = ("copies", "utility", "gate", "ct", "spread", "masks")
"""The baseline of the audit, and what needs more than any run has: volumes of training masks, ranges of training, HU,
several volumes of a mask, masks instead of volumes."""

DEFAULT_MEASUREMENTS = tuple(name for name in MEASUREMENTS if name not in NOT_BY_DEFAULT)


def evaluate(
    names: Sequence[str],
    *,
    run_dir: str | Path,
    work: str | Path,
    synthetic: str | Path | None = None,
    segmenter_settings: Mapping[str, Any] | None = None,
    device: str | None = None,
    bundle: str | Path | None = None,
    trust: bool = False,
    weights: str | None = None,
    perceptual: str | Path | None = None,
    lungs: Sequence[str] | None = None,
    workers: int | None = None,
    cluster: str | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Section]:
    """Measure, say and record each in ``RUN/evaluation/metrics.json``.

    Args:
        names: of `MEASUREMENTS`.
        run_dir: a run whose latents are finished; for a bundle, a folder for what is measured.
        work: the work folder that it was trained on.
        synthetic: folder of ``fibldm synthesize``; all but reconstruction need it.
        segmenter_settings: overrides of ``configs/train_segmenter.yaml``.
        device: None takes CUDA where there is one.
        bundle: measured in place of the run, see `Evaluated.open_bundle`.
        trust: take a bundle that changed since its export.
        weights: the beginning of the fingerprint of other weights than those of run or bundle, whose volumes these are.
        perceptual: file of weights of a ResNet of slices, for LPIPS of realism and reconstruction; None leaves it out.
        lungs: names of the labels that are the lungs, of `ct`; None goes by their names.
        workers: processes of this machine that compute features, segmentations and matches at the same time; None is
            this one alone.
        cluster: address of a scheduler of Dask, whose workers compute instead.
        say: where the figures go, as text.

    Raises:
        FibldmError: an unknown name, a run or folder that does not fit, volumes of other weights or of several
            samplings, or too few of them.
    """
    require_switches(trust=trust)
    for name in names:
        if name not in MEASUREMENTS:
            raise unknown_choice("measurement", name, MEASUREMENTS)
    if bundle:
        evaluated = Evaluated.open_bundle(bundle, work, out=run_dir, trust=trust)
    else:
        evaluated = Evaluated.open(run_dir, work)
    evaluated = replace(evaluated, engine=engine_of(workers, cluster))
    folder = None if synthetic is None else Path(synthetic)
    of, network = (Path(path) if path else None for path in (bundle, perceptual))
    if "masks" in names and len(names) > 1:
        raise FibldmError(f"masks are measured by themselves; got {', '.join(names)}", "measure volumes apart")
    check_what_is_drawn(evaluated.drawn, bundle or run_dir, masks="masks" in names)
    shared = (segmenter_settings, device, of, trust, weights, network, lungs)
    measurements = Measurements(evaluated, folder, *shared, of_masks="masks" in names)
    _ = measurements.planes  # before a segmenter is trained, as what follows
    if drawn := [name for name in names if name != "reconstruction"]:
        say(measurements.provenance.text)
    for name in names:
        if name not in ("reconstruction", "copies"):
            need_masks(measurements.synthetic, name)
    sections = {}
    for name in names:
        section = MEASUREMENTS[name](measurements)
        if name in drawn:
            facts = {**section.facts, "drawn": measurements.provenance.to_dict()}
            section = replace(section, facts=facts, notes=[*section.notes, *measurements.provenance.notes])
        record(evaluated.folder, name, section)
        say(section.text(name))
        sections[name] = section
    return sections
