# SPDX-License-Identifier: Apache-2.0
"""Owns what shrinking must not take for granted: the example's size, a forward without its trainer, grids of a constant."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from test_shrink import double, mask_rows, reasons
from test_shrink_cases import Net, conv, shape
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant import QuantFusionCallback, convert_model, make_plan, prepare_model
from lightning_quant.prepare import drop_deployed_layers
from lightning_quant.shrink import Shrunk, shrink_model, unread_values
from lightning_quant.trial import UncallableError

ROWS = {"a": [1, 2]}


def images(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def shrunk_for(net: nn.Module, example: Tensor, *others: Tensor, rows: Mapping[str, Sequence[int]] = ROWS) -> Shrunk:
    """Without these rows, their biases left: the same numbers for the example and for inputs of other sizes."""
    result = shrink_model(net, mask_rows(net, rows, bias=False), example)
    with torch.no_grad():
        for x in (example, *others):
            assert torch.allclose(result.model(x), net(x), rtol=0, atol=1e-9)
    return result


# -- other sizes ------------------------------------------------------------------------------------------------------

DEPENDS = "o reads it, a constant that depends on the size of the input"
IMAGES = [images(2, 3, 8, 8), images(3, 3, 8, 8), images(2, 3, 12, 12)]


@pytest.mark.parametrize(
    "run",
    [
        lambda n, x: n.o(torch.sigmoid(n.a(x)).mean((2, 3)) * x.shape[2]),
        lambda n, x: n.o(torch.sigmoid(n.a(x)).mean((2, 3)) * x.shape[3]),
        lambda n, x: n.o(torch.sigmoid(n.a(x)).mean((2, 3)) * x.shape[0]),
    ],
)
def test_a_constant_that_counts_rows_columns_or_samples_stays(run: Callable[[Any, Tensor], Any]) -> None:
    net = double(Net(run, a=conv(3, 6), o=nn.Linear(6, 2)))
    result = shrunk_for(net, *IMAGES, images(2, 3, 12, 8), images(2, 3, 8, 12))
    assert reasons(result, "a.weight") == DEPENDS and result.after == result.before


def test_constants_that_do_not_depend_on_the_size_still_go() -> None:
    net = double(Net(lambda n, x: n.o(torch.sigmoid(n.a(x)).mean((2, 3))), a=conv(3, 6), o=nn.Linear(6, 2)))
    assert shrunk_for(net, *IMAGES).model.get_submodule("o").in_features == 4


def test_only_the_channels_whose_constants_depend_on_the_size_stay() -> None:
    def run(n: Any, x: Tensor) -> Tensor:
        a, b = (torch.sigmoid(one(x)).mean((2, 3)) for one in (n.a, n.b))
        return n.o(torch.cat([a * x.shape[2], b], 1))  # type: ignore[no-any-return]

    net = double(Net(run, a=conv(3, 6), b=conv(3, 6), o=nn.Linear(12, 2)))
    result = shrunk_for(net, *IMAGES, rows={"a": [1, 2], "b": [0]})
    assert result.kept == {"a.weight": {DEPENDS: 2}}
    assert shape(result, "a.weight")[0] == 6 and shape(result, "b.weight")[0] == 5


def test_softmax_over_positions_is_no_constant() -> None:
    net = double(Net(lambda n, x: n.o(n.a(x).transpose(1, 2).softmax(-1).amax(-1)), a=nn.Linear(5, 6), o=nn.Linear(6, 2)))
    result = shrunk_for(net, images(2, 4, 5), images(2, 9, 5))
    assert reasons(result, "a.weight") == "o reads it, and it is not constant: what makes it is not masked altogether"


def test_a_table_of_positions_is_no_constant_though_the_example_has_one_position() -> None:
    net: Any = Net(lambda n, x: n.o(n.a(x) + n.p[:, : x.shape[1]]), a=nn.Linear(5, 6), o=nn.Linear(6, 2))
    net.p = nn.Parameter(torch.zeros(1, 9, 6))
    result = shrunk_for(double(net), images(2, 1, 5), images(2, 4, 5))
    assert reasons(result, "a.weight") == DEPENDS


def test_padding_that_an_average_pool_counts_is_seen_behind_an_image_of_one_pixel() -> None:
    net = double(Net(lambda n, x: n.o(F.avg_pool2d(torch.sigmoid(n.a(x)), 3, 1, 1)), a=conv(3, 6, 1), o=conv(6, 2, 1)))
    result = shrunk_for(net, images(2, 3, 1, 1), images(2, 3, 4, 4))
    assert reasons(result, "a.weight") == DEPENDS


@pytest.mark.parametrize("flat", [lambda x: x.flatten(1), lambda x: x.view(-1, x.shape[1] * 16)])
def test_a_net_for_one_size_shrinks_as_before(flat: Callable[[Tensor], Tensor]) -> None:
    """`view(-1, 96)` takes larger images, and makes more samples of them: that is no use of the net."""
    net = double(Net(lambda n, x: n.o(flat(torch.sigmoid(n.a(x)))), a=conv(3, 6), o=nn.Linear(96, 2)))
    assert reasons(shrunk_for(net, images(2, 3, 6, 6), images(5, 3, 6, 6)), "a.weight") == ""


def test_a_forward_that_goes_another_way_for_other_sizes_keeps_its_channels() -> None:
    """Whatever the constants are: a small model that fails or differs for another size is none."""

    def run(n: Any, x: Tensor) -> Tensor:
        y = n.a(x)
        return n.o(y[:, [0, 1, 3, 4]] if x.shape[2] > 8 else y[:, :4] * 1)  # type: ignore[no-any-return]

    net = double(Net(run, a=conv(3, 6), o=conv(4, 2)))
    result = shrunk_for(net, *IMAGES)
    assert result.after == result.before and reasons(result, "a.weight")


def test_several_inputs_grow_together() -> None:
    """Tokens and their mask have one length; a scale by the length is seen, and the mask's numbers stay what they were."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.a, self.o = nn.Embedding(7, 5), nn.Linear(5, 6), nn.Linear(6, 2)

        def forward(self, tokens: Tensor, seen: Tensor) -> Tensor:
            y = torch.sigmoid(self.a(self.table(tokens))).amax(1) * tokens.shape[1] ** 0.5
            return self.o(y) + (self.table(tokens)[..., :2] * seen[..., None]).sum(1)  # type: ignore[no-any-return]

    net = double(Masked())
    masks = mask_rows(net, {"a": [1, 2]}, bias=False)
    tokens, seen = torch.tensor([[1, 2, 3, 6]] * 2), torch.tensor([[True, True, True, False]] * 2)
    result = shrink_model(net, masks, (tokens, seen))
    longer = torch.cat([tokens, tokens], 1), torch.cat([seen, seen], 1)
    assert torch.allclose(result.model(*longer), net(*longer), rtol=0, atol=1e-9)
    assert reasons(result, "a.weight") == DEPENDS


