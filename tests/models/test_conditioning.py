"""Masks as conditions: fractions, features of shape, dropout, and what a network sees of them."""

import math

import pytest
import torch
from monai.transforms import LabelToContour
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from fibldm import UNKNOWN_LABEL
from fibldm.errors import FibldmError
from fibldm.models.conditions.mask import MaskEncoding
from fibldm.models.conditions.mask_encoders import AsEncoded, FeatureOnly, LabelValue, MaskConvolutions, MaskRescaler
from fibldm.models.conditions.mask_features import contour, signed_distance

LABELS = (0, 1, 4, 7)


def mask_of(labels: tuple[int, ...], seed: int = 0) -> Tensor:
    drawn = torch.randint(len(labels) + 1, (2, 1, 8, 4, 12), generator=torch.Generator().manual_seed(seed))
    return torch.tensor([*labels, UNKNOWN_LABEL])[drawn].to(torch.uint8)


@pytest.mark.parametrize("count", [1, 3, 182])
def test_fractions_keep_the_volume_of_every_label(count: int) -> None:
    encoding, mask = MaskEncoding(tuple(range(count)), 4), mask_of(tuple(range(count)))
    before = mask.clone()
    fractions = encoding.encode(mask)
    assert fractions.shape == (2, encoding.channels, 2, 1, 3)
    assert encoding.channels == count + 1
    assert torch.equal(fractions.sum(1), torch.ones(2, 2, 1, 3))
    for channel, label in enumerate([*range(count), UNKNOWN_LABEL]):
        assert float(fractions[:, channel].sum()) * 4**3 == float((mask == label).sum())
    assert torch.equal(mask, before)


def test_a_thin_label_survives() -> None:
    mask = torch.zeros(1, 1, 8, 8, 8, dtype=torch.uint8)
    mask[0, 0, 3, 5, :] = 7
    fractions = MaskEncoding(LABELS, 4).encode(mask)
    assert fractions[0, 3, 0, 1].tolist() == [4 / 64, 4 / 64]
    assert float(fractions[0, 3].sum()) == 8 / 64


def test_unknown_voxels_go_to_the_last_channel() -> None:
    mask = torch.full((1, 1, 4, 4, 4), UNKNOWN_LABEL, dtype=torch.uint8)
    encoding = MaskEncoding(LABELS, 4)
    assert encoding.encode(mask).flatten().tolist() == [0, 0, 0, 0, 1]
    assert torch.equal(encoding.encode(mask), encoding.null(encoding.encode(torch.zeros_like(mask))))


@pytest.mark.parametrize("wrong", [3, 4.5])
def test_a_label_that_the_data_do_not_have_is_refused(wrong: float) -> None:
    mask = torch.zeros(1, 1, 4, 4, 4)
    mask[0, 0, 1, 2, 3] = wrong
    with pytest.raises(FibldmError, match=rf"\[0, 1, 4, 7\] or 255 \(unknown\); got also \[{wrong:.1f}\]"):
        MaskEncoding(LABELS, 4).encode(mask)


def test_a_mask_that_does_not_fit_is_refused() -> None:
    with pytest.raises(FibldmError, match="must be divisible by 4"):
        MaskEncoding(LABELS, 4).encode(torch.zeros(1, 1, 4, 4, 6))


def test_dropping_a_label_moves_it_and_the_background_to_unknown_and_nothing_else() -> None:
    encoding = MaskEncoding(LABELS, 4)
    fractions = encoding.encode(mask_of(LABELS))
    before = fractions.clone()
    dropped = torch.tensor([[False, False, True, False], [False, False, False, False]])
    result = encoding.drop(fractions, dropped)
    assert torch.equal(fractions, before)
    assert torch.equal(result[1], before[1])
    assert torch.equal(result[0, [1, 3]], before[0, [1, 3]])
    assert torch.equal(result[0, [0, 2]], torch.zeros(2, 2, 1, 3))
    assert torch.equal(result[0, 4], before[0, 4] + before[0, 0] + before[0, 2])


@pytest.mark.parametrize("labels", [(0,), (0, 1), LABELS])
def test_the_null_of_guidance_is_the_null_of_dropout(labels: tuple[int, ...]) -> None:
    encoding = MaskEncoding(labels, 4)
    fractions = encoding.encode(mask_of(labels))
    all_dropped = encoding.drop(fractions, torch.ones(2, len(labels), dtype=torch.bool))
    assert torch.equal(all_dropped, encoding.null(fractions))


