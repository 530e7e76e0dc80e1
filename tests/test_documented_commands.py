"""Every command of README, docs and configuration headers runs as it stands, in small.

The commands of all pages run one after the other in one folder, as a reader would type them; where a page supposes
something (``my_data.yaml``, ``masks/``, a second run), it lies there. *In small* means options that are added, never
changed: the smallest networks, few steps. What cannot run here is listed with its reason.
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import monai.bundle
import numpy as np
import pytest
import torch
import yaml
from builders import verified_here
from monai.networks.nets import DiffusionModelUNet
from PIL import Image

from fibldm.cli import run
from fibldm.datasets.torch_datasets import write_source

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "docs/evaluation.md",
    "docs/examples.md",
    "docs/bundles.md",
    "docs/data.md",
    "docs/diffusion.md",
    "docs/pipelines.md",
    "docs/training.md",
)

ON_MINE = "fibldm train diffusion --data work --run runs/mine --config my_data.yaml --config mask_concat"

MEASURED = ("all", "faithfulness", "realism", "reconstruction", "copies", "utility", "gate")  # with a segmenter

# The beginning of commands that are not run, and why.
NOT_RUN = {
    "./scripts/demo.sh": "takes minutes; it is a proof with recorded results",
    "./scripts/test.sh": "is what runs this",
    "python scripts/benchmark.py": "takes minutes",
    "fibldm pipeline $FIBLDM_DATA": "takes an hour; it is a proof with recorded results",
    "fibldm verify bundles/mine": "takes a minute, and the README's is run",
    "python scripts/compare_translation.py": "takes most of an hour; it is a proof with recorded results",
    "sbatch": "needs a cluster",
    "srun": "needs a cluster",
    "RANK=": "needs a cluster",
    f"{ON_MINE} --devices": "see test_distributed.py",
    "fibldm prepare table.csv": "needs texts; see test_texts.py",
    f"{ON_MINE} --config text": "needs a text encoder; see test_text.py",
    "fibldm synthesize --run runs/mine --masks masks/ --text": "needs a text encoder; see test_text.py",
    "fibldm prepare liver_ct": "needs three datasets; see test_several.py",
    "fibldm prepare cases.csv --modality ct --second-modality": "needs second images; see test_image_condition.py",
    f"{ON_MINE} --config image": "needs second images; see test_image_condition.py",
    "fibldm synthesize --run runs/mine --masks masks/ --image": "needs second images; see test_image_condition.py",
    "fibldm train controlnet --data work --run runs/mine --config my_data.yaml --config image_controlnet": (
        "needs second images; see test_image_controlnet.py"
    ),
    "fibldm synthesize --run runs/boxes": "needs labels of these names; see test_boxes.py",
    "torchrun": "starts processes of its own; see test_distributed.py",
    "fibldm prepare TREE --out work --modality pt": "needs PET; see test_pet.py",
    "dask": "starts processes of a cluster; see test_workers.py",
    "fibldm synthesize --bundle bundles/mine --masks masks --count 10": "needs a cluster; see test_shared_work.py",
    "docker": "needs Docker",
    "python -m monai.bundle ckpt_export": "see test_bundles.py",
    "python -m monai.bundle onnx_export": "needs ONNX",
    "export ": "sets a variable of the shell",
    "source ": "is the shell's own",
    "pip ": "installs",
    "git ": "is no command of this project",
}

# Blocks that take more than a minute on two cores; they run where FIBLDM_LONG is set.
LONG = ("phantoms_fine", "fibldm plan", "hippocampus_mri --out", "lung_ct.csv", "runs/disease")

# Runs that pages suppose: which earlier run each is like, and the stages that it lacks, if that has them.
LIKE = {
    "lungs": ("mine", "diffusion"),
    "lesions": ("mine", "diffusion"),
    "free": ("mine", "diffusion"),
    "boxes": ("mine", "diffusion"),
    "by_monai": ("mine", "diffusion"),
    "imported": ("mine", "diffusion"),
    "adapted": ("tuned", "diffusion"),
    "texture": ("mine", "diffusion"),
    "fast": ("mine", "distillation"),
}

# Options that make commands small, by how they begin.
SMALL = {
    "fibldm phantoms": ["--subjects", "8"],
    "fibldm train": ["--config", "tiny"],
    "fibldm encode": ["--config", "tiny"],
    "fibldm plan": ["--config", "tiny"],
    "fibldm pipeline": [
        "--config",
        "tiny",
        "--set",
        "segmenter::steps=2",
        "--set",
        "synthesize::allow_extrapolation=true",
        "--set",
        "synthesize::steps=1",
        "--set",
        "measure=[reconstruction]",
    ],
    **{f"fibldm evaluate {name}": ["--set", "steps=2"] for name in MEASURED},
    "fibldm synthesize": ["--allow-extrapolation", "--steps", "1"],
    "python scripts/check_measurements.py": ["--set", "steps=2"],
    "fibldm watch": ["--once", "--steps", "1"],
}
# Later options win, so these stand last.
TWO_DIMENSIONS = ["--set", "patch=[32,32,1]"]


class Block(NamedTuple):
    """A block of commands of a page, by the line that it begins on."""

    page: str
    line: int
    text: str


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text()
        for match in re.finditer(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            found.append(Block(page, text[: match.start()].count("\n") + 2, match[1]))
    return found


FIRST_OF_PAGES = [next(block for block in blocks() if block.page == page) for page in PAGES]


def commands(text: str) -> Iterator[str]:
    """The commands of a block, continued lines joined, without comments; a here-document is one command."""
    lines = iter(text.replace("\\\n", " ").splitlines())
    for line in lines:
        end = re.search(r"<<'?(\w+)'?", line)
        if end:
            line = "\n".join([line, *iter(lambda: next(lines), end[1]), end[1]])  # noqa: PLW2901, B023
        else:
            line = re.sub(r"\s+#\s.*", "", line).strip()  # noqa: PLW2901
        if line and not line.startswith("#"):
            yield line


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that commands run in, with what the pages suppose to be there."""
    desk = tmp_path_factory.mktemp("desk")
    shutil.copytree(ROOT / "bundles", desk / "bundles")
    for name in ("configs", "scripts"):
        (desk / name).symlink_to(ROOT / name)
    (desk / "my_data.yaml").write_text(yaml.safe_dump({"spacing": [10.0, 10.0, 10.0], "size": [32, 32, 32]}))
    run(["phantoms", "--out", str(desk / "SOURCE"), "--subjects", "8", "--seed", "1"])
    first, *others = sorted((desk / "SOURCE" / "labels").glob("*.nii.gz"))
    for name in ("masks", "inbox"):
        (desk / name).mkdir()
    for source, copy in ((first, "mask.nii.gz"), (first, "inbox"), (first, "masks"), (others[-1], "masks")):
        shutil.copy(source, desk / copy)
    unet = DiffusionModelUNet(
        3, 4, 4, channels=[32, 32], num_res_blocks=1, attention_levels=[False, False], num_head_channels=32
    )
    torch.save(unet.state_dict(), desk / "unet.pt")
    before = Path.cwd()
    os.chdir(desk)
    yield desk
    os.chdir(before)


