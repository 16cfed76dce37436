# SPDX-License-Identifier: Apache-2.0
"""Owns unusual models and unusual uses of prepared ones: split tensors, nested layers, odd names, re-entrant forwards."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_quant import ConfigError, convert_model, export_model, make_plan, prepare_model, restore_model
from lightning_quant.export import onnxruntime_session
from lightning_quant.plan import UNCAUGHT
from lightning_quant.prepare import load_quantizer_state, quantizer_state

LINEAR = [{"op_types": ["Linear"]}]


def prepared(model: nn.Module, config_list: Any, x: Any, **options: Any) -> nn.Module:
    """`model` after one training step and in eval mode."""
    prepare_model(model, make_plan(model, config_list, example_input=x, **options)).train()
    model(*x) if isinstance(x, tuple) else model(x)
    return model.eval()


def source(model: nn.Module, config_list: Any, x: Tensor, name: str, **options: Any) -> str | None:
    plan = make_plan(model, config_list, example_input=x, **options)
    return next(layer for layer in plan.layers if layer.name == name).targets["_input_"].source


# -- which tensors are one ----------------------------------------------------------------------------------------------


class Chunked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        p, q = x.chunk(2, 1)
        y: Tensor = self.c(self.a(p) + self.b(q))
        return y


def test_the_parts_of_a_split_tensor_have_ranges_of_their_own() -> None:
    x = torch.randn(16, 8)
    x[:, 4:] *= 100
    assert source(Chunked(), LINEAR, x, "b") is None
    model = Chunked()
    with torch.no_grad():
        wanted = model(x)
        found = prepared(model, LINEAR, x)(x)
    assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        _, (_, cell) = self.lstm(x)
        y: Tensor = self.head(cell)
        return y


def test_a_second_output_is_not_taken_for_the_first() -> None:
    config = [{"op_types": ["LSTM"], "target_names": ["weight_*", "_output_"]}, *LINEAR]
    assert source(Cell(), config, torch.randn(4, 5, 4), "head") is None


class Box(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.seq = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.seq(x)
        return y


def test_what_leaves_a_quantized_container_is_on_its_grid() -> None:
    model = nn.Sequential(Box(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4))
    config = [*LINEAR, {"op_types": ["Box"], "quant_dtype": "int3"}]
    x = torch.randn(9, 4)
    settings: dict[str, Any] = {"Box": {"_output_": {}}}
    assert source(model, config, x, "1", settings=settings) is None
    assert source(model, [*LINEAR, {"op_types": ["Box"]}], x, "1", settings=settings) == "0._output_"


def test_what_enters_a_quantized_container_is_rounded_anew() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Box(nn.Linear(4, 4)))
    config = [*LINEAR, {"op_types": ["Box"], "quant_dtype": "int4"}]
    assert source(model, LINEAR, torch.randn(9, 4), "1.seq.0") == "0._output_"
    assert source(model, config, torch.randn(9, 4), "1.seq.0", settings={"Box": {"_input_": {}}}) is None


@pytest.mark.parametrize("config_list", ["int8", "int8-weight-only"])
@pytest.mark.parametrize("known", [True, False], ids=["example", "no example"])
def test_the_weight_inside_an_attention_layer_has_one_owner(config_list: str, known: bool) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.m(x, x, x)[0]
            return y

    model, x = Attention(), torch.randn(4, 5, 8)
    plan = make_plan(model, config_list, example_input=x if known else None)
    assert [layer.name for layer in plan.layers] == ["m"]
    assert "out_proj.weight" in plan.layers[0].targets
    prepare_model(model, plan).train()(x)
    with torch.no_grad():
        assert torch.equal(convert_model(model.eval())(x), model(x))


# -- odd forwards and odd names -----------------------------------------------------------------------------------------


class Scaled(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, nn.Parameter(torch.randn(4, 4)))
        self.order = names

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            x = x @ getattr(self, name)
        return x


@pytest.mark.parametrize(
    "names", [("w", "w_scale"), ("w_scale", "w"), ("inner", "first", "stored"), ("w", "w_zero_point"), ("training_", "rounds_in")]
)
def test_parameters_of_any_name(names: tuple[str, ...]) -> None:
    model, x = nn.Sequential(Scaled(*names)), torch.randn(3, 4)
    prepared(model, {"op_types": ["Scaled"], "quant_scheme": "affine"}, x, settings={"Scaled": {"*": {}}})
    with torch.no_grad():
        wanted, deployed = model(x), convert_model(model)
        assert torch.equal(deployed(x), wanted)
        restore_model(model)
        assert (wanted - model(x)).abs().max() < 0.1 * wanted.abs().max()
    integers = [tensor for tensor in deployed.state_dict().values() if tensor.dtype == torch.int8 and tensor.dim() == 2]
    assert len(integers) == len(names)


class Again(nn.Module):
    """Calls itself, and reads its parameter after that."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(4, 4))
        self.floats = 0

    def forward(self, x: Tensor, n: int = 3) -> Tensor:
        y: Tensor = x if n == 0 else self(x, n - 1)
        self.floats += self.p is self._parameters["p"]
        return y @ self.p


