"""Cached latents: written once by the encode stage, read by the stages that train on them."""

import logging
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import ignite.distributed as idist
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Transform
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError, sentence, unknown_choice
from fibldm.files import hash_file, write_json, write_tensors
from fibldm.models.autoencoder import Autoencoder, FrozenFirstStage, Posterior
from fibldm.models.conditions.condition import Case, Condition, present
from fibldm.models.conditions.covariates import CovariateEncoding
from fibldm.models.conditions.mask import MaskEncoding
from fibldm.models.latents import LatentSpace
from fibldm.models.residual_noise import ResidualNoise
from fibldm.models.tiling import tiled_decode, tiled_encode
from fibldm.progress import track
from fibldm.runs import BUDGET, Progress, StageFolder, load_facts
from fibldm.runs.values import check_values
from fibldm.runs.workflow import running_parser
from fibldm.shards import Shard, wait_for
from fibldm.training.base_latents import covariates_as_fitted, facts_of_base
from fibldm.training.distributed import on_first_rank
from fibldm.training.draws import key_seed
from fibldm.training.gate_ranges import GateRanges
from fibldm.training.latent_report import REMEDY, draw_interpolation, report_latents
from fibldm.volumes.datalist import SECOND_IMAGE, known_of
from fibldm.volumes.gate import has_gate, write_gate
from fibldm.volumes.grid import Grid
from fibldm.volumes.second_image import SecondImages, read_on_grid

Result = TypeVar("Result")
Draw = Literal["sample", "mean"]

INTERPOLATION = "interpolation.png"
RESIDUAL_NOISE = "residual_noise.safetensors"

_SPLITS = ("training", "validation")
_LONG = 3.0  # seconds
_RECONSTRUCTED = 64  # training cases that tell the residual noise
_OF_LATENT = {"mean", "std", "valid", "seed", "view"}

_logger = logging.getLogger("fibldm")


