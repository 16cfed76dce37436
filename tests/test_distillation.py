# SPDX-License-Identifier: Apache-2.0
"""Owns distillation: losses against their formulas, fits against the same loss written into the step, what must stay."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from distils import (
    IMAGE,
    LAYERS,
    Distils,
    Make,
    added,
    begun,
    by_layer,
    copied,
    fit,
    teacher_net,
)
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toys import FUSED, Calls, Lit, Net, fingerprint

from lightning_quant import ConfigError, DistillationSetting, make_plan, prepare_model
from lightning_quant.config import parse_distillation
from lightning_quant.distillation import LOSSES, Projection, distance, feature_dim, plain
from lightning_quant.distiller import Distiller
from lightning_quant.prepare import apply_phase, give_to_optimizers
from lightning_quant.schedule import Phase


@pytest.fixture(autouse=True)
def _fresh(own_registries: None) -> None:
    """What a test registers is gone after it."""


# -- losses, in float64, from their formulas ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "dim"), [((5, 7), -1), ((3, 4, 7), -1), ((3, 7, 4), 1), ((2, 7, 3, 5), 1), ((2, 3, 5, 7), -1)])
def test_losses_are_their_formulas(shape: tuple[int, ...], dim: int) -> None:
    s, t = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    rows_s, rows_t = (x.movedim(dim, -1).reshape(-1, 7) for x in (s, t))
    p, q = (rows_t / 3).softmax(1), (rows_s / 3).softmax(1)
    expected = {
        "mse": ((s - t) ** 2).sum() / s.numel(),
        "kl": 9 * sum((p[i] * (p[i] / q[i]).log()).sum() for i in range(len(p))) / len(p),
        "cosine": sum(1 - rows_s[i] @ rows_t[i] / (rows_s[i].norm() * rows_t[i].norm()) for i in range(len(p))) / len(p),
    }
    if len(shape) > 2:
        maps = [(x**2).movedim(dim, -1).sum(-1).reshape(shape[0], -1) for x in (s, t)]
        unit = [torch.stack([one / one.norm() for one in m]) for m in maps]
        expected["attention"] = ((unit[0] - unit[1]) ** 2).mean()
    for method, value in expected.items():
        found = distance(method, s, t, dim=dim, temperature=3.0, where="here")
        assert found.shape == () and found.dtype == torch.float64
        torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-12)
        assert LOSSES[method](t, t, dim, 3.0).abs() < 1e-12


def test_half_precision_is_computed_in_float32() -> None:
    s, t = torch.randn(4, 9).bfloat16(), torch.randn(4, 9)
    for method in LOSSES:
        x, y = (s, t) if method != "attention" else (s[:, :, None], t[:, :, None])
        found = distance(method, x, y, dim=1, temperature=2.0, where="here")
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, distance(method, x.float(), y, dim=1, temperature=2.0, where="here"))


def test_kl_is_that_of_nni_for_two_dimensions() -> None:
    s, t = torch.randn(6, 10), torch.randn(6, 10)
    nni = F.kl_div((s / 2).log_softmax(-1), (t / 2).softmax(-1), reduction="batchmean") * 4
    torch.testing.assert_close(distance("kl", s, t, dim=-1, temperature=2.0, where="here"), nni)


def test_where_features_are() -> None:
    assert [feature_dim(nn.ReLU(), dims) for dims in (1, 2, 3, 4, 5)] == [-1, -1, -1, 1, 1]
    assert feature_dim(nn.Conv1d(1, 1, 1), 3) == feature_dim(nn.BatchNorm1d(2), 3) == 1
    assert feature_dim(nn.BatchNorm1d(2), 2) == feature_dim(nn.Linear(1, 1), 4) == feature_dim(nn.LayerNorm(2), 4) == -1


def test_a_projection_is_a_linear_layer_and_a_1x1_convolution() -> None:
    state = torch.random.get_rng_state()
    one, same = (Projection("a->b", 6, 4, dim) for dim in (1, -1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one.weight, same.weight) and one.weight.abs().max() <= 6**-0.5 and one.weight.std() > 0.15
    picture, rows = torch.randn(2, 6, 3, 5), torch.randn(2, 3, 6)
    torch.testing.assert_close(one(picture), F.conv2d(picture, one.weight[:, :, None, None], one.bias))
    torch.testing.assert_close(one(picture[..., 0]), F.conv1d(picture[..., 0], one.weight[:, :, None], one.bias))
    torch.testing.assert_close(one(rows[0]), F.linear(rows[0], one.weight, one.bias))
    torch.testing.assert_close(same(rows), F.linear(rows, one.weight, one.bias))


# -- what is tapped ----------------------------------------------------------------------------------------------------------


def test_every_member_of_a_fused_group_shows_its_own_output() -> None:
    """While nothing is rounded, taps of a prepared model see what those of the float model see; the end is rounded afterwards."""
    student, teacher, x = Net(), teacher_net().eval(), torch.randn(8, 3, 8, 8)
    twin = copy.deepcopy(student)
    names = [name for name in LAYERS if name != "flatten"]
    distiller = begun([{"op_names": names}], student, teacher)
    prepare_model(student, make_plan(student, FUSED, example_input=IMAGE))
    apply_phase(student, Phase(quantize=False))
    wanted, own = by_layer(teacher, x), by_layer(twin, x)
    expected = {f"{name}._output_": F.mse_loss(own[name], wanted[name]) for name in names}
    found = added(distiller, student, x)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7, msg=f"{name} differs")
    apply_phase(student, Phase())
    student(x)
    rounded = added(distiller, student, x)
    group = student.relu1.__dict__["_lightning_quant"]
    assert rounded["relu1._output_"] != found["relu1._output_"]
    with distiller.batch():
        student(x)
        assert distiller._run is not None
        (end,) = distiller._run.pairs[0].student["relu1", "_output_"]
    levels = end / group.output.grid().scale
    assert end.unique().numel() <= 256 and (levels - levels.round()).abs().max() < 1e-3  # on the grid of the group's end


class InPlace(Net):
    """A net that writes over what its batch norms and its input are."""

    def __init__(self) -> None:
        super().__init__()
        self.relu1, self.relu2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2))


@pytest.mark.parametrize("example", [True, False])
def test_a_tensor_counts_as_it_was_when_it_was_made(example: bool) -> None:
    student, teacher = InPlace(), InPlace()
    names = ["bn1", "relu1", "bn2", "pool"]
    distiller = begun([{"op_names": names}], student, teacher, IMAGE if example else None)
    for _ in range(3):
        x = torch.randn(8, 3, 8, 8)
        own, wanted = by_layer(copied(student, Net()), 2 * x), by_layer(copied(teacher, Net()).eval(), 2 * x)
        before = x.clone()
        found = added(distiller, student, x)
        for name in names:
            torch.testing.assert_close(found[f"{name}._output_"], F.mse_loss(own[name], wanted[name]))
        assert torch.equal(x, 2 * before)  # the teacher wrote over it, too, and took that back
    assert distiller._run is not None
    assert {key[0]: flag for key, flag in distiller._run.student.copies.items()} == {
        "bn1": True,
        "relu1": False,
        "bn2": True,
        "pool": False,
    }


def test_the_first_batch_has_the_tensors_themselves_as_later_ones_have() -> None:
    """A copy would pass its gradient on at another time, and sums of gradients would differ in their last bits."""
    student = Net()
    distiller = begun([{"op_names": ["relu1", "fc"]}], student, teacher_net())
    made: list[Tensor] = []
    student.relu1.register_forward_hook(lambda *call: made.append(call[2]))
    for _ in range(2):
        with distiller.batch():
            made.append(student(torch.randn(4, 3, 8, 8)))
            run = distiller._run
            assert run is not None
            run.student.settle()
            seen = run.pairs[0].student
            assert [seen["relu1", "_output_"][0] is made[-2], seen["fc", "_output_"][0] is made[-1]] == [True, True]
            distiller.loss()


def test_the_student_may_write_over_what_the_teacher_was_given() -> None:
    student, x = InPlace(), torch.randn(8, 3, 8, 8)
    distiller = begun([{"op_names": [""], "target_names": ["_input_"]}], student, teacher_net(), x)
    for _ in range(2):
        assert float(added(distiller, student, x.clone())["_input_"]) == 0


def test_a_step_may_write_over_the_output() -> None:
    student, teacher = Net(), teacher_net().eval()
    distiller = begun("mse", student, teacher)
    for _ in range(2):
        x = torch.randn(8, 3, 8, 8)
        expected = F.mse_loss(copied(student, Net())(x), teacher(x))
        with distiller.batch():
            out = student(x).mul_(3)
            (out.sum() + distiller.loss()).backward()
        torch.testing.assert_close(distiller.losses["_output_"], expected)


def test_inputs_and_further_outputs_are_targets() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Calls(lambda self, x, *, scale: (self.fc(x), {"no": 0}, x * scale), fc=nn.Linear(4, 4))
            self.named = Calls(lambda self, x: {"mean": self.fc(x).mean(0, keepdim=True), "all": self.fc(x)}, fc=nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Any:
            first, _, third = self.pair(x, scale=2.0)
            return self.named(first + third)

    student, teacher, x = Two(), Two(), torch.randn(6, 4)
    entries = [
        {"op_names": ["pair"], "target_names": ["_output_0", "_output_2"]},
        {"op_names": ["named"], "target_names": ["_input_", "_output_all"]},
        {"op_names": [""], "target_names": ["_input_", "_output_mean"]},
    ]
    distiller = begun(entries, student, teacher, x)
    found = added(distiller, student, x)
    parts = [(net.pair(x, scale=2.0), net) for net in (student, teacher)]
    made = [{"0": pair[0], "in": pair[0] + pair[2], **net.named(pair[0] + pair[2])} for pair, net in parts]
    expected = {
        "pair._output_": F.mse_loss(made[0]["0"], made[1]["0"]),
        "pair._output_2": torch.tensor(0.0),
        "named._input_": F.mse_loss(made[0]["in"], made[1]["in"]),
        "named._output_all": F.mse_loss(made[0]["all"], made[1]["all"]),
        "_input_": torch.tensor(0.0),
        "_output_mean": F.mse_loss(made[0]["mean"], made[1]["mean"]),
    }
    assert set(found) == {*expected, "loss"}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_a_module_that_is_called_twice_has_both_calls_compared() -> None:
    def twice() -> Calls:
        return Calls(lambda self, x: self.fc(self.fc(x)), fc=nn.Linear(4, 4))

    student, teacher, x = twice(), twice(), torch.randn(5, 4)
    found = added(begun([{"op_names": ["fc"]}], student, teacher, x), student, x)
    layers = [net.get_submodule("fc") for net in (student, teacher)]
    once, again = ([fc(x), fc(fc(x))] for fc in layers)
    expected = (F.mse_loss(once[0], again[0]) + F.mse_loss(once[1], again[1])) / 2
    torch.testing.assert_close(found["fc._output_"], expected)
    other = Calls(lambda self, x: self.fc(x), fc=nn.Linear(4, 4))
    with pytest.raises(ConfigError, match=r"fc\._output_ was there 2 times in the student's forward, and 1 times in that of the"):
        begun([{"op_names": ["fc"]}], student, other, x)


def test_of_several_links_the_nearest_counts() -> None:
    """As in NNI's DynamicLayerwiseDistiller."""
    student, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(5, 4)
    teacher = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    teacher[0].load_state_dict({key: value + (key == "bias") * 0.1 for key, value in student[0].state_dict().items()})
    teacher[1].load_state_dict({"weight": torch.eye(4), "bias": torch.zeros(4)})
    entry = {"op_names": ["0"], "link": ["2", "0", "1"], "lambda": 3}
    found = added(begun([entry], student, teacher, x), student, x)
    torch.testing.assert_close(found["0._output_"], torch.tensor(3 * 0.01))


