# SPDX-License-Identifier: Apache-2.0
"""Owns the settings: templates per module type that say which targets a type has and what they are unless told otherwise.

Three registries with one interface (NNI 3.0's `QuantizationSetting`, `PruningSetting`, `DistillationSetting`).
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import nn

from lightning_quant.config import ConfigError, contradictions, raise_problems
from lightning_quant.keys import DISTILLATION, INPUT, OUTPUT, QUANTIZATION, WEIGHT, Key, Problems, check_keys, closest
from lightning_quant.pruning_keys import PRUNING

Setting = Mapping[str, Mapping[str, Any]]

# Weights: int8, symmetric, one scale per output channel, so that batch norm folds exactly (see fusion.py).
# Activations: uint8 affine, one scale a tensor: what CPU runtimes execute; int8 affine is the same grid moved by 128.
PARAMETER_DEFAULTS = {"quant_dtype": "int8", "quant_scheme": "symmetric", "granularity": "default"}
ACTIVATION_DEFAULTS = {"quant_dtype": "uint8", "quant_scheme": "affine", "granularity": "default"}


def is_kind(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether `module` computes what a `cls` computes: the class itself or a subclass that keeps its forward."""
    return isinstance(module, cls) and type(module).forward is cls.forward


def dotted(cls: type) -> str:
    """The path that tells a class from others of its name."""
    return f"{cls.__module__}.{cls.__qualname__}"


def kept_bases(module_type: type[nn.Module]) -> list[type[nn.Module]]:
    """`module_type` and those of its bases whose forward it keeps, nearest first: what it may be called in a config."""
    forward = _forward(module_type)
    return [c for c in module_type.__mro__ if issubclass(c, nn.Module) and c is not nn.Module and _forward(c) is forward]


def _forward(module_type: type[nn.Module]) -> Any:
    try:
        return module_type.forward
    except AttributeError:  # a scripted module's class has none to show
        return module_type


def is_called(module_type: type[nn.Module], name: str) -> bool:
    """Whether `name` is a class name or dotted path of `module_type` or of a base whose forward it keeps."""
    return any(name == cls.__name__ or _is_path_of(name, cls) for cls in kept_bases(module_type))


def _is_path_of(name: str, cls: type) -> bool:
    """Whether a dotted path leads to `cls`: where it is defined, or where a package shows it (`torch.nn.Conv2d`)."""
    where, _, last = name.rpartition(".")
    return name == dotted(cls) or (where in sys.modules and getattr(sys.modules[where], last, None) is cls)


def checked_setting(setting: Any, rows: Mapping[str, Key], where: str, problems: Problems) -> Setting:
    """A deep copy of `setting` after the checks that need no module."""
    if not isinstance(setting, Mapping):
        problems.append(f"{where}: expected a dict from target to settings, got {setting!r}.")
        return {}
    if not setting:
        problems.append(f"{where}: the setting has no target; give at least one, such as {{'weight': {{}}}}.")
    for target, keys in setting.items():
        if not isinstance(target, str):
            problems.append(f"{where}: a target is a string, got {target!r}.")
        check_keys(keys, rows, f"{where}[{target!r}]", problems)
    return copy.deepcopy(dict(setting))