@dataclass(frozen=True)
class Latents:
    """The cached latents of a run.

    Attributes:
        run_dir: the run folder.
        facts: content of ``latents.json``.
    """

    run_dir: Path
    facts: dict[str, Any]

    @classmethod
    def open(cls, run_dir: str | Path) -> "Latents":
        """Open the latents of a run.

        Raises:
            FibldmError: they are not finished, another autoencoder made them, or files of them are gone.
        """
        latents = cls(Path(run_dir), load_facts(run_dir))
        files = [Path(item["file"]) for split in _SPLITS for item in latents.items(split)]
        if gone := [file for file in files if not file.exists()]:
            raise FibldmError(
                f"{len(gone)} of {len(files)} cached latents are gone, the first is {gone[0]}",
                "run `fibldm encode`, which makes those that are missing",
            )
        return latents

    @property
    def channels(self) -> int:
        return len(self.facts["space"]["mean"])

    @property
    def space(self) -> LatentSpace:
        return LatentSpace.from_dict(self.facts["space"])

    def mask(self, detail: int, **choices: Any) -> MaskEncoding:
        """How the masks of these latents are encoded, see `MaskEncoding`; ``choices`` are of its attributes."""
        compression = self.facts["compression"]
        voxels = compression if isinstance(compression, int) else tuple(compression)
        labels = tuple(int(label) for label in self.facts["labels"])
        spacing = tuple(self.facts["grid"]["spacing"])
        return MaskEncoding(labels, voxels, detail, spacing=spacing, **choices)

    def covariates(self, names: Sequence[str], categories: Sequence[str] = ()) -> CovariateEncoding | None:
        """How covariates are encoded, by those of the training cases or of the base; None where there are no names.

        A name that comes twice is one covariate.

        Raises:
            FibldmError: the training cases do not have or do not differ in one of them; see `CovariateEncoding.fit`.
        """
        names = list(dict.fromkeys(names))
        if not names:
            return None
        if fitted := self.facts.get("fitted"):
            return covariates_as_fitted(fitted, names)
        return CovariateEncoding.fit(names, self.training_cases, categories)

    @property
    def training_cases(self) -> list[dict[str, Any]]:
        """What is known of each training case, for conditions that are fitted to it."""
        return list(self.known_cases("training").values())

    def known_cases(self, split: str) -> dict[str, dict[str, Any]]:
        """What is known of each case of "training" or "validation", by its name."""
        return {item["case"]: self.known_of(item["case"]) for item in self.facts["items"][split]}

    def training_labels(self) -> Iterator[Tensor]:
        """The mask of each training case on the model grid, not augmented, ``(1, X, Y, Z)``."""
        plain = {item["case"]: item for item in reversed(self.items("training"))}  # its first view
        for item in reversed(plain.values()):
            with safe_open(item["file"], framework="pt") as content:
                yield content.get_tensor("labels")

    def known_of(self, case: str) -> dict[str, Any]:
        """The covariates of a case, by name; None where one is unknown."""
        known: dict[str, Any] = self.facts.get("covariates", {}).get(case, {})
        return known

    def case(self, name: str, tensors: Mapping[str, Tensor]) -> Case:
        """What conditions are made of, of a case by its name and the tensors of a view."""
        images = {SECOND_IMAGE: tensors[SECOND_IMAGE].float()} if SECOND_IMAGE in tensors else {}
        return Case(tensors["labels"], self.known_of(name), images, name)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of ``latents.json``, which names the autoencoder, the data and every file."""
        return hash_file(self.run_dir / "latents" / "latents.json")

    def items(self, split: str) -> list[dict[str, str]]:
        """One item per cached view: ``file``, ``case``, ``subject``."""
        folder = self.run_dir / "latents"
        return [{**item, "file": str(folder / item["file"])} for item in self.facts["items"][split]]


class LoadLatent(Transform):
    """Read a cached latent: its normalised posterior, which cells are valid, and the conditions of its case.

    Args:
        latents: the run's latents.
        conditions: how each is encoded, by name; None of one leaves it out.

    Raises:
        FibldmError: a condition has the name of something else.
    """

    def __init__(self, latents: Latents, conditions: Mapping[str, Condition | None]) -> None:
        self.latents, self.space = latents, latents.space
        self.conditions: dict[str, Condition] = present(conditions)
        if taken := self.conditions.keys() & _OF_LATENT:
            raise FibldmError(f"conditions must not be named {', '.join(sorted(taken))}", "choose another name")

    def __call__(self, item: Mapping[str, str]) -> dict[str, Tensor]:
        """``mean`` and ``std`` ``(C, x, y, z)``, ``valid`` ``(1, x, y, z)``, and every condition, encoded, by its name.

        All float32 but mask and image, which are float16: they are the largest, and all cases are kept in memory.

        Raises:
            FibldmError: another autoencoder made this latent, or its file is gone or damaged.
        """
        try:
            with safe_open(item["file"], framework="pt") as content:
                self.space.check_autoencoder(content.metadata()["autoencoder"], item["file"])
                tensors = {name: content.get_tensor(name) for name in content.keys()}
        except (OSError, SafetensorError) as error:
            raise FibldmError(
                f"{item['file']} must be a cached latent; {error}", "run `fibldm encode`, which makes it again"
            ) from error
        posterior = Posterior(tensors["mean"][None], tensors["std"][None])
        mean, std = self.space.normalise_posterior(posterior)
        case = self.latents.case(item["case"], tensors)
        shown = {name: part.encode_case(case).to(part.kept_as) for name, part in self.conditions.items()}
        return {"mean": mean[0], "std": std[0], "valid": tensors["valid"], **shown}


class EncodeStage:
    """Encode every training and validation case once, with a few augmented views of the training cases.

    A view is made as the plain case is, then augmented together with its mask by transforms seeded by
    (seed, case, view). Views that lie there already are kept, so an interrupted run goes on; of a finished one, those
    that are gone or damaged are made again.

    Several processes share the cases (`Shard`); it is enough that they see the same folder. The first waits for the
    files of all and writes ``latents.json``, which is the same for any number of processes.

    Args:
        run_dir: the run folder.
        datalist: ``{"training": [...], "validation": [...]}``, items with ``image``, ``case``, ``subject`` and, but for
            cases of which nothing is known, ``label``, perhaps ``second_image``; all else they hold are covariates.
        preprocessing: to the model grid: ``image``, ``label`` and ``valid``.
        augmentation: random, on the three together.
        views: of every training case, the plain one included.
        facts: goes into ``latents.json`` as it is: channels, labels, intensity, grid, envelope, licence, ...
        inputs: fingerprints of the data.
        scale: factor of the latents, such as 0.18215, for weights that were trained so; None fits it to the training
            split.
        base: a run or a bundle of the same autoencoder whose scale and covariates are taken, for its network to be
            adapted; None takes none.
        draw: what the later stages train on: "sample" draws from the posterior anew each time, "mean" is its middle.
        seed: of the augmentation.
        device: to encode on.
        restart: begin anew although the folder holds another configuration's latents.
        patience: seconds that a process waits for another without a sign of it.
        check: refuses what must not be trained on, before anything is written; None has nothing to say.
    """

    def __init__(
        self,
        run_dir: str,
        *,
        datalist: dict[str, list[dict[str, Any]]],
        preprocessing: Compose,
        augmentation: Compose,
        views: int,
        facts: dict[str, Any],
        inputs: dict[str, str],
        scale: float | None = None,
        base: str | None = None,
        draw: Draw = "sample",
        seed: int,
        device: torch.device,
        restart: bool = False,
        patience: float = 3600.0,
        check: Callable[[], None] | None = None,
    ) -> None:
        self.run_dir, self.datalist, self.facts, self.inputs = Path(run_dir), datalist, facts, inputs
        self.preprocessing, self.augmentation, self.views = preprocessing, augmentation, views
        if draw not in get_args(Draw):
            raise unknown_choice("latent_draw", draw, get_args(Draw))
        self.draw = draw
        self.scale, self.seed, self.device, self.restart, self.patience = scale, seed, device, restart, patience
        self.base, self.check = base, check
        if base is not None and scale is not None:
            raise FibldmError("latents have one scale; got latent_scale and latent_space", "leave one of them out")

    def run(self) -> None:
        """Write the latents, the residual noise, the ranges of the gate, ``latents.json``, report and picture.

        Or say that they are done; of a run of before, measure the ranges that it lacks.

        Raises:
            FibldmError: the autoencoder is not trained or makes latents that are not finite, the folder holds latents
                of other inputs, another process broke off, or one that is none of those that share the work is at it.
        """
        shard, folder = Shard.from_environment(), StageFolder(self.run_dir, "latents")
        with folder.alone(shard.suffix):
            self._run(folder, shard)

    def _run(self, folder: StageFolder, shard: Shard) -> None:
        stage = StageFolder(self.run_dir, "autoencoder")
        autoencoder = stage.require()["weights"]
        config = {key: value for key, value in running_parser(self).get().items() if key != "epochs"}
        check_values(config)  # MONAI's own command does not
        with folder.kept_until_begun(self.restart and shard.is_first):
            if self.check is not None and shard.is_first and (self.restart or folder.done() is None):
                self.check()
            if self._begin(folder, config, {**self.inputs, "autoencoder": autoencoder}, shard) == "done":
                self._restore(folder, stage, shard)
                return
            known = {} if self.base is None else facts_of_base(self.base, autoencoder)
            self._make(folder, stage, autoencoder, shard, known)

    def _make(
        self, folder: StageFolder, stage: StageFolder, autoencoder: str, shard: Shard, known: Mapping[str, Any]
    ) -> None:
        with self._counted(folder, shard):
            first_stage = FrozenFirstStage(stage.trained()).to(self.device)
            self._encode_all(shard.take(self._cases()), first_stage, autoencoder, shown=shard.is_first)
            if shard.is_first:
                self._complete(folder, first_stage, autoencoder, known)

    def _cases(self) -> list[tuple[str, int]]:
        return [(split, index) for split in _SPLITS for index in range(len(self.datalist[split]))]

    def _encode_all(
        self, cases: Sequence[tuple[str, int]], first_stage: FrozenFirstStage, autoencoder: str, *, shown: bool
    ) -> None:
        for split, index in track(cases, "encode", shown=shown):
            self._encode(split, index, first_stage, autoencoder)

    def _restore(self, folder: StageFolder, stage: StageFolder, shard: Shard) -> None:
        """Make the files again that a finished stage has lost; what later stages were told of them stays."""
        lost = [case for case in shard.take(self._cases()) if self._missing(*case)]
        if lost:
            count = sum(len(self._missing(*case)) for case in lost)
            first_stage = FrozenFirstStage(stage.trained()).to(self.device)
            self._encode_all(lost, first_stage, stage.require()["weights"], shown=shard.is_first)
            _logger.info("latents: made %d files again that were gone or damaged (%s)", count, folder.path)
        else:
            _logger.info("latents: done already (%s), nothing to encode", folder.path)
        if shard.is_first:
            self._catch_up_on_gate()

    def _catch_up_on_gate(self) -> None:
        """Measure what a run of before lacks; its latents and all that was trained on them stay as they are."""
        facts = load_facts(self.run_dir)
        if has_gate(self.run_dir, facts):
            return
        wait_for([file for _, file in self._plain_files(facts["items"]["training"])], patience=self.patience)
        self._measure_gate(facts)

    def _measure_gate(self, facts: Mapping[str, Any]) -> None:
        files = self._plain_files(facts["items"]["training"])
        cases = self.datalist["training"]
        gate = GateRanges(facts).fit(files, lambda index: self._view(self._prepared(cases[index]), index, 0))
        write_gate(self.run_dir, facts, gate)
        if gate is None:
            _logger.info("latents: no ranges for `fibldm synthesize --check`, they take two training patients")
        else:
            _logger.info("latents: ranges of intensity of %d training patients, for --check", gate.patients)

    def _plain_files(self, items: Sequence[Mapping[str, str]]) -> list[tuple[str, Path]]:
        """The patient and the file of each training case that is not augmented."""
        return [(item["subject"], self._folder / item["file"]) for item in items[:: self._views("training")]]

    def expected_seconds(self, autoencoder: Autoencoder) -> float:
        """What `run` will take in one process, by its parts for the first case.

        Args:
            autoencoder: need not be trained yet.
        """
        first_stage = FrozenFirstStage(autoencoder).to(self.device)
        case = self.datalist["training"][0]
        load, prepared = _timed(lambda: self._prepared(case))
        change, _ = _timed(lambda: self._view(prepared, 0, 1))
        item = self._view(prepared, 0, 0)
        image = item["image"][None].float()
        encode, mean = _timed(lambda: tiled_encode(first_stage, image.to(self.device)).mean.cpu())
        mask = self._whole_mask(item["label"], first_stage)
        decode, decoded = _timed(lambda: tiled_decode(first_stage, mean.to(self.device), mask=mask).cpu())
        compared = (item["image"].float(), decoded[0].float(), item["valid"].float())
        compare, _ = _timed(lambda: ResidualNoise.fit([compared]))
        training, validation = (len(self.datalist[split]) for split in _SPLITS)
        again = 0 if first_stage.is_identity else min(training, _RECONSTRUCTED)
        return (
            (training + validation + again) * load
            + training * (self.views - 1) * change
            + (training * self.views + validation) * encode
            + again * (decode + compare)
        )

    @contextmanager
    def _counted(self, folder: StageFolder, shard: Shard) -> Iterator[None]:
        """Note how many seconds passed, and what an interrupted run before took."""
        before, began = folder.seconds(), time.monotonic()
        try:
            yield
        finally:
            if shard.is_first:
                write_json(folder.path / BUDGET, {"seconds": round(before + time.monotonic() - began, 1)})

    def _begin(self, folder: StageFolder, config: dict[str, Any], inputs: dict[str, str], shard: Shard) -> Progress:
        if idist.get_world_size() > 1:
            return on_first_rank(lambda: folder.begin(config, inputs, restart=self.restart))
        if shard.ranks > 1 and self.restart:
            raise FibldmError(
                "latents must be begun anew by one process, as others may write already; "
                f"got --restart and WORLD_SIZE={shard.ranks}",
                f"move {folder.path} away and leave --restart out",
            )
        if not shard.is_first:
            wait_for([folder.path / "inputs.json"], patience=self.patience)
        return folder.begin(config, inputs, restart=self.restart)

    def _complete(
        self, folder: StageFolder, first_stage: FrozenFirstStage, autoencoder: str, known: Mapping[str, Any]
    ) -> None:
        items = {split: self._items(split) for split in _SPLITS}
        wait_for([folder.path / item["file"] for part in items.values() for item in part], patience=self.patience)
        if "space" in known:
            space = LatentSpace.from_dict(known["space"])
        elif self.scale is None:
            space = LatentSpace.fit(self._cells(items["training"]), autoencoder)
        else:
            space = LatentSpace.constant(self.scale, first_stage.latent_channels, autoencoder)
        covariates = covariates_by_case([case for split in _SPLITS for case in self.datalist[split]])
        facts = {
            "compression": first_stage.compression,
            "space": space.to_dict(),
            **self.facts,
            **({"draw": self.draw} if self.draw != "sample" else {}),
            "residual_noise": self._measure_residual_noise(items["training"], first_stage),
            **({"covariates": covariates} if any(covariates.values()) else {}),
            **about_second_images([case for split in _SPLITS for case in self.datalist[split]]),
            **({"fitted": known["fitted"]} if "fitted" in known else {}),
            "items": items,
        }
        write_json(folder.path / "latents.json", facts)
        self._measure_gate(facts)
        self._report(items, space)
        self._draw(items, first_stage)
        folder.finish(epochs=0, latents=sum(len(part) for part in items.values()))
        size = zip(self.facts["grid"]["size"], first_stage.compression, strict=True)
        cells = " x ".join(str(length // factor) for length, factor in size)
        counts = [len(items[split]) for split in _SPLITS]
        said = "latents: %d training and %d validation views of %d channels and %s cells"
        _logger.info(said, *counts, first_stage.latent_channels, cells)

    def _measure_residual_noise(
        self, items: Sequence[dict[str, str]], first_stage: FrozenFirstStage
    ) -> dict[str, str] | None:
        """Write what the decoder leaves out of training cases, spread over the split; None where that is nothing."""
        if first_stage.is_identity:
            return None
        views = list(self._plain_views("training", items))
        count = min(len(views), _RECONSTRUCTED)
        chosen = [views[index * len(views) // count] for index in range(count)]
        noise = ResidualNoise.fit(
            self._reconstructed(case, item, first_stage) for case, item in track(chosen, "residual noise")
        )
        noise.save(self._folder / RESIDUAL_NOISE)
        return {"file": RESIDUAL_NOISE, "sha256": hash_file(self._folder / RESIDUAL_NOISE)}

    def _reconstructed(
        self, case: dict[str, Any], item: dict[str, str], first_stage: FrozenFirstStage
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A training case, what the decoder makes of the middle of its posterior, and which voxels count."""
        prepared = self._prepared(case)
        image, label, valid = (_plain(prepared[key]) for key in ("image", "label", "valid"))
        (posterior,) = self._posteriors([item])
        mask = self._whole_mask(label, first_stage)
        decoded = tiled_decode(first_stage, posterior.mean.to(self.device), mask=mask)
        return image.float(), decoded[0].clamp(-1, 1).float().cpu(), valid.float()

    def _whole_mask(self, label: Tensor, first_stage: FrozenFirstStage) -> Tensor | None:
        """The mask as a first stage that needs it is given it."""
        if not first_stage.needs_mask:
            return None
        encoding = MaskEncoding(tuple(int(label) for label in self.facts["labels"]), 1)
        return encoding.encode(label[None]).to(self.device)

    def _report(self, items: dict[str, list[dict[str, str]]], space: LatentSpace) -> None:
        training, validation = (self._cells(items[split]) for split in _SPLITS)
        report = report_latents(training, space, validation)
        write_json(self._folder / "report.json", report.to_dict())
        _logger.info("latents, channel by channel:\n%s", report.table())
        if report.warnings:
            lines = "\n".join(["warning: the latents are not fit for stage 2", *report.warnings])
            _logger.warning("%s", sentence(lines, REMEDY))

    def _draw(self, items: dict[str, list[dict[str, str]]], first_stage: FrozenFirstStage) -> None:
        """Draw what is between two patients, of validation where there are as many."""
        cases = [(case, item) for split in reversed(_SPLITS) for case, item in self._plain_views(split, items[split])]
        first, others = cases[0], [pair for pair in cases[1:] if pair[1]["subject"] != cases[0][1]["subject"]]
        if not others:
            _logger.info("latents: no %s, it takes two patients", INTERPOLATION)
            return
        pair = (first, others[0])
        prepared = [self._prepared(case) for case, _ in pair]
        one, two = (_plain(item["image"]).float() for item in prepared)
        mean_one, mean_two = (part.mean[0].to(self.device) for part in self._posteriors([item for _, item in pair]))
        mask_one, mask_two = (self._whole_mask(_plain(item["label"]), first_stage) for item in prepared)
        masks = None if mask_one is None or mask_two is None else (mask_one[0], mask_two[0])
        spacing = self.facts["grid"]["spacing"]
        file = self._folder / INTERPOLATION
        draw_interpolation(file, first_stage, (one, two), (mean_one, mean_two), spacing=spacing, masks=masks)

    def _plain_views(
        self, split: str, items: Sequence[dict[str, str]]
    ) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
        yield from zip(self.datalist[split], items[:: self._views(split)], strict=True)

    def _views(self, split: str) -> int:
        return self.views if split == "training" else 1

    def _names(self, split: str, index: int) -> list[str]:
        case = self.datalist[split][index]["case"]
        return [f"{split}/{case}_view-{view}.safetensors" for view in range(self._views(split))]

    def _items(self, split: str) -> list[dict[str, str]]:
        return [
            {"file": name, "case": case["case"], "subject": str(case["subject"])}
            for index, case in enumerate(self.datalist[split])
            for name in self._names(split, index)
        ]

    def _encode(self, split: str, index: int, first_stage: FrozenFirstStage, autoencoder: str) -> None:
        names, missing = self._names(split, index), self._missing(split, index)
        prepared = self._prepared(self.datalist[split][index]) if missing else {}
        for view in missing:
            item = self._view(prepared, index, view)
            noted = GateRanges(self.facts).noted(item) if split == "training" and view == 0 else {}
            self._write(item, self._folder / names[view], first_stage, {"autoencoder": autoencoder, **noted})

    def _prepared(self, case: Mapping[str, Any]) -> dict[Hashable, Any]:
        """A case on the model grid; where it has no mask, all of it is unknown."""
        item = dict(self.preprocessing(case))
        if SECOND_IMAGE in case:
            image = item["image"]
            grid = Grid(tuple(image.shape[1:]), image.affine.double().numpy())
            item[SECOND_IMAGE] = torch.from_numpy(read_on_grid(case[SECOND_IMAGE], grid))
        if "label" not in item:
            item["label"] = torch.full_like(item["valid"], UNKNOWN_LABEL)
        return item

    def _missing(self, split: str, index: int) -> list[int]:
        """Views of a case whose files are not there, or not whole."""
        return [view for view, name in enumerate(self._names(split, index)) if not _is_whole(self._folder / name)]

    @property
    def _folder(self) -> Path:
        return self.run_dir / "latents"

    def _view(self, prepared: Mapping[Hashable, Any], index: int, view: int) -> dict[str, Tensor]:
        item = dict(prepared)
        if view:
            self.augmentation.set_random_state(seed=key_seed(self.seed, index, view))
            item = self.augmentation(item)
        made = {key: _plain(item[key]) for key in ("image", "label", "valid")}
        return made | ({SECOND_IMAGE: self._second(prepared, index, view)} if SECOND_IMAGE in prepared else {})

    def _second(self, prepared: Mapping[Hashable, Any], index: int, view: int) -> Tensor:
        """The second image of a view, moved as the first is: in its place, with the same draws."""
        second = _plain(prepared[SECOND_IMAGE])
        if not view:
            return second
        affine = prepared["image"].affine
        voxels, known = (MetaTensor(part[None].clone(), affine=affine) for part in second)
        moved = self._view({"image": voxels, "label": prepared["label"], "valid": known}, index, view)
        inside = (moved["valid"] > 0.5).float()
        return torch.cat([moved["image"].float() * inside, inside])

    def _write(
        self, item: dict[str, Tensor], file: Path, first_stage: FrozenFirstStage, metadata: dict[str, str]
    ) -> None:
        posterior = tiled_encode(first_stage, item["image"][None].float().to(self.device))
        if not all(bool(part.isfinite().all()) for part in posterior):
            raise FibldmError(
                f"latents must be finite; those of {file.stem} are not", "train the autoencoder again, in float32"
            )
        tensors = {
            "mean": posterior.mean[0].cpu().contiguous(),
            # without a deviation every draw is the mean, and the scale is that of means
            "std": (posterior.std[0] if self.draw == "sample" else torch.zeros_like(posterior.std[0]))
            .cpu()
            .contiguous(),
            "labels": item["label"].round().to(torch.uint8).contiguous(),
            "valid": F.avg_pool3d(item["valid"][None].float(), first_stage.compression)[0].contiguous(),
        }
        if SECOND_IMAGE in item:
            tensors[SECOND_IMAGE] = item[SECOND_IMAGE].half().contiguous()
        write_tensors(file, tensors, metadata)

    def _cells(self, items: Sequence[dict[str, str]]) -> Iterator[Posterior]:
        """The posteriors of the cells that count, ``(1, C, n)``; padding is all alike and would change the scale."""
        for item, posterior in zip(items, self._posteriors(items), strict=True):
            with safe_open(self._folder / item["file"], framework="pt") as content:
                inside = content.get_tensor("valid")[0] > 0.5
            yield Posterior(posterior.mean[..., inside], posterior.std[..., inside])

    def _posteriors(self, items: Sequence[dict[str, str]]) -> Iterator[Posterior]:
        for item in items:
            with safe_open(self._folder / item["file"], framework="pt") as content:
                yield Posterior(content.get_tensor("mean")[None], content.get_tensor("std")[None])


def covariates_by_case(cases: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What a datalist says of its cases beside their files and patients, by case and name."""
    return {case["case"]: known_of(case) for case in cases}


def about_second_images(cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What ``latents.json`` says of the second images of a datalist's cases, where there are some."""
    files = [case[SECOND_IMAGE] for case in cases if SECOND_IMAGE in case]
    return {SECOND_IMAGE: SecondImages.beside(files[0]).to_dict()} if files else {}


def _timed(function: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds of a call, and what it gives; of the second one where the first, which is slower, was short."""
    for _ in range(2):
        began = time.monotonic()
        result = function()
        seconds = time.monotonic() - began
        if seconds > _LONG:
            break
    return seconds, result


def _is_whole(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt"):  # which compares the length of the file with what its header says
            return True
    except (OSError, SafetensorError):
        return False


def _plain(value: Tensor) -> Tensor:
    return value.as_tensor() if isinstance(value, MetaTensor) else torch.as_tensor(value)
