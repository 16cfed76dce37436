# SPDX-License-Identifier: Apache-2.0
"""Owns the losses of distillation: how far a student's tensor is from a teacher's; and the projection between their widths.

A loss takes two tensors of equal shape, the number of the dimension that holds features (channels, classes) and a temperature,
and returns a scalar in float32 or wider. Every other dimension is a position; the loss is the mean over positions, so its size
does not depend on the batch, the length of a sequence or the size of a picture.
"""

from __future__ import annotations

import importlib
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quant.config import ConfigError
from lightning_quant.keys import DISTILLATION_METHODS

TEMPERATURE = 2.0
Method = str | Callable[[Tensor, Tensor], Any]


def _rows(x: Tensor, dim: int) -> Tensor:
    """(positions, features) of x."""
    return x.movedim(dim, -1).reshape(-1, x.shape[dim])


def mse(student: Tensor, teacher: Tensor, dim: int, temperature: float) -> Tensor:
    """The mean squared difference (hints: Romero et al. 2015, arXiv 1412.6550, equation 3, without the 1/2)."""
    return F.mse_loss(student, teacher)


def kl(student: Tensor, teacher: Tensor, dim: int, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), the mean over positions.

    T^2 keeps the size of the gradients as T varies (Hinton, Vinyals and Dean 2015, arXiv 1503.02531, section 2).
    """
    p, q = ((_rows(x, dim) / temperature).log_softmax(-1) for x in (teacher, student))
    return F.kl_div(q, p, reduction="batchmean", log_target=True) * temperature**2


def cosine(student: Tensor, teacher: Tensor, dim: int, temperature: float) -> Tensor:
    """1 - the cosine of the angle between the features of a position, the mean over positions; from 0 to 2."""
    return 1 - F.cosine_similarity(student, teacher, dim=dim).mean()


def attention(student: Tensor, teacher: Tensor, dim: int, temperature: float) -> Tensor:
    """The mean squared difference of the attention maps of a sample, each of length 1; widths need not agree.

    A map is the mean square over features (Zagoruyko and Komodakis 2017, arXiv 1612.03928, F_sum^2 in section 3.1). The mean of
    squares is the authors' code; equation 2 has the length of the difference in its place.
    """
    maps = [F.normalize(x.pow(2).mean(dim).flatten(1), dim=1) for x in (student, teacher)]
    return F.mse_loss(maps[0], maps[1])


LOSSES: Mapping[str, Callable[[Tensor, Tensor, int, float], Tensor]] = {
    "mse": mse,
    "kl": kl,
    "cosine": cosine,
    "attention": attention,
}
assert tuple(LOSSES) == DISTILLATION_METHODS
BRIDGED = ("mse", "cosine")  # what a learned projection of the student makes sense for


def imported(path: str, where: str) -> Any:
    """What 'package.module.name' names.

    Raises:
        ConfigError: if there is no such thing.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{where}: {path!r} cannot be imported: {error}. Write 'package.module.name' of what exists."
        ) from error


def loss_named(method: Method, where: str) -> Method:
    """A method that is no path: a word of DISTILLATION_METHODS or a function of (student, teacher).

    Raises:
        ConfigError: for a path that leads to no function.
    """
    if not isinstance(method, str) or method in LOSSES:
        return method
    found = imported(method, where)
    if not callable(found):
        raise ConfigError(f"{where}: {method!r} is a {type(found).__name__}, not a function of (student, teacher).")
    function: Method = found
    return function


def name_of(method: Method) -> str:
    """How a method is shown, and how a config that is plain data names it."""
    if isinstance(method, str):
        return method
    return f"{getattr(method, '__module__', '')}.{getattr(method, '__qualname__', type(method).__qualname__)}"


def plain(config: Any) -> Any:
    """A `distillation` argument as plain data, for checkpoints and loggers: functions by their paths."""
    if isinstance(config, Mapping):
        return {str(key): plain(value) for key, value in config.items()}
    if isinstance(config, Sequence) and not isinstance(config, str):
        return [plain(value) for value in config]
    return name_of(config) if callable(config) else config


