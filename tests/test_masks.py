# SPDX-License-Identifier: Apache-2.0
"""Owns the checks of pruning plans and of masks at work: what an entry means, and what a masked model computes."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from toys import Calls, Net, fingerprint

from lightning_quant import PruningSetting
from lightning_quant.config import ConfigError
from lightning_quant.graph import Graph
from lightning_quant.masks import Masks, Pruning, PruningPlan, make_pruning
from lightning_quant.record import record
from lightning_quant.schedule import Clock

pytestmark = pytest.mark.usefixtures("own_registries")

END = Clock(step=100, epoch=1, done=100, length=100)
ALIGNED = {"module_name": "fc1", "target_name": "weight", "dims": [0]}


def now(step: int = 0, length: float = 100) -> Clock:
    return Clock(step=step, epoch=0, done=step, length=length)


def masked(model: nn.Module, pruning: Any, graph: Graph | None = None) -> Masks:
    """The model with its final masks."""
    masks = Masks(model, make_pruning(model, pruning, graph))
    assert masks.step(END)
    return masks


def kept(masks: Masks, name: str) -> Any:
    """A mask of parameters: of rows where rows are masked whole."""
    mask = masks.by_target()[name]
    rows = mask.flatten(1).all(1) if mask.dim() > 1 else mask
    whole = mask.dim() == 1 or torch.equal(rows, mask.flatten(1).any(1))
    return (rows if whole else mask).int().tolist()


class Two(nn.Module):
    """fc1 with rows of L1 norm 1, 2, 3, 4."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.bn1, self.fc2 = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        with torch.no_grad():
            self.fc1.weight.copy_(torch.tensor([[0.5, -0.5, 0.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 1.0], [2.0, -1.0, 1.0]]))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.relu(self.bn1(self.fc1(x))))
        return out


def entry(**keys: Any) -> list[dict[str, Any]]:
    return [{"op_names": ["fc1"], **keys}]


# -- cases 23 and 24 of NNI ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"sparse_ratio": 0.5}, [0, 0, 1, 1]),
        ({"sparse_ratio": 0.3}, [0, 1, 1, 1]),
        ({"sparse_threshold": 2.5}, [0, 0, 1, 1]),
        ({"sparse_threshold": 2.5, "max_sparse_ratio": 0.25}, [0, 1, 1, 1]),
        ({"sparse_threshold": 0.5, "min_sparse_ratio": 0.5}, [0, 0, 1, 1]),
        ({"sparse_ratio": 0.5, "internal_metric_block": 2}, [0, 1, 0, 1]),
        ({"sparse_ratio": 0.5, "granularity": [1, -1]}, [0, 0, 1, 1]),
    ],
    ids=str,
)
def test_rows_by_their_norms_and_the_bias_with_them(keys: dict[str, Any], expected: list[int]) -> None:
    model = Two()
    masks = masked(model, entry(**keys))
    assert kept(masks, "fc1.weight") == kept(masks, "fc1.bias") == expected
    assert (model.fc1.weight != 0).any(1).int().tolist() == (model.fc1.bias != 0).int().tolist() == expected
    assert masks.sparsity()["fc1.weight"] == expected.count(0) / 4


def test_a_level_ranked_over_two_layers() -> None:
    """8 of the 12 values of fc1 and 2 of the 8 of fc2 are the ten smallest."""
    model = Two()
    with torch.no_grad():
        model.fc1.weight.copy_(torch.arange(1.0, 13.0).reshape(4, 3))
        model.fc2.weight.copy_(torch.tensor([[2.5, 20.0, 8.5, 21.0], [22.0, 23.0, 24.0, 25.0]]))
    pruning = [{"op_names": ["fc1", "fc2"], "metric": "level", "sparse_ratio": 0.5, "global_group_id": "all"}]
    masks = masked(model, pruning)
    assert [int((~masks.by_target()[name]).sum()) for name in ("fc1.weight", "fc2.weight")] == [8, 2]
    assert [int((weight == 0).sum()) for weight in (model.fc1.weight, model.fc2.weight)] == [8, 2]


def test_a_dependency_group_has_one_mask() -> None:
    model = Calls(lambda m, x: m.a(x) + m.b(x), a=nn.Linear(2, 4), b=nn.Linear(2, 4))
    with torch.no_grad():
        model.get_parameter("a.weight").copy_(torch.tensor([[1.0, 0], [1, 1], [2, 1], [2, 2]]))
        model.get_parameter("b.weight").copy_(torch.tensor([[2.0, 2], [1, 0], [0, 1], [4, 0]]))
    pruning = {"op_names": ["a", "b"], "sparse_ratio": 0.5}
    masks = masked(model, [{**pruning, "dependency_group_id": 1}])
    assert kept(masks, "a.weight") == kept(masks, "b.weight") == kept(masks, "b.bias") == [1, 0, 0, 1]
    graph = record(model, torch.randn(1, 2))  # and by itself, where they meet
    found = make_pruning(model, [pruning], graph)
    assert "a.weight" in str(found) and found.units[0].members[0][0] == "a.weight" and len(found.units) == 1
    assert len(make_pruning(model, {"config_list": [pruning], "dependencies": False}, graph).units) == 2


