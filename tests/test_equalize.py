# SPDX-License-Identifier: Apache-2.0
"""Owns cross-layer equalization: the function stays, the factors are the paper's, what cannot be scaled is left."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prepare import traces
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_quant import ConfigError, make_plan, prepare_model
from lightning_quant.calibrate import calibrate
from lightning_quant.equalize import equalize_model


def scrambled(net: nn.Module, seed: int = 0) -> nn.Module:
    """Uneven weights, and batch norms that have seen data."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
                assert module.running_mean is not None
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.2, 3.0, generator=generator)
            for parameter in module._parameters.values():
                if parameter is not None:
                    lead = torch.rand(parameter.shape[0], *[1] * (parameter.dim() - 1), generator=generator, dtype=torch.float64)
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.copy_(noise * (4 * lead - 2).exp())
    return net


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return float((a - b).detach().abs().max()) <= tolerance * float(b.detach().abs().max())


class Functional(nn.Module):
    """Functions in place of modules, a mean for a pool and a channel that becomes several features."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 4, 3)
        self.c, self.d = nn.Linear(4 * 4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.a(x)), 2)
        x = F.dropout(F.leaky_relu(self.b(x)), 0.5, self.training)
        x = F.relu(self.c(x.view(x.shape[0], -1)))
        out: Tensor = self.d(x)
        return out


class Averaged(nn.Module):
    def __init__(self, keep: bool) -> None:
        super().__init__()
        self.conv, self.act, self.fc, self.keep = nn.Conv1d(2, 6, 3), nn.PReLU(6), nn.Linear(6, 3), keep

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x)).mean(-1, keepdim=self.keep)
        out: Tensor = self.fc(x.flatten(1))
        return out


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Linear(5, 3)), (7, 4), 2),
    "linear on 3-D": (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), (2, 5, 4), 1),
    "batch norm": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)
        ),
        (4, 3, 6, 6),
        1,
    ),
    "linear, batch norm": (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)), (9, 4), 1),
    "depthwise": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 6, 3, groups=6),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 4, 1),
        ),
        (2, 3, 5, 5),
        2,
    ),
    "grouped": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.LeakyReLU(), nn.Conv2d(6, 9, 1, groups=3), nn.Conv2d(9, 3, 1)),
        (2, 4, 5, 5),
        2,
    ),
    "1d, 3d, prelu": (
        lambda: nn.Sequential(
            nn.Conv3d(2, 4, 2), nn.PReLU(4), nn.AvgPool3d(2), nn.Conv3d(4, 3, 1), nn.Flatten(), nn.Linear(3, 2)
        ),
        (2, 2, 3, 3, 3),
        2,
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 6, 2, groups=2),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.ConvTranspose2d(6, 4, 2, groups=2),
            nn.ReLU(),
            nn.Conv2d(4, 2, 1),
        ),
        (2, 2, 5, 5),
        3,
    ),
    "flatten": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Dropout(), nn.MaxPool2d(2), nn.Flatten(), nn.Identity(), nn.Linear(16, 3)
        ),
        (3, 2, 4, 4),
        1,
    ),
    "unbatched": (lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 3, 1)), (2, 8), 1),
    "functions": (Functional, (3, 2, 10, 10), 3),
    "mean": (lambda: Averaged(False), (3, 2, 8), 1),
    "mean, dimension kept": (lambda: Averaged(True), (3, 2, 8), 1),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_function_stays(name: str, dtype: torch.dtype) -> None:
    make, shape, pairs = NETS[name]
    net, x = scrambled(make()).to(dtype).eval(), torch.randn(shape, dtype=dtype)
    before, weights = net(x), copy.deepcopy(net.state_dict())
    held = traces(net)
    report = equalize_model(net, example_input=x)
    assert len(report.pairs) == pairs, report
    assert all(pair.greatest / pair.least > 1.5 for pair in report.pairs), "nothing was uneven"
    assert any(not torch.equal(a, b) for a, b in zip(net.state_dict().values(), weights.values(), strict=True))
    assert close(net(x), before, 1e-10 if dtype == torch.float64 else 1e-5)
    assert traces(net) == held


@pytest.mark.parametrize("name", ["batch norm", "linear, batch norm", "depthwise", "transposed"])
def test_training_with_batch_norm_stays(name: str) -> None:
    """Outputs on batch statistics and the statistics that are left behind."""
    make, shape, _ = NETS[name]
    net, x = scrambled(make()).double().train(), torch.randn(shape, dtype=torch.float64)
    twin = copy.deepcopy(net)
    equalize_model(net, example_input=x)
    statistics = [(key, value) for key, value in twin.named_buffers()]
    assert statistics
    assert all(torch.equal(value, net.get_buffer(key)) for key, value in statistics), "recording moved them, or scaling did"
    for _ in range(2):
        assert close(net(x), twin(x), 1e-10)
    first = next(key for key, _ in statistics)
    assert torch.allclose(net.get_buffer(first), twin.get_buffer(first), rtol=1e-10)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_random_nets_keep_their_function(data: st.DataObject) -> None:
    channels = [data.draw(st.integers(1, 4)) for _ in range(data.draw(st.integers(2, 5)))]
    layers: list[nn.Module] = []
    for before, after in pairwise(channels):
        groups = data.draw(st.sampled_from([g for g in (1, 2, 3, 4) if before % g == 0 and after % g == 0]))
        kind = data.draw(st.sampled_from([nn.Conv2d, nn.ConvTranspose2d]))
        layers.append(kind(before, after, data.draw(st.integers(1, 2)), groups=groups, bias=data.draw(st.booleans())))
        if data.draw(st.booleans()):
            layers.append(nn.BatchNorm2d(after, affine=data.draw(st.booleans())))
        kinds: list[Callable[[], nn.Module]] = [nn.Identity, nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ReLU6, nn.GELU]
        layers.append(data.draw(st.sampled_from(kinds))())
        layers.append(data.draw(st.sampled_from([nn.Identity(), nn.AvgPool2d(1), nn.MaxPool2d(1)])))
    layers += [nn.Flatten(), nn.LazyLinear(2)]
    net, x = nn.Sequential(*layers).double(), torch.randn(2, channels[0], 9, 9, dtype=torch.float64)
    net(x)
    before_ = scrambled(net, data.draw(st.integers(0, 99))).eval()(x)
    heads = [module for module in net if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]
    report = equalize_model(net, example_input=x)
    assert len(report.pairs) + len(report.left) == len(heads)
    assert close(net(x), before_, 1e-10)


# -- the factors ------------------------------------------------------------------------------------------------------------


def test_one_round_has_the_papers_factors() -> None:
    """Equations 9 to 11, with a batch norm folded on both sides, in numpy."""
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4), nn.Tanh()
    )
    scrambled(net).double().eval()
    old = {key: value.detach().numpy().copy() for key, value in net.state_dict().items()}
    report = equalize_model(net, example_input=torch.randn(2, 3, 6, 6, dtype=torch.float64), iterations=1)
    k1 = np.abs(old["1.weight"]) / np.sqrt(old["1.running_var"] + 1e-5)
    k2 = np.abs(old["4.weight"]) / np.sqrt(old["4.running_var"] + 1e-5)
    r1 = np.abs(old["0.weight"]).reshape(5, -1).max(1) * k1
    r2 = (np.abs(old["3.weight"][:, :, 0, 0]) * k2[:, None]).max(0)
    s = r1 / np.sqrt(r1 * r2)
    new = {key: value.detach().numpy() for key, value in net.state_dict().items()}
    np.testing.assert_allclose(new["1.weight"], old["1.weight"] / s, rtol=1e-12)
    np.testing.assert_allclose(new["1.bias"], old["1.bias"] / s, rtol=1e-12)
    np.testing.assert_allclose(new["3.weight"], old["3.weight"] * s[None, :, None, None], rtol=1e-12)
    for key in ("0.weight", "1.running_mean", "1.running_var", "3.bias", "4.weight"):
        np.testing.assert_array_equal(new[key], old[key])
    pair = report.pairs[0]
    assert (pair.first, pair.norm, pair.second) == ("0", "1", "3")
    np.testing.assert_allclose([pair.least, pair.greatest], [s.min(), s.max()], rtol=1e-12)


@pytest.mark.parametrize("name", ["grouped", "depthwise", "transposed", "flatten"])
def test_channels_are_balanced_at_the_end(name: str) -> None:
    """r1 = r2 for every channel of every pair, by a loop over channels with functional probes: which weights meet channel i."""
    make, shape, _ = NETS[name]
    net, x = scrambled(make()).double().eval(), torch.randn(shape, dtype=torch.float64)
    report = equalize_model(net, example_input=x, iterations=2000)
    modules = dict(net.named_modules())
    for pair in report.pairs:
        first, second = modules[pair.first], modules[pair.second]
        made = _reached(first, outputs=True)
        if pair.norm is not None:
            made = made * _scale(modules[pair.norm])
        behind = modules.get(str(int(pair.second) + 1))
        norm = behind if isinstance(behind, nn.BatchNorm2d) else None
        read = _reached(second, outputs=False, norm=norm)
        read = read.reshape(len(made), -1).amax(1)
        assert torch.allclose(made, read, rtol=1e-2), pair


def _scale(norm: nn.Module) -> Tensor:
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_var is not None
    return (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().abs()


def _reached(layer: nn.Module, *, outputs: bool, norm: nn.Module | None = None) -> Tensor:
    """The greatest |weight| that makes each output channel or that reads each input channel, found by gradients of the layer."""
    inputs = int(getattr(layer, "in_channels", 0) or getattr(layer, "in_features", 0))
    spatial = layer.get_parameter("weight").dim() - 2
    found: list[list[float]] = []
    alone = copy.deepcopy(layer).double()
    for channel in range(inputs):
        x = torch.zeros(1, inputs, *[9] * spatial, dtype=torch.float64)
        x[(0, channel, *[4] * spatial)] = 1.0
        bias = alone.get_parameter("bias").detach().view(1, -1, *[1] * spatial)
        y = (torch.as_tensor(alone(x)).detach() - bias).abs()
        found.append(y.flatten(2).amax(2)[0].tolist() if spatial else y[0].tolist())
    table = torch.tensor(found, dtype=torch.float64)  # (in, out)
    if norm is not None:
        table = table * _scale(norm)
    return table.amax(0 if outputs else 1)


def test_dead_channels_keep_their_scale() -> None:
    first, second = nn.Linear(3, 4), nn.Linear(4, 2)
    net = scrambled(nn.Sequential(first, nn.ReLU(), second)).double()
    with torch.no_grad():
        first.weight[1] = 0
        second.weight[:, 2] = 0
    old, was = copy.deepcopy(net), copy.deepcopy(first)
    x = torch.randn(5, 3, dtype=torch.float64)
    equalize_model(net, example_input=x)
    assert torch.equal(first.weight[1:3], was.weight[1:3])
    assert torch.equal(first.bias[1:3], was.bias[1:3])
    assert not torch.equal(first.weight[0], was.weight[0])
    assert close(net(x), old(x), 1e-10)


# -- what is left, and why --------------------------------------------------------------------------------------------------


class Wired(nn.Module):
    """Two linear layers with something of the test's own between them."""

    def __init__(self, between: Callable[[Wired, Tensor], Tensor], make: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.between, self.extra = between, nn.Identity() if make is None else make()

    def forward(self, x: Tensor) -> Tensor:
        return self.between(self, x)


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    net[2].weight = net[0].weight
    return net


def hooked(where: int, pre: bool) -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    if pre:
        net[where].register_forward_pre_hook(lambda m, i: None)
    else:
        net[where].register_forward_hook(lambda m, i, o: None)
    return net


def parametrized() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    parametrizations.weight_norm(net[0])
    return net


def replaced() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    net[1].forward = torch.sin
    return net


def patched() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.__dict__["forward"] = lambda x: F.linear(x, layer.weight).sin()
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(4, 2))


