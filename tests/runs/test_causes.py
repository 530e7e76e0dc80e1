"""What goes wrong inside of a configuration is told by its cause: which part, which file, how much memory."""

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from fibldm.errors import FibldmError
from fibldm.evaluation.measurements import evaluate
from fibldm.files import write_json
from fibldm.out_of_memory import out_of_memory
from fibldm.runs.causes import unwrapped
from fibldm.runs.values import check_values
from fibldm.synthesis import Synthesizer, synthesize_files
from fibldm.volumes.datalist import load_datalist, read_datalist


def fail(error: BaseException) -> None:
    raise error


def made(content: dict[str, Any], name: str) -> Any:
    with unwrapped():
        return ConfigParser(content, globals={"fail": fail}).get_parsed_content(name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": {"_target_": "torch.nn.Linear", "in_features": 2}}, "to make; a is not: TypeError: .*out_features"),
        (
            {"a": "@b", "b": {"_target_": "torch.nn.Lineer"}},
            "to make; b is not: ModuleNotFoundError: .*torch.nn.Lineer",
        ),
        ({"a": "$len(@b)", "b": 3}, r"to make; a is not: TypeError: .*int.* has no len"),
        ({"a": {"x": "$1 / 0"}}, "to make; a::x is not: ZeroDivisionError: division by zero"),
        ({"a": "@c"}, "to make; a is not: ValueError: .*`@c` is not defined"),
        ({"a": "$fail(ValueError(''))"}, "to make; a is not: ValueError: nothing more is said"),
        ({"a": "$fail(FileNotFoundError(2, 'No such file', 'x/c3.nii.gz'))"}, "x/c3.nii.gz must be .*; No such file"),
        (
            {"a": "$fail(RuntimeError('expected input[1, 2] to have 7 channels, but got 8 channels instead'))"},
            "8; it is 7",
        ),
    ],
)
def test_a_part_that_cannot_be_made_is_named_with_its_cause(content: dict[str, Any], message: str) -> None:
    with pytest.raises(FibldmError, match=message):
        made(content, "a")


def test_what_a_part_refused_comes_as_it_was() -> None:
    refusal = FibldmError("must hold", "do this")
    with pytest.raises(FibldmError) as raised, unwrapped():
        ConfigParser(
            {"a": {"_target_": "$@b"}, "b": "$fail"}, globals={"fail": lambda: fail(refusal)}
        ).get_parsed_content("a")
    assert raised.value is refusal


def test_what_fails_while_a_stage_runs_is_no_bad_input() -> None:
    with pytest.raises(KeyError, match="gone"):
        made({"run": ["$fail(KeyError('gone'))"]}, "run::0")


def test_a_failure_without_a_configuration_stays_itself() -> None:
    error = RuntimeError("of another kind")
    with pytest.raises(RuntimeError) as raised, unwrapped():
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (MemoryError(), "it more was asked for"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096000000 bytes."), "4.1 GB"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), "2.15 GB"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "it more was asked for"),
    ],
)
def test_memory_that_is_not_enough_says_what_was_asked_and_where_to_look(error: Exception, asked: str) -> None:
    told = out_of_memory(error)
    assert told is not None
    assert asked in told.message and "memory of" in told.message and "fibldm plan" in told.remedy
    with pytest.raises(FibldmError, match="must be enough"), unwrapped():
        raise error


def test_a_real_allocation_that_is_too_large_is_told_with_what_is_free() -> None:
    for allocate in (lambda: torch.empty(2**46), lambda: np.empty(2**46)):
        with pytest.raises((RuntimeError, MemoryError)) as raised:
            allocate()
        told = out_of_memory(raised.value)
        assert told is not None
        assert "5.63e+05 GB" in told.message or "2.81e+05 GB" in told.message
        assert "GB are free" in told.message
    assert out_of_memory(ValueError("out of memory")) is None


# --- values


@pytest.mark.parametrize(
    ("key", "value", "must"),
    [
        ("spacing", [0, 2, 2], "three numbers above 0"),
        ("spacing", [-2, 2, 2], "three numbers above 0"),
        ("spacing", [2, 2, float("nan")], "three numbers above 0"),
        ("spacing", ["2", "2", "2"], "three numbers above 0"),
        ("spacing", [2.0, 2.0], "three numbers above 0"),
        ("spacing", "2,2,2", "three numbers above 0"),
        ("size", 32, "three whole numbers"),
        ("size", [32, 32, 0], "three whole numbers"),
        ("size", [32.5, 32, 32], "three whole numbers"),
        ("patch", 16, "three whole numbers"),
        ("learning_rate", -1, "a number of at least 0"),
        ("learning_rate", None, "a number of at least 0"),
        ("learning_rate", "fast", "a number of at least 0"),
        ("seed", 1e3, "a whole number of at least 0"),
        ("batch_size", True, "a whole number of at least 1"),
        ("mask_dropout", 1.5, "a number from 0 to 1"),
        ("restart", "no", "true or false"),
    ],
)
def test_a_value_that_no_stage_can_use_is_refused_by_its_key(key: str, value: object, must: str) -> None:
    with pytest.raises(FibldmError, match=f"^{key} must be {must}.*; got "):
        check_values({key: value})


def test_values_that_are_evaluated_or_fit_are_let_through() -> None:
    check_values({"patch": "@window", "size": ["@edge", 64, 1], "learning_rate": "$1e-5 * @batch_size", "seed": 0})
    check_values({"spacing": (1, 1.5, 2), "subset": 1.0, "restart": False, "mine": None, "epochs": 0})


def test_all_wrong_values_are_told_at_once() -> None:
    with pytest.raises(FibldmError, match="spacing must(.|\n)*learning_rate must"):
        check_values({"learning_rate": -1, "spacing": [0, 1, 1]})


def test_files_of_the_work_folder_that_are_gone_are_named_before_anything_is_read(tmp_path: Path) -> None:
    entries = [{"image": f"images/c{number}.nii.gz", "label": "labels/c.nii.gz"} for number in range(5)]
    write_json(tmp_path / "datalist.json", {"training": entries, "validation": [], "test": entries[:1]})
    for name in ("images/c4.nii.gz", "labels/c.nii.gz"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    with pytest.raises(FibldmError, match="images/c0.nii.gz, .*images/c1.nii.gz, .*c2.nii.gz and 1 more is not;"):
        load_datalist(tmp_path, "training")
    assert len(read_datalist(tmp_path)["training"]) == 5


@pytest.mark.parametrize("text", ["false", "no", "off"])
def test_a_switch_that_came_as_a_text_is_not_taken_for_on(text: str, tmp_path: Path) -> None:
    """MONAI's command makes texts of them, and every text counts as true."""
    for refused in (
        lambda: check_values({"restart": text}),
        lambda: Synthesizer.from_bundle(tmp_path, trust=text),  # type: ignore[arg-type]
        lambda: synthesize_files(None, [], tmp_path, unconditional=text),  # type: ignore[arg-type]
        lambda: evaluate(["realism"], trust=text, run_dir=tmp_path, work=tmp_path),  # type: ignore[arg-type]
    ):
        with pytest.raises(FibldmError, match=rf"must be true or false; got '{text}'; .*takes True and False"):
            refused()
