# SPDX-License-Identifier: Apache-2.0
"""Owns training where it is hardest: gammas of zero, slow and coarse batch norm, single examples, tied weights, dead channels.

Real Trainer runs with the callback on scikit-learn's digits or a rule that can be learned; each beside its float twin, which
begins from the same weights and sees the same batches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant import QuantFusionCallback, make_plan, prepare_model
from lightning_quant.calibrate import calibrate
from lightning_quant.prepare import apply_phase, learned_parameters, quantizers_of
from lightning_quant.quantizers import Grid
from lightning_quant.schedule import Phase

TrainerMaker = Callable[..., Trainer]
LAYERS: list[dict[str, Any]] = [{"op_types": ["Conv2d", "Linear"]}]


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(1400 images (1, 8, 8) in [0, 1], labels, 397 further images, labels), in an order of chance."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16
    y = torch.tensor(data.target)[order]
    return x[:1400], y[:1400], x[1400:], y[1400:]


def batches(size: int, count: int = 1400, scale: float = 1.0) -> DataLoader[tuple[Tensor, ...]]:
    x, y, _, _ = digits()
    return DataLoader(TensorDataset(x[:count] * scale, y[:count]), batch_size=size)


def accuracy(model: nn.Module, scale: float = 1.0) -> float:
    """On the further images, in eval mode."""
    _, _, x, y = digits()
    with torch.no_grad():
        return float((model.eval()(x * scale).argmax(1) == y).double().mean())


class Task(LightningModule):
    """Trains a net by cross entropy; keeps the losses, the norm of each gradient and what is asked for of each step."""

    def __init__(self, net: nn.Module, lr: float, momentum: float = 0.9) -> None:
        super().__init__()
        self.net, self.lr, self.momentum = net, lr, momentum
        self.losses: list[float] = []
        self.finite = True

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def on_after_backward(self) -> None:
        self.finite &= all(bool(p.grad.isfinite().all()) for p in self.parameters() if p.grad is not None)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def fitted(
    make: TrainerMaker, net: nn.Module, data: Any, config: Any, *, lr: float = 0.05, epochs: int = 3, **options: Any
) -> tuple[Task, QuantFusionCallback | None]:
    """The net trained; in float where `config` is None."""
    task = Task(net, lr)
    callback = None if config is None else QuantFusionCallback(config, verbose=0, **options)
    make(max_epochs=epochs, callbacks=[] if callback is None else [callback]).fit(task, data)
    assert task.finite
    return task, callback


def deployed_of(callback: QuantFusionCallback | None, task: Task) -> nn.Module:
    """The converted net; what it computes is what the prepared net computes in eval mode, bit for bit."""
    assert callback is not None and callback.deployed_model is not None
    x = digits()[2]
    with torch.no_grad():
        y = callback.deployed_model(x)
        assert torch.equal(y, task.eval()(x))
    assert bool(y.isfinite().all())
    return callback.deployed_model


# -- gamma = 0 ---------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block whose last batch norm begins with weight 0: at first it hands on its input."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.down: nn.Module = nn.Identity()
        if stride > 1 or channels != width:
            self.down = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.down(x))


def residual() -> nn.Module:
    torch.manual_seed(4)
    stem = [nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*stem, Block(8, 8, 1), Block(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


@pytest.mark.parametrize(
    ("method", "granularity"),
    [
        ("qat", "default"),
        ("lsq", "default"),
        *(pytest.param(*p, marks=pytest.mark.slow) for p in (("qat", "per_tensor"), ("pact", "default"))),
    ],
)
def test_zero_initialised_residuals_learn_as_in_float(method: str, granularity: str, quiet_trainer: TrainerMaker) -> None:
    """Folded weights are all zero at first, and so is what comes out: neither grid may stay so. The last epoch's mean loss is
    within 0.15 of float's."""
    twin, _ = fitted(quiet_trainer, residual(), batches(50, 1000), None, lr=0.1)
    config = [{"op_types": ["Conv2d", "Linear", "add"], "method": method, "granularity": granularity}]
    task, callback = fitted(quiet_trainer, residual(), batches(50, 1000), config, lr=0.1)
    gammas = [task.net.get_parameter(f"{i}.bn2.weight") for i in (3, 4)]
    float_gammas = [twin.net.get_parameter(f"{i}.bn2.weight") for i in (3, 4)]
    for gamma, expected in zip(gammas, float_gammas, strict=True):
        assert bool((gamma != 0).all()), "every channel has left 0"
        assert 0.6 < float((gamma.norm() / expected.norm()).detach()) < 1.6
    first, last = mean(task.losses[:20]), mean(task.losses[-20:])
    expected_first, expected_last = mean(twin.losses[:20]), mean(twin.losses[-20:])
    assert expected_last < 0.5 * expected_first, "float learns"
    assert last < expected_last + 0.15
    assert first < expected_first + 0.1
    reference = residual()
    reference.load_state_dict(task.net.state_dict())
    bound = 0.06 if method == "pact" else 0.03  # its clip is part of what was trained, and the reference lacks it
    assert accuracy(deployed_of(callback, task)) >= accuracy(reference) - bound