def norm(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, **options), nn.ReLU(), nn.Linear(4, 2))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "relu6": (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU6(), nn.Linear(4, 2)), "0", r"'1' \(ReLU6\) cuts off at 6; a scaled"),
    "hardtanh": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Hardtanh(0, 2), nn.Linear(4, 2)),
        "0",
        r"'1' \(Hardtanh\) cuts off at 2; a scaled channel would be cut off elsewhere",
    ),
    "hardtanh, function": (lambda: Wired(lambda n, x: n.b(F.hardtanh(n.a(x)))), "a", r"\(hardtanh\) cuts off at -1 and 1"),
    "gelu": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)),
        "0",
        r"'1' \(GELU\) stands behind it, out of which",
    ),
    "alpha dropout": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.AlphaDropout(), nn.Linear(4, 2)),
        "0",
        r"\(AlphaDropout\) stands behind",
    ),
    "layer norm": (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)), "0", r"'1' \(LayerNorm\) stands"),
    "norm behind": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 2)),
        "0",
        r"'2' \(BatchNorm1d\) stands behind it",
    ),
    "added": (lambda: Wired(lambda n, x: n.b(n.a(x) + x)), "a", r"'add' \(add\) stands behind it"),
    "two readers": (lambda: Wired(lambda n, x: n.b(y := F.relu(n.a(x))) + y), "a", r"what 'relu' makes is read by 'b', 'add'"),
    "twice the same": (lambda: Wired(lambda n, x: n.b((y := n.a(x)) * y)), "a", r"'mul' \(mul\) stands behind it"),
    "returned": (lambda: Wired(lambda n, x: (y := n.a(x), n.b(y))), "a", "the model returns or keeps what 'a' makes"),  # type: ignore[arg-type,return-value]
    "last": (lambda: nn.Sequential(nn.Linear(4, 4)), "0", "the model returns or keeps what '0' makes"),
    "unread": (lambda: Wired(lambda n, x: (n.a(x), n.b(x))[1]), "a", "nothing reads what 'a' makes"),
    "written over": (
        lambda: Wired(lambda n, x: (y := n.a(x), F.relu_(y), n.b(y))[2]),
        "a",
        r"'relu' works in place and its input is used afterwards",
    ),
    "called twice": (lambda: Wired(lambda n, x: n.b(n.a(n.a(x)))), "a", "'a' is called 2 times"),
    "second called twice": (lambda: Wired(lambda n, x: n.b(n.b(n.a(x)))), "a", "'b' is called 2 times"),
    "not called": (lambda: Wired(lambda n, x: n.b(x)), "a", "'a' is not called in the recorded forward"),
    "tied": (tied, "0", "the weight of '2' is shared with '0'"),
    "tied to the next": (tied, "2", "the weight of '2' is shared with '0'"),
    "read elsewhere": (lambda: Wired(lambda n, x: n.b(n.a(x)) @ n.a.weight), "a", "the weight of 'a' is also read by 'matmul'"),
    "parametrized": (parametrized, "0", "the weight of '0' is computed from others, or missing"),
    "hook": (lambda: hooked(0, False), "0", "a hook on '0' reads what would be scaled"),
    "hook between": (lambda: hooked(1, True), "0", "a hook on '1' reads what would be scaled"),
    "hook before the second": (lambda: hooked(2, True), "0", "a hook on '2' reads what would be scaled"),
    "forward on the instance": (replaced, "0", "'1' has a forward of its own on the instance"),
    "own forward on the instance": (patched, "0", "'0' has a forward of its own on the instance; what it computes is unknown"),
    "norm without weight": (lambda: norm(affine=False), "0", r"'1' has no weight to scale \(affine=False\)"),
    "norm without statistics": (lambda: norm(track_running_stats=False), "0", "'1' has no running statistics"),
    "pool over channels": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.MaxPool1d(1), nn.Linear(4, 2)),
        "0",
        "'1' pools over its channels",
    ),
    "mean of channels": (
        lambda: Wired(lambda n, x: n.b(n.a(x).mean(1, keepdim=True).expand(-1, 4))),
        "a",
        "'mean' reduces its channels",
    ),
    "mixed": (
        lambda: Wired(lambda n, x: n.b(n.a(x).reshape(-1, 2).reshape(-1, 4))),
        "a",
        "'reshape' does not keep its channels apart",
    ),
    "another dimension": (
        lambda: Wired(lambda n, x: n.b(n.a(x).unsqueeze(-1).mT.mT.squeeze(-1))),
        "a",
        r"\(mT\) stands behind it",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_scaled_is_left(name: str) -> None:
    make, layer, reason = REFUSED[name]
    net, x = make().eval(), torch.randn(4, 4)
    numbers = copy.deepcopy(net.state_dict())
    report = equalize_model(net, example_input=x)
    assert all(pair.first != layer for pair in report.pairs)
    with pytest.raises(ConfigError, match=reason):
        raise ConfigError(report.left[layer])
    assert f"left as it is: {layer}: {report.left[layer]}" in str(report)
    if not report.pairs:
        assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), numbers.values(), strict=True))


