# SPDX-License-Identifier: Apache-2.0
"""Owns conversion: a trained, prepared model becomes a plain copy with integer layers; the trained one stays trainable."""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.utils.prune import BasePruningMethod, remove

from lightning_quant.config import ConfigError
from lightning_quant.fusion import Ending
from lightning_quant.group import Group, Strays, leave, watching
from lightning_quant.integer import ActivatedLayer, IntegerLayer, PartlyIntegerLayer, Rounding
from lightning_quant.intercept import OperatorGroup, deploy_sites, is_owner, operators_aside
from lightning_quant.masked import carry_passing
from lightning_quant.prepare import LEARNED, prepared_groups, quantizers_of
from lightning_quant.sites import Operator
from lightning_quant.sparsity import came, note_came, sizes_before
from lightning_quant.wrapped import QuantizedModule

Model = TypeVar("Model", bound=nn.Module)


def convert_model(model: nn.Module, *, mode: str = "integer") -> nn.Module:
    """A deployed copy of a prepared model: same class and call, fused groups replaced by folded integer layers.

    In the copy the head of every group is an `IntegerLayer` (int8 weight, int32 bias; float arithmetic on int8 weights
    where a grid is missing), batch norms and activations of groups are `nn.Identity`, any other quantized module is a
    `QuantizedModule` (integer parameters around its own forward), and everything runs in eval mode on the device the model
    is on. Hooks on members of groups are not copied (a warning names those that see what goes in or comes out). The result equals
    the prepared model's eval mode without gradients bit for bit, unless the model's forward looks into its layers; what the
    schedule has not yet quantized is integers here all the same. `mode`: see `set_mode`.

    Raises:
        ConfigError: if `mode` is unknown, the model is not prepared, a range was never observed, or the data took another way
            than in the recorded forward (the layers are named).
    """
    check_mode(mode)
    if not prepared_groups(model):
        raise ConfigError(
            f"{type(model).__name__} is not prepared; call prepare_model(model, plan) and train or calibrate it first."
        )
    if problem := strayed(model):
        raise ConfigError(problem)
    blind = unobserved(model)
    if blind:
        raise ConfigError(
            f"no range was observed for {', '.join(blind)}: run training steps (model.train()) or, for method 'ptq' at least, "
            "calibrate(model, batches) with representative data through these layers first, or leave them out of config_list."
        )
    if hooked := _hooked(model):
        warnings.warn(
            f"hooks on {', '.join(hooked)} are not in the deployed copy. If one of them changes what passes, the copy computes "
            "something else: do that in the forward.",
            stacklevel=2,
        )
    deployed = unwrapped(made_permanent(copy_of(model)))
    deployed.__dict__.pop(LEARNED, None)
    for quantizer in quantizers_of(deployed).values():
        quantizer.settled = True
    groups = list(prepared_groups(deployed).values())
    for owner in [module for module in deployed.modules() if is_owner(module)]:
        deploy_sites(owner)
    names = {id(module): name for name, module in deployed.named_modules()}
    sizes = sizes_before(deployed)
    before = [came((*group.ahead, head, *group.members), sizes) for head, group in groups]
    for (head, group), one in zip(groups, before, strict=True):
        layer = _deploy(deployed, head, group, names)
        if layer is not None:
            note_came(layer, one)
    return set_mode(deployed.eval(), mode)


MODES = ("integer", "reference", "onednn")


def check_mode(mode: Any) -> None:
    """Raise a ConfigError if `mode` is none."""
    if mode not in MODES:
        raise ConfigError(f"mode: {mode!r} is not one of {', '.join(MODES)}.")


def set_mode(deployed: Model, mode: str) -> Model:
    """Have a deployed model compute in another way, in place, and return it.

    `.onnx` and `.pt` files hold no mode: what is in "reference" is written as in "integer". A `.pt2` file in our own dialect runs
    as the model did: one of "reference" holds torch's own operators alone, one of the others ours.

    "integer": exact integers, held in float32, at the speed of the float model; what eval of the prepared model computes, bit for
    bit, and what files are checked against. "onednn": the same numbers, bit for bit, with torch's int8 CPU kernels where the CPU
    has them and the layer fits; a warning names the layers that go on as in "integer". Inputs in torch.channels_last, the
    kernels' own layout, save a copy a layer. "reference": float32 arithmetic on dequantized integers by torch's own operators,
    for any device, under autocast and torch.compile; sums are not exact, so that a value near the middle of two levels may come
    out as the other one.

    Raises:
        ConfigError: if `mode` is unknown, or `deployed` has no deployed layer.
    """
    check_mode(mode)
    if not isinstance(deployed, nn.Module):
        raise ConfigError(f"deployed: expected a module, got {deployed!r}; give what convert_model returned.")
    kinds = (IntegerLayer, PartlyIntegerLayer, Rounding, QuantizedModule)
    layers = {name: module for name, module in _everything(deployed) if isinstance(module, kinds)}
    if not layers:
        raise ConfigError(f"{type(deployed).__name__} has no deployed layer; give what convert_model returned.")
    reasons: dict[str, list[str]] = {}
    for name, layer in layers.items():
        layer.mode = mode
        if mode == "onednn" and (reason := _onednn_problem(layer)):
            reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        warnings.warn(f"mode 'onednn': {', '.join(names)} run as in 'integer': {reason}.", stacklevel=2)
    return deployed