# -- batch norm with a great eps and a small momentum ---------------------------------------------------------------------------


def plain(width: int = 12, **norm: Any) -> nn.Sequential:
    torch.manual_seed(5)
    parts: list[nn.Module] = []
    for before, after in ((1, width), (width, width)):
        parts += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after, **norm), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(4 * width, 10))


DARK = 0.05


def test_batch_norm_with_eps_1e_3_and_momentum_0_01(quiet_trainer: TrainerMaker) -> None:
    """MobileNet's and EfficientNet's numbers. The images are dark, so that variances are about eps, and a wrong eps shows.

    An epoch in float with the usual momentum comes first: from 0 and 1 statistics would take a thousand steps to arrive.
    """
    start, _ = fitted(quiet_trainer, plain(eps=1e-3), batches(20, scale=DARK), None, epochs=1)

    def make() -> nn.Module:
        net = copy.deepcopy(start.net)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.01
        return net

    twin, _ = fitted(quiet_trainer, make(), batches(20, scale=DARK), None, lr=0.01, epochs=1)
    task, callback = fitted(quiet_trainer, make(), batches(20, scale=DARK), LAYERS, lr=0.01, epochs=1)
    deployed = deployed_of(callback, task)
    assert accuracy(twin, DARK) > 0.9
    assert accuracy(deployed, DARK) >= accuracy(twin, DARK) - 0.02
    trained = task.net.state_dict()
    variance = trained["1.running_var"]
    assert float(variance.median()) < 3e-3, "eps is no trifle here"
    for name in ("1.running_var", "5.running_var", "1.running_mean", "5.running_mean"):
        ours, theirs = trained[name], twin.net.state_dict()[name]
        assert float((ours - theirs).norm() / theirs.norm()) < 0.25, name
    # The fold by the textbook, with the user's eps; with torch's default it would be far off.
    layer = deployed.get_submodule("net.0")
    found = layer.get_buffer("weight").double() * layer.get_buffer("scale").double().view(-1, 1, 1, 1)
    steps = {}
    for eps in (1e-3, 1e-5):
        factor = (trained["1.weight"].double() / (variance.double() + eps).sqrt()).view(-1, 1, 1, 1)
        folded = trained["0.weight"].double() * factor
        steps[eps] = float(((found - folded).abs() / layer.get_buffer("scale").double().view(-1, 1, 1, 1)).max())
    assert steps[1e-3] <= 0.51
    assert steps[1e-5] > 5
    reference = make()
    reference.load_state_dict(trained)
    assert accuracy(deployed, DARK) >= accuracy(reference, DARK) - 0.01


# -- one example a step ---------------------------------------------------------------------------------------------------------