def test_a_checkpointed_forward_counts_once() -> None:
    net, x = Net(), torch.randn(4, 3, 8, 8)

    def forward(self: nn.Module, x: Tensor) -> Any:
        return checkpoint(self.net, x, use_reentrant=False)

    student, teacher = Calls(forward, net=net), Calls(forward, net=teacher_net())
    distiller = begun([{"op_names": ["net.conv2", "net.pool"]}], student, teacher)
    with distiller.batch():
        student(x)
        distiller.loss().backward()
        assert distiller._run is not None and not distiller._run.pairs
    assert net.conv1.weight.grad is not None
    again = copied(net, Net())
    distiller = begun([{"op_names": ["conv2", "pool"]}], again, teacher.net)
    with distiller.batch():
        again(x)
        distiller.loss().backward()
    torch.testing.assert_close(net.conv1.weight.grad, again.conv1.weight.grad)


def test_a_checkpoint_around_the_model_counts_once() -> None:
    student, teacher, x = Net(), teacher_net().eval(), torch.randn(4, 3, 8, 8)
    expected = F.mse_loss(copied(student, Net())(x), teacher(x))
    distiller = begun("mse", student, teacher)
    with distiller.batch():
        out = checkpoint(student, x, use_reentrant=False)
        (out.sum() + distiller.loss()).backward()
        assert distiller._run is not None
        assert not distiller._run.pairs
        assert distiller.loss() == 0
    torch.testing.assert_close(distiller.losses["loss"], expected)