def test_a_module_that_calls_itself_stays_rounded() -> None:
    again = Again()
    model, x = nn.Sequential(again), torch.randn(3, 4)
    prepared(model, {"op_types": ["Again"], "quant_dtype": "int3"}, x, settings={"Again": {"p": {}}})
    again.floats = 0
    with torch.no_grad():
        assert torch.equal(convert_model(model)(x), model(x))
    model.train()(x).sum().backward()
    assert not again.floats
    assert "p" not in vars(again)


def test_an_instance_without_a_group_is_what_its_class_was() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(3, 4)
    prepared(model, LINEAR, x)
    other: Any = type(model[0])(4, 4)
    assert torch.equal(other.train()(x), nn.functional.linear(x, other.weight, other.bias))


def test_keyword_calls_go_on_after_conversion() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Conv1d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(input=self.a(input=x))
            return y

    x = torch.randn(2, 3, 4)
    model = prepared(Named(), [{"op_types": ["Linear", "Conv1d"]}], x)
    with torch.no_grad():
        assert torch.equal(convert_model(model)(x), model(x))


def test_a_deployed_module_serves_several_threads() -> None:
    model, x = nn.Sequential(Scaled("p", "q")), torch.randn(64, 4)
    deployed = convert_model(prepared(model, {"op_types": ["Scaled"]}, x, settings={"Scaled": {"*": {}}}))
    with torch.no_grad():
        wanted = deployed(x)
    wrong: list[Any] = []

    def serve() -> None:
        for _ in range(100):
            try:
                with torch.no_grad():
                    if not torch.equal(deployed(x), wanted):
                        wrong.append("numbers")
            except Exception as error:  # noqa: BLE001  (collected, and shown by the assertion)
                wrong.append(error)

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Checkpointed(nn.Module):
    def __init__(self, use: bool) -> None:
        super().__init__()
        self.a, self.b, self.use = nn.Linear(4, 4), nn.Linear(4, 4), use

    def forward(self, x: Tensor) -> Tensor:
        part = nn.Sequential(self.a, nn.ReLU(), self.b)
        y: Tensor = checkpoint(part, x, use_reentrant=False) if self.use else part(x)
        return y


@pytest.mark.parametrize("fuse", [{"fuse_names": []}, {}], ids=["off", "auto"])
def test_gradient_checkpointing_changes_neither_ranges_nor_gradients(fuse: dict[str, Any]) -> None:
    """The ReLU is no module of the model: in a checkpoint nothing can catch its second run, so it is not fused there."""
    found = []
    for use in (False, True):
        torch.manual_seed(0)
        model = Checkpointed(use)
        config = [{**LINEAR[0], **(fuse if use else {"fuse_names": []})}]
        plan = make_plan(model, config, example_input=torch.randn(9, 4))
        assert plan.left == {"relu": UNCAUGHT if use else "not selected"}
        prepare_model(model, plan).train()
        for _ in range(3):
            model(torch.randn(9, 4)).square().sum().backward()
        found.append((quantizer_state(model), [parameter.grad for parameter in model.parameters()]))
    assert found[0][0] == found[1][0]
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


# -- other tensors, other plans -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config_list", [LINEAR, [{"op_types": ["Linear"], "target_settings": {"bias": {}}}]], ids=["plain", "bias"]
)
def test_functional_call_in_eval_mode_uses_the_tensors_it_is_given(config_list: Any) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    prepared(model, config_list, x)
    zeros = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    with torch.no_grad():
        before = model(x)
        assert not torch.func.functional_call(model, zeros, (x,)).any()
        assert torch.equal(model(x), before)


