"""Does a bundle do what it says? Everything that is promised of it, tried out; the figures of a fresh process.

A check gives a sentence on what it saw, or raises what is wrong.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.files import hash_file, read_json, write_json
from fibldm.manifest import MANIFEST, check_manifest, differences
from fibldm.models.one_tensor import OneTensorDecoder, OneTensorEncoder, OneTensorNetwork
from fibldm.runs.renamed import current
from fibldm.synthesis import Synthesizer, synthesize_files
from fibldm.synthesis.bundle import GENERATOR, inside
from fibldm.typed_settings import counted
from fibldm.verbatim import as_argument, verbatim
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.grid import Volume
from fibldm.volumes.writer import write_labels

_STEPS = 2  # or those that a distilled network was trained for
_TOLERANCE = 1e-4
_ROUNDING = 2e-3  # of whole HU, or of other threads
_MULTIPLES = (1, 2, 3)
_OF_ONNX = ("onnx", "onnxscript", "onnxruntime")
SCHEMA = "metadata_schema.json"
NOT_TRIED = "not tried"


@dataclass(frozen=True)
class Check:
    """One thing that was tried out, whether it holds, and what was seen or is wrong."""

    name: str
    ok: bool
    saw: str


def verify(bundle: Path, *, trust: bool = False) -> Iterator[Check]:
    """All checks, each as soon as it is done, in a process of their own, which starts in an empty folder.

    Args:
        bundle: its folder, whose configurations are run.
        trust: do so although it changed since its export.

    Raises:
        FibldmError: there is no such folder, it is no bundle, its files are not those of its manifest, or the process
            broke off.
    """
    require_bundle(bundle)
    facts = read_json(Path(bundle) / GENERATOR) if (Path(bundle) / GENERATOR).is_file() else None
    named = isinstance(facts, dict) and "manifest" in facts
    check_manifest(Path(bundle), trust=trust, named=named)  # before anything of it is run
    program = f"from {__name__} import print_checks; print_checks()"
    command = [sys.executable, "-c", program, str(Path(bundle).resolve()), str(trust)]
    done = 0
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            for line in process.stdout or ():
                if line.startswith('{"name"'):
                    done += 1
                    yield Check(**json.loads(line))
        if process.returncode or done < len(CHECKS):
            errors.seek(0)
            last = errors.read().strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
            raise FibldmError(f"all checks of {bundle} must come to an end; they broke off with {last[0]}")


def require_bundle(bundle: Path) -> None:
    """Refuse what is no folder of a bundle.

    Raises:
        FibldmError: it is none.
    """
    if not Path(bundle).is_dir():
        raise FibldmError(f"a bundle must be a folder to be verified; {bundle} is none", "unpack the archive first")
    if not (Path(bundle) / "configs").is_dir():
        raise FibldmError(
            f"what is verified must be a bundle, with a folder configs; {bundle} has none",
            "make a bundle of a run with fibldm export",
        )


def print_checks() -> None:
    """Print every check as a line of JSON; what `verify` starts."""
    for check in run_checks(Path(sys.argv[1]), Path.cwd(), trust=sys.argv[2] == "True"):
        print(json.dumps(asdict(check)), flush=True)


def run_checks(bundle: Path, folder: Path, names: Sequence[str] = (), *, trust: bool = False) -> Iterator[Check]:
    """Try things out.

    Args:
        bundle: its folder.
        folder: to write in.
        names: of `CHECKS`; none means all.
        trust: take what changed since the export.
    """
    trial = BundleUnderTest(bundle, folder, trust)
    for name in names or CHECKS:
        try:
            yield Check(name, True, CHECKS[name](trial))
        except Exception as error:
            reason = error.message if isinstance(error, FibldmError) else f"{type(error).__name__}: {error}"
            yield Check(name, False, " ".join(reason.split())[:500])


@dataclass(frozen=True)
class BundleUnderTest:
    """What all checks share: see `run_checks`."""

    bundle: Path
    folder: Path
    trust: bool = False

    @cached_property
    def synthesizer(self) -> Synthesizer:
        return Synthesizer.from_bundle(self.bundle, trust=self.trust)

    @property
    def steps(self) -> int:
        """Of a sampling that is tried: few, and as a distilled network needs them."""
        student = self.synthesizer.student
        return _STEPS if student is None else student.calls

    @cached_property
    def current(self) -> Path:
        """The bundle with today's names of classes, which MONAI finds; one of before is copied for it."""
        names = ("inference.json", "train.json")
        made = {name: current(read_json(inside(self.bundle, f"configs/{name}"))) for name in names}
        if all(made[name] == read_json(self.bundle / "configs" / name) for name in names):
            return self.bundle
        copy = self.folder / "current" / self.bundle.name
        shutil.copytree(self.bundle, copy, symlinks=True)
        for name, content in made.items():
            write_json(copy / "configs" / name, content)
        return copy

    @cached_property
    def mask(self) -> Path:
        """A mask of the size of the model grid with every label in it."""
        made = self.synthesizer
        length, width, _ = made.grid.size
        labels = np.zeros(made.grid.size, dtype=np.uint8)
        labels[: length // 8] = UNKNOWN_LABEL
        for place, label in enumerate(made.names):
            start = length // 4 + place * max(1, length // (2 * len(made.names)))
            labels[start : start + 2, width // 4 : -width // 4] = label
        file = self.folder / "masks" / "trial.nii.gz"
        write_labels(file, Volume(labels, np.diag([*made.grid.spacing, 1.0])))
        return file

    @property
    def masks(self) -> list[Path]:
        """What volumes are tried to be made from: nothing, of a generator without masks."""
        return [self.mask] if self.synthesizer.network.sees_mask else []

    @property
    def masks_given(self) -> dict[str, str]:
        """The same as a key of ``inference.json``."""
        return {"masks": str(self.mask)} if self.masks else {}

    @cached_property
    def networks(self) -> Mapping[str, tuple[nn.Module, Callable[[int], Tensor]]]:
        """Networks of one tensor, each with what makes an input of so many times its smallest size."""
        made = self.synthesizer
        channels, factors = len(made.space.mean), made.mask.factors
        autoencoder = made.first_stage.autoencoder
        smallest = [1 if length == 1 else made.network.multiple for length in made.grid.size]

        def cells(times: int) -> list[int]:
            return [1 if cell == 1 else cell * times for cell in smallest]

        def latent(count: int, times: int) -> Tensor:
            return torch.randn(1, count, *cells(times), generator=torch.Generator().manual_seed(times))

        def volume(times: int) -> Tensor:
            size = [cell * step for cell, step in zip(cells(times), factors, strict=True)]
            return torch.rand(1, len(made.channels), *size, generator=torch.Generator().manual_seed(times)) * 2 - 1

        packed = channels + 1 + (made.mask.channels if made.network.sees_mask else 0)
        networks: dict[str, tuple[nn.Module, Callable[[int], Tensor]]] = {
            "network": (OneTensorNetwork(made.network, channels, made.conditions), lambda times: latent(packed, times)),
            "encoder": (OneTensorEncoder(autoencoder), volume),
        }
        if not autoencoder.needs_mask:
            networks["decoder"] = (OneTensorDecoder(autoencoder), lambda times: latent(channels, times))
        return {name: (network.eval(), example) for name, (network, example) in networks.items()}


def _manifest(trial: BundleUnderTest) -> str:
    """Files changed after the export are refused before this, unless that was lifted."""
    found = differences(trial.bundle)
    if found is None:
        return f"{NOT_TRIED}: there is no {MANIFEST}, so nobody can tell what changed since the export"
    if found and not trial.trust:
        raise FibldmError(f"files must be those that were exported; {'; '.join(found)}")
    digest = hash_file(trial.bundle / MANIFEST)
    return f"trusted nevertheless: {'; '.join(found)}" if found else f"files as exported, {MANIFEST} is {digest}"


def _layout(trial: BundleUnderTest) -> str:
    licence = inside(trial.bundle, "LICENSE").read_text(encoding="utf-8")
    if not licence.startswith("SPDX-License-Identifier: "):
        raise FibldmError("LICENSE must begin with SPDX-License-Identifier")
    card = inside(trial.bundle, "docs/README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    size = sum(file.stat().st_size for file in (trial.bundle / "models").iterdir())
    return f"licence {front['license']}, {size / 1e6:.1f} MB of weights"


def _generator(trial: BundleUnderTest) -> str:
    made = trial.synthesizer
    count = sum(weight.numel() for weight in made.network.parameters())
    return f"hashes, definitions and weights fit; {count} parameters"


def _metadata(trial: BundleUnderTest) -> str:
    from jsonschema import validate
    from monai.bundle import verify_metadata

    schema = Path(str(files("fibldm.delivery") / SCHEMA))
    file = inside(trial.bundle, "configs/metadata.json")
    validate(read_json(file), read_json(schema))
    verify_metadata(str(file), filepath=str(schema), hash_val=hash_file(schema), hash_type="sha256")
    return f"valid by {SCHEMA}"


def _inference_properties(trial: BundleUnderTest) -> str:
    from monai.bundle import create_workflow

    given: dict[str, Any] = verbatim(
        {
            "bundle_root": str(trial.bundle),
            **trial.masks_given,
            "output_dir": str(trial.folder / "out"),
            "trust": trial.trust,
        }
    )
    configuration = inside(trial.current, "configs/inference.json")
    workflow = create_workflow(config_file=str(configuration), workflow_type="inference", **given)
    if missing := workflow.check_properties():
        raise FibldmError(f"properties are missing: {', '.join(missing)}")
    return "no property is missing"


def _train_properties(trial: BundleUnderTest) -> str:
    """By name, as there is no training data to make them of."""
    from monai.bundle import ConfigParser
    from monai.bundle.properties import TrainProperties
    from monai.utils import BundleProperty, BundlePropertyConfig

    parser = ConfigParser(read_json(inside(trial.bundle, "configs/train.json")))
    properties = [part for part in TrainProperties.values() if part[BundleProperty.REQUIRED]]
    wanted = [str(part[BundlePropertyConfig.ID]) for part in properties]  # type: ignore[index]
    if missing := [name for name in wanted if parser.get(name) is None]:
        raise FibldmError(f"properties are missing: {', '.join(missing)}")
    return f"all {len(wanted)} are named"


def _load(trial: BundleUnderTest) -> str:
    from monai.bundle import load

    bundle = trial.current
    network: Any = load(bundle.name, bundle_dir=str(bundle.parent), workflow_type="train", device="cpu")
    kept = trial.synthesizer.network.state_dict()
    if any(not torch.equal(tensor, kept[name]) for name, tensor in network.state_dict().items()):
        raise FibldmError("models/model.pt must hold the weights of models/network.safetensors; it does not")
    return f"{type(network).__name__} with the weights of the bundle"


def _in_and_out(trial: BundleUnderTest) -> str:
    from monai.bundle import verify_net_in_out

    verify_net_in_out(
        net_id="one_tensor_network",
        meta_file=str(trial.bundle / "configs" / "metadata.json"),
        config_file=str(trial.bundle / "configs" / "inference.json"),
        device="cpu",
        bundle_root=verbatim(str(trial.bundle)),
        trust=trial.trust,
    )
    return "one_tensor_network as metadata.json says"


def _onnx(trial: BundleUnderTest) -> str:
    if missing := [name for name in _OF_ONNX if find_spec(name) is None]:
        return f"{NOT_TRIED}: {', '.join(missing)} missing (pip install 'fibldm[onnx]')"
    return _compared(trial, _as_onnx)


def _as_onnx(network: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    """The network in ONNX, of the size of the example, by its runtime."""
    import onnxruntime

    program: Any = torch.onnx.export(network, (example,), dynamo=True, verbose=False)
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return lambda tensor: torch.from_numpy(session.run(None, {given.name: tensor.numpy()})[0])


def _compared(trial: BundleUnderTest, convert: Callable[[nn.Module, Tensor], Any]) -> str:
    worst = 0.0
    with torch.no_grad():
        for network, example in trial.networks.values():
            for times in _MULTIPLES:
                given = example(times)
                expected, found = network(given), convert(network, given)(given)
                worst = max(worst, float((expected - found).abs().max() / expected.abs().max()))
    if not worst <= _TOLERANCE:
        raise FibldmError(f"results must be equal to 1e-4 of the largest; they differ by {worst:.2g}")
    return f"{', '.join(trial.networks)} at {len(_MULTIPLES)} sizes, differ by at most {worst:.1g}"


def _synthesis(trial: BundleUnderTest) -> str:
    out = trial.folder / "own"
    (file,) = synthesize_files(
        *(None, trial.masks, out),
        count=1,
        steps=trial.steps,
        bundle=trial.bundle,
        trust=trial.trust,
        allow_extrapolation=True,
        device="cpu",
    )
    volume = read_volume(file)
    if volume.array.shape[:3] != tuple(trial.synthesizer.grid.size) or not np.isfinite(volume.array).all():
        raise FibldmError("a volume must be finite and lie on the grid of its mask")
    return f"a volume of {' x '.join(map(str, volume.array.shape))} voxels in {counted(trial.steps, 'step')}"


def _inference(trial: BundleUnderTest) -> str:
    """By MONAI, in another process; equal to FibLDM's own."""
    _check_sampling(trial)
    command = [sys.executable, "-m", "monai.bundle", "run"]
    given = {
        "bundle_root": str(trial.bundle),
        "output_dir": str(trial.folder / "monai"),
        **trial.masks_given,
        "inferer::steps": trial.steps,
        "trust": trial.trust,
        "allow_extrapolation": True,
        "device": "cpu",
    }
    options = [part for name, value in given.items() for part in (f"--{name}", as_argument(verbatim(value)))]
    file = str(trial.bundle / "configs" / "inference.json")
    told = subprocess.run([*command, "--config_file", file, *options], cwd=trial.folder, capture_output=True, text=True)
    if told.returncode:
        raise FibldmError(f"monai.bundle run ended with {told.returncode}: {told.stderr.strip().splitlines()[-1:]}")
    own, by_monai = (next((trial.folder / name).glob("*.nii.gz")) for name in ("own", "monai"))
    one, other = (read_volume(file).array.astype(np.float64) for file in (own, by_monai))
    difference = np.abs(one - other).max() / np.ptp(one)
    if not difference <= _ROUNDING:
        raise FibldmError(f"volumes by MONAI and by fibldm synthesize must be equal; they differ by {difference:.2g}")
    return f"the same volume as by fibldm synthesize, differs by {difference:.1g} of its range"


def _check_sampling(trial: BundleUnderTest) -> None:
    """Whether MONAI and FibLDM draw by the same default, where the bundle says one."""
    own = read_json(trial.bundle / GENERATOR).get("sampling")
    inferer = read_json(trial.bundle / "configs" / "inference.json")["inferer"]
    by_monai = {name: value for name, value in inferer.items() if name != "_target_"}
    if own is not None and own != by_monai:
        differing = ", ".join(sorted(name for name in own.keys() | by_monai if own.get(name) != by_monai.get(name)))
        raise FibldmError(
            f"inferer of inference.json and sampling of {GENERATOR} must be the same; they differ in {differing}"
        )


CHECKS: Mapping[str, Callable[[BundleUnderTest], str]] = {
    "manifest": _manifest,
    "layout": _layout,
    "generator": _generator,
    "metadata": _metadata,
    "inference properties": _inference_properties,
    "train properties": _train_properties,
    "monai.bundle.load": _load,
    "verify_net_in_out": _in_and_out,
    "torch.export": partial(_compared, convert=lambda net, x: torch.export.export(net, (x,), strict=False).module()),
    "torch.jit.trace": partial(_compared, convert=lambda net, x: torch.jit.trace(net, x, check_trace=False)),
    "ONNX": _onnx,
    "synthesis": _synthesis,
    "monai.bundle run": _inference,
}