def test_the_teacher_meets_what_the_student_is_called_with() -> None:
    """Not what hooks of the user's make of it: a copy of the student has these hooks, too. A forward may fail."""

    def forward(self: Any, x: Tensor) -> Any:
        y = self.fc(x)
        if self.__dict__.pop("fails", False):
            raise ValueError("on purpose")
        return y

    student, x = Calls(forward, fc=nn.Linear(3, 2)), torch.randn(5, 3)
    student.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    distiller = begun(["mse", {"op_names": ["fc"], "target_names": ["_input_"]}], student, "self", x)
    student.__dict__["fails"] = True
    with distiller.batch():
        with pytest.raises(ValueError, match="on purpose"):
            student(x)
        student(x)
        distiller.loss()
    assert {name: float(value) for name, value in distiller.losses.items()} == {"_output_": 0, "fc._input_": 0, "loss": 0}


def test_a_layer_that_training_leaves_out_adds_nothing() -> None:
    def skipping(self: Any, x: Tensor) -> Any:
        return x if self.training and self.__dict__.get("short") else self.fc(x)

    student, teacher, x = Calls(skipping, fc=nn.Linear(4, 4)), Calls(skipping, fc=nn.Linear(4, 4)), torch.randn(3, 4)
    distiller = begun([{"op_names": ["fc"]}, "mse"], student, teacher, x)
    student.__dict__["short"] = True
    assert set(added(distiller, student, x)) == {"_output_", "loss"}
    student.__dict__["short"] = False
    assert set(added(distiller, student, x)) == {"_output_", "fc._output_", "loss"}