def test_single_examples_with_frozen_batch_norm(quiet_trainer: TrainerMaker) -> None:
    """Batch norm behind a linear layer cannot even be computed from one example; frozen from the start it need not be."""
    torch.manual_seed(6)
    head: list[nn.Module] = [nn.Flatten(), nn.Linear(48, 24, bias=False), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 10)]
    start, _ = fitted(quiet_trainer, nn.Sequential(*list(plain())[:-2], *head), batches(20, 600), None, epochs=2)
    before = {name: value.clone() for name, value in start.net.state_dict().items()}
    singles, data = 150, digits()
    rest = DataLoader(TensorDataset(data[0][600 : 600 + singles], data[1][600 : 600 + singles]), batch_size=1)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        fitted(quiet_trainer, copy.deepcopy(start.net), rest, None, lr=0.0001, epochs=1)

    class Frozen(Task):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            for module in self.modules():
                module.training = not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)

    twin = Frozen(copy.deepcopy(start.net), 0.0001)
    quiet_trainer(max_epochs=1).fit(twin, rest)
    schedule = {"freeze_batch_norm": 0}
    task, callback = fitted(
        quiet_trainer, copy.deepcopy(start.net), rest, LAYERS, lr=0.0001, epochs=1, schedule=schedule, calibration=4
    )
    after = task.net.state_dict()
    norms = [name for name in after if "running" in name or "tracked" in name]
    assert len(norms) == 9, "three batch norms"
    assert all(torch.equal(after[name], before[name]) for name in norms)
    assert all(not torch.equal(after[name], before[name]) for name in after if name not in norms)
    assert len(task.losses) == singles
    assert mean(task.losses) < mean(twin.losses) + 0.05
    assert accuracy(twin) >= accuracy(start) - 0.01
    assert accuracy(deployed_of(callback, task)) >= accuracy(twin) - 0.02


# -- tied weights ---------------------------------------------------------------------------------------------------------------