def distance(method: Method, student: Tensor, teacher: Tensor, *, dim: int, temperature: float, where: str) -> Tensor:
    """The loss of one pair of tensors, a scalar with the student's gradient.

    Half precision is computed in float32. A function of the user's gets both tensors as they are.

    Raises:
        ConfigError: if a function returns anything but a scalar tensor.
    """
    if isinstance(method, str):
        dtype = torch.promote_types(student.dtype, torch.float32)
        return LOSSES[method](student.to(dtype), teacher.to(student.device, dtype), dim, temperature)
    value = method(student, teacher)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        said = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ConfigError(f"{where}: {name_of(method)} returned {said}; a loss is one number, such as (s - t).abs().mean().")
    return value.reshape(())


# -- features -----------------------------------------------------------------------------------------------------------

_LAST = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.MultiheadAttention)


def feature_dim(module: nn.Module, dims: int) -> int:
    """Which dimension of a module's tensor, of `dims` dimensions, holds features: 1 or the last.

    Pictures and volumes have channels in dimension 1. Of three dimensions it is the last (batch, tokens, features), but with
    layers for sequences of channels (`Conv1d`, `BatchNorm1d`, ...). Linear layers and layer norms have features last anywhere.
    """
    if isinstance(module, _LAST) or dims < 3:
        return -1
    if dims > 3:
        return 1
    return 1 if any(cls.__name__.endswith("1d") and cls.__module__.startswith("torch.nn") for cls in type(module).__mro__) else -1


def mismatch(method: Method, student: Sequence[int], teacher: Sequence[int], dim: int) -> str | None:
    """Why tensors of these shapes cannot be compared even with a projection of the student; None if they can."""
    if not isinstance(method, str):
        return None
    if not -len(student) <= dim < len(student):
        return f"there is no dimension {dim}"
    if method == "attention" and len(student) < 3:
        return "attention compares maps over positions, and there is one position; take mse or cosine"
    if list(student) == list(teacher):
        return None
    if len(student) != len(teacher):
        return f"{len(student)} dimensions cannot be compared with {len(teacher)}"
    features = dim % len(student)
    others = [size for index, size in enumerate(student) if index != features]
    if others != [size for index, size in enumerate(teacher) if index != features]:
        return f"they may differ in dimension {features}, the features, only (`dim` names another one)"
    if method == "kl":
        return "kl compares classes one by one, and there are other numbers of them"
    return None


class Projection:
    """A learned linear map of the student's features to as many as the teacher has: a linear layer, or a 1x1 convolution.

    FitNets' regressor (Romero et al. 2015). No module, so that nothing joins the user's model. It begins as `nn.Linear` does, by
    a generator of its own: the same numbers in every process, and the random state of the run is as it was.

    Args:
        name: what its parameters are called by; it also decides the numbers that are drawn.
        wide: features of the student.
        to: features of the teacher.
        dim: which dimension they are in.

    Attributes:
        weight, bias: (to, wide) and (to), float32 or as `like`.
    """

    def __init__(self, name: str, wide: int, to: int, dim: int, like: Tensor | None = None) -> None:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        bound = 1 / math.sqrt(wide)
        device, dtype = (None, None) if like is None else (like.device, torch.promote_types(like.dtype, torch.float32))
        self.name, self.dim = name, dim
        self.weight, self.bias = (
            nn.Parameter(((torch.rand(shape, generator=generator) * 2 - 1) * bound).to(device, dtype))
            for shape in ((to, wide), (to,))
        )

    def __call__(self, x: Tensor) -> Tensor:
        """x (.., wide, ..) as (.., to, ..)."""
        if self.dim % x.dim() == x.dim() - 1:
            return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))
        lead, rest = self.dim % x.dim(), x.shape[self.dim % x.dim() + 1 :]
        y: Tensor = self.weight.to(x.dtype) @ x.flatten(lead + 1) + self.bias.to(x.dtype)[:, None]
        unfolded: Tensor = y.unflatten(-1, rest)
        return unfolded
