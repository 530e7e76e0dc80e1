"""Values from outside are taken as they stand by MONAI's configurations, whatever they look like."""

import shlex
from pathlib import Path
from typing import Any

import pytest
from fire.parser import DefaultParseValue
from monai.bundle import ConfigParser

from fibldm.runs import StageFolder
from fibldm.runs.config_files import shipped
from fibldm.runs.configuration import stage_configuration
from fibldm.runs.options import as_options, parse_overrides
from fibldm.verbatim import as_argument, as_word, verbatim

PATHS = [
    "plain",
    "/data/a b",
    "trial #2",
    "@home",
    "@run_dir",
    "a@b",
    "%50",
    "%/etc/x.json",
    "a::b",
    "@::work",
    "it's #1",
    "back\\slash#",
    "-dash",
    "$HOME",
    "größe#",
    '$__import__("pathlib").Path("evaluated").touch()',
]


@pytest.mark.parametrize("text", PATHS)
def test_a_text_comes_out_of_a_configuration_as_it_went_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    parser = ConfigParser(
        {
            "work": verbatim(text),
            "again": "@work",
            "file": "$@work + '/a'",
            "items": verbatim([{"image": text, "number": 1}]),
        }
    )
    assert parser.get_parsed_content("work") == parser.get_parsed_content("again") == text
    assert parser.get_parsed_content("file") == text + "/a"
    assert parser.get_parsed_content("items") == [{"image": text, "number": 1}]
    assert not Path("evaluated").exists()


@pytest.mark.parametrize("text", ["plain", "/data/a-b_c/1", "2024", "it's"])
def test_a_text_without_meaning_stays_as_it_is(text: str) -> None:
    assert verbatim(text) == text
    assert verbatim(7) == 7


@pytest.mark.parametrize("value", ["plain", "2024", "1e3", "None", "[a]", "a,b", "it's", 3, 1.5, None, True, [1, 2]])
def test_an_argument_comes_to_the_same_by_monais_command_line(value: Any) -> None:
    assert DefaultParseValue(as_argument(value)) == value


@pytest.mark.parametrize("folder", [*PATHS, "2024"])
def test_the_folders_of_a_stage_are_what_was_given_by_both_commands(folder: str) -> None:
    made = stage_configuration(
        "autoencoder", work=Path(folder), run_dir=Path(folder), configs=["data_chest_phantom"], overrides={}
    )
    arguments = shlex.split(made.command)
    options = zip(arguments[6::2], arguments[7::2], strict=True)
    monai = {name.lstrip("-"): DefaultParseValue(value) for name, value in options}
    for parser in (made.parser(), ConfigParser(monai)):
        assert parser.get_parsed_content("work") == parser.get_parsed_content("run_dir") == str(Path(folder))


@pytest.mark.parametrize("folder", [*PATHS, "2024", "[a", "a: b"])
def test_a_path_in_a_printed_command_is_the_file_that_it_names(folder: str) -> None:
    """In --set, by an expression that gives the path; as a word of its own, as it stands."""
    words = shlex.split(as_options({"init_from": verbatim(folder)}))
    parser = ConfigParser(parse_overrides(words[1:]))
    assert words[0] == "--set" and parser.get_parsed_content("init_from") == folder
    (word,) = shlex.split(as_word(folder))
    assert Path(word) == Path(folder) and not word.startswith("-")


def test_only_the_files_and_set_hold_expressions() -> None:
    made = stage_configuration(
        "autoencoder",
        work=Path("$1 + 1"),
        run_dir=Path("r"),
        configs=["data_chest_phantom"],
        overrides={"seed": "$1 + 1"},
    )
    parser = made.parser()
    assert (parser.get_parsed_content("work"), parser.get_parsed_content("seed")) == ("$1 + 1", 2)


def test_a_stage_is_read_back_from_a_folder_with_any_name(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path / "@run #1", "autoencoder")
    stage.begin({"where": "$@run_dir + '/x'", "work": verbatim("@w")}, {})
    assert stage.component("where") == f"{tmp_path}/@run #1/x"
    assert stage.component("work") == "@w"


def test_a_file_of_the_users_may_lie_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path("it's $1 #2.yaml")
    file.write_text("spacing: [1, 1, 1]\nsize: [32, 32, 32]\n")
    made = stage_configuration("latents", work=Path("w"), run_dir=Path("r"), configs=[str(file)], overrides={})
    listed = DefaultParseValue(shlex.split(made.command)[5])
    assert listed == [str(shipped("common")), str(shipped("encode_latents")), str(file)]