def test_blocks_of_two_by_two() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(torch.tensor([[0.1, 0.2, 3.0, 4.0], [0.3, 0.1, 2.0, 5.0]]))
    masks = masked(model, [{"op_names": ["0"], "target_names": ["weight"], "granularity": [2, 2], "sparse_ratio": 0.5}])
    assert kept(masks, "0.weight") == [[0, 0, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("first", [True, False])
def test_a_batch_norm_follows_its_layer_whichever_entry_comes_first(first: bool) -> None:
    model = Two()
    entries = [*entry(sparse_ratio=0.5), {"op_names": ["bn1"], "target_settings": {"weight": {"align": ALIGNED}}}]
    masks = masked(model, entries if first else entries[::-1])
    assert kept(masks, "bn1.weight") == kept(masks, "bn1.bias") == [0, 0, 1, 1]


# -- the compression-setting document -----------------------------------------------------------------------------------


class CustomizedModule(torch.nn.Module):
    """As in the document, its parameters made of tensors (`Parameter(200, 100)` is none)."""

    def __init__(self) -> None:
        super().__init__()
        self.p1 = torch.nn.Parameter(torch.randn(200, 100))
        self.p2 = torch.nn.Parameter(torch.randn(200, 50))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.matmul(self.p1, x) + torch.matmul(self.p2, y)


default_setting: dict[str, Any] = {
    'weight': {
        'sparse_ratio': None,
        'max_sparse_ratio': None,
        'min_sparse_ratio': None,
        'sparse_threshold': None,
        'global_group_id': None,
        'dependency_group_id': None,
        'granularity': 'default',
        'internal_metric_block': None,
        'apply_method': 'mul',
    },
    'bias': {
        'align': {
            'module_name': None,
            'target_name': 'weight',
            'dims': [0],
        },
        'apply_method': 'mul',
    }
}  # fmt: skip
customized_setting: dict[str, Any] = {
    'p1': {
        'sparse_ratio': None,
        'max_sparse_ratio': None,
        'min_sparse_ratio': None,
        'sparse_threshold': None,
        'global_group_id': None,
        'dependency_group_id': None,
        'granularity': [1, -1],
        'internal_metric_block': None,
        'apply_method': 'mul',
    },
    'p2': {
        'sparse_ratio': None,
        'max_sparse_ratio': None,
        'min_sparse_ratio': None,
        'sparse_threshold': None,
        'global_group_id': None,
        'dependency_group_id': None,
        'granularity': [1, -1],
        'internal_metric_block': None,
        'apply_method': 'mul',
    },
    '_output_': {
        'align': {
            'module_name': None,
            'target_name': 'p1',
            'dims': [0],
        },
        'apply_method': 'mul',
        'granularity': [-1, 1]
    }
}  # fmt: skip


@pytest.mark.parametrize("with_graph", [True, False])
def test_the_documents_customized_module(with_graph: bool) -> None:
    PruningSetting.register('CustomizedModule', customized_setting)  # fmt: skip
    model = Calls(lambda m, x, y: m.own(x, y), own=CustomizedModule())
    own: Any = model.own
    x, y = torch.randn(100, 200), torch.randn(50, 200)
    before = fingerprint(model)
    p1, p2 = own.p1.detach().clone(), own.p2.detach().clone()
    graph = record(model, (x, y)) if with_graph else None
    masks = masked(model, [{"op_types": ["CustomizedModule"], "sparse_ratio": 0.25}], graph)
    rows, rows2 = ((p.abs().sum(1) >= p.abs().sum(1).sort().values[50]) for p in (p1, p2))
    expected = ((p1 * rows[:, None]) @ x + (p2 * rows2[:, None]) @ y) * rows  # rows of p1, on the second dimension
    torch.testing.assert_close(model(x, y), expected)
    assert own.p1[~rows].abs().sum() == 0 == own(x, y)[:, ~rows].abs().sum()
    assert type(own).__name__ == "CustomizedModule" and masks.passing().keys() == {"own._output_"}
    masks.remove()
    with torch.no_grad():
        own.p1.copy_(p1)
        own.p2.copy_(p2)
    assert fingerprint(model) == before


def test_the_documents_default_setting_is_that_of_weighted_layers() -> None:
    PruningSetting.register("Linear", default_setting)
    masks = masked(Two(), entry(sparse_ratio=0.5))
    assert kept(masks, "fc1.bias") == [0, 0, 1, 1]


def convs() -> nn.Module:
    layers: dict[str, nn.Module] = {"conv1": nn.Conv2d(3, 4, 3), "bn1": nn.BatchNorm2d(4)}
    layers |= {"conv2": nn.Conv2d(4, 6, 3), "bn2": nn.BatchNorm2d(6), "fc": nn.Linear(6, 2)}
    return Calls(lambda m, x: m.fc(F.relu(m.bn2(m.conv2(F.relu(m.bn1(m.conv1(x)))))).mean((2, 3))), **layers)


@pytest.mark.parametrize("ratio", [None, 0.5])
def test_the_documents_temporary_setting_update(ratio: float | None) -> None:
    config_list: list[dict[str, Any]] = [{
        'op_names': ['conv1', 'conv2'],
        'granularity': 'out_channel',
    }, {
        'op_names': ['bn1'],
        'target_settings': {
            'weight': {
                'align': {
                    'module_name': 'conv1',
                    'target_name': 'weight',
                    'dims': [0],
                },
                'granularity': 'out_channel',
            }
        }
    }, {
        'op_names': ['bn2'],
        'target_settings': {
            'weight': {
                'align': {
                    'module_name': 'conv2',
                    'target_name': 'weight',
                    'dims': [0],
                },
                'granularity': 'out_channel',
            }
        }
    }]  # fmt: skip
    if ratio is not None:  # as written it masks nothing, and says so
        config_list[0]["sparse_ratio"] = ratio
    model = convs()
    plan = make_pruning(model, config_list, record(model, torch.randn(1, 3, 8, 8)))
    assert ("note: nothing is masked: no entry gives sparse_ratio" in str(plan)) == (ratio is None)
    masks = Masks(model, plan)
    masks.step(END)
    for one in ("conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias"):
        assert kept(masks, one) == kept(masks, "conv1.weight")
        assert masks.sparsity()[one] == (ratio or 0) == masks.sparsity()[one.replace("1.", "2.")]


# -- what a masked model computes ---------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 8), (5, 6)),
    "linear of tokens": (lambda: nn.Linear(6, 8), (5, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3), (2, 6, 7)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, padding=1), (2, 6, 7, 7)),
    "grouped": (lambda: nn.Conv2d(6, 8, 3, groups=2), (2, 6, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(6, 8, 2), (2, 6, 3, 3, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 8, 3), (2, 6, 4, 4)),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(6, 8, 3, groups=2), (2, 6, 4, 4)),
    "without bias": (lambda: nn.Conv2d(6, 8, 3, bias=False), (2, 6, 7, 7)),
    "batch norm": (lambda: nn.BatchNorm2d(6), (4, 6, 3, 3)),
}


