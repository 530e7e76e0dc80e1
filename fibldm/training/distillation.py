"""A student that does in one or two network calls what its teacher does in many: distillation of a sampler.

Without noise of its own, a sampler is a function: of the noise that it begins with and of what is asked, guidance
included, to a latent. The student learns that function from pairs of noise and latent that the teacher made (Luhman &
Luhman 2021, "Knowledge distillation in iterative generative models for improved sampling speed"; the pairs are those by
which Liu et al. 2023 straighten a rectified flow). It is the teacher's network, and begins with its weights; its first
call, on the noise alone, is asked for the teacher's latent, and so is every later one, on what the student's own
sampler makes of the calls before (as in Yin et al. 2024, "Improved distribution matching distillation", section 4.5),
so that a later call corrects the earlier ones as they are and not as they should be.

No scan is needed: only noise, masks and further conditions.
"""

import hashlib
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Protocol

import torch
from ignite.metrics import Metric
from ignite.metrics.metric import reinit__is_reduced, sync_all_reduce
from torch import Tensor, nn

from fibldm.errors import FibldmError
from fibldm.models.conditions.condition import Condition
from fibldm.models.denoiser import Denoiser
from fibldm.models.network import ConditionedNetwork
from fibldm.models.process import Prediction, Process, Target
from fibldm.models.samplers import Denoise, Sampler, ddim, draw_noise
from fibldm.models.timesteps import UniformTimes, sampling_times
from fibldm.models.transfer import to_device
from fibldm.training.latents import LoadLatent
from fibldm.training.losses import Weighted
from fibldm.training.precision import store_channels_last
from fibldm.training.prepare_batch import LatentPrepareBatch, _drop

MOST_CALLS = 2
CASE = "case_key"
"""What an item holds beside its latent: a number of its file, by which pairs of noise and latent are kept."""


class Sampling(Protocol):
    """How the teacher draws: `fibldm.synthesis.SamplingSettings`."""

    sampler: str
    guidance: float

    @property
    def eta(self) -> float | None: ...
    @property
    def draw(self) -> Sampler: ...
    def guide(self, conditional: Denoise, unconditional: Denoise) -> Denoise: ...
    def times(self, process: Process) -> Tensor: ...