class _Registry:
    """What the three registries share: class names (or dotted paths), each with one setting and perhaps the class itself."""

    registry: ClassVar[dict[str, Setting]]
    _types: ClassVar[dict[str, type[nn.Module]]]
    _rows: ClassVar[Mapping[str, Key]]
    _default: ClassVar[Setting | None] = None  # what a type without a setting of its own has

    @classmethod
    def register(cls, module_type: str | type[nn.Module], setting: Setting) -> None:
        """Make `setting` the template of a module type, in place of the one it had; never merged, copied deeply.

        Args:
            module_type: a class, or its name or dotted path. A subclass uses it, too, where it keeps the class's forward.
            setting: target -> keys. A key left out or None has its default. `_input_` and `_output_` are the first argument
                and the first output; a parameter is named as in `named_parameters()`, `*` stands for any part of a name.

        Raises:
            ConfigError: for unknown keys or values, and for a second class with the name of a registered one.
        """
        name = cls._name_of(module_type, ".register")
        where, problems = f"{cls.__name__}.register({name!r})", list[str]()
        if isinstance(module_type, type):
            known = cls._types.get(name)
            if known is not None and dotted(known) != dotted(module_type):
                raise ConfigError(
                    f"{where}: the name is taken by {dotted(known)}, and {dotted(module_type)} is another class; register "
                    f"{dotted(module_type)!r}, its dotted path, or unregister({name!r}) first."
                )
        copied = checked_setting(setting, cls._rows, where, problems)
        for target, keys in copied.items():
            problems += contradictions(keys, f"{where}[{target!r}]") if isinstance(keys, Mapping) else []
        raise_problems(problems)
        cls.registry[name] = copied
        if isinstance(module_type, type):
            cls._types[name] = module_type
        elif name in cls._types and not cls._types[name].__module__.startswith("torch."):
            del cls._types[name]  # by name it is any class of that name, not the one of an earlier registration

    @classmethod
    def unregister(cls, module_type: str | type[nn.Module]) -> None:
        """Forget the setting of a module type.

        Raises:
            ConfigError: if it has none.
        """
        name = cls._name_of(module_type)
        if name not in cls.registry:
            raise ConfigError(cls._unregistered(name))
        del cls.registry[name]
        cls._types.pop(name, None)

    @classmethod
    def get(cls, module_type: str | type[nn.Module] | nn.Module) -> dict[str, dict[str, Any]]:
        """A copy of the setting of a module type, given by name, class or instance.

        Raises:
            ConfigError: if it has none, with the closest names that have one.
        """
        name = cls._name_of(type(module_type) if isinstance(module_type, nn.Module) else module_type)
        if isinstance(module_type, str):
            found = cls.registry.get(module_type, cls._default)
        else:
            module_class = type(module_type) if isinstance(module_type, nn.Module) else module_type
            found = cls.find(module_class)
        if found is None:
            raise ConfigError(cls._unregistered(name))
        return copy.deepcopy({target: dict(keys) for target, keys in found.items()})

    @classmethod
    @contextlib.contextmanager
    def temporary(cls, module_type: str | type[nn.Module], setting: Setting) -> Iterator[None]:
        """`register` for the length of a `with` block; what was registered before is registered again after it."""
        before, types = dict(cls.registry), dict(cls._types)
        cls.register(module_type, setting)
        try:
            yield
        finally:
            cls.registry.clear()
            cls.registry.update(before)
            cls._types.clear()
            cls._types.update(types)

    @classmethod
    def find(cls, module_type: type[nn.Module], local: Mapping[str, Setting] | None = None) -> Setting | None:
        """The setting that a module of `module_type` uses, or None.

        The class itself comes before its bases, a dotted path before a name, and `local` settings before the registered ones.
        A base counts only where its forward is kept: with a forward of its own, what a subclass computes is unknown.
        """
        for base in kept_bases(module_type):
            for settings in (local or {}, cls.registry):
                for name in (*(name for name in settings if "." in name and _is_path_of(name, base)), base.__name__):
                    known = None if settings is local else cls._types.get(name)
                    if name in settings and (known is None or dotted(known) == dotted(base)):  # a notebook defines classes anew
                        return settings[name]
        return None

    @classmethod
    def _name_of(cls, module_type: Any, call: str = "") -> str:
        if isinstance(module_type, str):
            return module_type
        if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
            raise ConfigError(f"{cls.__name__}{call}: expected a module class or its name, got {module_type!r}.")
        return module_type.__name__

    @classmethod
    def _unregistered(cls, name: str) -> str:
        near = closest(name, cls.registry)
        hint = f" Closest: {', '.join(map(repr, near))}." if near else ""
        return f"{cls.__name__}: {name!r} is not registered.{hint}"


# -- what is registered at start --------------------------------------------------------------------------------------