# -- entries -----------------------------------------------------------------------------------------------------------------


def test_later_entries_and_targets_win() -> None:
    DistillationSetting.register("Conv2d", {"_output_": {"lambda": 0.25}, "_input_": {"lambda": 0.125}})
    entries = [
        {"op_types": ["Conv2d"], "apply_method": "cosine", "target_settings": {"_input_": {"apply_method": "mse"}}},
        {"op_names_re": ["conv2"], "target_names": ["_output_"], "lambda": 2, "link": "conv1"},
        {"op_types": ["ReLU"], "exclude_op_names": ["relu1"]},
        {"op_names": ["", "fc"], "apply_method": "kl", "temperature": 3},
    ]
    distiller = begun(entries, Net(), Net(), None)
    assert distiller.links is not None
    rows = {link.name: (link.method, link.weight, link.teachers, link.temperature) for link in distiller.links.links}
    assert rows == {
        "conv1._output_": ("cosine", 0.25, ("conv1",), 2.0),
        "conv1._input_": ("mse", 0.125, ("conv1",), 2.0),
        "conv2._input_": ("mse", 0.125, ("conv2",), 2.0),
        "conv2._output_": ("mse", 2.0, ("conv1",), 2.0),
        "relu2._output_": ("mse", 1.0, ("relu2",), 2.0),
        "_output_": ("kl", 1.0, ("",), 3.0),
        "fc._output_": ("kl", 1.0, ("fc",), 3.0),
    }
    text = str(distiller.links)
    assert "overrules distillation[0]" in text and "kl (temperature 3)" in text and "the model" in text
    weighed = begun({"config_list": "kl", "origin_loss_lambda": 0}, Net(), Net(), None)
    assert "note: the loss of the step itself is weighed by 0" in str(weighed.links)
    page = weighed.links._repr_html_()  # type: ignore[union-attr]
    assert "<table" in page and "kl (temperature 2)" in page and "the loss of the step itself is weighed by 0" in page
    before = str(weighed.links)
    weighed.end()
    assert str(weighed.links) == before  # to be looked at after a fit