# -- a forward that needs its trainer -----------------------------------------------------------------------------------


class NeedsTrainer(LightningModule):
    """`forward` asks the Trainer something, and fails without one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * (1 + 0 * self.trainer.current_epoch)  # type: ignore[no-any-return]

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return self(batch[0]).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


@pytest.mark.parametrize("config", [None, "int8"])
def test_a_forward_that_needs_its_trainer_ships_masked_and_as_large_as_before(config: str | None, tmp_path: Path) -> None:
    lit, data = NeedsTrainer(), DataLoader(TensorDataset(images(8, 3, 4, 4).float()), 4)
    pruning = {"config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "metric": "l1"}], "schedule": "one_shot"}
    callback = QuantFusionCallback(config, pruning=pruning, verbose=0)
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[callback],
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(lit, data)
    said = [str(one.message) for one in caught if "channels cannot be removed" in str(one.message)]
    assert len(said) == 1 and "is not attached to a `Trainer`" in said[0] and "as large as before" in said[0]
    assert callback.shrunk is None and callback.deployed_model is not None and callback.sparsity() == 0.5
    weight = lit.net[0].weight
    assert isinstance(weight, Tensor) and int((weight.flatten(1) == 0).all(1).sum()) == 3
    deployed = callback.deployed_model.get_submodule("net")(images(2, 3, 4, 4).float())
    lit.eval()
    assert torch.equal(deployed, lit.net(images(2, 3, 4, 4).float())) and tuple(deployed.shape) == (2, 2)


def test_shrinking_by_hand_says_that_the_forward_fails() -> None:
    lit = NeedsTrainer()
    masks = mask_rows(lit, {"net.0": [1]})
    with pytest.raises(UncallableError, match="channels cannot be removed: the forward of a copy of the model, which has no"):
        shrink_model(lit, masks, images(2, 3, 4, 4).float())


# -- reasons and reports --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_attention_by_hand_says_that_its_heads_are_written_in(fused: bool) -> None:
    def run(n: Any, x: Tensor) -> Tensor:
        q, k, v = (one(x).view(2, 5, 3, 4).transpose(1, 2) for one in (n.q, n.k, n.v))
        y = F.scaled_dot_product_attention(q, k, v) if fused else (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return n.o(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    net = double(Net(run, **{name: nn.Linear(6, 12) for name in ("q", "k", "v")}, o=nn.Linear(12, 2)))
    rows = range(4, 8)
    result = shrunk_for(net, images(2, 5, 6), rows={"q": rows, "k": rows, "v": rows})
    for name in ("q", "k", "v"):
        assert "works on heads, and how many is written into the forward" in reasons(result, f"{name}.weight")
    assert result.after == result.before


def test_what_was_removed_is_short_in_a_repl_and_a_table_in_a_notebook() -> None:
    net = double(Net(lambda n, x: n.o(torch.sigmoid(n.a(x)).mean((2, 3))), a=conv(3, 6), o=nn.Linear(6, 2)))
    result = shrunk_for(net, *IMAGES)
    said = repr(result)
    assert said.startswith("Shrunk(Net, parameters: 182 -> 122 (67%), bytes: 728 -> 488 (67%), multiply-adds: ")
    assert "\n" not in said and "Conv2d" not in said
    assert "<table" in result._repr_html_() and "parameters: 182 -&gt; 122 (67%)" in result._repr_html_()
    kept = shrink_model(net, mask_rows(net, {"a": [1], "o": [0]}, bias=False), IMAGES[0])
    assert repr(kept).endswith("1 masked slices stay)") and "the model returns it" in kept._repr_html_()
    pretty: list[str] = []
    kept._repr_pretty_(SimpleNamespace(text=pretty.append), cycle=False)
    assert pretty == [str(kept)]


# -- constants of a quantized model -----------------------------------------------------------------------------------------


def quantized(net: Any, x: Tensor, config: Any = "int8") -> Any:
    """In eval mode, with the ranges of a few training steps; no norm as it began."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    prepare_model(net, make_plan(net, config, example_input=x))
    for _ in range(3):
        net.train()(x)
    return net.eval()