@pytest.mark.parametrize("detail", [1, 2, 4])
def test_mask_detail_says_where_in_a_cell_a_label_lies(detail):
    """The parts of a cell average to its fraction; one voxel fills one part, in the order of the axes."""
    labels = torch.randint(0, 3, (2, 1, 8, 12, 4))
    coarse, fine = MaskEncoding((0, 1, 2), 4).encode(labels), MaskEncoding((0, 1, 2), 4, detail).encode(labels)
    assert fine.shape == (2, 4 * detail**3, 2, 3, 1)
    torch.testing.assert_close(fine.unflatten(1, (4, -1)).mean(dim=2), coarse)
    voxel = torch.zeros(1, 1, 4, 4, 4, dtype=torch.long)
    voxel[0, 0, 3, 0, 1] = 1
    part = (3 * detail // 4) * detail**2 + (0 * detail // 4) * detail + 1 * detail // 4
    assert MaskEncoding((0, 1), 4, detail).encode(voxel)[0, detail**3 :][: detail**3].flatten().nonzero().item() == part


def test_dropping_every_label_of_a_detailed_mask_is_its_null():
    """Dropout and guidance share the null, whatever the detail."""
    mask = MaskEncoding((0, 1, 2), 4, 2)
    encoded = mask.encode(torch.randint(0, 3, (2, 1, 8, 8, 8)))
    torch.testing.assert_close(mask.drop(encoded, torch.ones(2, 3, dtype=torch.bool)), mask.null(encoded))
    with pytest.raises(FibldmError, match="mask detail must divide the compression 4; got 3"):
        MaskEncoding((0, 1), 4, 3)


# --- features and resizing


def box() -> Tensor:
    """Label 1, asymmetric and off centre, of 5 x 3 x 7 voxels."""
    labels = torch.zeros(1, 1, 16, 8, 12, dtype=torch.uint8)
    labels[0, 0, 4:9, 2:5, 1:8] = 1
    return labels


def test_nearest_asks_the_voxel_in_the_middle_of_a_cell() -> None:
    labels = mask_of(LABELS)
    encoded = MaskEncoding(LABELS, 4, resize="nearest").encode(labels)
    for channel, label in enumerate([*LABELS, UNKNOWN_LABEL]):
        assert torch.equal(encoded[:, channel], (labels[:, 0, 2::4, 2::4, 2::4] == label).float())
    thin = torch.zeros(1, 1, 8, 8, 8, dtype=torch.uint8)
    thin[..., 1] = 7
    assert float(MaskEncoding(LABELS, 4, resize="nearest").encode(thin)[0, 3].sum()) == 0
    assert float(MaskEncoding(LABELS, 4).encode(thin)[0, 3].sum()) == 1.0


def test_signed_distances_are_millimetres_to_the_border() -> None:
    """Along one axis by hand, everywhere against scipy on the upsampled volume's spacing."""
    shape = box()[:, 0][:, None] == 1
    distance = signed_distance(shape, (1.0, 2.0, 3.0), reach=100.0)[0, 0] * 100
    # one voxel outside along x is half a voxel of the finest axis from the border, further out a millimetre each
    assert distance[9:13, 3, 4].tolist() == pytest.approx([-0.5, -1.5, -2.5, -3.5])
    assert distance[6, 3, 4].item() == pytest.approx(2.5)
    inside = distance_transform_edt(shape[0, 0].numpy(), sampling=(1, 2, 3))
    torch.testing.assert_close(distance[4:9, 2:5, 1:8].double(), torch.from_numpy(inside)[4:9, 2:5, 1:8] - 0.5)
    assert torch.equal(signed_distance(shape, (1, 2, 3), reach=1.0).sign(), torch.where(shape, 1.0, -1.0))
    nothing = torch.zeros(1, 2, 3, 3, 3, dtype=torch.bool)
    nothing[0, 1] = True
    made = signed_distance(nothing, (1, 1, 1), reach=5.0)
    assert bool((made[0, 0] == -1).all()) and bool((made[0, 1] == 1).all())


def test_a_contour_is_that_of_monai_but_for_the_edges_of_the_volume() -> None:
    shape = box() == 1
    ours = contour(shape)
    assert ours.sum() == 5 * 3 * 7 - 3 * 1 * 5
    theirs = LabelToContour()(shape[0].float())
    # MONAI's Laplacian also takes voxels that touch the outside by an edge or a corner, which of a box are its faces
    assert torch.equal(ours[0], (theirs > 0).float())
    filled = torch.ones(1, 1, 4, 4, 1, dtype=torch.bool)
    assert float(contour(filled).sum()) == 0
    filled[..., 0, :, :] = False
    assert contour(filled)[0, 0, :, :, 0].sum(dim=1).tolist() == [0, 0, 0, 0] or float(contour(filled).sum()) == 4


@pytest.mark.parametrize("feature", ["signed_distance", "contour"])
@pytest.mark.parametrize("detail", [1, 2])
def test_dropping_a_label_leaves_no_trace_of_its_shape(feature: str, detail: int) -> None:
    """A mask whose label was dropped is the mask in which nobody drew it."""
    mask = MaskEncoding(LABELS, 4, detail, feature=feature, spacing=(1.0, 2.0, 3.0))  # type: ignore[arg-type]
    labels = box()
    labels[0, 0, 10:14, 1:7, 3:11] = 4
    encoded = mask.encode(labels)
    assert encoded.shape == (1, mask.channels, 4, 2, 3) and mask.channels == 9 * detail**3
    dropped = mask.drop(encoded, torch.tensor([[False, False, True, False]]))
    undrawn = torch.where((labels == 4) | (labels == 0), UNKNOWN_LABEL, labels)
    torch.testing.assert_close(dropped, mask.encode(undrawn))
    everything = torch.full_like(labels, UNKNOWN_LABEL)
    assert torch.equal(mask.null(encoded), mask.encode(everything))
    torch.testing.assert_close(mask.shares(encoded), MaskEncoding(LABELS, 4).encode(labels))


def dropped_by_its_formula(mask: MaskEncoding, encoded: Tensor, dropped: Tensor) -> Tensor:
    """Channel by channel, sample by sample: unknown is whatever the labels that are left do not fill."""
    made, parts = encoded.clone(), math.prod(mask.pieces)
    for sample in range(len(encoded)):
        gone = [bool(label) for label in dropped[sample]]
        gone[0] = any(gone)
        for part in range(parts):
            left = torch.ones_like(encoded[sample, 0])
            for label, is_gone in enumerate(gone):
                channel = label * parts + part
                made[sample, channel] = 0 if is_gone else encoded[sample, channel]
                left = left - made[sample, channel]
                if is_gone and mask.feature is not None:
                    made[sample, mask.known_channels + channel] = -1 if mask.feature == "signed_distance" else 0
            made[sample, len(gone) * parts + part] = left
    return made


@pytest.mark.parametrize("feature", [None, "signed_distance", "contour"])
@pytest.mark.parametrize(("compression", "detail"), [(4, 1), (4, 2), ((4, 4, 1), 2), (3, 3), (6, 2)], ids=str)
def test_dropping_labels_is_its_formula(compression: object, detail: int, feature: object) -> None:
    """Exactly, where fractions are sums of powers of 2, as of 8 voxels; else but for the rounding of sums."""
    mask = MaskEncoding(LABELS, compression, detail, feature=feature)  # type: ignore[arg-type]
    size = [2 * factor for factor in mask.factors]
    drawn = torch.Generator().manual_seed(1)
    labels = torch.tensor([*LABELS, UNKNOWN_LABEL])[torch.randint(5, (16, 1, *size), generator=drawn)]
    encoded = mask.encode(labels)
    dropped = torch.rand(16, len(LABELS), generator=drawn) < 0.3
    dropped[0], dropped[1] = True, False
    before = encoded.clone()
    made, expected = mask.drop(encoded, dropped), dropped_by_its_formula(mask, encoded, dropped)
    assert torch.equal(encoded, before)
    exact = compression not in (3, 6)
    torch.testing.assert_close(made, expected, rtol=0, atol=0 if exact else 1e-6)
    assert mask.drop_(encoded, dropped) is encoded
    assert torch.equal(encoded, made)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"resize": "linear"}, "mask resize must be one of fraction, nearest; got 'linear'"),
        ({"feature": "edges"}, "mask feature must be one of signed_distance, contour; got 'edges'"),
    ],
)
def test_unknown_choices_are_refused(choice: dict[str, str], message: str) -> None:
    with pytest.raises(FibldmError, match=message):
        MaskEncoding(LABELS, 4, **choice)  # type: ignore[arg-type]