class Teacher:
    """A trained generator on latents with its deterministic sampler, and the pairs that it made.

    Every pair is drawn by itself, so that it is the same in any batch and after a resume.

    Args:
        network: trained; frozen here.
        process: of its training.
        target: what its output means.
        conditions: how they are encoded, by name.
        sampling: sampler, steps, guidance and all else; the shift of its times is that of training unless it is given.
        mask_dropout: of its training; None where that is not known.
        kept: whether pairs are kept in memory, 4 bytes for each value of a latent, to be shown again.
        device: where it draws.

    Raises:
        FibldmError: the sampler draws noise of its own, or guidance has nothing to compare with.
    """

    def __init__(
        self,
        network: ConditionedNetwork,
        *,
        process: Process,
        target: Target,
        conditions: Mapping[str, Condition],
        sampling: Sampling,
        mask_dropout: float | None = None,
        kept: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        if sampling.sampler == "ancestral" or sampling.eta:
            raise FibldmError(
                f"a teacher must draw without noise of its own, so that its latent follows from the first noise; got "
                f"{sampling.sampler} with eta {1.0 if sampling.eta is None else sampling.eta:g}",
                "take dpmpp_2m, heun or ddim as teacher_sampler",
            )
        if sampling.guidance != 1 and "mask" in network.sees and mask_dropout == 0:
            raise FibldmError(
                f"guidance compares with what the network says without a mask, which the teacher was never shown "
                f"(mask_dropout was 0); got teacher_guidance {sampling.guidance:g}",
                "set teacher_guidance to 1.0",
            )
        self.network = network.requires_grad_(False).eval().to(device)
        if torch.device(device).type == "cpu":
            store_channels_last(self.network)
        self.process, self.target, self.sampling, self.device = process, target, sampling, torch.device(device)
        self.conditions = {name: part for name, part in conditions.items() if name in network.sees}
        self.pairs: dict[tuple[int, int], Tensor] | None = {} if kept else None

    def latents(self, noise: Tensor, shown: Mapping[str, Tensor], keys: list[tuple[int, int]]) -> Tensor:
        """What it draws from noise ``(B, C, x, y, z)``, normalised latents of the same shape.

        Args:
            noise: on the CPU or there.
            shown: conditions, encoded, ``(B, ...)``.
            keys: of the pairs, by which they are found again.
        """
        made = []
        for place, key in enumerate(keys):
            known = None if self.pairs is None else self.pairs.get(key)
            if known is None:
                own = {name: part[place : place + 1] for name, part in shown.items() if name in self.conditions}
                known = self._draw(noise[place : place + 1], own)
                if self.pairs is not None:
                    self.pairs[key] = known.cpu()
            made.append(known.to(self.device))
        return torch.cat(made)

    @torch.no_grad()
    def _draw(self, noise: Tensor, shown: Mapping[str, Tensor]) -> Tensor:
        z, times = to_device(noise, self.device).float(), self.sampling.times(self.process)
        if self.sampling.guidance == 1:
            denoise: Denoise = Denoiser(self.network, self.process, self.target, shown)
        else:
            nothing = {name: self.conditions[name].null(part) for name, part in shown.items()}
            both = {name: torch.cat([part, nothing[name]]) for name, part in shown.items()}
            together = _Together(Denoiser(self.network, self.process, self.target, both))
            denoise = self.sampling.guide(together.conditional, together.unconditional)
        return self.sampling.draw(denoise, z, times, process=self.process, generators=[torch.Generator()])


class _Together:
    """Both predictions that guidance compares, by one call of the network on twice the batch."""

    def __init__(self, denoise: Denoise) -> None:
        self.denoise = denoise

    def conditional(self, z_t: Tensor, t: Tensor) -> Prediction:
        own, self.without = self.denoise(torch.cat([z_t, z_t]), torch.cat([t, t])).z_0.chunk(2)
        return Prediction(own)

    def unconditional(self, z_t: Tensor, t: Tensor) -> Prediction:
        """Of the call of `conditional` just before, which has the same arguments."""
        return Prediction(self.without)


class LoadCase(LoadLatent):
    """The same as `LoadLatent`, and by which number pairs of the case are kept."""

    def __call__(self, item: Mapping[str, str]) -> dict[str, Tensor]:
        digest = hashlib.sha256(item["file"].encode()).digest()
        return {**super().__call__(item), CASE: torch.tensor(int.from_bytes(digest[:7], "big"))}


class DistillationPrepareBatch(LatentPrepareBatch):
    """From noise and conditions to what each call of the student sees, all of it asked for the teacher's latent.

    A batch of B cases becomes one of B times the number of calls, call by call. Errors are weighed so that one of
    ``z_0`` counts the same in every call.

    Args:
        teacher: makes the pairs; of the same process and target.
        student: the network that is trained, or its average: what later calls see is made by it.
        calls: of the student, 1 or 2.
        shift: of the student's times, see `fibldm.models.timesteps.shifted`.
        conditions: see `LatentPrepareBatch`, as is ``dropout``: what is unknown is so to both.
        dropout: see there.
        noises: of every view of a case; after so many passes the same pairs come again. None draws new ones always.

    Raises:
        FibldmError: as `LatentPrepareBatch`, or there are too many calls.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: nn.Module,
        *,
        calls: int,
        shift: float = 1.0,
        conditions: Mapping[str, Condition | None] | None = None,
        dropout: Mapping[str, float | Mapping[str, float]] | None = None,
    ) -> None:
        check_calls(calls)
        super().__init__(
            teacher.process, target=teacher.target, times=UniformTimes(), conditions=conditions, dropout=dropout
        )
        self.teacher, self.student, self.calls = teacher, student, calls
        self.knots = sampling_times(calls, spacing=self.process.sampling_spacing, shift=shift)

    def __call__(
        self, batchdata: dict[str, Tensor], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Weighted, tuple[Any, ...], dict[str, Any]]:
        generators = [torch.Generator().manual_seed(int(seed)) for seed in batchdata["seed"]]
        noise = to_device(draw_noise(batchdata["mean"].shape[1:], generators), device)
        shown = {name: to_device(batchdata[name], device).to(torch.float32, copy=True) for name in self.conditions}
        for name, dropped in self._dropped(generators).items():
            _drop(self.conditions[name], shown[name], dropped)
        keys = list(zip(batchdata[CASE].tolist(), batchdata["seed"].tolist(), strict=True))
        z_0 = to_device(self.teacher.latents(noise, shown, keys), device)
        seen = self._seen(noise, shown)
        t = self.knots[:-1].float().repeat_interleave(len(noise))
        valid = to_device(batchdata["valid"], device).float()
        z_t, z_0 = torch.cat(seen), z_0.repeat(self.calls, *[1] * (z_0.ndim - 1))
        asked = Weighted(
            asked_of(self.process, self.target, z_0, z_t, t).to(device, **kwargs),
            valid.repeat(self.calls, *[1] * (z_0.ndim - 1)).to(device, **kwargs),
            to_device(self.process.output_scale(self.target, t).square(), device).view(-1, *[1] * (z_0.ndim - 1)),
            t=t,
        )
        time = to_device(self.process.network_time(t), device).to(device, **kwargs)
        given = {name: part.repeat(self.calls, *[1] * (part.ndim - 1)) for name, part in shown.items()}
        return z_t.to(device, **kwargs), asked, (time, *([given] if given else [])), {}

    @torch.no_grad()
    def _seen(self, noise: Tensor, shown: Mapping[str, Tensor]) -> list[Tensor]:
        """What each call sees, by the sampler with which the student draws."""
        if self.calls == 1:
            return [noise]
        training, seen = self.student.training, [noise]
        self.student.eval()
        denoise = Denoiser(self.student, self.process, self.target, shown)  # type: ignore[arg-type]
        for times in pairwise(self.knots.tolist()):
            if len(seen) < self.calls:
                knots = torch.tensor(times, dtype=torch.float64)
                seen.append(ddim(denoise, seen[-1], knots, process=self.process))
        self.student.train(training)
        return seen


class LossByCall(Metric):
    """The validation loss of each call by itself, ``validation_loss/call_1`` and so on.

    Args:
        loss: of a prediction and its `Weighted` target, a scalar.
        calls: of the student.
    """

    def __init__(self, loss: nn.Module, calls: int) -> None:
        self.loss, self.calls = loss, calls
        super().__init__(lambda output: (output["pred"], output["label"]))

    @reinit__is_reduced
    def reset(self) -> None:
        self._sums = torch.zeros(self.calls, dtype=torch.float64)
        self._cases = torch.zeros(1, dtype=torch.float64)

    @reinit__is_reduced
    @torch.no_grad()
    def update(self, output: tuple[Tensor, Weighted]) -> None:
        """Add a batch: predictions ``(calls B, C, ...)``, call by call, and their targets."""
        prediction, target = output
        count = len(prediction) // self.calls
        for call in range(self.calls):
            own = slice(call * count, (call + 1) * count)
            part = Weighted(*(None if value is None else value[own] for value in target))  # type: ignore[arg-type]
            self._sums[call] += count * float(self.loss(prediction[own], part))
        self._cases += count

    @sync_all_reduce("_sums", "_cases")
    def compute(self) -> dict[str, float]:
        """The mean loss of each call, by the name of its column."""
        means = (self._sums / self._cases.clamp(min=1)).tolist()
        return {f"validation_loss/call_{call}": mean for call, mean in enumerate(means, start=1)}


def asked_of(process: Process, target: Target, z_0: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
    """What a network must say at ``z_t`` for the latent ``z_0`` to be behind it: the inverse of `Process.to_z_0`.

    Args:
        process: the process.
        target: what the output means.
        z_0: latents ``(B, C, x, y, z)``.
        z_t: what the network sees, the same shape; the noise in it is whatever ``z_0`` leaves.
        t: times in (0, 1], ``(B,)``.
    """
    shape = (-1, *[1] * (z_t.ndim - 1))
    alpha, sigma = (to_device(part(t), z_t.device).view(shape) for part in (process.alpha, process.sigma))
    return process.target(target, z_0, (z_t - alpha * z_0) / sigma, t)


def check_calls(calls: int) -> None:
    """Refuse a number of calls that no student has.

    Raises:
        FibldmError: it is neither 1 nor 2.
    """
    if isinstance(calls, bool) or not isinstance(calls, int) or not 1 <= calls <= MOST_CALLS:
        raise FibldmError(
            f"a student makes 1 or 2 network calls; got student_calls {calls!r}",
            "for more calls draw with the teacher: dpmpp_2m needs 5 steps",
        )