_ACTIVATION = {**ACTIVATION_DEFAULTS, "apply_method": "qat_clamp_round"}
_PARAMETER = {**PARAMETER_DEFAULTS, "apply_method": "qat_clamp_round"}
_THROUGH: Setting = {INPUT: _ACTIVATION, OUTPUT: _ACTIVATION}
_TWO: Setting = {INPUT: _ACTIVATION, "_input_1": _ACTIVATION, OUTPUT: _ACTIVATION}
_WEIGHTED: Setting = {INPUT: _ACTIVATION, WEIGHT: _PARAMETER, OUTPUT: _ACTIVATION}
# Query, key and value; in_proj_weight or q_, k_ and v_proj_weight; out_proj.weight.
_ATTENTION: Setting = {
    INPUT: _ACTIVATION,
    "_input_1": _ACTIVATION,
    "_input_2": _ACTIVATION,
    "*_weight": _PARAMETER,
    "out_proj.weight": _PARAMETER,
    OUTPUT: _ACTIVATION,
}
_QUANTIZATION: list[tuple[Setting, tuple[type[nn.Module], ...]]] = [
    (_WEIGHTED, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)),
    ({INPUT: _ACTIVATION, "_input_1": _ACTIVATION, WEIGHT: _PARAMETER, OUTPUT: _ACTIVATION}, (nn.Bilinear,)),
    (_WEIGHTED, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)),
    (_THROUGH, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm)),
    (_THROUGH, (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)),
    ({WEIGHT: _PARAMETER}, (nn.Embedding, nn.EmbeddingBag)),
    (_ATTENTION, (nn.MultiheadAttention,)),
    ({"weight_*": _PARAMETER}, (nn.LSTM, nn.GRU, nn.RNN)),
    (_THROUGH, (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish)),
    (_THROUGH, (nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Softmax)),
    (_THROUGH, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)),
    (_THROUGH, (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)),
    (_THROUGH, (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)),
    (_THROUGH, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity, nn.Flatten, nn.Upsample)),
]
# Operators that a model calls as functions, by the names under which they are recorded.
TWO_INPUT_OPERATORS = ("add", "sub", "mul", "matmul", "bmm", "einsum")
VARIADIC_OPERATORS = ("cat", "stack", "einsum")
OPERATORS = (
    *TWO_INPUT_OPERATORS,
    *("relu", "relu6", "hardtanh", "leaky_relu", "gelu", "silu", "hardswish", "sigmoid", "hardsigmoid", "tanh", "softmax"),
    *("cat", "stack", "mean", "interpolate", "pad", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d"),
    *("avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
)


class QuantizationSetting(_Registry):
    """Which tensors of a module type are quantized, and how, unless a `config_list` says otherwise.

    `QuantizationSetting.register("CustomizedModule", {"_input_": {}, "p1": {"granularity": [1, -1]}, "_output_": {}})`
    """

    registry: ClassVar[dict[str, Setting]] = {
        **{module.__name__: setting for setting, modules in _QUANTIZATION for module in modules},
        **{name: _TWO if name in TWO_INPUT_OPERATORS else _THROUGH for name in OPERATORS},
    }
    _types: ClassVar[dict[str, type[nn.Module]]] = {module.__name__: module for _, modules in _QUANTIZATION for module in modules}
    _rows = QUANTIZATION


_MASKED: Setting = {
    "weight": {"granularity": "default", "apply_method": "mul"},
    "bias": {"align": {"module_name": None, "target_name": "weight", "dims": [0]}, "apply_method": "mul"},
}
_PRUNED: list[tuple[Setting, tuple[type[nn.Module], ...]]] = [
    (_MASKED, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)),
    (_MASKED, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)),
    ({"weight": {"granularity": "in_channel", "apply_method": "mul"}}, (nn.Embedding,)),
]


class PruningSetting(_Registry):
    """Which tensors of a module type are masked, and how, unless a `pruning` list says otherwise."""

    registry: ClassVar[dict[str, Setting]] = {module.__name__: setting for setting, modules in _PRUNED for module in modules}
    _types: ClassVar[dict[str, type[nn.Module]]] = {module.__name__: module for _, modules in _PRUNED for module in modules}
    _rows = PRUNING


class DistillationSetting(_Registry):
    """Which tensors of a module type are compared with a teacher's; a type without a setting has the one for its output."""

    registry: ClassVar[dict[str, Setting]] = {}
    _types: ClassVar[dict[str, type[nn.Module]]] = {}
    _rows = DISTILLATION
    _default: ClassVar[Setting | None] = {OUTPUT: {"lambda": 1.0, "link": "auto", "apply_method": "mse"}}

    @classmethod
    def find(cls, module_type: type[nn.Module], local: Mapping[str, Setting] | None = None) -> Setting | None:
        """The setting of `module_type`, or that of any module: its output, by mean squared error."""
        return super().find(module_type, local) or cls._default