# --- what a network sees


def test_the_mask_as_encoded_or_as_one_grey_value() -> None:
    """Values are the labels' places in their order; unknown has a channel of its own."""
    mask, labels = MaskEncoding(LABELS, 4), torch.zeros(1, 1, 8, 8, 8, dtype=torch.uint8)
    labels[..., :4, :, :] = 4
    labels[..., 4:, :2, :] = 7
    labels[..., 4:, 4:, :] = UNKNOWN_LABEL
    encoded = mask.encode(labels)
    assert AsEncoded(mask)(encoded) is encoded
    grey = LabelValue(mask)(encoded)
    assert grey.shape[1] == LabelValue(mask).channels == 2
    assert grey[0, 0, :, :, 0].tolist() == pytest.approx(torch.tensor([[2 / 3, 2 / 3], [0.5, 0.0]]))
    assert grey[0, 1, :, :, 0].tolist() == [[0, 0], [0, 1]]


def test_the_feature_alone_hides_what_the_labels_fill() -> None:
    mask = MaskEncoding((0, 1), 4, feature="contour")
    solid, hollow = box(), box()
    hollow[0, 0, 5:8, 3, 2:7] = 0  # the inside of label 1
    seen = [FeatureOnly(mask)(mask.encode(labels)) for labels in (solid, hollow)]
    assert seen[0].shape[1] == FeatureOnly(mask).channels == 3
    outer = contour(solid == 1)
    torch.testing.assert_close(seen[0][:, 2], torch.nn.functional.avg_pool3d(outer, 4)[:, 0])
    with pytest.raises(FibldmError, match="FeatureOnly needs a mask with a feature"):
        FeatureOnly(MaskEncoding((0, 1), 4))