NETS: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[], dict[str, nn.Module]]]] = {
    "conv": (lambda n, x: n.o(torch.sigmoid(n.a(x))), lambda: {"a": conv(3, 6), "o": conv(6, 4)}),
    "no bias": (lambda n, x: n.o(torch.sigmoid(n.a(x))), lambda: {"a": conv(3, 6), "o": conv(6, 4, bias=False)}),
    "groups": (lambda n, x: n.o(torch.sigmoid(n.a(x))), lambda: {"a": conv(3, 6), "o": conv(6, 4, groups=2)}),
    "norm behind": (
        lambda n, x: F.relu(n.bn(n.o(torch.sigmoid(n.a(x))))).mean((2, 3)),
        lambda: {"a": conv(3, 6), "o": conv(6, 4, bias=False), "bn": nn.BatchNorm2d(4)},
    ),
    "linear": (
        lambda n, x: n.o(F.softplus(n.a(x)).mean((2, 3))),
        lambda: {"a": conv(3, 6), "o": nn.Linear(6, 4)},
    ),
    "curve": (
        lambda n, x: F.gelu(n.o(n.a(x) + 1.0)).mean((2, 3)),
        lambda: {"a": conv(3, 6), "o": conv(6, 4)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("granularity", ["default", "per_tensor"])
def test_a_quantized_model_without_constant_channels_has_the_validated_integers(name: str, granularity: str) -> None:
    """The columns that go hold the largest weights of their rows: without these the scales would be others."""
    run, layers = NETS[name]
    x = images(8, 3, 8, 8).float()
    net: Any = Net(run, **layers())
    with torch.no_grad():
        net.o.weight[:, :2] *= 4
    config = ["int8", {"op_names": ["o"], "target_names": ["weight"], "granularity": granularity}]
    net = quantized(net, x, config)
    rows = {"a": [0, 3] if name == "groups" else [1, 2]}
    masks = mask_rows(net, rows, bias=False)
    drop_deployed_layers(net)
    result = shrink_model(net, masks, x)
    assert result.removed["a.weight"] == (2, 6) and result.cuts.biases
    for given in (x, 3 * images(5, 3, 9, 7).float()):
        with torch.no_grad():
            found, expected = convert_model(result.model)(given), net(given)
            assert torch.equal(found, result.model(given))
        if granularity == "default" or name != "norm behind":  # one scale under a norm: it is a new one
            assert torch.equal(found, expected)
        else:
            assert float((found - expected).abs().max()) <= 0.05 * float(expected.abs().max())
    result.model.train()(x).square().mean().backward()
    assert all(one.grad is not None and bool(one.grad.isfinite().all()) for one in result.model.parameters())


def test_a_parameter_that_is_added_is_not_masked_because_its_channel_will_go() -> None:
    """It makes the constant that goes into the next bias; a convolution's own columns that nothing reads are masked."""
    net: Any = Net(lambda n, x: n.o((n.a(x) + n.w).mean((2, 3))), a=conv(3, 6), o=nn.Linear(6, 2))
    net.w = nn.Parameter(torch.zeros(6, 6, 6))
    net = double(net)
    masks = mask_rows(net, {"a": [1, 2]})
    assert "w" not in unread_values(net, masks, images(2, 3, 8, 8))
    with torch.no_grad():
        net.o.weight[:, [1, 2]] = 0
    masks["o.weight"] = torch.tensor([True, False, False, True, True, True]).expand(2, 6)
    found = unread_values(net, masks, images(2, 3, 8, 8))
    assert not bool(found["w"][[1, 2]].any()) and bool(found["w"][[0, 3, 4, 5]].all())  # nothing reads these any more
