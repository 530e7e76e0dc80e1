"""Precision of a forward pass: autocast inside, float32 outside."""

import pytest
import torch
from torch import nn

from fibldm.errors import FibldmError
from fibldm.models.autoencoder import Posterior, Reconstruction
from fibldm.training.inferers import AutocastInferer, fast_bfloat16


class Seen(nn.Module):
    """Remembers the precision that its convolution computed in, and answers as an autoencoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 1, 1)

    def forward(self, volume: torch.Tensor) -> Reconstruction:
        output = self.conv(volume)
        self.dtype = output.dtype
        return Reconstruction(output, Posterior(output, output))


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_autocast_computes_in_the_precision_and_returns_float32(precision, dtype):
    """The parts of a reconstruction come back in float32, in their own types."""
    network = Seen()
    output = AutocastInferer(precision)(torch.zeros(1, 1, 4, 4, 4), network)
    assert network.dtype == dtype
    assert isinstance(output, Reconstruction) and isinstance(output.posterior, Posterior)
    assert output.volume.dtype == output.posterior.std.dtype == torch.float32


def test_auto_is_bfloat16_only_where_that_is_fast():
    """A CPU without matrix units keeps float32."""
    network = Seen()
    AutocastInferer("auto")(torch.zeros(1, 1, 4, 4, 4), network)
    assert network.dtype == (torch.bfloat16 if fast_bfloat16("cpu") else torch.float32)


def test_an_unknown_precision_lists_the_choices():
    with pytest.raises(FibldmError, match="precision must be one of auto, float32, bfloat16, float16; got 'fp8'"):
        AutocastInferer("fp8")  # type: ignore[arg-type]