@pytest.mark.parametrize("target", ["_input_", "_output_"])
@pytest.mark.parametrize("case", LAYERS)
def test_an_input_or_output_of_a_layer_is_masked_in_its_weights(case: str, target: str) -> None:
    make, shape = LAYERS[case]
    layer = make()
    source = nn.BatchNorm1d(8 if target == "_output_" and case not in ("depthwise", "batch norm") else 6)
    nn.init.uniform_(source.weight)
    model = Calls(lambda m, x: m.layer(x), layer=layer, source=source)
    x, float_twin = torch.randn(shape), make().train()
    float_twin.load_state_dict(layer.state_dict())
    align = {"module_name": "source", "target_name": "weight", "dims": [0]}
    pruning = [
        {"op_names": ["source"], "sparse_ratio": 0.5},
        {"op_names": ["layer"], "target_names": [target], "target_settings": {target: {"align": align}}},
    ]
    masks = masked(model, pruning, record(model, x))
    mask = (source.weight != 0).float()
    assert 0 < mask.mean() < 1 and not masks.passing() and type(layer) is type(float_twin)

    def along(channels: int) -> Tensor:
        return mask if channels == 2 or "linear" in case else mask.reshape(-1, *[1] * (channels - 2))

    expected = float_twin(x * along(x.dim())) if target == "_input_" else float_twin(x) * along(x.dim())
    torch.testing.assert_close(model.train()(x), expected)
    gone = {name for name, share in masks.sparsity().items() if share == 0.5 and name.startswith("layer")}
    assert gone == {f"layer.{name}" for name, _ in layer.named_parameters() if target == "_output_" or name == "weight"}


