"""Intensity: fixed window or percentiles to [-1, 1] and back."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.data import MetaTensor

from fibldm.errors import FibldmError
from fibldm.files import write_json
from fibldm.volumes.intensity import Intensity, NormaliseIntensityd, load_intensity, percentile_range

CT = Intensity("window", low=-1000, high=600)
MR = Intensity("percentile", lower=0.5, upper=99.5, output_low=12.5, output_high=884.0)
TWO = Intensity("percentile", lower=0.5, upper=99.5, output_low=(12.5, -3.0), output_high=(884.0, 7.0))


@given(st.lists(st.integers(-1000, 600), min_size=1))
def test_window_round_trip_is_exact_in_whole_hu_a6(values: list[int]) -> None:
    hu = np.array(values, dtype=np.int16)
    tensor = CT.normalise(hu)
    assert tensor.dtype == np.float32
    assert tensor.min() >= -1 and tensor.max() <= 1
    written = CT.to_disk(tensor)
    assert written.dtype == np.int16
    np.testing.assert_array_equal(written, hu)


def test_window_is_linear_inside_and_clipped_outside() -> None:
    hu = np.array([-3000, -1000, -600, -200, 600, 3000])
    np.testing.assert_array_equal(CT.normalise(hu), np.float32([-1, -1, -0.5, 0, 1, 1]))


def test_window_of_a_constant_crop_does_not_depend_on_the_crop() -> None:
    np.testing.assert_array_equal(CT.normalise(np.full((2, 2, 2), -200.0)), 0)


def test_restore_clips_the_overshoot_of_a_decoder() -> None:
    np.testing.assert_allclose(CT.restore(torch.tensor([-1.2, 0.0, 1.3])), [-1000, -200, 600])
    np.testing.assert_allclose(MR.restore(np.float32([-1, 0, 1.1])), [12.5, 448.25, 884.0])
    assert MR.to_disk(torch.zeros(2)).dtype == np.float32


def test_percentiles_are_those_of_the_volume_on_the_way_in() -> None:
    volume = np.arange(1001, dtype=np.float64).reshape(7, 11, 13)
    tensor = MR.normalise(volume)
    np.testing.assert_allclose(tensor.ravel()[[0, 5, 500, 995, 1000]], [-1, -1, 0, 1, 1], atol=1e-6)
    np.testing.assert_allclose(MR.normalise(volume * 1700 + 3), tensor, atol=1e-5)


def test_each_channel_has_its_own_percentiles_and_its_own_range() -> None:
    first = np.arange(1001, dtype=np.float64).reshape(7, 11, 13)
    second = np.square(first[::-1]) - 40
    tensor = TWO.normalise(np.stack([first, second]))
    assert tensor.dtype == np.float32
    for channel, alone in zip(tensor, (first, second), strict=True):
        np.testing.assert_allclose(channel, MR.normalise(alone), atol=1e-6)
    ends = np.stack([np.full((2, 3, 4), -1.2), np.linspace(-1, 1, 24).reshape(2, 3, 4)])
    restored = TWO.to_disk(ends)
    assert restored.dtype == np.float32
    np.testing.assert_array_equal(restored[0], 12.5)
    np.testing.assert_allclose(restored[1], np.linspace(-3, 7, 24).reshape(2, 3, 4), atol=1e-5)
    np.testing.assert_allclose(TWO.restore(torch.from_numpy(ends)), restored)
    np.testing.assert_array_equal(CT.normalise(np.stack([first, second])), [CT.normalise(first), CT.normalise(second)])


def test_volumes_of_other_channels_than_the_rule_are_refused() -> None:
    volume = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    for intensity, wrong, channels in ((TWO, volume[:1], 2), (TWO, volume[0], 2), (MR, volume, 1)):
        message = (
            rf"as many channels as output_low and output_high of its intensity, {channels}, as \(C, X, Y, Z\); its"
        )
        for refuse in (intensity.normalise, intensity.restore):
            with pytest.raises(FibldmError, match=message):
                refuse(wrong)
    volume[1] = 7
    with pytest.raises(FibldmError, match=r"percentiles 0.5 and 99.5 of channel 2 must differ; both are 7"):
        TWO.normalise(volume)


def test_one_channel_may_have_an_axis_of_its_own() -> None:
    volume = np.random.default_rng(0).normal(size=(3, 4, 5))
    np.testing.assert_array_equal(MR.normalise(volume[None])[0], MR.normalise(volume))


@pytest.mark.parametrize("intensity", [CT, MR])
def test_arrays_and_tensors_agree_and_the_input_is_not_changed(intensity: Intensity) -> None:
    volume = np.random.default_rng(0).normal(-200, 500, (5, 6, 7)).astype(np.float32)
    kept = volume.copy()
    tensor = intensity.normalise(torch.from_numpy(volume))
    assert tensor.dtype == torch.float32
    np.testing.assert_allclose(tensor.numpy(), intensity.normalise(volume), atol=1e-6)
    intensity.restore(volume)
    np.testing.assert_array_equal(volume, kept)


@pytest.mark.parametrize("intensity", [CT, TWO])
def test_transform_keeps_the_affine_and_leaves_other_keys_alone(intensity: Intensity) -> None:
    affine = torch.tensor([[0.0, 2.0, 0, 5], [-1.5, 0, 0, -7], [0, 0, 3.0, 11], [0, 0, 0, 1]], dtype=torch.float64)
    image = MetaTensor(torch.linspace(-900, 500, 48).reshape(2, 2, 3, 4), affine=affine)
    data = {"image": image, "label": torch.ones(1, 2, 3, 4)}
    before = image.clone()
    result = NormaliseIntensityd("image", intensity)(data)
    assert isinstance(result["image"], MetaTensor)
    torch.testing.assert_close(result["image"].affine, affine)
    assert float(result["image"].min()) >= -1 and float(result["image"].max()) <= 1
    assert result["label"] is data["label"]
    assert data["image"] is image and torch.equal(image, before)


@pytest.mark.parametrize("intensity", [CT, MR, TWO])
def test_stored_and_read_back(intensity: Intensity, tmp_path) -> None:
    write_json(tmp_path / "intensity.json", intensity.to_dict())
    assert load_intensity(tmp_path / "intensity.json") == intensity
    assert load_intensity(str(tmp_path / "intensity.json")) == intensity


def test_what_is_stored() -> None:
    assert CT.to_dict() == {"kind": "window", "low": -1000, "high": 600, "units": "HU"}
    assert MR.to_dict() == {
        "kind": "percentile",
        "lower": 0.5,
        "upper": 99.5,
        "output_low": 12.5,
        "output_high": 884.0,
        "units": "arbitrary",
    }
    assert TWO.to_dict() | {"output_low": [12.5, -3.0], "output_high": [884.0, 7.0]} == TWO.to_dict()


def test_units_and_output() -> None:
    assert (CT.units, CT.output_dtype, CT.output_range) == ("HU", np.int16, (-1000, 600))
    assert (MR.units, MR.output_dtype, MR.output_range) == ("arbitrary", np.float32, (12.5, 884.0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "minmax"}, r"intensity kind must be one of window, suv, percentile, range; got 'minmax'"),
        ({}, r"intensity kind must be one of window, suv, percentile, range; got None"),
        ({"kind": "window", "low": -1000}, r"must give numbers for low, high; high came as None"),
        ({"kind": "window", "low": 5, "high": 5}, r"window in HU must be finite and increasing .* got 5 and 5"),
        ({"kind": "window", "low": -1000, "high": 40000}, r"within \[-32768, 32767\]; got -1000 and 40000"),
        (
            {"kind": "percentile", "lower": [1], "upper": 99, "output_low": [0, "1"], "output_high": [1, 2]},
            r"must give numbers for lower, upper, .*; lower, output_low came as \[1\], \[0, '1'\]",
        ),
        *(
            (
                {"kind": "percentile", "lower": 1, "upper": 99, "output_low": low, "output_high": high},
                r"output_low and output_high must be two numbers, or one of both for each of several channels; got",
            )
            for low, high in (([0, 1], [2]), ([0], [2]), ([0, 1], 2), ([], []))
        ),
        (
            {"kind": "percentile", "lower": 1, "upper": 99, "output_low": [0, 5], "output_high": [1, 5]},
            r"output_low and output_high must be finite and increasing; got 5 and 5",
        ),
        (
            {"kind": "percentile", "lower": -1, "upper": 99, "output_low": 0, "output_high": 1},
            r"percentiles must be finite and increasing within \[0, 100\]; got -1 and 99",
        ),
        (
            {"kind": "percentile", "lower": 1, "upper": 99, "output_low": 3, "output_high": float("nan")},
            r"output_low and output_high must be finite and increasing; got 3 and nan",
        ),
    ],
)
def test_wrong_values_are_refused(values: dict, message: str) -> None:
    with pytest.raises(FibldmError, match=message):
        Intensity.from_dict(values)


def test_percentile_kind_without_a_recorded_range_is_refused() -> None:
    with pytest.raises(FibldmError, match="output_low and output_high must be finite and increasing; got 0 and 0"):
        Intensity("percentile")


def test_constant_and_non_finite_volumes_are_refused() -> None:
    with pytest.raises(FibldmError, match=r"percentiles 0.5 and 99.5 of a volume must differ; both are 7; leave out"):
        MR.normalise(torch.full((3, 3, 3), 7.0))
    with pytest.raises(FibldmError, match="a volume to normalise must be finite; 1 voxels are NaN or infinite"):
        CT.normalise(np.array([0.0, np.nan, 2.0]))
    with pytest.raises(FibldmError, match="a volume to restore must be finite; 2 voxels"):
        MR.restore(torch.tensor([0.0, torch.inf, torch.nan]))
    with pytest.raises(FibldmError, match="must be finite; 1 voxels"):
        MR.normalise(np.array([0.0, 1e300]))


def test_percentile_range_takes_tensors_and_arrays() -> None:
    assert percentile_range(torch.arange(101.0), 10, 90) == percentile_range(np.arange(101.0), 10, 90) == (10.0, 90.0)


def test_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(FibldmError, match="intensity.json must exist"):
        load_intensity(tmp_path / "intensity.json")


def test_a_declared_range_is_exact_inside_and_comes_back() -> None:
    """Whatever is neither CT nor MR, of any number of channels."""
    intensity = Intensity("range", low=-2.5, high=7.5)
    volume = np.linspace(-2.5, 7.5, 24, dtype=np.float32).reshape(2, 3, 4, 1)
    tensor = intensity.normalise(volume)
    assert tensor.min() == -1 and tensor.max() == 1
    np.testing.assert_allclose(intensity.to_disk(tensor), volume, atol=1e-6)
    assert intensity.to_disk(tensor).dtype == np.float32
    assert intensity.normalise(np.array([-9.0, 2.5, 9.0])).tolist() == [-1, 0, 1]
    assert Intensity.from_dict(intensity.to_dict()) == intensity
    with pytest.raises(FibldmError, match="a range must be finite and increasing; got 1 and 1"):
        Intensity("range", low=1, high=1)
