"""First stages: codebook, MAISI, monai-generative, mask-conditioned, anisotropic, in two and three dimensions."""

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import STAGES, kl_numbers, normal, tiny_configuration
from generative.networks.nets import VQVAE as GenerativeVQVAE
from generative.networks.nets import AutoencoderKL as GenerativeAutoencoderKL
from ignite.engine import Engine
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.networks.nets import VQVAE, AutoencoderKL, SPADEAutoencoderKL
from torch import Tensor, nn

from fibldm.errors import FibldmError
from fibldm.files import read_json
from fibldm.models.autoencoder import Autoencoder, FrozenFirstStage, check_divisible
from fibldm.models.conditions.mask import MaskEncoding
from fibldm.models.maisi import MaisiAutoencoder
from fibldm.models.spade_autoencoder import SpadeAutoencoder
from fibldm.models.strides import set_strides, total_stride
from fibldm.models.vector_quantised import VectorQuantisedAutoencoder
from fibldm.runs import StageFolder
from fibldm.runs.config_files import shipped
from fibldm.runs.stages import TABLE
from fibldm.training.handlers import EMA
from fibldm.training.masked_volumes import MaskedVolumePrepareBatch


def kl_network(levels: int = 3, *, spatial_dims: int = 3, channels: int = 1, **changes: object) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**kl_numbers(levels, spatial_dims=spatial_dims, channels=channels), **changes)


def generative_numbers(levels: int = 3, **changes: object) -> dict[str, object]:
    numbers = kl_numbers(levels)
    return {"num_channels": numbers.pop("channels"), **numbers, **changes}


def vq_network(kind: type[nn.Module] = VQVAE, *, spatial_dims: int = 3, codes: int = 16, bands: int = 1) -> nn.Module:
    torch.manual_seed(0)
    width = "channels" if kind is VQVAE else "num_channels"
    return kind(
        spatial_dims=spatial_dims,
        in_channels=bands,
        out_channels=bands,
        num_res_layers=1,
        num_res_channels=(8, 8),
        downsample_parameters=((2, 4, 1, 1),) * 2,
        upsample_parameters=((2, 4, 1, 1, 0),) * 2,
        num_embeddings=codes,
        embedding_dim=3,
        decay=0.9,
        **{width: (8, 8)},
    )


def spade_network() -> SPADEAutoencoderKL:
    torch.manual_seed(0)
    return SPADEAutoencoderKL(label_nc=4, spade_intermediate_channels=4, **kl_numbers(3))


def maisi_network(splits: int = 1, *, axis: int = 0, norm_float16: bool = False) -> AutoencoderKlMaisi:
    torch.manual_seed(0)
    return AutoencoderKlMaisi(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        num_res_blocks=(1, 1, 1),
        num_channels=(8, 8, 8),
        attention_levels=(False,) * 3,
        norm_num_groups=4,
        num_splits=splits,
        dim_split=axis,
        norm_float16=norm_float16,
    )


FIRST_STAGES: dict[str, Callable[[], Autoencoder]] = {
    "kl": lambda: Autoencoder(kl_network()),
    "vq": lambda: VectorQuantisedAutoencoder(vq_network()),
    "vq of monai-generative": lambda: VectorQuantisedAutoencoder(vq_network(GenerativeVQVAE)),
    "vq with quantised latents": lambda: VectorQuantisedAutoencoder(vq_network(), quantised_latents=True),
    "vq behind a wavelet": lambda: VectorQuantisedAutoencoder(vq_network(bands=8), wavelet=True),
    "kl of monai-generative": lambda: Autoencoder(GenerativeAutoencoderKL(**generative_numbers())),
    "maisi": lambda: MaisiAutoencoder(maisi_network()),
    "spade": lambda: SpadeAutoencoder(spade_network()),
}