@pytest.mark.parametrize("case", [case for case in LAYERS if case != "batch norm"])
def test_output_channels_are_scored_by_what_makes_them(case: str) -> None:
    make, shape = LAYERS[case]
    model = nn.Sequential(make())
    scores = []  # of each output channel: the L1 norm of what an impulse at any input makes of it, by linearity
    with torch.no_grad():
        x = torch.zeros(1, *shape[1:]).double()
        for i in range(shape[1] if "linear" not in case else 6):
            spot = x.clone()
            center = (0, *(0,) * (x.dim() - 2), i) if "linear" in case else (0, i, *(s // 2 for s in shape[2:]))
            spot[center] = 1
            twin = make().double()
            twin.load_state_dict(model[0].state_dict())
            y = twin(spot) - twin(x)
            y = y.movedim(-1 if "linear" in case else 1, 0)
            scores.append(y.abs().flatten(1).sum(1))
    total = torch.stack(scores).sum(0)
    masks = masked(model, [{"op_names": ["0"], "sparse_ratio": 0.5}])
    weight: Any = model[0]
    out = total >= total.sort().values[len(total) // 2]
    with torch.no_grad():
        y = weight(torch.randn(shape))
    dim = y.dim() - 1 if "linear" in case else 1
    assert torch.equal((y.abs().sum([d for d in range(y.dim()) if d != dim]) > 0), out)
    assert masks.sparsity()["0.weight"] == 0.5


def test_a_softmax_gets_a_thousand_less() -> None:
    own = CustomizedModule()
    model = Calls(lambda m, x: m.softmax(m.own(x, x[:50]).T), own=own, softmax=nn.Softmax(1))
    align = {"module_name": "own", "target_name": "p1", "dims": [0]}
    x = torch.randn(100, 3)
    pruning = [
        {"op_names": ["own"], "target_settings": {"p1": {"sparse_ratio": 0.5}}},
        {"op_names": ["softmax"], "target_settings": {"_input_": {"align": align, "apply_method": "add"}}},
    ]
    masks = masked(model, pruning, record(model, x))
    mask = (own.p1 != 0).any(1)
    y = model(x)
    assert y[:, ~mask].abs().max() == 0 and torch.allclose(y.sum(1), torch.ones(3))
    torch.testing.assert_close(y[:, mask], own(x, x[:50]).T[:, mask].softmax(1))
    masks.remove()
    assert type(model.softmax) is nn.Softmax and vars(model.softmax).keys() == vars(nn.Softmax(1)).keys()


def test_a_masked_residual_net_computes_on_the_channels_that_are_left() -> None:
    """Masks alone found in the recorded forward: every stage has one, batch norms behind it too, and channels are exactly 0."""
    layers: dict[str, nn.Module] = {"stem": nn.Conv2d(3, 8, 3, padding=1), "a": nn.Conv2d(8, 8, 3, padding=1)}
    layers |= {"n0": nn.BatchNorm2d(8), "n1": nn.BatchNorm2d(8), "dw": nn.Conv2d(8, 8, 3, padding=1, groups=8)}
    layers |= {"n2": nn.BatchNorm2d(8), "fc": nn.Linear(8, 4)}

    def trunk(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.n0(m.stem(x)))
        y = F.relu(y + m.n1(m.a(y)))
        out: Tensor = m.n2(m.dw(y))
        return out

    model = Calls(lambda m, x: m.fc(trunk(m, x).mean((2, 3))), **layers)
    x = torch.randn(4, 3, 6, 6)
    masks = masked(model, [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5, "exclude_op_names": ["dw"]}], record(model, x))
    rows = kept(masks, "stem.weight")
    assert sum(rows) == 4
    for name in ("stem.bias", "n0.weight", "n0.bias", "a.weight", "n1.weight", "n1.bias", "dw.weight", "dw.bias", "n2.weight"):
        assert kept(masks, name) == rows, name
    assert "fc.weight" not in masks.by_target()
    assert "fc makes what the model returns and keeps all its channels" in str(masks.plan)
    for mode in (True, False):
        assert (trunk(model.train(mode), x).abs().sum((0, 2, 3)) > 0).int().tolist() == rows


def test_a_masked_batch_norm_takes_its_layer_with_it() -> None:
    model = convs()
    nn.init.uniform_(model.get_parameter("bn1.weight"))
    masks = masked(model, [{"op_names": ["bn1"], "metric": "slim", "sparse_ratio": 0.5}], record(model, torch.randn(1, 3, 8, 8)))
    assert kept(masks, "conv1.weight") == kept(masks, "conv1.bias") == kept(masks, "bn1.weight") == kept(masks, "bn1.bias")
    assert sum(kept(masks, "bn1.weight")) == 2
    model = convs()
    nn.init.uniform_(model.get_parameter("bn1.weight"))
    scale = model.get_parameter("bn1.weight").detach().clone()
    masks = masked(
        model, [{"op_names": ["conv1"], "metric": "slim", "sparse_ratio": 0.5}], record(model, torch.randn(1, 3, 8, 8))
    )
    assert kept(masks, "conv1.weight") == (scale >= scale.sort().values[2]).int().tolist()


def test_two_of_four() -> None:
    model = nn.Sequential(nn.Conv2d(8, 4, 3), nn.Linear(4, 4))
    before = model.get_parameter("0.weight").detach().clone()
    masked(model, [{"op_names": ["0"], "target_names": ["weight"], "pattern": "2:4"}])
    weight = model.get_parameter("0.weight")
    groups = (weight != 0).reshape(4, 2, 4, 3, 3).sum(2)
    assert groups.unique().tolist() == [2]
    smallest = before.abs().reshape(4, 2, 4, 3, 3).sort(2).values[:, :, 1:2]
    assert torch.equal((weight != 0), (before.abs().reshape(4, 2, 4, 3, 3) > smallest).reshape(before.shape))
    masks = Masks(
        nn.Sequential(nn.Linear(8, 2)), make_pruning(nn.Sequential(nn.Linear(8, 2)), [{"op_names": ["0"], "pattern": "1:4"}])
    )
    shares = []
    for step in range(0, 60, 5):
        masks.step(now(step))
        shares.append(masks.sparsity()["0.weight"])
    assert sorted(set(shares)) == [0, 0.25, 0.5, 0.75] and shares == sorted(shares)


def test_tied_parameters_have_one_mask() -> None:
    model = Calls(lambda m, x: m.b(m.a(x)), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    model.b.weight = model.a.weight  # type: ignore[union-attr]
    masks = masked(model, [{"op_names": ["a", "b"], "target_names": ["weight"], "sparse_ratio": 0.5}])
    assert "b.weight is the same Parameter as a.weight and has its mask" in str(masks.plan)
    assert list(masks.by_target()) == ["a.weight"] and model.get_parameter("b.weight").abs().sum(1).count_nonzero() == 2


def test_one_parameter_has_one_setting() -> None:
    model = Calls(lambda m, x: m.b(m.a(x)), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    model.b.weight = model.a.weight  # type: ignore[union-attr]
    entries = [{"op_names": [name], "target_names": ["weight"], "sparse_ratio": r} for name, r in (("a", 0.5), ("b", 0.25))]
    text = r"pruning\[1\]: b.weight is a.weight, one Parameter with two settings; give them once"
    with pytest.raises(ConfigError, match=text):
        make_pruning(model, entries)


def test_inputs_of_a_grouped_convolution_have_no_scores() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2))
    inputs = {"op_names": ["1"], "target_names": ["_input_"]}
    text = r"pruning\[0\]: 1._input_: the inputs of a grouped convolution have no scores; align them to another target"
    with pytest.raises(ConfigError, match=text):
        make_pruning(model, [{**inputs, "sparse_ratio": 0.5}])
    follows = {"align": {"module_name": "0", "target_name": "weight", "dims": [0]}}
    masks = masked(model, [{"op_names": ["0"], "sparse_ratio": 0.5}, {**inputs, **follows}])
    columns = masks.by_target()["1.weight"].flatten(1).reshape(2, 2, 2)  # groups, outputs, inputs
    assert columns.all(1).flatten().int().tolist() == columns.any(1).flatten().int().tolist() == kept(masks, "0.weight")


def test_a_plan_is_data_without_the_model() -> None:
    model = convs()
    plan = make_pruning(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], record(model, torch.randn(1, 3, 8, 8)))
    again = pickle.loads(pickle.dumps(plan))
    assert str(again) == str(plan) and again.decisions() == plan.decisions() and len(pickle.dumps(plan)) < 20_000
    masks = Masks(model, again)
    masks.step(END)
    assert kept(masks, "bn1.weight") == kept(masks, "conv1.weight") and sum(kept(masks, "bn1.weight")) == 2


def test_what_has_no_shape_yet_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"pruning\[0\]: 0.weight: '0' is lazy and has no shape yet; call the model once"):
        make_pruning(
            nn.Sequential(nn.LazyLinear(4)), [{"op_names": ["0"], "target_names": ["weight"], "target_settings": {"weight": {}}}]
        )