def test_the_rescaler_is_a_mixture_of_every_cell_and_learns() -> None:
    mask = MaskEncoding(tuple(range(182)), 4)
    encoded = mask.encode(torch.arange(182)[torch.randint(182, (1, 1, 8, 4, 12))])
    rescaler = MaskRescaler(mask, 3)
    made = rescaler(encoded)
    by_hand = torch.einsum("oi,bixyz->boxyz", rescaler.mix.weight[:, :, 0, 0, 0], encoded)
    torch.testing.assert_close(made, by_hand + rescaler.mix.bias.view(1, 3, 1, 1, 1))
    made.square().sum().backward()
    assert rescaler.mix.weight.grad is not None and float(rescaler.mix.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("compression", [4, (4, 4, 2), (16, 16, 1)], ids=str)
def test_convolutions_see_the_mask_at_its_full_size(compression: object) -> None:
    """A shift of one voxel changes the condition; the parts of a cell are laid out as the voxels they are."""
    detail = 2 if compression == (4, 4, 2) else math.lcm(*(compression if isinstance(compression, tuple) else (4,)))
    mask = MaskEncoding((0, 1), compression, detail)  # type: ignore[arg-type]
    size = [2 * factor for factor in mask.factors]
    labels = (torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(0)) < 0.3).long()
    network = MaskConvolutions(mask, 5, hidden=4)
    seen: list[Tensor] = []
    network.layers.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    made = network(mask.encode(labels))
    assert made.shape == (2, 5, *(2 for _ in size))
    steps = [factor // part for factor, part in zip(mask.factors, mask.pieces, strict=True)]
    whole = torch.nn.functional.avg_pool3d((labels == 1).float(), steps)
    torch.testing.assert_close(seen[0][:, 1:2], whole)
    with pytest.raises(FibldmError, match="a mask_detail that is a power of 2 and no mask_feature; got 3"):
        MaskConvolutions(MaskEncoding((0, 1), 3, 3), 5)


def test_labels_to_keep_must_exist() -> None:
    mask = MaskEncoding(LABELS, 4)
    assert mask.all_but([4]).tolist() == [[False, True, False, True]]
    for wrong in ([], [4, 5]):
        with pytest.raises(FibldmError, match=r"labels must be some of \[0, 1, 4, 7\]"):
            mask.all_but(wrong)
