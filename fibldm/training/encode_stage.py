"""The encode stage: the latents of every case, cached once, with what later stages must know of them."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import ignite.distributed as idist
import torch
from monai.transforms import Compose
from torch import Tensor

from fibldm.errors import FibldmError, sentence, unknown_choice
from fibldm.files import hash_file, write_json
from fibldm.models.autoencoder import Autoencoder, FrozenFirstStage
from fibldm.models.conditions.mask import MaskEncoding
from fibldm.models.latents import LatentSpace
from fibldm.models.residual_noise import ResidualNoise
from fibldm.models.tiling import tiled_decode, tiled_encode
from fibldm.progress import track
from fibldm.runs import BUDGET, Progress, StageFolder, load_facts
from fibldm.runs.values import check_values
from fibldm.runs.workflow import running_parser
from fibldm.shards import Shard
from fibldm.training.base_latents import facts_of_base
from fibldm.training.distributed import local_device, on_first_rank
from fibldm.training.gate_ranges import GateRanges
from fibldm.training.latent_report import REMEDY, draw_interpolation, report_latents
from fibldm.training.view_cache import SPLITS, Draw, ViewCache, plain_tensor
from fibldm.volumes.datalist import SECOND_IMAGE, known_of
from fibldm.volumes.gate import has_gate, write_gate
from fibldm.volumes.second_image import SecondImages
from fibldm.workers import Work, engine_of

Result = TypeVar("Result")

INTERPOLATION = "interpolation.png"
RESIDUAL_NOISE = "residual_noise.safetensors"

_LONG = 3.0  # seconds
_TO_BEGIN = 60.0  # seconds for another process to write two small files
_RECONSTRUCTED = 64  # training cases that tell the residual noise

_logger = logging.getLogger("fibldm")


class EncodeStage:
    """Encode every training and validation case once, with a few augmented views of the training cases.

    A view is made as the plain case is, then augmented together with its mask by transforms seeded by
    (seed, case, view). Views that lie there already are kept, so an interrupted run goes on; of a finished one, those
    that are gone or damaged are made again.

    An engine encodes case by case. Several processes, each with an engine of its own, may share the cases (`Shard`); it
    is enough that they see the same folder. None waits for another, but for those that torch.distributed joins: the one
    that finds all files there writes ``latents.json``, which is the same for any number of processes.

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
        workers: processes of this machine that encode at the same time; None is this one alone.
        cluster: address of a scheduler of Dask, whose workers encode instead.
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
        workers: int | None = None,
        cluster: str | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        self.run_dir, self.datalist, self.facts, self.inputs = Path(run_dir), datalist, facts, inputs
        if draw not in get_args(Draw):
            raise unknown_choice("latent_draw", draw, get_args(Draw))
        folder = self.run_dir / "latents"
        ranges = GateRanges(facts)
        self.cache = ViewCache(folder, datalist, preprocessing, augmentation, views, draw, seed, device, ranges)
        self.scale, self.device, self.restart = scale, device, restart
        self.base, self.check, self.workers, self.cluster = base, check, workers, cluster
        if base is not None and scale is not None:
            raise FibldmError("latents have one scale; got latent_scale and latent_space", "leave one of them out")

    def run(self) -> None:
        """Write the latents, the residual noise, the ranges of the gate, ``latents.json``, report and picture.

        Or say that they are done; of a run of before, measure the ranges that it lacks.

        Raises:
            FibldmError: the autoencoder is not trained or makes latents that are not finite, the folder holds latents
                of other inputs, or a process that is none of those that share the work is at it.
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
            begins = shard.is_first or (idist.get_world_size() == 1 and not (folder.path / "inputs.json").exists())
            if self.check is not None and begins and (self.restart or folder.done() is None):
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
            self._encode_all(shard.take(self.cache.cases()), first_stage, shown=shard.is_first)
            if idist.get_world_size() > 1:
                idist.barrier()
                if shard.is_first:
                    self._complete(folder, first_stage, autoencoder, known)
            elif lacking := sum(bool(self.cache.missing(*case)) for case in self.cache.cases()):
                _logger.info("latents: the last process to end completes them; %d cases are left to others", lacking)
            else:
                self._complete_once(folder, first_stage, autoencoder, known)

    def _complete_once(
        self, folder: StageFolder, first_stage: FrozenFirstStage, autoencoder: str, known: Mapping[str, Any]
    ) -> None:
        """Complete the stage, unless another process that found all files there has begun to, or has done it."""
        with ExitStack() as stack:
            try:
                stack.enter_context(folder.alone(".last"))
            except FibldmError as error:
                _logger.info("latents: another process completes them (%s)", error.message)
                return
            if folder.done() is None:
                self._complete(folder, first_stage, autoencoder, known)

    def _encode_all(self, cases: Sequence[tuple[str, int]], first_stage: FrozenFirstStage, *, shown: bool) -> None:
        """Let the engine write the views of these cases that are missing."""
        engine = engine_of(self.workers, self.cluster)
        work = Work(encode_case, CaseKit(self.run_dir, (self, first_stage)), "encoded a case", self.cache.folder)
        for _ in engine.each(work, cases, lambda places: track(places, "encode", shown=shown)):
            pass

    def _restore(self, folder: StageFolder, stage: StageFolder, shard: Shard) -> None:
        """Make the files again that a finished stage has lost; what later stages were told of them stays."""
        lost = [case for case in shard.take(self.cache.cases()) if self.cache.missing(*case)]
        if lost:
            count = sum(len(self.cache.missing(*case)) for case in lost)
            first_stage = FrozenFirstStage(stage.trained()).to(self.device)
            self._encode_all(lost, first_stage, shown=shard.is_first)
            _logger.info("latents: made %d files again that were gone or damaged (%s)", count, folder.path)
        else:
            _logger.info("latents: done already (%s), nothing to encode", folder.path)
        if idist.get_world_size() > 1:
            idist.barrier()
        if shard.is_first:
            self._catch_up_on_gate()

    def _catch_up_on_gate(self) -> None:
        """Measure what a run of before lacks; its latents and all that was trained on them stay as they are."""
        facts = load_facts(self.run_dir)
        if has_gate(self.run_dir, facts):
            return
        if all(file.exists() for _, file in self.cache.plain_files(facts["items"]["training"])):
            self._measure_gate(facts)
        else:
            _logger.info(
                "latents: ranges for --check wait for files that other processes make; run `fibldm encode` again"
            )

    def _measure_gate(self, facts: Mapping[str, Any]) -> None:
        files = self.cache.plain_files(facts["items"]["training"])
        cases = self.datalist["training"]
        gate = GateRanges(facts).fit(files, lambda index: self.cache.view(self.cache.prepared(cases[index]), index, 0))
        write_gate(self.run_dir, facts, gate)
        if gate is None:
            _logger.info("latents: no ranges for `fibldm synthesize --check`, they take two training patients")
        else:
            _logger.info("latents: ranges of intensity of %d training patients, for --check", gate.patients)

    def expected_seconds(self, autoencoder: Autoencoder) -> float:
        """What `run` will take in one process, by its parts for the first case.

        Args:
            autoencoder: need not be trained yet.
        """
        first_stage = FrozenFirstStage(autoencoder).to(self.device)
        case = self.datalist["training"][0]
        load, prepared = _timed(lambda: self.cache.prepared(case))
        change, _ = _timed(lambda: self.cache.view(prepared, 0, 1))
        item = self.cache.view(prepared, 0, 0)
        image = item["image"][None].float()
        encode, mean = _timed(lambda: tiled_encode(first_stage, image.to(self.device)).mean.cpu())
        mask = self._whole_mask(item["label"], first_stage)
        decode, decoded = _timed(lambda: tiled_decode(first_stage, mean.to(self.device), mask=mask).cpu())
        compared = (item["image"].float(), decoded[0].float(), item["valid"].float())
        compare, _ = _timed(lambda: ResidualNoise.fit([compared]))
        training, validation = (len(self.datalist[split]) for split in SPLITS)
        again = 0 if first_stage.is_identity else min(training, _RECONSTRUCTED)
        return (
            (training + validation + again) * load
            + training * (self.cache.views - 1) * change
            + (training * self.cache.views + validation) * encode
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
        if shard.ranks == 1:
            return folder.begin(config, inputs, restart=self.restart)
        with folder.alone(".begin", patience=_TO_BEGIN):
            return folder.begin(config, inputs)

    def _complete(
        self, folder: StageFolder, first_stage: FrozenFirstStage, autoencoder: str, known: Mapping[str, Any]
    ) -> None:
        items = {split: self.cache.items(split) for split in SPLITS}
        if "space" in known:
            space = LatentSpace.from_dict(known["space"])
        elif self.scale is None:
            space = LatentSpace.fit(self.cache.cells(items["training"]), autoencoder)
        else:
            space = LatentSpace.constant(self.scale, first_stage.latent_channels, autoencoder)
        covariates = covariates_by_case([case for split in SPLITS for case in self.datalist[split]])
        facts = {
            "compression": first_stage.compression,
            "space": space.to_dict(),
            **self.facts,
            **({"draw": self.cache.draw} if self.cache.draw != "sample" else {}),
            "residual_noise": self._measure_residual_noise(items["training"], first_stage),
            **({"covariates": covariates} if any(covariates.values()) else {}),
            **about_second_images([case for split in SPLITS for case in self.datalist[split]]),
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
        counts = [len(items[split]) for split in SPLITS]
        said = "latents: %d training and %d validation views of %d channels and %s cells"
        _logger.info(said, *counts, first_stage.latent_channels, cells)

    def _measure_residual_noise(
        self, items: Sequence[dict[str, str]], first_stage: FrozenFirstStage
    ) -> dict[str, str] | None:
        """Write what the decoder leaves out of training cases, spread over the split; None where that is nothing."""
        if first_stage.is_identity:
            return None
        views = list(self.cache.plain_views("training", items))
        count = min(len(views), _RECONSTRUCTED)
        chosen = [views[index * len(views) // count] for index in range(count)]
        noise = ResidualNoise.fit(
            self._reconstructed(case, item, first_stage) for case, item in track(chosen, "residual noise")
        )
        noise.save(self.cache.folder / RESIDUAL_NOISE)
        return {"file": RESIDUAL_NOISE, "sha256": hash_file(self.cache.folder / RESIDUAL_NOISE)}

    def _reconstructed(
        self, case: dict[str, Any], item: dict[str, str], first_stage: FrozenFirstStage
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A training case, what the decoder makes of the middle of its posterior, and which voxels count."""
        prepared = self.cache.prepared(case)
        image, label, valid = (plain_tensor(prepared[key]) for key in ("image", "label", "valid"))
        (posterior,) = self.cache.posteriors([item])
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
        training, validation = (self.cache.cells(items[split]) for split in SPLITS)
        report = report_latents(training, space, validation)
        write_json(self.cache.folder / "report.json", report.to_dict())
        _logger.info("latents, channel by channel:\n%s", report.table())
        if report.warnings:
            lines = "\n".join(["warning: the latents are not fit for stage 2", *report.warnings])
            _logger.warning("%s", sentence(lines, REMEDY))

    def _draw(self, items: dict[str, list[dict[str, str]]], first_stage: FrozenFirstStage) -> None:
        """Draw what is between two patients, of validation where there are as many."""
        cases = [
            (case, item) for split in reversed(SPLITS) for case, item in self.cache.plain_views(split, items[split])
        ]
        first, others = cases[0], [pair for pair in cases[1:] if pair[1]["subject"] != cases[0][1]["subject"]]
        if not others:
            _logger.info("latents: no %s, it takes two patients", INTERPOLATION)
            return
        pair = (first, others[0])
        prepared = [self.cache.prepared(case) for case, _ in pair]
        one, two = (plain_tensor(item["image"]).float() for item in prepared)
        mean_one, mean_two = (
            part.mean[0].to(self.device) for part in self.cache.posteriors([item for _, item in pair])
        )
        mask_one, mask_two = (self._whole_mask(plain_tensor(item["label"]), first_stage) for item in prepared)
        masks = None if mask_one is None or mask_two is None else (mask_one[0], mask_two[0])
        spacing = self.facts["grid"]["spacing"]
        file = self.cache.folder / INTERPOLATION
        draw_interpolation(file, first_stage, (one, two), (mean_one, mean_two), spacing=spacing, masks=masks)


@dataclass(frozen=True)
class CaseKit:
    """What a process needs to encode.

    Attributes:
        run_dir: the run folder, where the stage has begun.
        here: stage and first stage of this process; others make their own.
    """

    run_dir: Path
    here: tuple[EncodeStage, FrozenFirstStage] | None

    def __call__(self) -> tuple[ViewCache, FrozenFirstStage, str]:
        trained = StageFolder(self.run_dir, "autoencoder")
        stage, first_stage = self.here or (StageFolder(self.run_dir, "latents").component("stage"), None)
        cache = stage.cache
        if first_stage is None:
            device = local_device() if torch.device(cache.device).type == "cuda" else torch.device("cpu")
            cache, first_stage = replace(cache, device=device), FrozenFirstStage(trained.trained()).to(device)
        return cache, first_stage, trained.require()["weights"]

    def __getstate__(self) -> dict[str, Any]:
        return {"run_dir": self.run_dir, "here": None}


def encode_case(kit: tuple[ViewCache, FrozenFirstStage, str], split: str, index: int) -> None:
    """Write the views of a case that are missing; see `ViewCache.encode`."""
    cache, first_stage, autoencoder = kit
    cache.encode(split, index, first_stage, autoencoder)


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
