# SPDX-License-Identifier: Apache-2.0
"""Owns the lanes that the benchmarks compare: the float net, ours in its variants, and the peers that are installed.

All lanes of a net begin from equal weights. Peers are measured where they can be imported: torch.ao comes with torch;
`pip install torchao` and `pip install nni==3.0` add the others.
"""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from timed_nets import Net, layers_of
from torch import Tensor, nn

from lightning_quant import make_plan, prepare_model
from lightning_quant.masks import Masks, make_pruning
from lightning_quant.prepare import apply_phase
from lightning_quant.record import record
from lightning_quant.schedule import Clock, Phase


class Model(NamedTuple):
    """What a lane trains, in train mode, and how many quantizers of tensors it has (a shared one counts once).

    `after_backward` and `after_step` belong to its training step: before and behind the optimizer's.
    """

    model: nn.Module
    quantizers: int
    after_backward: Callable[[], None] = lambda: None
    after_step: Callable[[], None] = lambda: None


class Lane(NamedTuple):
    """`make(net, x)` builds the model; `missing()` says why it cannot be, or nothing; `settle` follows the warm-up."""

    title: str
    make: Callable[[Net, Tensor], Model]
    missing: Callable[[], str] = lambda: ""
    settle: Callable[[nn.Module], None] = lambda model: None


def float_model(net: Net) -> nn.Module:
    """The float net in train mode: the same weights at every call."""
    torch.manual_seed(0)
    return net.make().train()


# -- ours ---------------------------------------------------------------------------------------------------------------


def ours(net: Net, x: Tensor, config_list: Any = None, **options: Any) -> Model:
    """The net quantized by lightning_quant, groups found by themselves; convolutions and linear layers unless told else."""
    model = float_model(net)
    plan = make_plan(model, config_list or layers_of(model), example_input=x)
    targets = [target for layer in plan.layers for target in layer.targets.values()]
    inner = sum(layer.inner is not None for layer in plan.layers)
    quantizers = sum(target.active and target.source is None for target in targets) + inner
    return Model(prepare_model(model, plan, **options).train(), quantizers)


def masked(net: Net, x: Tensor) -> Model:
    """The quantized net with half of its channels masked, where dependencies allow it; the classifier keeps its own."""
    model = float_model(net)
    plan = make_plan(model, layers_of(model), example_input=x)
    entries = layers_of(model)[0]
    pruning = {"config_list": [{**entries, "sparse_ratio": 0.5}], "schedule": "one_shot"}
    masks = Masks(model, make_pruning(model, pruning, record(model, x)))
    masks.step(Clock(step=0, epoch=0, done=0, length=0))
    targets = [target for layer in plan.layers for target in layer.targets.values()]
    quantizers = sum(target.active and target.source is None for target in targets)
    prepare_model(model, plan)
    return Model(model.train(), quantizers, masks.after_backward, masks.apply)


def lean_missing() -> str:
    return "" if "memory" in inspect.signature(prepare_model).parameters else "prepare_model here takes no memory="


# -- the peers ----------------------------------------------------------------------------------------------------------


def torch_ao(net: Net, x: Tensor) -> Model:
    """The whole net quantized by torch.ao's eager mode, as its documentation does it for x86."""
    quantization: Any = torch.ao.quantization
    model = net.torch_ao()
    model.load_state_dict(float_model(net).state_dict())
    model.train()
    groups = [list(group) for group in net.torch_ao_groups(model)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and says so at every call
        fused = quantization.fuse_modules_qat(model, groups) if groups else model
        wrapped = quantization.QuantWrapper(fused)
        wrapped.qconfig = quantization.get_default_qat_qconfig("x86")
        prepared: nn.Module = quantization.prepare_qat(wrapped.train())
    return Model(prepared, _count(prepared, "FusedMovingAvgObsFakeQuantize"))


def pt2e(net: Net, x: Tensor) -> Model:
    """The whole net quantized by torchao's PT2E with its quantizer for x86."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x86: Any = importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
        quantize_pt2e: Any = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
        exported = torch.export.export(float_model(net), (x,)).module()
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
        prepared: nn.Module = quantize_pt2e.prepare_qat_pt2e(exported, quantizer)  # in train mode; .train() is refused
    return Model(prepared, _count(prepared, "FusedMovingAvgObsFakeQuantize"))


def nni(net: Net, x: Tensor) -> Model:
    """Convolutions and linear layers quantized by NNI 3.0's QATQuantizer, fused where it can (no ReLU6, no addition)."""
    tool: Any = importlib.import_module("nni")
    compression: Any = importlib.import_module("nni.compression")
    quantization: Any = importlib.import_module("nni.compression.quantization")
    model = float_model(net)
    activations = {"quant_dtype": "int8", "quant_scheme": "affine", "granularity": "default"}
    weights = {"quant_dtype": "int8", "quant_scheme": "symmetric", "granularity": "out_channel"}
    targets = {"_input_": activations, "weight": weights, "_output_": activations}
    entry = {**layers_of(model)[0], "quant_dtype": "int8", "target_names": list(targets), "target_settings": targets}
    if groups := net.torch_ao_groups(model):
        entry["fuse_names"] = groups
    optimizer = tool.trace(torch.optim.SGD)(model.parameters(), lr=1e-3)  # it asks for one; the lane has its own
    evaluator = compression.TorchEvaluator(lambda *_: None, optimizer, lambda *_: None)
    quantizer = quantization.QATQuantizer(model, [entry], evaluator)
    return Model(model, sum(len(spaces) for spaces in quantizer._target_spaces.values()))


def _count(model: nn.Module, kind: str) -> int:
    return sum(type(module).__name__ == kind for module in model.modules())


def _not_installed(package: str) -> Callable[[], str]:
    return lambda: "" if importlib.util.find_spec(package) else f"{package} is not installed"


# -- all of them --------------------------------------------------------------------------------------------------------

LANES = {
    "float": Lane("float", lambda net, _: Model(float_model(net), 0)),
    "ours": Lane("ours", ours),
    "frozen": Lane("ours, ranges frozen", ours, settle=lambda model: apply_phase(model, Phase(observe=False))),
    "int8": Lane("ours, preset int8", lambda net, x: ours(net, x, "int8")),  # additions and pools, too, where they are called
    "masked": Lane("ours, half masked", masked),
    "lean": Lane("ours, lean", lambda net, x: ours(net, x, memory="lean"), missing=lean_missing),
    "torch_ao": Lane("torch.ao eager", torch_ao),
    "pt2e": Lane("torchao PT2E", pt2e, missing=_not_installed("torchao")),
    "nni": Lane("NNI 3.0", nni, missing=_not_installed("nni")),
}


def present(names: Sequence[str]) -> list[str]:
    """The lanes that can run here, float first; for each other one a line says why not."""
    for name in names:
        if reason := LANES[name].missing():
            print(f"left out: {LANES[name].title} ({reason})")
    return ["float", *(name for name in LANES if name in names and name != "float" and not LANES[name].missing())]