def test_a_batch_norm_of_another_dimension_is_left() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval()
    report = equalize_model(net, example_input=torch.randn(2, 4, 4))
    assert report.left["0"] == "'1' normalises another dimension than that of its channels"
    conv = nn.Sequential(nn.Conv1d(2, 4, 1), nn.ReLU(), nn.Linear(4, 2))
    report = equalize_model(conv, example_input=torch.randn(2, 2, 4))
    assert report.left["0"] == "'2' reads another dimension than that of its channels"


def test_without_an_example_shapes_decide_nothing() -> None:
    net = scrambled(
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Linear(3, 2))
    )
    net, x = net.double().eval(), torch.randn(2, 2, 3, 3, dtype=torch.float64)
    before = net(x)
    report = equalize_model(net)
    assert [pair.first for pair in report.pairs] == ["0"]
    assert report.left["3"] == "only example_input can show where '4' puts its channels"
    assert close(net(x), before, 1e-10)
    assert equalize_model(Averaged(False)).left["conv"] == "only example_input can show what 'mean' does to its channels"
    assert equalize_model(norm()).left["0"] == "only example_input can show which dimension '1' normalises"


def test_the_report_can_be_read() -> None:
    net = scrambled(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))).eval()
    lines = str(equalize_model(net, example_input=torch.randn(2, 4))).splitlines()
    assert lines[0].startswith("0 + 1 -> 3: factors ")
    assert lines[1] == "left as it is: 3: the model returns or keeps what '3' makes"