class Language(nn.Module):
    """Says which of 24 words follows one of two others; its last layer is its embedding, and two inner layers share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(24, 16), nn.Linear(32, 16)
        self.inner, self.outer = nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 24, bias=False)
        self.tie()

    def tie(self) -> None:
        self.head.weight, self.outer.weight = self.table.weight, self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.mix(self.table(x).flatten(1)))
        y: Tensor = self.head(x + self.outer(torch.relu(self.inner(x))))
        return y


def words(batch: int = 48) -> DataLoader[tuple[Tensor, ...]]:
    """All pairs of words, and (7 b + 5) mod 24."""
    pairs = torch.cartesian_prod(torch.arange(24), torch.arange(24))[
        torch.randperm(576, generator=torch.Generator().manual_seed(2))
    ]
    return DataLoader(TensorDataset(pairs, (7 * pairs[:, 1] + 5) % 24), batch_size=batch)


TIES = [("table", "head"), ("inner", "outer")]


@pytest.mark.parametrize("method", ["qat", "lsq"])
def test_the_gradient_of_a_tied_weight_is_the_sum(method: str) -> None:
    """Of those that two separate weights of the same values get; and both layers round it to one grid."""
    torch.manual_seed(7)
    net = Language()
    x, y = next(iter(words()))
    entry = {"op_types": ["Embedding", "Linear"], "target_settings": {"weight": {"method": method}}}
    untied = copy.deepcopy(net)
    untied.head.weight, untied.outer.weight = (nn.Parameter(p.detach().clone()) for p in (net.table.weight, net.inner.weight))
    for model in (net, untied):
        prepare_model(model, make_plan(model, [entry], example_input=x))
        calibrate(model, [x])
        apply_phase(model.train(), Phase(observe=False))
        F.cross_entropy(model(x), y).backward()
    for one, other in TIES:
        parts = [untied.get_parameter(f"{name}.weight").grad for name in (one, other)]
        total = net.get_parameter(f"{one}.weight").grad
        assert total is not None and parts[0] is not None and parts[1] is not None
        assert all(float(part.abs().max()) > 1e-4 for part in parts if part is not None)
        torch.testing.assert_close(total, parts[0] + parts[1], rtol=1e-5, atol=1e-7)
    learned, separate = learned_parameters(net), learned_parameters(untied)
    assert len(separate) == (5 if method == "lsq" else 0)
    assert set(learned) == ({f"{name}.weight.scale" for name in ("table", "mix", "inner")} if method == "lsq" else set())
    for one, other in TIES if method == "lsq" else ():
        sums = [separate[f"{name}.weight.scale"].grad for name in (one, other)]
        assert sums[0] is not None and sums[1] is not None
        torch.testing.assert_close(learned[f"{one}.weight.scale"].grad, sums[0] + sums[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("method", ["qat", "lsq"])
def test_tied_weights_stay_tied(method: str, quiet_trainer: TrainerMaker) -> None:
    """Through fit and conversion, with the integers and scales of one grid; what is learned is within 3 points of float."""
    nets, reached = [], []
    for config in (None, [{"op_types": ["Embedding", "Linear"], "target_settings": {"weight": {"method": method}}}]):
        torch.manual_seed(7)
        task, callback = fitted(quiet_trainer, Language(), words(), config, lr=0.1, epochs=12)
        assert len(list(task.parameters())) == 6, "a weight each for two layers, twice, and mix, and three biases"
        for one, other in TIES:
            assert task.net.get_parameter(f"{one}.weight") is task.net.get_parameter(f"{other}.weight")
        shipped = task.eval() if callback is None else callback.deployed_model
        assert shipped is not None
        with torch.no_grad():
            outputs = [(shipped(x), task.eval()(x), y) for x, y in words()]
        assert all(torch.equal(a, b) for a, b, _ in outputs)
        reached.append(mean([float((a.argmax(1) == y).double().mean()) for a, _, y in outputs]))
        nets.append(shipped)
    assert reached[0] > 0.9, "float learns"
    assert reached[1] >= reached[0] - 0.03
    for one, other in TIES:
        first, second = (dict(nets[1].get_submodule(f"net.{name}").named_buffers()) for name in (one, other))
        scales = [next(v for k, v in buffers.items() if k.endswith("scale") and v.numel() > 1) for buffers in (first, second)]
        assert torch.equal(first["weight"], second["weight"])
        assert torch.equal(scales[0].flatten(), scales[1].flatten())
        assert first["weight"].dtype == torch.int8


# -- dead channels ---------------------------------------------------------------------------------------------------------------

WIDE, ALIVE = 12, 6


def half_dead() -> tuple[nn.Sequential, nn.Sequential]:
    """(a net half of whose channels are dead, the same net without them): one function.

    Of the dead ones of each convolution two have a weight of zeros, two a gamma of 0, and two never reach their ReLU.
    """
    small, wide = plain(ALIVE), plain(WIDE)
    with torch.no_grad():
        for conv, norm in ((0, 1), (4, 5)):
            alive_in = slice(None) if conv == 0 else slice(ALIVE)
            weight = wide.get_parameter(f"{conv}.weight")
            weight[:ALIVE, alive_in] = small.get_parameter(f"{conv}.weight")
            weight[ALIVE : ALIVE + 2] = 0
            wide.get_parameter(f"{norm}.weight")[ALIVE + 2 : ALIVE + 4] = 0
            wide.get_parameter(f"{norm}.bias")[ALIVE + 4 :] = -20
        wide.get_parameter("9.weight")[:, : 4 * ALIVE] = small.get_parameter("9.weight")
        wide.get_parameter("9.bias").copy_(small.get_parameter("9.bias"))
    return wide, small


@pytest.mark.parametrize("granularity", ["default", "per_tensor"])
def test_half_of_the_channels_are_dead(granularity: str, quiet_trainer: TrainerMaker) -> None:
    config = [{"op_types": ["Conv2d", "Linear"], "granularity": granularity}]
    wide, small = half_dead()
    with torch.no_grad():
        x = digits()[2]
        torch.testing.assert_close(wide.eval()(x), small.eval()(x), rtol=1e-5, atol=1e-5)
    task, callback = fitted(quiet_trainer, wide.train(), batches(35), config, lr=0.1)
    twin, other = fitted(quiet_trainer, small.train(), batches(35), config, lr=0.1)
    deployed, without = deployed_of(callback, task), deployed_of(other, twin)
    for name, quantizer in quantizers_of(task).items():
        grid = quantizer.grid()
        assert isinstance(grid, Grid) and grid.scale > 0, name
    for name, buffer in deployed.named_buffers():
        assert bool(buffer.double().isfinite().all()), name
        assert not name.endswith("scale") or bool((buffer > 0).all()), name
    assert all(bool(value.isfinite().all()) for value in task.state_dict().values())
    seen: list[Tensor] = []
    handle = task.net.get_submodule("6").register_forward_hook(lambda *io: seen.append(io[2]))
    with torch.no_grad():
        task.train()(digits()[0][:100])
    handle.remove()
    assert bool((seen[0][:, ALIVE:] == 0).all()), "they are still dead"
    assert bool((seen[0][:, :ALIVE].amax((0, 2, 3)) > 0).all())
    assert accuracy(without) > 0.9
    assert accuracy(deployed) >= accuracy(without) - 0.02
