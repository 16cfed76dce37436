# SPDX-License-Identifier: Apache-2.0
"""Owns the checks of `settings.py`: which types have a setting, what it says, and which subclasses may use it."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from lightning_quant.settings import registered_base, registered_names, setting_of

WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class Renamed(nn.Conv2d):
    """Keeps the forward of its base."""


class Rescaled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Again(Rescaled):
    """Keeps a forward that is not torch's."""


class Mixed(Renamed, nn.Module):
    extra = 1


def test_registered_names() -> None:
    assert registered_names() == ["Conv1d", "Conv2d", "Conv3d", "Linear"]


@pytest.mark.parametrize("base", WEIGHTED, ids=lambda cls: cls.__name__)
def test_the_bare_defaults_of_every_type(base: type[nn.Module]) -> None:
    activation = {"quant_dtype": "uint8", "quant_scheme": "affine", "granularity": "default"}
    weight = {"quant_dtype": "int8", "quant_scheme": "symmetric", "granularity": "default"}
    setting = setting_of(base)
    assert dict(setting) == {"_input_": activation, "weight": weight, "_output_": activation}
    assert list(setting) == ["_input_", "weight", "_output_"]


@pytest.mark.parametrize(
    ("module_type", "base"),
    [
        *((cls, cls) for cls in WEIGHTED),
        (Renamed, nn.Conv2d),
        (Mixed, nn.Conv2d),
        (Rescaled, None),
        (Again, None),
        (nn.ConvTranspose2d, None),
        (nn.ReLU, None),
        (nn.Module, None),
        (nn.modules.linear.NonDynamicallyQuantizableLinear, nn.Linear),
        (nn.Bilinear, None),
        (nn.LazyLinear, nn.Linear),
    ],
    ids=lambda cls: getattr(cls, "__name__", "none"),
)
def test_a_subclass_uses_the_setting_only_where_it_keeps_the_forward(
    module_type: type[nn.Module], base: type[nn.Module] | None
) -> None:
    assert registered_base(module_type) is base