def test_names_are_relative_to_the_root() -> None:
    model = nn.ModuleDict({"net": Two()})
    graph = record(model["net"], torch.randn(2, 3))
    plan = make_pruning(model, entry(sparse_ratio=0.5), graph, root="net")
    masks = Masks(model, plan)
    masks.step(END)
    assert kept(masks, "net.fc1.weight") == kept(masks, "net.bn1.weight") == [0, 0, 1, 1]


def test_settings_of_one_plan() -> None:
    setting = {"Linear": {"weight": {"sparse_ratio": 0.5, "granularity": "in_channel"}}}
    plan = make_pruning(Two(), [{"op_names": ["fc2"]}], settings=setting)
    assert [(t.name, t.kernel, t.spec.wanted.ratio) for t in plan.targets] == [("fc2.weight", (-1, 1), 0.5)]


def test_later_entries_and_own_settings_win() -> None:
    entries = [
        {"op_types": ["Linear"], "sparse_ratio": 0.5},
        {"op_names": ["fc1"], "sparse_threshold": 1.5, "target_settings": {"bias": {"sparse_ratio": 0.6}}},
        {"op_names": ["fc2"], "apply_method": "bypass"},
    ]
    plan = make_pruning(Two(), entries)
    said = {t.name: (str(t.spec), t.decided_by, t.notes) for t in plan.targets}
    assert said == {
        "fc1.weight": ("below 1.5", "pruning[1]", ("overrules pruning[0]",)),
        "fc1.bias": ("0.6", "pruning[1]", ("overrules pruning[0]",)),
    }


def test_the_plan_prints_itself() -> None:
    model = convs()
    plan = make_pruning(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], record(model, torch.randn(1, 3, 8, 8)))
    lines = str(plan).splitlines()
    assert lines[0].split()[:5] == ["module", "target", "masked", "metric", "blocks"]
    assert lines[2].split() == ["conv1", "weight", "0.5", "l1", "4", "pruning[0]"]
    assert "<table" in plan._repr_html_() and "as the channels it reads" in str(plan)


def test_a_config_of_options() -> None:
    options = Pruning.make(
        {"config_list": [{"op_names": ["fc1"]}], "schedule": "linear", "start": "epoch 1", "stop": "epoch 3", "updates": 2}
    )
    assert (options.pace.schedule, options.pace.updates) == ("linear", 2)
    assert Pruning.make([{"op_names": ["fc1"]}]) == Pruning(config_list=[{"op_names": ["fc1"]}])
    assert Pruning.make(options) is options


def test_a_plan_of_another_model_is_refused() -> None:
    plan: PruningPlan = make_pruning(Two(), entry(sparse_ratio=0.5))
    with pytest.raises(ConfigError, match=r"masks 'fc1.weight', which Net lacks; make the plan anew"):
        Masks(Net(), plan)
    other = Two()
    other.fc1 = nn.Linear(3, 5)
    with pytest.raises(ConfigError, match=r"'fc1.weight' of shape \[4, 3\], and here it has \[5, 3\]; make the plan anew"):
        Masks(other, plan)