# --- one interface


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_every_first_stage_has_one_interface(name: str) -> None:
    """Sizes, compression, a posterior, and gradients in every trained weight."""
    stage, volume, mask = FIRST_STAGES[name](), normal(2, 1, 16, 8, 24), torch.rand(2, 4, 16, 8, 24)
    step = 8 if "wavelet" in name else 4
    assert stage.compression == (step,) * 3
    assert stage.latent_channels == 3
    made = stage.train()(volume, mask)
    assert made.volume.shape == volume.shape
    assert made.posterior.mean.shape == made.posterior.std.shape == (2, 3, 16 // step, 8 // step, 24 // step)
    assert (made.quantisation is not None) == ("vq" in name)
    loss = made.volume.square().mean() + made.posterior.std.square().mean()
    (loss if made.quantisation is None else loss + made.quantisation.loss).backward()
    trained = [weight for weight in stage.parameters() if weight.requires_grad]
    assert all(weight.grad is not None and bool(weight.grad.isfinite().all()) for weight in trained)
    assert sum(float(weight.grad.abs().sum()) > 0 for weight in trained) > 0.9 * len(trained)
    frozen = FrozenFirstStage(stage)
    posterior = frozen.encode(volume)
    assert frozen.decode(posterior.mean, mask).shape == volume.shape
    assert (frozen.compression, frozen.latent_channels) == (stage.compression, 3)
    assert frozen.needs_mask == (name == "spade")
    with pytest.raises(FibldmError, match=rf"must be divisible by {step} \(autoencoder compression\)"):
        frozen.encode(normal(1, 1, 16, 8, 18))


@pytest.mark.parametrize("wavelet", [True, False])
@pytest.mark.parametrize("quantised", [True, False])
def test_slices_have_first_stages_too(quantised: bool, wavelet: bool) -> None:
    """Two dimensions and three channels: 4 bands, one voxel along Z, which is neither compressed nor encoded."""
    inputs, step = (12, 8) if wavelet else (3, 4)
    stage: Autoencoder
    if quantised:
        stage = VectorQuantisedAutoencoder(vq_network(spatial_dims=2, bands=inputs), wavelet=wavelet)
    else:
        stage = Autoencoder(kl_network(spatial_dims=2, channels=inputs), wavelet=wavelet, local_norm=True)
    image = normal(2, 3, 16, 24, 1)
    assert stage.compression == (step, step, 1)
    made = stage(image)
    assert made.volume.shape == image.shape
    assert made.posterior.mean.shape == (2, 3, 16 // step, 24 // step, 1)
    frozen = FrozenFirstStage(stage)
    assert frozen.decode(frozen.encode(image).mean).shape == image.shape
    mask = MaskEncoding((0, 1), stage.compression, 2).encode(torch.zeros(2, 1, 16, 24, 1))
    assert mask.shape == (2, 12, 16 // step, 24 // step, 1)
    with pytest.raises(FibldmError, match=r"takes single slices \(X, Y, 1\); got the size \(16, 24, 2\)") as raised:
        stage.encode(image.expand(-1, -1, -1, -1, 2))
    assert "fibldm slices" in str(raised.value.remedy)
    if wavelet:
        assert stage.wavelet is not None
        bands = stage.wavelet(image[..., 0])
        torch.testing.assert_close(stage.wavelet.inverse(bands), image[..., 0])
        torch.testing.assert_close(bands[:, ::4], nn.functional.avg_pool2d(image[..., 0], 2))


# --- codebook


def vector_quantised(**changes: object) -> VectorQuantisedAutoencoder:
    return VectorQuantisedAutoencoder(vq_network(), **changes)


def nearest(stage: VectorQuantisedAutoencoder, latent: Tensor) -> Tensor:
    """The nearest code by the definition, pair by pair."""
    codes = stage.network.quantizer.quantizer.embedding.weight
    flat = latent.movedim(1, -1).flatten(0, -2)
    chosen = (flat[:, None] - codes[None]).square().sum(-1).argmin(1)
    return codes[chosen].view(*latent.movedim(1, -1).shape).movedim(-1, 1)


def started(**changes: object) -> VectorQuantisedAutoencoder:
    """Past its first pass, which fills the codebook."""
    stage = vector_quantised(**changes).train()
    stage(normal(2, 1, 16, 8, 24))
    return stage.eval()


def test_latents_are_taken_before_or_after_the_codebook() -> None:
    """Encoder outputs as in CompVis, or codes as in MONAI's `encode_stage_2_inputs`; both decode alike."""
    before, after = started(), started(quantised_latents=True)
    volume = normal(1, 1, 16, 8, 24, seed=3)
    with torch.no_grad():
        plain, codes = before.encode(volume), after.encode(volume)
        torch.testing.assert_close(plain.mean, before.network.encode(volume))
        torch.testing.assert_close(codes.mean, nearest(after, plain.mean))
        torch.testing.assert_close(codes.mean, after.network.encode_stage_2_inputs(volume))
        assert torch.equal(plain.std, torch.zeros_like(plain.std))
        assert not torch.equal(plain.mean, codes.mean)
        assert torch.equal(before.decode(plain.mean), after.decode(codes.mean))
        torch.testing.assert_close(before(volume).volume, before.decode(plain.mean))


def test_the_codebook_loss_and_the_perplexity_are_those_of_the_definition() -> None:
    """Commitment 0.25 |z - code|^2 and exp of the entropy of the codes' use."""
    stage, volume = started(), normal(2, 1, 16, 8, 24, seed=4)
    with torch.no_grad():
        made = stage(volume)
    codes = nearest(stage, made.posterior.mean)
    assert made.quantisation is not None
    torch.testing.assert_close(made.quantisation.loss, 0.25 * (codes - made.posterior.mean).square().mean())
    _, counts = codes.movedim(1, -1).flatten(0, -2).unique(dim=0, return_counts=True)
    share = counts / counts.sum()
    entropy = float(-(share * share.log()).sum())
    assert float(made.quantisation.perplexity) == pytest.approx(math.exp(entropy), rel=1e-5)
    assert made.quantisation.perplexity > 2


def test_evaluation_and_decoding_leave_the_codebook_alone() -> None:
    stage = started()
    before = copy.deepcopy(stage.state_dict())
    stage(normal(1, 1, 8, 8, 8))
    stage.train().decode(normal(1, 3, 2, 2, 2))
    stage.encode(normal(1, 1, 8, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in stage.state_dict().items())


def is_among(codes: Tensor, vectors: Tensor) -> Tensor:
    return (codes[:, None] == vectors[None]).all(dim=-1).any(dim=1)


def test_the_codebook_starts_with_outputs_of_the_encoder_and_dead_codes_come_back_as_such() -> None:
    """A code that nothing is near takes the place of an encoder output; used codes stay."""
    stage, volume = vector_quantised(), normal(2, 1, 16, 16, 16)
    outputs = stage.eval().network.encode(volume).detach().movedim(1, -1).flatten(0, -2)
    book = stage.network.quantizer.quantizer
    stage._revive(stage.network.encode(volume).detach())
    assert is_among(book.embedding.weight, outputs).all()
    assert len(book.embedding.weight.unique(dim=0)) == 16
    book.embedding.weight[3], book.ema_cluster_size[3] = 1e3, 0.0
    kept = book.embedding.weight.clone()
    stage._revive(stage.network.encode(volume).detach())
    assert [int(row) for row in (kept != book.embedding.weight).any(dim=1).nonzero()] == [3]
    assert is_among(book.embedding.weight[3:4], outputs).all()
    torch.testing.assert_close(book.ema_w[3], book.embedding.weight[3] * book.ema_cluster_size[3])
    assert float(book.ema_cluster_size[3]) == 2 * 4**3 / 16


def test_without_revival_codes_die_and_with_it_they_are_used() -> None:
    """On the same data, training lowers the loss and more codes are in use at the end."""
    volume = normal(4, 1, 8, 8, 8).cumsum(2).cumsum(3).cumsum(4).tanh()

    def train(revive_below: float) -> tuple[float, float, float]:
        stage = vector_quantised(revive_below=revive_below).train()
        optimizer = torch.optim.Adam(stage.parameters(), lr=3e-3)
        losses = []
        for _ in range(60):
            made = stage(volume)
            loss = (made.volume - volume).abs().mean() + made.quantisation.loss  # type: ignore[union-attr]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses[0], losses[-1], float(made.quantisation.perplexity)  # type: ignore[union-attr]

    first, last, perplexity = train(0.1)
    assert last < 0.75 * first
    assert perplexity > 3 > train(0.0)[2]


def test_training_goes_on_exactly_from_a_checkpoint() -> None:
    """Codebook, use and the draw of revived vectors are all in the state; no other random number is asked."""
    volumes = [normal(2, 1, 8, 8, 8, seed=seed) for seed in range(6)]

    def go(stage: VectorQuantisedAutoencoder, seeds: range) -> None:
        stage.train()
        for seed in seeds:
            torch.manual_seed(int(torch.randint(10**6, ())) if seed == 3 else seed)  # of no account
            stage.network.quantizer.quantizer.ema_cluster_size[seed] = 0
            stage(volumes[seed])

    whole, part, other = vector_quantised(), vector_quantised(), vector_quantised()
    go(whole, range(6))
    go(part, range(3))
    other.load_state_dict(part.state_dict())
    go(other, range(3, 6))
    assert int(other.passes) == 6
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in other.state_dict().items())


def test_an_average_of_the_weights_has_the_codebook_of_the_network() -> None:
    """The codebook is no parameter, which an average would leave as it was at the start."""
    stage = vector_quantised().train()
    average = EMA(stage, momentum=0.1)
    assert not any("embedding" in name for name, _ in stage.named_parameters())
    engine = Engine(lambda engine, volume: stage(volume))
    average.attach(engine)
    engine.run([normal(2, 1, 8, 8, 8)], max_epochs=2)
    for name in ("embedding.weight", "ema_w", "ema_cluster_size"):
        key = f"network.quantizer.quantizer.{name}"
        assert torch.equal(average.ema_model.state_dict()[key], stage.state_dict()[key])


def test_half_precision_does_not_round_the_codebook() -> None:
    """The sums over vectors are of float32 although the network computes in bfloat16."""
    stage, volume = started().train(), normal(1, 1, 8, 8, 8, seed=5)
    book = stage.network.quantizer.quantizer
    before, size = book.ema_w.clone(), book.ema_cluster_size.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = stage(volume)
    vectors = made.posterior.mean.movedim(1, -1).flatten(0, -2).double()
    chosen = torch.cdist(vectors, stage_codes_before(before, size)).argmin(1)
    sums = torch.zeros(16, 3, dtype=torch.float64).index_add(0, chosen, vectors)
    torch.testing.assert_close(book.ema_w.double(), 0.9 * before.double() + 0.1 * sums, rtol=1e-5, atol=1e-6)


def stage_codes_before(ema_w: Tensor, size: Tensor) -> Tensor:
    """The codes of the moving sums: with Laplace smoothing, as in van den Oord et al. 2017, appendix A.1."""
    total = size.double().sum()
    smooth = (size.double() + 1e-5) / (total + len(size) * 1e-5) * total
    return ema_w.double() / smooth[:, None]


# --- anisotropic compression and presets


@pytest.mark.parametrize(
    ("strides", "wavelet", "compression"),
    [
        ([[2, 2, 1], [2, 2, 2]], False, (4, 4, 2)),
        ([[1, 2, 2], [1, 1, 2]], False, (1, 2, 4)),
        ([[2, 2, 1], [2, 1, 1]], True, (8, 4, 2)),
    ],
)
def test_the_axes_may_be_compressed_differently(
    strides: list[list[int]], wavelet: bool, compression: tuple[int, ...]
) -> None:
    """Shapes there and back, and the arithmetic of what does not fit, per axis."""
    stage = Autoencoder(kl_network(channels=8 if wavelet else 1), wavelet=wavelet, local_norm=True, strides=strides)
    assert stage.compression == compression
    size = tuple(step * cells for step, cells in zip(compression, (2, 3, 5), strict=True))
    made = stage(normal(1, 1, *size))
    assert made.posterior.mean.shape == (1, 3, 2, 3, 5)
    assert made.volume.shape == (1, 1, *size)
    wrong = (size[0], size[1] + 1, size[2])
    left = f"{wrong[1]} = {wrong[1] // compression[1]} x {compression[1]} + 1"
    with pytest.raises(FibldmError, match=re.escape(f"{wrong} must be divisible by {compression}")) as raised:
        stage.encode(normal(1, 1, *wrong))
    assert left in raised.value.message
    padded = (size[0], size[1] + compression[1], size[2])
    assert raised.value.remedy == f"pad to {padded}, for example with DivisiblePadd(k={compression})"


def test_strides_of_2_are_monais_network_to_the_bit() -> None:
    """The names of the weights stay, so foreign weights fit; an axis of stride 1 is centred as in any convolution."""
    plain, same = kl_network(), kl_network()
    set_strides(same, [[2, 2, 2], [2, 2, 2]])
    assert list(plain.state_dict()) == list(same.state_dict())
    volume = normal(1, 1, 8, 12, 16)
    assert torch.equal(plain.encode(volume)[0], same.encode(volume)[0])
    assert torch.equal(plain.reconstruct(volume), same.reconstruct(volume))


def test_an_axis_that_is_kept_stays_symmetric() -> None:
    """Turned around, an axis without compression gives the latent turned around, if the weights are symmetric."""
    stage = Autoencoder(kl_network(), local_norm=True, strides=[[2, 2, 1], [2, 2, 1]])
    with torch.no_grad():
        for layer in stage.modules():
            if isinstance(layer, nn.Conv3d):
                layer.weight.copy_((layer.weight + layer.weight.flip(4)) / 2)
    volume = normal(1, 1, 8, 8, 7)
    for way in (lambda v: stage.encode(v).mean, lambda v: stage.decode(stage.encode(v).mean)):
        torch.testing.assert_close(way(volume.flip(4)), way(volume).flip(4), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("network", "strides", "message"),
    [
        (lambda: kl_network(), [[2, 2, 1]], r"strides must be 2 lists .* of 3 numbers .*; got \[\[2, 2, 1\]\]"),
        (lambda: kl_network(), [[2, 2], [2, 2]], "2 lists .* of 3 numbers"),
        (lambda: kl_network(), [[2, 2, 3], [2, 2, 2]], r"each 1 or 2; got \[\[2, 2, 3\], \[2, 2, 2\]\]"),
        (lambda: kl_network(use_convtranspose=True), [[2, 2, 1]] * 2, "without use_convtranspose; got monai"),
        (lambda: maisi_network(), [[2, 2, 1]] * 2, "strides per axis need .*; got .*AutoencoderKlMaisi; leave"),
        (lambda: GenerativeAutoencoderKL(**generative_numbers()), [[2, 2, 1]] * 2, "got generative.*AutoencoderKL"),
    ],
)
def test_strides_that_do_not_fit_are_refused(network: object, strides: list[list[int]], message: str) -> None:
    with pytest.raises(FibldmError, match=message):
        Autoencoder(network(), strides=strides)  # type: ignore[operator]


def test_one_divisor_or_one_per_axis() -> None:
    check_divisible((8, 12), 4, "x")
    check_divisible((8, 12, 3), (4, 6, 1), "x")
    with pytest.raises(FibldmError, match=r"\(8, 9, 3\) must be divisible by \(4, 6, 1\) \(x\): .*9 = 1 x 6 \+ 3"):
        check_divisible((8, 9, 3), (4, 6, 1), "x")


@pytest.mark.parametrize(("compression", "detail", "parts"), [((4, 2, 1), 2, (2, 2, 1)), ((2, 4, 2), 2, (2, 2, 2))])
def test_a_mask_is_encoded_at_the_size_of_an_anisotropic_latent(
    compression: tuple[int, ...], detail: int, parts: tuple[int, ...]
) -> None:
    """Fractions of the parts by the definition; axes that are not compressed are not cut."""
    encoding = MaskEncoding((0, 1, 2), list(compression), detail)
    labels = torch.randint(3, (1, 1, 8, 4, 6), generator=torch.Generator().manual_seed(0))
    encoded = encoding.encode(labels)
    cells = tuple(length // step for length, step in zip((8, 4, 6), compression, strict=True))
    assert encoded.shape == (1, 4 * math.prod(parts), *cells)
    x, y, z = (step // part for step, part in zip(compression, parts, strict=True))
    at = [1, 0, min(1, cells[2] - 1)]
    part = [parts[0] - 1, 0, parts[2] - 1]
    begin = [cell * step + p * w for cell, step, p, w in zip(at, compression, part, (x, y, z), strict=True)]
    box = labels[0, 0, begin[0] : begin[0] + x, begin[1] : begin[1] + y, begin[2] : begin[2] + z]
    channel = 1 * math.prod(parts) + (part[0] * parts[1] + part[1]) * parts[2] + part[2]
    assert float(encoded[0, channel, at[0], at[1], at[2]]) == float((box == 1).float().mean())
    everything = torch.ones(1, 3, dtype=torch.bool)
    torch.testing.assert_close(encoding.drop(encoded, everything), encoding.null(encoded))
    with pytest.raises(FibldmError, match=re.escape(f"mask detail must divide the compression {compression}; got 3")):
        MaskEncoding((0, 1), compression, 3)


# --- MAISI


@pytest.mark.parametrize(("splits", "axis", "length"), [(2, 0, 32), (3, 1, 48), (2, 2, 40)])
def test_slabs_of_maisi_give_what_the_whole_gives(splits: int, axis: int, length: int) -> None:
    size = [8, 8, 8]
    size[axis] = length
    whole, slabs = MaisiAutoencoder(maisi_network()).eval(), MaisiAutoencoder(maisi_network(splits, axis=axis)).eval()
    volume = normal(1, 1, *size)
    with torch.no_grad():
        torch.testing.assert_close(slabs.encode(volume).mean, whole.encode(volume).mean)
        latent = whole.encode(volume).mean
        torch.testing.assert_close(slabs.decode(latent), whole.decode(latent))


def test_slabs_of_maisi_that_would_lose_voxels_are_refused() -> None:
    """MONAI's network gives 32 voxels back for 36, and says nothing."""
    network = maisi_network(2).eval()
    with torch.no_grad():
        assert network.reconstruct(normal(1, 1, 36, 8, 8)).shape[2] == 32
    stage = MaisiAutoencoder(network)
    shown = r"\(36, 8, 8\) must be divisible by \(8, 4, 4\) \(autoencoder compression x 2 slabs of MAISI along axis 0\)"
    with pytest.raises(FibldmError, match=shown + ": 36 = 4 x 8 \\+ 4"):
        stage.encode(normal(1, 1, 36, 8, 8))
    with pytest.raises(FibldmError, match=shown):
        stage.decode(normal(1, 3, 9, 2, 2))
    with pytest.raises(FibldmError, match="at least 4 cells of the latent; 2 slabs of 16 voxels hold 2; lower"):
        stage.encode(normal(1, 1, 16, 8, 8))


def test_norms_of_maisi_in_float16_are_refused_on_the_cpu() -> None:
    with pytest.raises(RuntimeError, match="should be the same"):
        maisi_network(norm_float16=True).encode(normal(1, 1, 8, 8, 8))
    with pytest.raises(
        FibldmError, match="norm_float16 must be used on CUDA and under autocast; .* on cpu; set .*false"
    ):
        MaisiAutoencoder(maisi_network(norm_float16=True)).encode(normal(1, 1, 8, 8, 8))


# --- monai-generative


@pytest.mark.parametrize("attention", [False, True])
def test_the_network_of_monai_generative_is_monais_on_equal_weights(attention: bool) -> None:
    """Through MONAI's `load_old_state_dict`, and behind the same wavelet and norms."""
    changes = {"attention_levels": (False, False, attention), "with_encoder_nonlocal_attn": attention}
    old = GenerativeAutoencoderKL(**generative_numbers(**changes, in_channels=8, out_channels=8))
    new = AutoencoderKL(**kl_numbers(3, channels=8, **changes), include_fc=False)
    with torch.no_grad():
        for seed, weight in enumerate(old.parameters()):
            weight.copy_(0.2 * normal(*weight.shape, seed=seed))
    new.load_old_state_dict(old.state_dict())
    one, other = (Autoencoder(network.eval(), wavelet=True, local_norm=True) for network in (old, new))
    volume = normal(1, 1, 16, 8, 16)
    with torch.no_grad():
        for got, wanted in zip(one.encode(volume), other.encode(volume), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        latent = one.encode(volume).mean
        torch.testing.assert_close(one.decode(latent), other.decode(latent), rtol=1e-4, atol=1e-4)


def test_the_vqvae_of_monai_generative_is_monais_on_equal_weights() -> None:
    old, new = VectorQuantisedAutoencoder(vq_network(GenerativeVQVAE)).eval(), vector_quantised().eval()
    new.load_state_dict(old.state_dict())
    volume = normal(1, 1, 8, 8, 16)
    torch.testing.assert_close(old(volume).volume, new(volume).volume)


def test_weights_of_another_network_are_refused() -> None:
    with pytest.raises(RuntimeError, match="Missing key"):
        vector_quantised().load_state_dict(Autoencoder(kl_network()).state_dict())


# --- mask-conditioned


def test_the_decoder_sees_the_mask_and_the_encoder_does_not() -> None:
    stage, labels = SpadeAutoencoder(spade_network()).eval(), torch.zeros(1, 1, 16, 8, 24)
    labels[..., 5:9] = 2
    mask = MaskEncoding((0, 1, 2), compression=1).encode(labels)
    latent = stage.encode(normal(1, 1, 16, 8, 24)).mean
    with torch.no_grad():
        assert not torch.allclose(stage.decode(latent, mask), stage.decode(latent, mask.roll(1, dims=1)))
        torch.testing.assert_close(stage.decode(latent, mask), stage.network.decode(latent, mask))


def test_a_decoder_that_sees_the_mask_needs_it() -> None:
    stage, latent = SpadeAutoencoder(spade_network()), normal(1, 3, 2, 2, 3)
    with pytest.raises(FibldmError, match="decodes with the mask at hand; got a latent alone; give decode the mask"):
        stage(normal(1, 1, 8, 8, 12))
    wanted = r"mask of this latent must have the shape \(1, 4, 8, 8, 12\); it has "
    with pytest.raises(FibldmError, match=wanted + r"\(1, 4, 2, 2, 3\)"):
        stage.decode(latent, torch.rand(1, 4, 2, 2, 3))
    with pytest.raises(FibldmError, match=wanted + r"\(1, 3, 8, 8, 12\)"):
        stage.decode(latent, torch.rand(1, 3, 8, 8, 12))


def test_training_gives_the_mask_beside_the_volume() -> None:
    label = torch.tensor([0, 4, 255, 4]).view(1, 1, 1, 2, 2)
    batch = {"image": normal(1, 1, 1, 2, 2), "valid": torch.ones(1, 1, 1, 2, 2), "label": label}
    batch["seed"] = torch.tensor([5])
    image, target, (mask,), options = MaskedVolumePrepareBatch([0, 4])(batch, "cpu")
    assert torch.equal(image, batch["image"])
    assert torch.equal(target.value, batch["image"])
    assert torch.equal(target.weight, batch["valid"])
    assert mask.flatten(2)[0].tolist() == [[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0]]
    assert options == {"seeds": batch["seed"]}


# --- configurations


@pytest.mark.parametrize("name", ["vq", "maisi", "generative", "spade", "f8", "identity"])
def test_every_first_stage_trains_from_the_same_configuration_and_a_small_file(
    name: str, phantom_work: Path, tiny_data: Path, tmp_path: Path
) -> None:
    tiny_configuration("autoencoder", phantom_work, tmp_path, tiny_data, f"autoencoder_{name}", "tiny").run()
    trained = StageFolder(tmp_path, "autoencoder").trained()
    volume = normal(1, 1, 16, 16, 16)
    mask = torch.rand(1, 8, 16, 16, 16)
    assert trained.decode(trained.encode(volume).mean, mask).shape == volume.shape
    if name == "vq":
        assert int(trained.passes) == 2


def test_a_run_with_anisotropic_latents_goes_all_the_way(phantom_work: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Encode, base network and ControlNet at a latent of 8 x 8 x 16 cells."""
    for stage in STAGES:
        extra = ["autoencoder_anisotropic"] if stage == "autoencoder" else []
        tiny_configuration(stage, phantom_work, tmp_path, tiny_data, *extra, "tiny").run()
    trained = StageFolder(tmp_path, "autoencoder").trained()
    assert trained.decode(trained.encode(normal(1, 1, 16, 16, 16)).mean).shape == (1, 1, 16, 16, 16)
    assert read_json(tmp_path / "latents" / "latents.json")["compression"] == [4, 4, 2]
    assert StageFolder(tmp_path, "controlnet").component("mask").factors == (4, 4, 2)


def test_the_presets_compress_4_and_8_times_with_attention_at_the_smallest_size() -> None:
    """As the shipped files say, without the tiny sizes."""
    from monai.bundle import ConfigParser

    def network(*names: str) -> Autoencoder:
        files = [str(shipped(name)) for name in ("common", *TABLE["autoencoder"].files, *names)]
        parser = ConfigParser(ConfigParser.load_config_files(files))
        parser["image_channels"], parser["spatial_dims"] = 1, 3
        made: Autoencoder = parser.get_parsed_content("network_def")
        return made

    plain, deep = network(), network("autoencoder_f8")
    assert plain.compression == (4, 4, 4)
    assert deep.compression == (8, 8, 8)
    attention = [type(block).__name__ == "SpatialAttentionBlock" for block in deep.network.encoder.blocks]
    halvings = [type(block).__name__ == "AEKLDownsample" for block in deep.network.encoder.blocks]
    assert sum(attention) == 1
    assert attention.index(True) > max(at for at, halving in enumerate(halvings) if halving)
    assert total_stride(deep.network.encoder) == (4, 4, 4)