def _onednn_problem(layer: nn.Module) -> str:
    """Why torch's int8 kernels cannot run what multiplies in a deployed layer; nothing if they can, or nothing does."""
    if isinstance(layer, IntegerLayer):
        return layer.onednn_problem()
    multiplies = isinstance(layer, PartlyIntegerLayer) or (isinstance(layer, QuantizedModule) and layer.stored)
    return "float arithmetic on rounded tensors" if multiplies else ""


def for_files(deployed: nn.Module) -> nn.Module:
    """What an `.onnx` or `.pt` file is made of: the model, or a copy in "integer" where a layer of it computes as "reference"."""
    references = any(getattr(module, "mode", None) == MODES[1] for _, module in _everything(deployed))
    return set_mode(copy_of(deployed), MODES[0]) if references else deployed


def in_float32(model: nn.Module) -> nn.Module:
    """The model, or a copy whose floating parameters and buffers are float32 where one of them is not."""
    tensors = (*model.parameters(), *model.buffers())
    others = any(tensor.is_floating_point() and tensor.dtype != torch.float32 for tensor in tensors)
    return copy_of(model).float() if others else model


def _everything(deployed: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules, with those that stand beside the module tree because their owner would call them."""
    for name, module in deployed.named_modules():
        yield name, module
        for number, layer in enumerate(operators_aside(module)):
            yield from layer.named_modules(prefix=f"{name}.operator_{number}")


def _deploy(deployed: nn.Module, head: nn.Module, group: Group, names: Mapping[int, str]) -> nn.Module | None:
    """Put the integer layer of a group, returned, in the place of its head, and nothing in that of its members."""
    for member in (*group.ahead, *group.members):
        replace_module(deployed, member, nn.Identity())
    if isinstance(group, OperatorGroup):
        return None
    replace_module(deployed, head, layer := group.deploy(head))
    if isinstance(group, Ending) and isinstance(group.activation, Operator):
        layer.register_forward_hook(group.stamp)
    if isinstance(layer, QuantizedModule):
        layer.take_over()
    if isinstance(layer, ActivatedLayer):
        assert isinstance(group, Ending) and group.activation is not None
        leave(group.activation)
        group.activation._forward_hooks.clear()
        group.activation._forward_pre_hooks.clear()
        layer.take_over(group.activation, names.get(id(group.activation), ""))
    return layer


def _hooked(model: nn.Module) -> list[str]:
    """The names of modules whose hooks see what goes into or comes out of a layer, and would be gone with them."""
    names = {id(module): name for name, module in model.named_modules()}
    found: list[str] = []
    for head, group in prepared_groups(model).values():
        chain = [] if isinstance(group, OperatorGroup) else [*group.ahead, head, *group.members]
        ends = [m for m in chain[:1] if watching(m)] + [m for m in chain[-1:] if m._forward_hooks]
        found += [names[id(m)] for m in ends if id(m) in names]  # a function that ends a group has no name
    return list(dict.fromkeys(found))


def strayed(model: nn.Module) -> str:
    """What to say where the data did not flow as the recorded forward had shown; nothing where it did."""
    groups = [group for _, group in prepared_groups(model).values()]
    found = [group for group in groups if isinstance(group, Ending) and group.strayed]
    if found:
        return (
            f"{', '.join(repr(group.name) for group in found)}: {found[0].strayed} of {found[0].strays.of} tensors did not go "
            "through what is fused there as in the recorded forward: the forward branches, skips a member or writes in between, "
            "or a hook or another model's call does. "
            f"Give fuse_names: [] for these layers, so that they are quantized alone.{_only_training(found[0].strays)}"
        )
    for group in groups:
        for share in group.shares.values():
            if share.strays.number:
                return (
                    f"{group.name!r}: {share.strays.number} of {share.strays.of} inputs did not come from where the recorded "
                    f"forward had shown, whose range they have ({share.quantizer.name!r}): the forward branches there. Leave one "
                    f"of the two out of config_list.{_only_training(share.strays)}"
                )
    return ""


def _only_training(strays: Strays) -> str:
    hint = " If it branches in training only, run the model once in eval mode before: that is what counts then."
    return "" if strays.evaluated else hint


def unobserved(model: nn.Module) -> list[str]:
    """The quantizers of a prepared model that have no range yet, by target name ('conv1._output_')."""
    return [name for name, quantizer in quantizers_of(model).items() if not quantizer.ready]


def copy_of(model: Model) -> Model:
    """A deep copy. What a hook computes before each forward (a pruned weight, a spectral norm's) is copied without its graph."""
    tensors = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    memo: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in tensors if not tensor.is_leaf}
    try:
        twin = copy.deepcopy(model, dict(memo))
    except Exception:  # noqa: BLE001  (an attribute of the user's: a lock, a list of losses with their graph)
        twin = copy.deepcopy(model, {**memo, **_uncopied(model, memo)})
    for module in twin.modules():
        module._compiled_call_impl = None  # what `module.compile()` made is bound to the original (a LightningModule's is copied)
        uncompile(module)
    return twin


def _uncopied(model: nn.Module, memo: dict[int, Any]) -> dict[int, Any]:
    """The attributes that cannot be copied, for the copy to share; named in a warning."""
    own = {id(module): module for module in model.modules()}
    shared: dict[int, Any] = {}
    names: list[str] = []
    for name, module in model.named_modules():
        for key, value in module.__getstate__().items():  # a LightningModule leaves its Trainer out
            if key not in ("_parameters", "_buffers", "_modules"):
                try:
                    copy.deepcopy(value, {**memo, **own})
                except Exception:  # noqa: BLE001  (whatever it is)
                    shared[id(value)] = value
                    names.append(f"{name}.{key}" if name else key)
    if names:
        warnings.warn(f"{', '.join(names)} cannot be copied; the deployed model shares that with the trained one.", stacklevel=4)
    return shared


_STEPS = ("forward", "training_step", "validation_step", "test_step", "predict_step")


def uncompile(module: nn.Module) -> Callable[..., Any] | None:
    """Have a LightningModule run its own steps again that a Trainer was given as `torch.compile(module)`.

    Returns what compiled them, None if nothing had. A copy of such a module would run the original's.
    """
    context = module.__dict__.get("_compiler_ctx")
    if context is None:
        return None
    for name in _STEPS:
        step = context[f"original_{name}"]
        if inspect.ismethod(step) or hasattr(step, "_torchdynamo_orig_callable"):  # a second fit compiles what was compiled
            module.__dict__.pop(name, None)  # the class has it, prepared or not
        else:
            module.__dict__[name] = step
    module.__dict__["_compiler_ctx"] = None
    compiler: Callable[..., Any] = context["dynamo_ctx"]
    return compiler


@contextlib.contextmanager
def uncompiled(module: nn.Module) -> Iterator[None]:
    """Within this context the steps of a LightningModule are its own; then they are compiled again as they are by then."""
    compiler = uncompile(module)
    try:
        yield
    finally:
        if compiler is not None:
            steps = {name: getattr(module, name) for name in _STEPS}
            originals = {f"original_{name}": step for name, step in steps.items()}
            module.__dict__["_compiler_ctx"] = {"compiler": "dynamo", "dynamo_ctx": compiler, **originals}
            module.__dict__.update((name, compiler(step)) for name, step in steps.items())


def unwrapped(model: nn.Module) -> nn.Module:
    """`model` with the modules that `torch.compile(module)` wraps in its place, under the names that they have alone."""
    for module in list(model.modules()):
        if isinstance(module, OptimizedModule):
            replace_module(model, module, module._orig_mod)
    return model._orig_mod if isinstance(model, OptimizedModule) else model


def made_permanent(model: Model) -> Model:
    """`model` with what is being pruned (`torch.nn.utils.prune`) for good: the masked values are the Parameters."""
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, BasePruningMethod):
                remove(module, hook._tensor_name)
    return model


def load_weights(model: nn.Module, state: Mapping[str, Tensor], *, strict: bool) -> None:
    """`load_state_dict`, whether the model or the state was being pruned by then or not: masked values count."""
    masked = {key.removesuffix("_mask") for key in state if key.endswith("_mask")}
    masked = {key for key in masked if f"{key}_orig" in state}
    dense = {key: value for key, value in state.items() if key.removesuffix("_mask").removesuffix("_orig") not in masked}
    for key in masked:
        original, mask = state[f"{key}_orig"], state[f"{key}_mask"]
        dense[key] = original * mask.to(original.dtype)
    made_permanent(model).load_state_dict(dense, strict=strict)


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` is registered, under all its names; what was masked as it passed `old` still is."""
    carry_passing(old, new)
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is old:
                parent._modules[key] = new