def test_what_torch_prunes_or_computes_is_refused() -> None:
    model = Two()
    prune.l1_unstructured(model.fc1, "weight", 0.5)
    with pytest.raises(ConfigError, match=r"weight of 'fc1' is being pruned by torch.nn.utils.prune, which has a mask"):
        make_pruning(model, entry(sparse_ratio=0.5))
    model = Two()
    parametrizations.weight_norm(model.fc1)
    with pytest.raises(ConfigError, match=r"weight of 'fc1' is no Parameter of its own \(parametrized or weight-normed\)"):
        make_pruning(model, entry(sparse_ratio=0.5, target_names=["weight"]))
    model = Two()
    masks = masked(model, entry(sparse_ratio=0.5))
    prune.l1_unstructured(model.fc1, "weight", 0.5)
    with pytest.raises(ConfigError, match=r"fc1.weight: torch.nn.utils.prune \(ModelPruning\) has taken the Parameter's place"):
        masks.apply()


# -- bad input ----------------------------------------------------------------------------------------------------------


def align(target: str, module: str | None = "fc1", dims: tuple[int, ...] = (0,)) -> dict[str, Any]:
    return {"align": {"module_name": module, "target_name": target, "dims": list(dims)}}


def both(one: dict[str, Any], other: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"op_names": ["fc1"], "target_names": ["weight"], **one}, {"op_names": ["fc2"], "target_names": ["weight"], **other}]


