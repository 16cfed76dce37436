# SPDX-License-Identifier: Apache-2.0
"""Owns activations with a scale for each block of a tensor, one for each channel, say: their ranges and their rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_quant.config import ConfigError
from lightning_quant.quantizers import ActivationQuantizer, BlockGrid, block_range, on_host


class BlockQuantizer(ActivationQuantizer):
    """An activation with a scale for each block of its dimensions: one for each channel, say.

    The range is a pair of float32 tensors on the device of the activation, shape (dimension / block) along every dimension;
    that shape belongs to the layer, so a batch that would need another one is an error.
    """

    def observe(self, x: Tensor) -> None:
        """Move the ranges by one batch; a block with NaN or infinity is left out."""
        x = x.detach()
        if x.numel() == 0:
            return
        self._count()
        low, high = (side.float() for side in block_range(x, self._checked_kernel(x)))
        if self.noted is not None:
            self._note(low, high)
        self._observe_device(low, high)

    def _observe_device(self, low: Tensor, high: Tensor) -> None:
        if on_host(low) and not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
            self._warn()
            return
        super()._observe_device(low, high)

    def _kernel(self, x: Tensor) -> tuple[int, ...]:
        kernel = self.spec.kernel(x.dim())
        if len(kernel) != x.dim() or any(block > 0 and size % block for block, size in zip(kernel, x.shape, strict=True)):
            raise self._misfit(x, "which these blocks do not divide")
        return kernel

    def _checked_kernel(self, x: Tensor) -> tuple[int, ...]:
        """The size of a block along each dimension; a ConfigError unless x has one block for each range."""
        kernel = self._kernel(x)
        blocks = tuple(1 if block == -1 else size // block for block, size in zip(kernel, x.shape, strict=True))
        if isinstance(self.low, Tensor) and tuple(self.low.shape) != blocks:
            raise self._misfit(x, f"its ranges have the shape {tuple(self.low.shape)}, this batch needs {blocks}")
        return kernel

    def accepts(self, state: dict[str, Any]) -> bool:
        """Whether a saved range has a value for each block."""
        sides = [side is None or (isinstance(side, Tensor) and side.dim() > 0) for side in state.values()]
        return set(state) - {"young"} == {"low", "high"} and all(sides)

    def _misfit(self, x: Tensor, why: str) -> ConfigError:
        return ConfigError(
            f"{self.name}: granularity {self.spec.granularity} met a tensor of shape {tuple(x.shape)}: {why}. A scale for each "
            "block needs dimensions of one size; use 'per_tensor' or -1 for those that change."
        )

    def grid(self) -> BlockGrid:
        """Scales and zero points, each value repeated along its block: they broadcast against the activation."""
        assert isinstance(self.low, Tensor), self.name
        scale, zero = self._scale_and_zero(self.low.device)
        return BlockGrid(scale=scale, zero_point=zero, spec=self.spec)

    def _spread(self, values: Tensor) -> Tensor:
        for dim, block in enumerate(self.spec.kernel(values.dim())):
            values = values.repeat_interleave(block, dim) if block > 1 else values
        return values

    def _on_host(self, x: Tensor) -> Tensor:
        return self._on_device(x)

    def _on_device(self, x: Tensor) -> Tensor:
        self._checked_kernel(x)
        return super()._on_device(x)

    def _scale_and_zero(self, device: torch.device) -> tuple[Tensor, Tensor]:
        scale, zero = super()._scale_and_zero(device)
        return self._spread(scale), self._spread(zero)

    def state_dict(self) -> dict[str, Any]:
        """The ranges as tensors on the host, None where there are none."""
        young = {"young": self.young.cpu()} if isinstance(self.young, Tensor) and bool(self.young.any()) else {}
        sides = {"low": self.low, "high": self.high}
        return {**{key: side.cpu() if isinstance(side, Tensor) else None for key, side in sides.items()}, **young}