def test_equalizing_again_changes_nothing_more() -> None:
    make, shape, _ = NETS["depthwise"]
    net, x = scrambled(make()).double().eval(), torch.randn(shape, dtype=torch.float64)
    assert equalize_model(net, example_input=x).rounds > 2
    again = equalize_model(net, example_input=x)
    assert again.rounds == 1
    assert all(abs(value - 1) < 1e-3 for pair in again.pairs for value in (pair.least, pair.greatest))


def test_wrong_calls_are_errors() -> None:
    net, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 4)
    with pytest.raises(ConfigError, match="iterations=0 is no number of rounds; give 1 or more"):
        equalize_model(net, example_input=x, iterations=0)
    with pytest.raises(
        ConfigError, match=r"equalize_model: pairs are proven by a recorded forward, and there is none .*give example_input"
    ):
        equalize_model(Wired(lambda n, x: n.b(n.a(x)) if x.sum() > 0 else x))
    prepare_model(net, make_plan(net, "int8", example_input=x))
    with pytest.raises(
        ConfigError, match="Sequential is prepared, so its ranges would no longer fit; equalize before prepare_model"
    ):
        equalize_model(net, example_input=x)


# -- what it is for -----------------------------------------------------------------------------------------------------------


def test_uneven_channels_survive_rounding_per_tensor(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trained depthwise net on 400 pictures: about 69 % in float, 13 % rounded as it is, restored without training."""
    monkeypatch.syspath_prepend(str(shared / "data" / "float"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    from nets import RECIPES, unequalize  # type: ignore[import-not-found]

    data = np.load(shared / "data" / "emoji32.npz")

    def images(key: str, count: int) -> Tensor:
        return torch.from_numpy(data[key][:count]).permute(0, 3, 1, 2).float().div(127.5).sub(1)

    x, y = images("x_test", 400), torch.from_numpy(data["y_test"][:400].astype("int64"))
    net: nn.Module = RECIPES["emoji_ds_relu"][1]()
    net.load_state_dict(torch.load(shared / "data" / "float" / "emoji_ds_relu.pt", weights_only=True))
    unequalize(net.eval(), 30)
    config = ["int8", {"op_types": ["Conv2d", "Linear"], "granularity": "per_tensor"}]

    def accuracy(model: nn.Module) -> float:
        prepare_model(model, make_plan(model, config, example_input=x[:2]))
        calibrate(model, images("x_train", 128).split(64))
        with torch.no_grad():
            return float((model(x).argmax(1) == y).double().mean())

    assert accuracy(copy.deepcopy(net)) < 0.2
    equalize_model(net, example_input=x[:2])
    assert accuracy(net) >= 0.65