WRONG: dict[str, tuple[Any, str]] = {
    "ratio and threshold": (
        entry(sparse_ratio=0.5, sparse_threshold=1),
        "pruning[0]: sparse_ratio and sparse_threshold exclude each other; give one.",
    ),
    "ratio out of range": (entry(sparse_ratio=1.5), "pruning[0]['sparse_ratio']: 1.5 is not in the range 0 to 1."),
    "negative ratio": (entry(sparse_ratio=-0.1), "pruning[0]['sparse_ratio']: -0.1 is not in the range 0 to 1."),
    "ratio that is no number": (
        entry(sparse_ratio="half"),
        "pruning[0]['sparse_ratio']: expected a number from 0 to 1, got 'half'.",
    ),
    "limits that contradict": (
        entry(sparse_ratio=0.5, min_sparse_ratio=0.6, max_sparse_ratio=0.4),
        "pruning[0]: min_sparse_ratio 0.6 is greater than max_sparse_ratio 0.4; exchange them.",
    ),
    "limits that contradict from two places": (
        entry(min_sparse_ratio=0.6, target_settings={"weight": {"max_sparse_ratio": 0.4}}),
        "pruning[0]: fc1.weight: min_sparse_ratio 0.6 is greater than max_sparse_ratio 0.4; exchange them.",
    ),
    "unknown metric": (
        entry(sparse_ratio=0.5, metric="fpmg"),
        "pruning[0]['metric']: 'fpmg' is not one of l1, l2, level, fpgm, slim, taylor, movement, random. Did you mean 'fpgm'?",
    ),
    "unknown pattern": (
        entry(pattern="4:2"),
        "pruning[0]['pattern']: '4:2' is no pattern; write 'N:M', N of every M values stay, N less than M: '2:4'.",
    ),
    "pattern and ratio": (
        entry(pattern="2:4", sparse_ratio=0.5),
        "pruning[0]: pattern decides the mask, so sparse_ratio would say nothing; leave one of them out.",
    ),
    "pattern and granularity": (
        entry(pattern="1:3", granularity="out_channel"),
        "pruning[0]: pattern decides the blocks, so granularity would say nothing; leave it out.",
    ),
    "pattern that does not divide": (
        entry(pattern="2:4"),
        "pruning[0]: fc1.weight: pattern 2:4 needs a number of input channels that 4 divides; its shape is [4, 3].",
    ),
    "pattern by filters": (
        entry(pattern="1:3", metric="fpgm"),
        (
            "pruning[0]: fc1.weight: a pattern ranks single values; metric 'fpgm' does not, take one of level, taylor, movement, "
            "random."
        ),
    ),
    "align and ratio": (
        entry(sparse_ratio=0.5, **align("weight", "fc2")),
        "pruning[0]: align decides the mask, so sparse_ratio would say nothing; leave one of them out.",
    ),
    "align to a missing module": (
        both({"sparse_ratio": 0.5}, align("weight", "fc3")),
        "pruning[1]: align of 'fc2': 'fc3' is no module of the model. Did you mean 'fc2'?",
    ),
    "align to a missing target": (
        both({"sparse_ratio": 0.5}, align("wieght")),
        "pruning[1]: align of 'fc2': 'fc1' (Linear) has no target 'wieght'",
    ),
    "align to what has no mask": (
        entry(target_settings={"weight": align("weight", "fc2")}),
        "pruning[0]: fc1.weight follows 'fc2.weight', which no entry selects; select it, with a sparse_ratio, say.",
    ),
    "align in a circle": (
        both(align("weight", "fc2"), align("weight", "fc1")),
        (
            "pruning[0]: align goes round in a circle: fc1.weight -> fc2.weight -> fc1.weight; one of them must have a mask of "
            "its own."
        ),
    ),
    "align to itself": (
        entry(target_names=["weight"], **align("weight")),
        "pruning[0]: align goes round in a circle: fc1.weight -> fc1.weight",
    ),
    "align along another number": (
        both({"sparse_ratio": 0.5}, align("weight")),
        "pruning[1]: fc2.weight has 2 blocks and follows fc1.weight, which has 4 along dims [0]; change dims or granularity.",
    ),
    "align along no dimension": (
        both({"sparse_ratio": 0.5}, align("weight", dims=(2,))),
        "pruning[1]: fc2.weight: align: dims [2] are no dimensions of fc1.weight, whose shape is [4, 3].",
    ),
    "dependency of other numbers of blocks": (
        both({"sparse_ratio": 0.5, "dependency_group_id": 1}, {"sparse_ratio": 0.5, "dependency_group_id": 1}),
        (
            "pruning[1]: fc1.weight and fc2.weight: dependency_group_id 1 share one mask, but have 4 and 2 blocks; make them "
            "equal, or "
            "leave one out of the group."
        ),
    ),
    "dependency of other ratios": (
        both(
            {"sparse_ratio": 0.5, "dependency_group_id": 1},
            {"sparse_ratio": 0.25, "dependency_group_id": 1, "granularity": "in_channel"},
        ),
        (
            "pruning[1]: fc1.weight and fc2.weight: dependency_group_id 1 share one mask, but have sparse_ratio 0.5 and 0.25; "
            "make them"
        ),
    ),
    "global group of other ratios": (
        both({"sparse_ratio": 0.5, "global_group_id": "g"}, {"sparse_ratio": 0.25, "global_group_id": "g"}),
        "pruning: fc1.weight and fc2.weight: global_group_id 'g' ranks them together, but they have sparse_ratio 0.5 and 0.25",
    ),
    "global group of other metrics": (
        both({"sparse_ratio": 0.5, "global_group_id": "g"}, {"sparse_ratio": 0.5, "global_group_id": "g", "metric": "random"}),
        (
            "pruning: fc1.weight and fc2.weight: global_group_id 'g' ranks them together, but they have metrics l1 and random, "
            "whose scores cannot be compared; make them equal."
        ),
    ),
    "parts that do not divide": (
        entry(sparse_ratio=0.5, internal_metric_block=3),
        "pruning[0]: internal_metric_block: 4 blocks of fc1.weight do not fall into 3 equal parts.",
    ),
    "blocks that do not divide": (
        entry(sparse_ratio=0.5, granularity=[3, -1]),
        "pruning[0]: fc1.weight: granularity [3, -1] does not divide its shape [4, 3].",
    ),
    "one block": (
        entry(sparse_ratio=0.5, granularity="per_tensor"),
        (
            "pruning[0]: fc1.weight: granularity 'per_tensor' is one block, which always stays; write out_channel, in_channel or "
            "block"
        ),
    ),
    "channels of an activation": (
        entry(sparse_ratio=0.5, granularity="per_channel"),
        "pruning[0]: fc1.weight: granularity 'per_channel' is for inputs and outputs; write out_channel",
    ),
    "input channels of a vector": (
        [{"op_names": ["bn1"], "sparse_ratio": 0.5, "granularity": "in_channel"}],
        "pruning[0]: bn1.weight: granularity 'in_channel' needs two dimensions; its shape is [4].",
    ),
    "distances of single values": (
        [{"op_names": ["wide"], "sparse_ratio": 0.5, "metric": "fpgm", "granularity": [1]}],
        "pruning[0]: wide.weight: metric 'fpgm' compares every block with every other, and it has 16512; at most 16384",
    ),
    "add to a parameter": (
        entry(target_names=["weight"], sparse_ratio=0.5, apply_method="add"),
        "pruning[0]: fc1.weight: apply_method 'add' is for inputs and outputs; a masked parameter is 0, write 'mul'.",
    ),
    "scores of what passes": (
        [{"op_names": ["act"], "target_settings": {"_output_": {"sparse_ratio": 0.5}}}],
        "pruning[0]: act._output_: what passes a ReLU has no values to score before it is there; align it to a parameter",
    ),
    "a pattern of what passes": (
        entry(target_names=["_output_"], pattern="2:4"),
        "pruning[0]: fc1._output_: a pattern is for parameters; give it to a weight.",
    ),
    "a type without setting": (
        [{"op_names": ["act"], "sparse_ratio": 0.5}],
        "pruning[0]: 'act' is a ReLU, which has no pruning setting.",
    ),
    "types without setting": (
        [{"op_types": ["ReLU"], "sparse_ratio": 0.5}],
        "pruning[0]: 'act' is a ReLU, which has no pruning setting.",
    ),
    "unknown target": (
        entry(target_names=["wieght"], sparse_ratio=0.5),
        "pruning[0]: 'fc1' (Linear) has no target 'wieght'",
    ),
    "a target that is None": (
        [{"op_names": ["fc2"], "target_names": ["bias"], "sparse_ratio": 0.5}],
        "pruning[0]: 'fc2' (Linear) has no target 'bias': it is None there; it has _input_, weight, _output_.",
    ),
    "a target that is left out": (
        entry(target_names=["weight"], target_settings={"bias": {"sparse_ratio": 0.5}}),
        "pruning[0]: target_settings has 'bias', but target_names leaves it out; add it or drop its settings.",
    ),
    "slim without a batch norm": (
        [{"op_names": ["fc2"], "sparse_ratio": 0.5, "metric": "slim"}],
        "pruning[0]: fc2.weight: metric 'slim' scores output channels by the scales of the batch norm that reads them",
    ),
    "unknown name": ([{"op_names": ["fc9"], "sparse_ratio": 0.5}], "pruning[0]: op_names 'fc9' matches no module. Close: "),
    "unknown key": (entry(sparse_ration=0.5), "pruning[0]: unknown key 'sparse_ration'; allowed: align, "),
    "a key of quantization": (entry(quant_dtype="int8"), "pruning[0]: unknown key 'quant_dtype'; allowed: "),
    "nothing": ([], "pruning: expected a non-empty list of dicts, one dict, or a dict with config_list and options, got []"),
    "a word": ("half", "pruning: expected a non-empty list of dicts"),
    "no dict": (["half"], "pruning[0]: expected a dict, got 'half'."),
    "selects nothing": ([{"sparse_ratio": 0.5}], "pruning[0]: selects nothing; give op_names"),
    "unknown option": ({"config_list": entry(), "update": 3}, "pruning: unknown key 'update'; allowed: config_list, schedule, "),
    "options alone": ({"schedule": "agp"}, "pruning: options without entries, {'schedule': 'agp'}; add config_list: [{...}]."),
    "no schedule": ({"config_list": entry(), "schedule": "apg"}, "pruning: schedule: 'apg' is not one of one_shot, linear, agp."),
    "no switch": ({"config_list": entry(), "shrink": 1}, "pruning: shrink=1 is not true or false."),
    "no penalty": ({"config_list": entry(), "penalty": -1}, "pruning: penalty=-1 is no number from 0; 1e-4 is usual."),
    "no seed": ({"config_list": entry(), "seed": 0.5}, "pruning: seed=0.5 is no integer."),
}