Both = NamedTuple("Both", [("features", Tensor), ("logits", Tensor)])  # noqa: UP014
MANY: dict[str, tuple[Callable[[Tensor, Tensor], Any], str, str]] = {
    "dict": (lambda a, b: {"features": a, "logits": b}, "_output_features, _output_logits", "_output_logits"),
    "tuple": (lambda a, b: (a, b), "_output_0, _output_1", "_output_1"),
    "named tuple": (Both, "_output_0, _output_1", "_output_1"),
}


def many(make: Callable[[Tensor, Tensor], Any]) -> Calls:
    def forward(self: Any, x: Tensor) -> Any:
        features = self.body(x)
        return make(features, self.fc(features))

    return Calls(forward, body=nn.Linear(3, 6), fc=nn.Linear(6, 4))


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("example", [True, False])
def test_of_several_outputs_one_is_named(name: str, example: bool) -> None:
    make, said, wanted = MANY[name]
    student, teacher, x = many(make), many(make), torch.randn(5, 3)
    shown = wanted if name == "dict" else "_output_0"
    text = (
        rf"distillation\[0\]: the student returns 2 tensors, {said}, and it is not said .* 'kl', 'target_names': \['{shown}'\]}}"
    )
    with pytest.raises(ConfigError, match=text):
        added(begun("kl", student, teacher, x if example else None), student, x)
    first = [net.get_submodule("body")(x) for net in (student, teacher)]
    logits = [net.get_submodule("fc")(features) for net, features in zip((student, teacher), first, strict=True)]
    entries = [{"apply_method": "kl", "target_names": [wanted]}, {"op_names": ["fc"]}]
    found = added(begun(entries, student, teacher, x), student, x)
    torch.testing.assert_close(found[wanted], distance("kl", *logits, dim=-1, temperature=2.0, where="here"))
    assert set(found) == {wanted, "fc._output_", "loss"}
    if name != "dict":
        found = added(begun([{"target_names": ["_output_0"]}], student, teacher, x), student, x)
        torch.testing.assert_close(found["_output_"], F.mse_loss(*first))


def test_of_several_outputs_of_a_teacher_one_is_named() -> None:
    teacher, x = many(lambda a, b: {"features": a, "logits": b}), torch.randn(5, 3)
    student = Calls(lambda self, x: self.net(x)["logits"], net=many(lambda a, b: {"features": a, "logits": b}))
    with pytest.raises(ConfigError, match=r"the teacher returns 2 tensors, _output_features, _output_logits, .*`link` name the"):
        begun("kl", student, teacher, x)
    found = added(begun([{"apply_method": "kl", "link": "fc"}], student, teacher, x), student, x)
    expected = distance("kl", student(x), teacher(x)["logits"], dim=-1, temperature=2.0, where="here")
    torch.testing.assert_close(found["_output_"], expected)


def test_one_tensor_among_other_things_needs_no_name() -> None:
    student, teacher = (many(lambda a, b: {"logits": b, "length": 3}) for _ in "ab")
    x = torch.randn(5, 3)
    found = added(begun("mse", student, teacher, x), student, x)
    torch.testing.assert_close(found["_output_"], F.mse_loss(student(x)["logits"], teacher(x)["logits"]))


def absolute(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).abs().mean()