def words(command: str) -> list[str]:
    """As a shell splits them, with what is added to make the command small."""
    split = [os.path.expandvars(word) for word in shlex.split(command)]
    added = [word for start, more in SMALL.items() if command.startswith(start) for word in more]
    if "--minutes" in command:
        added += ["--minutes", "0.2"]
    if any(name in command for name in ("slices", "pictures", "digits")) and command.startswith("fibldm train"):
        added += TWO_DIMENSIONS
    return split + ([] if "--subjects" in split else added)


def execute(command: str, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """The exit code; None where the command is not run here."""
    if "\n" in command:
        return subprocess.run(["bash", "-c", command], check=False).returncode
    if any(command.startswith(start) for start in NOT_RUN):
        return None
    program, *rest = words(command)
    if program == "fibldm":
        return run(rest)
    if program == "python" and rest[:3] == ["-m", "monai.bundle", "run"]:
        return bundle_run(rest[3:])
    assert program == "python", f"it is not said how to run {command!r}"
    monkeypatch.setattr(sys, "argv", rest)
    try:
        runpy.run_path(rest[0], run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def bundle_run(rest: Sequence[str]) -> int:
    """`python -m monai.bundle run`, in this process; stage files are followed by the smallest networks."""
    identifiers = [] if rest[0].startswith("--") else [rest[0]]
    options = dict(zip(*[iter(rest[len(identifiers) :])] * 2, strict=True))
    keywords = {name.removeprefix("--"): value for name, value in options.items()}
    files = keywords.pop("config_file")
    if files.startswith("["):
        files = [*yaml.safe_load(files), "configs/tiny.yaml"]
    else:
        keywords["inferer::steps"] = 1
    monai.bundle.run(*identifiers, config_file=files, **keywords)
    return 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")  # MONAI's advice about configurations as code
@pytest.mark.parametrize("block", blocks(), ids=lambda block: f"{block.page}:{block.line}")
def test_the_commands_of_a_page_run(
    block: Block, desk: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if any(word in block.text for word in LONG) and not os.environ.get("FIBLDM_LONG"):
        pytest.skip("takes more than a minute (FIBLDM_LONG=1 runs it)")
    monkeypatch.setattr("fibldm.pipeline.verify", verified_here)  # all of it is that of `fibldm verify`
    if "$FIBLDM_DATA" in block.text:
        monkeypatch.setenv("FIBLDM_DATA", str(request.getfixturevalue("data_folder")))
    prepare(block, desk, monkeypatch)
    codes = {command: execute(command, monkeypatch) for command in commands(block.text)}
    assert {command: code for command, code in codes.items() if code} == {}


def prepare(block: Block, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page supposes and no command before it made."""
    for folder in desk.glob("synthetic*") if block in FIRST_OF_PAGES else ():
        shutil.rmtree(folder)
    for name, (origin, *without) in LIKE.items():
        if f"runs/{name}" in block.text:
            shutil.copytree(desk / "runs" / origin, desk / "runs" / name, ignore=shutil.ignore_patterns(*without))
    if "fibldm prepare pictures" in block.text:
        write_pictures(desk / "pictures")
    if "fibldm prepare digits" in block.text:
        items = [{"image": picture, "class": name} for name, picture, _ in drawn()]
        write_source(items, desk / "digits", spacing=(1, 1, 1))
    if "my_recipe.yaml" in block.text:
        page = (ROOT / block.page).read_text()
        recipe = yaml.safe_load(re.search(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1])  # type: ignore[index]
        recipe["autoencoder"]["epochs"] = recipe["diffusion"]["epochs"] = 1
        (desk / "my_recipe.yaml").write_text(yaml.safe_dump(recipe))
    if "--set init_from=bundles/mine" in block.text:
        assert run("export --run runs/mine --out bundles/mine --license CC-BY-4.0".split()) == 0
    if "site.safetensors" in block.text:
        make_adapter(desk)
    if "--synthetic synthetic_test" in block.text and "fibldm synthesize" not in block.text:
        draw = (
            "synthesize --run runs/mine --data work --split test --out synthetic_test --steps 1 --allow-extrapolation"
        )
        assert run(draw.split()) == 0
    if "--with-controlnet" in block.text:
        train_without_mask(desk, "lungs", "diffusion", "controlnet")
        shutil.copytree(desk / "runs" / "lungs", desk / "runs" / "lesions", dirs_exist_ok=True)
    if "runs/free" in block.text:
        train_without_mask(desk, "free", "diffusion")
    if "patients.csv" in block.text:
        (desk / "patients.csv").write_text("\n".join(["mask", *(file.name for file in (desk / "masks").iterdir())]))
    if "covariates=[age" in block.text:
        monkeypatch.chdir(with_covariates(desk))


def drawn() -> Iterator[tuple[str, Image.Image, Image.Image]]:
    """Grey discs and squares of 28 x 28 pixels: name of a class of MNIST, picture, and mask with 1 or 2 inside."""
    random = np.random.default_rng(0)
    across, down = np.meshgrid(np.arange(28), np.arange(28))
    for index in range(12):
        x, y, radius = random.uniform((10, 10, 4), (18, 18, 8))
        square = index % 2
        distance = np.maximum(abs(across - x), abs(down - y)) if square else np.hypot(across - x, down - y)
        inside = distance < radius
        grey = random.normal(30, 8, inside.shape) + inside * (100 + 40 * square)
        name = ("7 - seven", "8 - eight")[square]
        yield name, *(Image.fromarray(part.astype(np.uint8)) for part in (grey.clip(0, 255), inside * (1 + square)))


def write_pictures(folder: Path) -> None:
    """PNG files with masks of the same names."""
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for index, (_, picture, mask) in enumerate(drawn()):
        picture.save(folder / "images" / f"{index:02d}.png")
        mask.save(folder / "labels" / f"{index:02d}.png")


def train_without_mask(desk: Path, name: str, *stages: str) -> None:
    """Stages of a run whose base network knows no masks."""
    for stage in stages:
        train = f"train {stage} --data work --run {desk / 'runs' / name} --config my_data.yaml --config tiny"
        assert run(train.split()) == 0


def make_adapter(desk: Path) -> None:
    """``site.safetensors`` for ``runs/mine``, and ``bundles/mine`` of that."""
    assert run("export --run runs/mine --out bundles/mine --license CC-BY-4.0".split()) == 0
    for part in ("autoencoder", "latents"):
        shutil.copytree(desk / "runs" / "mine" / part, desk / "runs" / "for_adapter" / part)
    names = " ".join(f"--config {name}" for name in ("my_data.yaml", "tiny", "mask_concat", "adapter"))
    train = f"train diffusion --data work --run runs/for_adapter {names} --set init_from=runs/mine"
    assert run(train.split()) == 0
    file = desk / "runs" / "for_adapter" / "diffusion" / "checkpoints" / "adapter.safetensors"
    shutil.copy(file, desk / "site.safetensors")


def with_covariates(desk: Path) -> Path:
    """A folder of its own, whose ``work`` knows age and sex, with a first stage and latents."""
    folder = desk / "with_covariates"
    folder.mkdir()
    for name in ("my_data.yaml", "masks"):
        (folder / name).symlink_to(desk / name)
    rows = ["image,label,subject,age,sex"]
    for index, image in enumerate(sorted((desk / "SOURCE" / "images").glob("*.nii.gz"))):
        rows.append(f"{image},{desk / 'SOURCE' / 'labels' / image.name},p{index},{50 + 5 * index},{'FM'[index % 2]}")
    (folder / "table.csv").write_text("\n".join(rows))
    commands = (
        f"prepare {folder}/table.csv --out {folder}/work --modality ct",
        f"train autoencoder --data {folder}/work --run {folder}/runs/mine --config {desk}/my_data.yaml --config tiny",
        f"encode --data {folder}/work --run {folder}/runs/mine --config {desk}/my_data.yaml --config tiny",
    )
    assert [run(command.split()) for command in commands] == [0, 0, 0]
    return folder