class Folded(nn.Module):
    """A group of three, and a module whose parameters are in a child."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn(self.conv(x))).flatten(2).transpose(1, 2)
        attended: Tensor = self.attention(y, y, y)[0]
        return attended


@pytest.mark.parametrize("place", ["conv.weight", "conv.bias", "bn.weight", "bn.running_mean", "attention.out_proj"])
def test_what_is_exchanged_between_two_forwards_in_eval_mode_counts(place: str) -> None:
    x = torch.randn(4, 3, 6, 6)
    model = Folded()
    prepare_model(model, make_plan(model, [{"op_types": ["Conv2d", "MultiheadAttention"]}], example_input=x)).train()
    model(x)
    model.eval()
    with torch.no_grad():
        before = model(x)
        assert torch.equal(model(x), before)
        owner, _, name = place.rpartition(".")
        module, old = model.get_submodule(owner), model.get_submodule(owner).__getattr__(name)
        if isinstance(old, nn.Module):
            setattr(module, name, type(old)(8, 8))
        else:
            new = torch.rand_like(old)
            setattr(module, name, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
        after = model(x)
        assert not torch.equal(after, before)
        assert torch.equal(after, convert_model(model)(x))


def test_a_plan_for_another_model_is_refused_and_changes_nothing() -> None:
    plan = make_plan(nn.Sequential(nn.Linear(4, 4)), LINEAR)
    for other in (nn.Sequential(nn.ReLU()), nn.Sequential(nn.LSTM(4, 4)), nn.Sequential(nn.Conv1d(4, 4, 1))):
        kind = type(other[0])
        with pytest.raises(
            ConfigError, match=f"the plan has a Linear called '0', which is a {kind.__name__} here; make the plan"
        ):
            prepare_model(other, plan)
        assert type(other[0]) is kind


def test_a_class_that_cannot_be_derived_from_leaves_the_model_as_it_was() -> None:
    class Final(nn.Linear):
        def __init_subclass__(cls, **options: Any) -> None:
            raise TypeError("final")

    model = nn.Sequential(nn.Linear(4, 4), Final(4, 4))
    with pytest.raises(TypeError, match="final"):
        prepare_model(model, make_plan(model, LINEAR))
    assert [type(module) for module in model] == [nn.Linear, Final]
    assert not [key for module in model for key in vars(module) if "lightning_quant" in key]


def test_ranges_of_another_granularity_are_refused() -> None:
    model, x = nn.Sequential(nn.Conv2d(2, 3, 1)), torch.randn(4, 2, 5, 5)
    channels = {"op_names": ["0"], "target_settings": {"_output_": {"granularity": "per_channel"}}}
    states = []
    for config_list in ("int8", ["int8", channels]):
        prepared(model, config_list, x)
        states.append(quantizer_state(model))
        for state in states[:-1]:
            with pytest.raises(ConfigError, match=r"saved ranges of 0._output_ have another granularity"):
                load_quantizer_state(model, state)
        load_quantizer_state(model, states[-1])
        restore_model(model)
    prepared(model, "int8", x)
    with pytest.raises(ConfigError, match=r"saved ranges of 0._output_ have another granularity"):
        load_quantizer_state(model, states[1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_prepared_recurrent_model_can_be_pickled(kind: Any) -> None:
    model, x = nn.Sequential(kind(4, 4)), torch.randn(5, 2, 4)
    prepared(model, "int8", x)
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(model))(x)[0], model(x)[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")  # which models that were scripted long ago still hold
def test_a_scripted_submodule_is_left_alone() -> None:
    model, x = nn.Sequential(torch.jit.script(nn.ReLU()), nn.Linear(2, 2)), torch.randn(4, 2)
    assert [layer.name for layer in make_plan(model, [{"op_names": ["1"]}], example_input=x).layers] == ["1"]
    assert [layer.name for layer in make_plan(model, LINEAR).layers] == ["1"]


def test_not_a_number_in_one_channel_is_reported_and_left_out() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 3, 1)), torch.randn(4, 3, 5, 5)
    config = {"op_types": ["Conv2d"], "target_settings": {"_input_": {"granularity": "per_channel"}}}
    prepare_model(model, make_plan(model, config, example_input=x)).train()
    bad = x.clone()
    bad[0, 0, 0, 0] = torch.nan
    with pytest.warns(UserWarning, match="NaN or infinity; it does not move the range"):
        model(bad)
    assert quantizer_state(model)["0._input_"]["low"] is None
    model(x)
    assert torch.equal(quantizer_state(model)["0._input_"]["low"].flatten(), x.amin((0, 2, 3)))


def test_blocks_of_another_shape_are_refused_in_eval_mode_too() -> None:
    model, x = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Conv1d(4, 4, 1)), torch.randn(8, 3, 10)
    config = {"op_types": ["Conv1d"], "target_settings": {"_output_": {"granularity": "per_channel"}}}
    prepared(model, config, x)
    deployed = convert_model(model)
    for net in (model, deployed):
        with torch.no_grad(), pytest.raises(ConfigError, match=r"shape \(4, 8\) met scales for the blocks of another shape"):
            net(x[0])


# -- onnxruntime computes what the deployed layer computes ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape", "entry"),
    [
        (nn.ConvTranspose2d(4, 6, 3), (4, 4, 5, 5), {}),
        (nn.Linear(16, 8), (32, 16), {"granularity": "in_channel"}),
        (nn.Linear(16, 8), (32, 16), {"granularity": [1, 4]}),
        (nn.Conv2d(4, 8, 3), (4, 4, 8, 8), {"granularity": [[1, 2], "back", -1]}),
        (nn.Linear(16, 8), (32, 16), {"target_settings": {"weight": {"apply_method": "bypass"}}}),
        (nn.Conv2d(4, 8, 3), (4, 4, 8, 8), {"target_settings": {"weight": {"apply_method": "bypass"}}}),
        (nn.Conv2d(4, 8, 3), (4, 4, 8, 8), {"quant_dtype": "int16"}),
        (nn.Linear(16, 8), (32, 16), {"quant_dtype": "int12"}),
        (nn.Conv2d(4, 8, 3), (4, 4, 8, 8), {"target_settings": {"_input_": {"granularity": "per_channel"}}}),
    ],
    ids=str,
)
def test_onnxruntime_rounds_nothing_again(layer: nn.Module, shape: tuple[int, ...], entry: Any, tmp_path: Any) -> None:
    model, x = nn.Sequential(layer, nn.ReLU()), torch.randn(shape)
    targets = ["_input_", "weight", "_output_"]
    prepared(model, {"op_names": ["0"], "target_names": targets, **entry}, x)
    deployed = convert_model(model)
    session = onnxruntime_session(export_model(deployed, tmp_path / "model.onnx", example_input=x))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        wanted = deployed(x)
    # float sums are taken in another order: now and then a value lies on the other side of half a step
    apart = (torch.as_tensor(found) - wanted).abs() > 1e-5 * wanted.abs().max()
    assert apart.float().mean() < 0.004


def test_planning_leaves_a_bounded_embedding_as_it_was() -> None:
    table = nn.Embedding(5, 4, max_norm=0.1)
    before = table.weight.detach().clone()
    make_plan(nn.Sequential(table, nn.Linear(4, 4)), LINEAR, example_input=torch.tensor([1, 2]))
    assert torch.equal(table.weight, before)


def test_readers_with_other_observers_have_ranges_of_their_own() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    x = torch.randn(2, 4)
    assert source(Two(), LINEAR, x, "b") == "a._input_"
    assert source(Two(), [*LINEAR, {"op_names": ["b"], "observer": "minmax"}], x, "b") is None


def test_a_static_forward_has_its_first_argument() -> None:
    class Doubled(nn.Module):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return 2 * x

    model, x = nn.Sequential(Doubled()), torch.randn(2, 4)
    prepared(model, {"op_names": ["0"]}, x, settings={"Doubled": {"_input_": {}}})
    with torch.no_grad():
        assert (model(x) - 2 * x).abs().max() < 0.02 * x.abs().max()
    with pytest.raises(ConfigError, match="has no target '_input_999999'; the arguments of its forward are x"):
        make_plan(nn.Sequential(Doubled()), {"op_names": ["0"], "target_settings": {"_input_999999": {}}})


def test_a_parameter_of_a_module_that_is_registered_twice_is_one_target() -> None:
    box = Box(nn.Linear(4, 4))
    box.again = box.seq[0]
    (layer,) = make_plan(nn.Sequential(box), {"op_types": ["Box"]}, settings={"Box": {"*weight": {}}}).layers
    assert list(layer.targets) == ["seq.0.weight"]