def test_functions_and_their_paths() -> None:
    student, teacher, x = Net(), teacher_net().eval(), torch.randn(4, 3, 8, 8)
    entries = [{"op_names": ["pool"], "apply_method": absolute}, {"apply_method": f"{__name__}.absolute"}]
    found = added(begun(entries, student, teacher, x), student, x)
    own, wanted = by_layer(copied(student, Net()), x), by_layer(teacher, x)
    torch.testing.assert_close(found["pool._output_"], (own["pool"] - wanted["pool"]).abs().mean())
    torch.testing.assert_close(found["_output_"], (own["fc"] - wanted["fc"]).abs().mean())
    assert plain(entries) == [{"op_names": ["pool"], "apply_method": f"{__name__}.absolute"}, entries[1]]


def test_a_net_inside_the_lightning_module() -> None:
    """Names are the model's, the teacher may be a bare net or another LightningModule, or the root may be the net."""

    class Outer(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.other = Net(), nn.Linear(2, 2)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            out: Tensor = self.net(batch)
            return out.sum()

    student, x = Outer(), torch.randn(4, 3, 8, 8)
    bare = teacher_net().eval()
    whole = Outer()
    whole.net.load_state_dict(bare.state_dict())
    own, wanted = by_layer(copied(student.net, Net()), x), by_layer(bare, x)
    for teacher in (bare, whole):
        for root, name in ((None, "net.pool"), ("net", "pool")):
            distiller = begun(["mse", {"op_names": [name]}], student, teacher, entry="net", root=root)
            found = added(distiller, student.net, x)
            assert set(found) == {"_output_", "net.pool._output_", "loss"}
            torch.testing.assert_close(found["net.pool._output_"], F.mse_loss(own["pool"], wanted["pool"]))
            torch.testing.assert_close(found["_output_"], F.mse_loss(own["fc"], wanted["fc"]))
            own = by_layer(copied(student.net, Net()), x)
    with pytest.raises(ConfigError, match=r"'other' is not in 'net', the module that is called with the input"):
        begun([{"op_names": ["other"]}], student, bare, entry="net")
    with pytest.raises(ConfigError, match=r"link 'other' is outside of what is called with the input, 'net'\."):
        begun([{"op_names": ["net.fc"], "link": "other"}], student, whole, entry="net")


# -- bad input ---------------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[Any, str]] = {
    "a number": (
        3,
        r"distillation: expected a non-empty list of dicts, one dict or a loss \(mse, kl, cosine, attention\), got 3",
    ),
    "nothing": ([], "distillation: expected a non-empty list"),
    "no dict": ([3], r"distillation\[0\]: expected a dict, got 3"),
    "no loss": ("klx", r"distillation\[0\]: 'klx' is not one of mse, kl, .*'package\.module\.function'\. Did you mean 'kl'\?"),
    "unknown method": ([{"apply_method": "l3"}], r"distillation\[0\]\['apply_method'\]: 'l3' is not one of mse, kl, cosine"),
    "no module": ([{"apply_method": "no.such.function"}], r"\['apply_method'\]: 'no\.such\.function' cannot be imported"),
    "no function": ([{"apply_method": "math.pi"}], "'math.pi' is a float, not a function of"),
    "unknown key": ([{"op_name": ["a"]}], r"distillation\[0\]: unknown key 'op_name'; .* Did you mean 'op_names'\?"),
    "of pruning": (
        [{"sparse_ratio": 1}],
        r"'sparse_ratio' is a key of pruning, which has a list and settings of its own .*; allowed: apply_method, dim,",
    ),
    "a setting": ([{"target_settings": {"_output_": {"lamda": 1}}}], r"\['_output_'\]: unknown key 'lamda'"),
    "only exclude": ([{"exclude_op_names": ["a"]}], r"distillation\[0\]: there are only exclude keys; give op_names"),
    "temperature": ([{"temperature": 0}], "a temperature is greater than 0"),
    "dim": ([{"dim": 1.5}], r"\['dim'\]: expected an integer from -16 to 16, got 1\.5"),
    "own weight": ({"config_list": "kl", "origin_loss_lambda": -1}, r"\['origin_loss_lambda'\]: -1 is not in the range"),
    "own key": ({"config_list": "kl", "loss": 1}, "distillation: unknown key 'loss'; allowed: config_list, origin_loss_lambda"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_without_a_model(name: str) -> None:
    given, text = BAD[name]
    with pytest.raises(ConfigError, match=text):
        Distiller(given, "self")


def test_both_or_neither() -> None:
    with pytest.raises(ConfigError, match="distillation: there is no teacher; give teacher: a module"):
        Distiller("kl", None)
    with pytest.raises(ConfigError, match="teacher: nothing is to be learned from it; give distillation"):
        Distiller(None, Net())
    for teacher in (3, "", {"class_path": "a"}, {"class_path": 1, "ckpt_path": 2}):
        with pytest.raises(ConfigError, match=r"teacher: expected a (module|dict of class_path and ckpt_path)"):
            Distiller("kl", teacher)
    assert parse_distillation("kl") == parse_distillation(["kl"])


def scalarless(student: Tensor, teacher: Tensor) -> Any:
    return student - teacher


def failing(student: Tensor, teacher: Tensor) -> Any:
    raise ValueError("no")


class Sloppy(Net):
    """Returns other things than tensors, and has a layer that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(2, 2)
        self.words = Calls(lambda self, x: "words")

    def forward(self, x: Tensor) -> Tensor:
        self.words(x)
        return super().forward(x)


WRONG: dict[str, tuple[Any, Callable[[], nn.Module], str]] = {
    "unknown link": (
        [{"op_names": ["conv1"], "link": "conv9"}],
        Net,
        r"link 'conv9' is no module of the teacher, a Net\. Close: '",
    ),
    "unknown auto": (
        [{"op_names": ["idle"]}],
        Net,
        r"link 'auto': 'idle' is no module of the teacher, a Net.* Give `link`, a module",
    ),
    "unknown name": ([{"op_names": ["conv9"]}], Net, r"op_names 'conv9' matches no module\. Close: 'conv"),
    "parameter": (
        [{"op_names": ["fc"], "target_names": ["weight"]}],
        Net,
        "target 'weight' of 'fc': distillation compares what goes",
    ),
    "argument": ([{"op_names": ["fc"], "target_names": ["_input_3"]}], Net, "'fc' has no argument '_input_3'; it has input"),
    "temperature": (
        [{"temperature": 3}],
        Net,
        r"the model\._output_: temperature is for 'kl', and the loss is 'mse'; leave it out",
    ),
    "not called": ([{"op_names": ["idle"]}], Sloppy, "'idle' is not called in the student's forward, so there is nothing to"),
    "not called there": (
        [{"op_names": ["fc"], "link": "idle"}],
        Sloppy,
        "'idle' is not called in the teacher's forward, so there is nothing to compare",
    ),
    "no tensor": ([{"op_names": ["words"]}], Sloppy, "'words': its _output_ in the student's forward is no tensor but: a str"),
    "no such output": (
        [{"op_names": ["fc"], "target_names": ["_output_1"]}],
        Net,
        "'fc': its _output_1 in the student's forward is no tensor but: _output_",
    ),
    "spatial": (
        [{"op_names": ["pool"], "link": "conv1"}],
        Net,
        r"\(2, 8, 4, 4\) in the student and \(2, 8, 8, 8\) in the teacher \('conv1'\): they may differ in dimension 1",
    ),
    "dimensions": ([{"op_names": ["fc"], "link": "conv1"}], Net, "2 dimensions cannot be compared with 4"),
    "classes": (
        [{"apply_method": "kl"}],
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5)),
        "kl compares classes one by one, and there are other numbers of them",
    ),
    "attention": ([{"apply_method": "attention"}], Net, "attention compares maps over positions, and there is one position"),
    "no dimension": ([{"dim": 2}], Net, "there is no dimension 2"),
    "no scalar": ([{"apply_method": scalarless}], Net, r"scalarless returned a tensor of shape \(2, 4\); a loss is one number"),
    "no tensor of a function": ([{"apply_method": lambda s, t: None}], Net, "returned a NoneType; a loss is one number"),
    "a function fails": ([{"apply_method": failing}], Net, "failing fails: ValueError: no"),
    "input": ("mse", lambda: nn.Linear(3, 4), "teacher: its forward fails on what the student is called with: RuntimeError: "),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_model(name: str) -> None:
    entries, make, text = WRONG[name]
    student, teacher = Sloppy(), make()
    before = fingerprint(student), fingerprint(teacher)
    with pytest.raises(ConfigError, match=text):
        begun(entries, student, teacher)
    assert (fingerprint(student), fingerprint(teacher)) == before


def test_problems_are_told_together() -> None:
    with pytest.raises(ConfigError, match=r"(?s)2 problems:.*conv9.*conv8"):
        begun([{"op_names": ["conv9"]}, {"op_names": ["fc"], "link": "conv8"}], Net(), Net())


def test_the_student_is_no_teacher_of_itself() -> None:
    model = Net()
    for teacher in (model, model.conv1):
        with pytest.raises(
            ConfigError, match=r"teacher: it has parameters of the student \(.*give teacher='self' for the student"
        ):
            begun("mse", model, teacher)


def test_the_first_batch_must_call_the_model(quiet_trainer: Make) -> None:
    class Around(Lit):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return F.cross_entropy(self.forward(batch[0]), batch[1])

    with pytest.raises(ConfigError, match=r"the first training batch did not call Around \('the model'\) with gradients"):
        fit(quiet_trainer, Around(), Distils("kl", teacher_net()))


def test_without_an_example_problems_show_in_the_first_batch() -> None:
    student, x = Net(), torch.randn(4, 3, 8, 8)
    wide = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Flatten(), nn.Linear(320, 4))
    for entry, text in (
        ({"op_names": ["conv2"], "link": "0"}, "a projection between them must be known before training; give example_input"),
        ({"op_names": ["pool"], "link": "0"}, r"shape \(4, 8, 4, 4\) in the student and \(4, 5, 8, 8\) in the teacher"),
    ):
        distiller = begun([entry], student, wide, None)
        distiller.start()
        student(x)
        with pytest.raises(ConfigError, match=text):
            distiller.loss()
        distiller.end()


def test_a_state_of_another_distillation_is_refused() -> None:
    wide = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Flatten(), nn.Linear(320, 4))
    one = begun([{"op_names": ["conv2"], "link": "0"}], Net(), wide)
    two, three = begun("mse", Net(), wide), begun("mse", Net(), "self")
    with pytest.raises(ConfigError, match=r"projections are of another distillation: \['conv2.*'\] there, \[\] here"):
        two.load_state_dict(one.state_dict())
    wider = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Flatten(), nn.Linear(384, 4))
    with pytest.raises(ConfigError, match=r"->0.weight \(5, 8\)'\] there, .*->0.weight \(6, 8\)'\] here"):
        begun([{"op_names": ["conv2"], "link": "0"}], Net(), wider).load_state_dict(one.state_dict())
    with pytest.raises(
        ConfigError, match="'self' is the float model when training began, and the checkpoint is of a run that did"
    ):
        three.load_state_dict(two.state_dict())
    with pytest.raises(ConfigError, match="the checkpoint's teacher is another model than this one"):
        begun("mse", nn.Sequential(nn.Conv2d(3, 1, 1)), "self").load_state_dict(three.state_dict())
    state = three.state_dict()
    three.end()
    fresh = Distiller("mse", "self")
    assert fresh.state_dict() == {} and fresh.links is None and fresh.losses == {} and fresh.loss() == 0
    for idle in (three, fresh):
        idle.load_state_dict(state)  # to be saved again, in an evaluation say
        assert idle.state_dict() == state
    again = begun("mse", Net(), "self")
    assert not torch.equal(again.state_dict()["teacher"]["fc.weight"], state["teacher"]["fc.weight"])
    again.load_state_dict(state)
    assert again.state_dict()["teacher"] == state["teacher"]
    student = Net()
    begun([{"op_names": ["conv2"], "link": "0"}], student, wide)
    with pytest.raises(ConfigError, match="is to be learned, but no optimizer has a parameter group"):
        give_to_optimizers(student, [])