class Three(Two):
    def __init__(self) -> None:
        super().__init__()
        self.fc2, self.act, self.wide = nn.Linear(4, 2, bias=False), nn.ReLU(), nn.Linear(128, 129)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.bn1(self.fc1(x))))
        return out


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("with_graph", [True, False])
def test_what_cannot_be_is_one_clear_error(case: str, with_graph: bool) -> None:
    pruning, text = WRONG[case]
    model = Three()
    before = fingerprint(model)
    graph = record(model, torch.randn(2, 3)) if with_graph else None
    with pytest.raises(ConfigError) as caught:
        make_pruning(model, pruning, graph)
    assert str(caught.value).startswith(text), str(caught.value)
    assert "problems:" not in str(caught.value) and fingerprint(model) == before


def test_all_problems_come_together() -> None:
    entries = [*entry(sparse_ratio=0.5, granularity=[3, -1]), {"op_names": ["fc9"]}, {"op_names": ["fc2"], "pattern": "1:3"}]
    with pytest.raises(ConfigError, match="3 problems:") as caught:
        make_pruning(Two(), entries)
    assert all(text in str(caught.value) for text in ("granularity [3, -1]", "'fc9' matches no module", "pattern 1:3 needs"))


def test_other_ratios_where_channels_meet() -> None:
    model = Calls(lambda m, x: m.c(m.a(x) + m.b(x)), a=nn.Linear(2, 4), b=nn.Linear(2, 4), c=nn.Linear(4, 4))
    entries = [{"op_names": ["a"], "sparse_ratio": 0.5}, {"op_names": ["b"], "sparse_ratio": 0.25}]
    graph = record(model, torch.randn(1, 2))
    text = "a.weight and b.weight: their channels meet .* sparse_ratio 0.5 and 0.25; make them equal, or give dependencies: false"
    with pytest.raises(ConfigError, match=text):
        make_pruning(model, entries, graph)
    assert len(make_pruning(model, {"config_list": entries, "dependencies": False}, graph).units) == 2
    plan = make_pruning(model, entries[:1], graph)
    assert "a shares channels with b, which no entry masks: they cannot be removed" in str(plan)


def test_what_passes_must_fit_in_the_recorded_forward() -> None:
    model = Calls(lambda m, x: m.act(m.fc(x)), fc=nn.Linear(3, 4), act=nn.Sigmoid())
    target = {"_output_": {"align": {"module_name": "fc", "target_name": "weight", "dims": [0]}}}
    entries = [{"op_names": ["fc"], "sparse_ratio": 0.5}, {"op_names": ["act"], "target_settings": target}]
    make_pruning(model, entries, record(model, torch.randn(2, 3)))
    with pytest.raises(
        ConfigError, match=r"act._output_: its shape is \[2, 5, 4\], blocks \[-1, 1, -1\], and the mask .* has 4 values"
    ):
        make_pruning(model, entries, record(model, torch.randn(2, 5, 3)))
    masks = masked(model, entries)
    with pytest.raises(
        ConfigError, match=r"act._output_: a tensor of shape \[2, 5, 4\] came by, and its mask of shape \[4\] lies"
    ):
        model(torch.randn(2, 5, 3))
    masks.remove()
