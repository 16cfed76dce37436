# SPDX-License-Identifier: Apache-2.0
"""Owns the reference of the config language, generated from `keys.py`: a JSON schema for each kind of file, and `CONFIG.md`.

`python -m lightning_quant.schema` writes them beside this file; a test holds them to the code.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from lightning_quant.config import PRESETS, contradictions
from lightning_quant.keys import (
    DISTILLATION,
    DISTILLATION_ENTRY,
    DISTILLATION_METHODS,
    ENTRY,
    QUANTIZATION,
    SELECTION,
    WEIGHT_OF_LOSS,
    Blocks,
    Key,
)
from lightning_quant.pruning_keys import PRUNING, PRUNING_ENTRY
from lightning_quant.schedule import CURVES
from lightning_quant.settings import OPERATORS, PruningSetting, QuantizationSetting

FOLDER = Path(__file__).parent
_SELECTS = {"anyOf": [{"required": [name]} for name in ("op_names", "op_names_re", "op_types")]}


def config_list_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a `config_list`, as YAML or JSON hold it."""
    part = {"anyOf": [{"$ref": "#/$defs/preset"}, {"$ref": "#/$defs/entry"}]}
    whole = {"anyOf": [*part["anyOf"], {"type": "array", "minItems": 1, "items": part}]}
    return {
        **_head("config_list"),
        "anyOf": [*whole["anyOf"], _with_options(whole, {})],
        "$defs": {
            "preset": {"enum": list(PRESETS), "description": "A preset, which stands for its entries."},
            "entry": {**_entry(ENTRY, QUANTIZATION), **_SELECTS},
            "target": _target(QUANTIZATION),
        },
    }


def pruning_schema() -> dict[str, Any]:
    """The same of `pruning`."""
    entry = {"$ref": "#/$defs/entry"}
    whole = {"anyOf": [entry, {"type": "array", "minItems": 1, "items": entry}]}
    options = {
        name: {**schema, "description": f"{text} Default: {default}."} for name, (schema, default, text) in _OPTIONS.items()
    }
    apart = {"allOf": [_not_both(*pair) for pair in combinations(PRUNING, 2) if contradictions(dict.fromkeys(pair, ""), "")]}
    return {
        **_head("pruning"),
        "anyOf": [*whole["anyOf"], _with_options(whole, options)],
        "$defs": {
            "entry": {**_entry(PRUNING_ENTRY, PRUNING), **_SELECTS, **apart},
            "pruning_target": {**_target(PRUNING), **apart},
        },
    }


def distillation_schema() -> dict[str, Any]:
    """The same of `distillation`."""
    # An entry may select nothing, which means the model's own output, but not by exclude keys alone.
    excludes = [name for name in SELECTION if name.startswith("exclude_")]
    selects = {"anyOf": [*_SELECTS["anyOf"], {"not": {"anyOf": [{"required": [name]} for name in excludes]}}]}
    entry = {"$ref": "#/$defs/entry"}
    part = {"anyOf": [DISTILLATION["apply_method"].schema, entry]}
    several = {"type": "array", "minItems": 1, "items": part}
    own = {**WEIGHT_OF_LOSS, "description": "Weight of the loss of training_step itself. Default: 1.0."}
    return {
        **_head("distillation"),
        "anyOf": [
            {"enum": list(DISTILLATION_METHODS), "description": "This loss of the model's own output."},
            entry,
            several,
            _with_options({"anyOf": [*part["anyOf"], several]}, {"origin_loss_lambda": own}),
        ],
        "$defs": {
            "entry": {**_entry(DISTILLATION_ENTRY, DISTILLATION), **selects},
            "distillation_target": _target(DISTILLATION),
        },
    }


SCHEMAS = {"config_list": config_list_schema, "pruning": pruning_schema, "distillation": distillation_schema}


def _head(name: str) -> dict[str, str]:
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"lightning_quant {name}"}


def _with_options(whole: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """A dict with the key `config_list` and these options."""
    return {
        "type": "object",
        "properties": {"config_list": dict(whole), **options},
        "required": ["config_list"],
        "additionalProperties": False,
    }


def _not_both(*names: str) -> dict[str, Any]:
    """Not all of these keys; one that is null does not count."""
    return {"not": {"required": list(names), "properties": {name: {"not": {"type": "null"}} for name in names}}}


def _entry(rows: Mapping[str, Key], keys: Mapping[str, Key]) -> dict[str, Any]:
    """An entry of a list, with the keys `rows`, of which `keys` may be null."""
    return {
        "type": "object",
        "properties": {name: _property(key, nullable=name in keys) for name, key in rows.items()},
        "additionalProperties": False,
    }


def _target(keys: Mapping[str, Key]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {name: _property(key, nullable=True) for name, key in keys.items()},
        "additionalProperties": False,
    }


def _property(key: Key, *, nullable: bool) -> dict[str, Any]:
    value: dict[str, Any] = {"anyOf": [dict(key.schema), {"type": "null"}]} if nullable else dict(key.schema)
    return {**value, "description": f"{key.text} Default: {key.default}."}


_MOMENT = {
    "anyOf": [
        {"type": "integer", "minimum": 0},
        {"type": "number", "minimum": 0, "maximum": 1},
        {"type": "string", "pattern": r"^\s*((step|epoch)\s+[0-9]+|(100(\.0+)?|[0-9]{1,2}(\.[0-9]+)?)\s*%)\s*$"},
        {"type": "null"},
    ]
}
# Option of `pruning` -> (schema, default, text); a test holds them to `Pruning`.
_OPTIONS: dict[str, tuple[dict[str, Any], str, str]] = {
    "schedule": (
        {"enum": list(CURVES)},
        "`agp`",
        "`one_shot`: the whole mask at `start`. `linear`: in equal steps. `agp`: large steps first, 1 - (1 - t)^3 (Zhu and Gupta 2017).",
    ),
    "start": (
        _MOMENT,
        "0",
        'A moment as in `Schedule`: a step, a share of the run, `"epoch 3"`, `"80%"`. The mask grows from here on.',
    ),
    "stop": (_MOMENT, "0.5", "The moment of the last step, of the unit of `start`; `one_shot` does not need it."),
    "updates": ({"type": "integer", "minimum": 1}, "10", "How many steps; the last one comes at `stop`."),
    "dependencies": ({"type": "boolean"}, "true", "What is said above of the recorded forward."),
    "shrink": ({"type": "boolean"}, "true", "Conversion removes masked channels."),
    "penalty": (
        {"type": "number", "minimum": 0},
        "1e-4",
        "Weight of the L1 norm of scales that metric `slim` adds to the loss until the last update.",
    ),
    "seed": ({"type": "integer"}, "0", "Of metric `random`."),
}


# -- the page ---------------------------------------------------------------------------------------------------------

_INTRODUCTION = """\
# The config language

Generated by `python -m lightning_quant.schema` from `keys.py`, `settings.py` and `config.py`: do not edit.

A `config_list` is a list of entries. Each selects modules and says how their tensors are quantized; whatever it leaves out has
a default, so `[{"op_types": ["Linear"]}]` is complete. It is given to `QuantFusionCallback(config_list)` or
`make_plan(model, config_list)` as a list, one dict, a preset's name or the path of a YAML or JSON file. In YAML:

```yaml
# yaml-language-server: $schema=config_list.schema.json
- int8                                   # a preset, refined by what follows
- op_names: [net.conv1]
  quant_scheme: affine
  target_settings:
    weight: {quant_dtype: int4}
  fuse_names: [[net.conv1, net.bn1, net.relu1]]
```

Names are those of the LightningModule (`net.conv1`); with `root="net"` they are relative to it (`conv1`). `print(plan)` shows
what was decided for every tensor, by which entry, and what was overruled.
"""
_PRECEDENCE = """\
## Precedence

Within an entry, key by key: default ← setting of the type ← the entry's own keys ← its `target_settings`. A quantization key
that is `null` counts as not given. Between entries the later one wins, per module and target, whole: it starts from the setting again. What an
entry leaves untouched (other modules, other targets) stays as earlier entries decided.
"""
_NOTES = """\
## What the plan's notes mean

Integer kernels run a convolution (not transposed) or linear layer whose input, weight and, for a convolution, output have up to
8 bits, weights with one scale or one for each output channel, activations with one scale. Everything else is float arithmetic on
rounded numbers: right, and as small a file, but no faster.

| note | meaning |
|---|---|
| float arithmetic around its own forward | any other module type: its forward reads rounded parameters and arguments |
| no integer kernel has ...: float arithmetic | more bits, or scales inside a channel or an activation |
| no input grid / no output grid: float arithmetic | add `_input_` (`_output_`) to the targets to have it run on integers |
| last layer: float output | a linear layer whose result no other quantized layer reads keeps its full precision; name `_output_` to round it |
| last layer, output quantized | the same for a convolution, which runtimes have only with a rounded output |
| `_inner_` | what an activation reads that no integer kernel has: rounded on the grid of `_output_`, of its own range |
| shared with ... | the tensor is on that grid already, or another reader rounds it: one range for both |
| overrules ... | an earlier entry decided this target, too |
| one scale: ... / ... is for weights | the entry's granularity does not fit this target |

## From the command line and from Hydra

```console
$ python train.py fit --config config.yaml --trainer.callbacks+=lightning_quant.QuantFusionCallback --trainer.callbacks.config_list=int8
```

In the YAML of LightningCLI the callback stands in `trainer.callbacks` with `class_path: lightning_quant.QuantFusionCallback` and its
arguments under `init_args`; a path there is relative to that YAML. For Hydra: `_target_: lightning_quant.QuantFusionCallback` beside
`config_list:`. A file holds the list, one entry, a preset's name or a dict with the one key `config_list`; a file of `settings` holds
a dict from class names to settings:

```yaml
CustomizedModule:
  _input_: {granularity: per_channel}
  p1: {quant_dtype: int4}
```

"""
_FUSION = """\
## What fuses

Groups are found in the recorded forward, by what reads what, whatever the names; each member may be a module or, for additions and
activations, a function. Between members, dropout and identity are seen through.

| group | deployed as |
|---|---|
| Conv1d/2d/3d or Linear, [BatchNorm or SyncBatchNorm], [ReLU, ReLU6 or Hardtanh] | one integer kernel |
| the same with LeakyReLU, PReLU, SiLU, Hardswish, GELU, Sigmoid, Tanh or Hardsigmoid | an integer kernel, rounded (`_inner_` in the plan), then the activation in float arithmetic, rounded |
| ConvTranspose1d/2d/3d in place of the layer | int8 weights, float arithmetic: CPU runtimes have no such kernel |
| BatchNorm before a convolution that does not pad, or before Linear | folded into the layer, where its weight grid has no zero point; by itself not at the model's input nor where channels are scaled very unlike, because they would share grids |
| BatchNorm, clamp (ReLU, ReLU6 or Hardtanh) | one integer kernel with a scale for each channel, exact |
| add, clamp | an addition on rounded tensors; the clamp is the end of its grid |
| a layer's group, add, [clamp], in `fuse_names` | the two above: a runtime adds in a kernel of its own |
| what `register_fusion` adds | as it says |

Linear and BatchNorm1d fuse on 2-D inputs only. Refused, with the reason in the plan: a layer or norm that two groups share, an output
that something else reads, too, batch norm without running statistics, a batch norm behind an activation, a layer or norm whose
forward is its own. An activation without parameters that several layers share (`self.relu` of a residual block) counts as the
function that it calls: each call is fused where it stands and is called `layer1.0.relu_1`, `layer1.0.relu_2`, ... in the plan; in
an entry `layer1.0.relu` and `ReLU` mean all of them, in `fuse_names` the call behind the member before it. What an in-place
activation wrote over keeps its old values in training; a forward that reads them by the old name is refused, unless only
training does so. Without an example input the forward is traced symbolically, where `torch.fx` can follow it.
"""
_PRUNING = """\
## Pruning

A `pruning` list has entries like those of a `config_list`, which select modules in the same way and say which of their tensors are
masked: `[{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]`. As a file, with options:

```yaml
# yaml-language-server: $schema=pruning.schema.json
schedule: agp
stop: 60%
config_list:
  - {op_types: [Conv2d], sparse_ratio: 0.5}
  - {op_names: [net.head], pattern: "2:4", metric: level}
```

What an entry leaves out comes from `PruningSetting`: the weights of
linear layers, convolutions, batch norms and embeddings, and biases, which follow their weight. Precedence is that of `config_list`; of
`sparse_ratio`, `sparse_threshold`, `pattern` and `align` the one said last holds. An entry that gives none of them masks nothing.

Masked values are 0 in the parameters themselves, so the quantizer, checkpoints and averaged weights have them, and a forward costs
nothing. A mask grows by the schedule, and what is masked stays so (metric `movement` lets it return). With a recorded forward:

- layers whose channels meet share one mask (additions, gates, depthwise and grouped convolutions, concatenations); their ratios must
  be equal. An id (`dependency_group_id`) that you give is used in place of what is found.
- batch norms and depthwise convolutions behind masked layers are masked with them, so that a masked channel is exactly 0, and a layer
  before a masked batch norm, too.
- a layer that makes what the model returns keeps its output channels, unless `op_names` names it.
- a layer that the forward does not use (of a net beside the one that trains) stays as it is, unless `op_names` names it.

A teacher's layers are never masked, and a layer with weights of one bit (`bnn`), which has no 0, is refused. Metrics that need gradients
score a frozen layer from the first update on that comes while it trains. A run may be resumed by another schedule: masks grow on from
the share that was reached.

`{config_list: [...], ...}` in place of the list takes options:
"""
_PRUNING_MORE = """\
Weights of transposed convolutions count as (out, in / groups, ...), so that `out_channel`, `in_channel` and the `dims` of an `align`
mean for them what they mean for other layers. Where this differs from NNI 3.0, beside the table below:

| NNI 3.0 | here | why |
|---|---|---|
| one pruner class for a metric | `metric:` in an entry or target | several in one run, beside quantization |
| `align` to a target that is aligned itself fails | any order, any chain; a circle is an error | the page's own example does so |
| `sparse_ratio` 1.5 is 1, integers are refused | 1.5 is an error, 1 is a ratio | |
| a ratio of 1 or a high threshold masks a whole layer | one block of a target always stays | an empty layer cuts the net in two |
| groups of layers are written by hand, or by an extra call | found in the recorded forward | |
| masks of inputs and outputs multiply at run time | of layers with weights they are masks of the weights | the same function, for nothing |
| the weights behind masks are kept | they are 0 (but for `movement`) | what is trained is what ships |

"""
_DISTILLATION = """\
## Distillation

A list of its own, beside a teacher. Its entries select modules and tensors as above (`_input_` and `_output_` targets), and say how far
the student's is from the teacher's; the sum joins the loss that `training_step` returns. An entry that selects nothing, or has the
name `""`, means the model's own output: `"kl"` is `[{"apply_method": "kl"}]`. Of a model that returns several
tensors `target_names` says which: `_output_logits` for a key, `_output_0` and on for a place; nothing is taken unasked.

```yaml
# yaml-language-server: $schema=distillation.schema.json
- {apply_method: kl, temperature: 4}                              # the logits
- {op_names: [net.layer1, net.layer2], lambda: 0.5}               # the teacher's modules of the same names
- {op_names: [net.layer3], link: [layer3, layer4], apply_method: attention}
```

Where the features of student and teacher differ in number, `mse` and `cosine` compare a learned linear map of the student's (a 1x1
convolution; it trains with the model, resumes with it, and is not deployed). A dict of `config_list` and `origin_loss_lambda` weighs the
loss of the step itself, too. Teachers: a module; the path of a checkpoint, loaded with the student's class, or `{class_path: ...,
ckpt_path: ...}`; `self`, the float model as it is when training begins, which checkpoints keep. The teacher computes without gradients
in eval mode, on what the student is called with, and is afterwards what it was. In manual optimization `training_step` adds
`callback.distillation_loss()` itself, after the student's forward.

There is no teacher by default: its forward costs a quarter to a half of a float step, and what the float self gave a quantized net
could not be told from nothing at 8 and 4 bits (at 3 bits 1.2 +- 1.1 points; tables in benchmarks/README.md).
"""
_DEVIATIONS = """\
## Where this differs from NNI 3.0

| NNI 3.0 | here | why |
|---|---|---|
| a module that two entries select keeps the *first* setting (its pages say both) | the later entry wins, and the plan says what was overruled | general entries first, exceptions after them |
| `granularity: default` is one scale for a tensor | weights one for each output channel, activations one; `per_tensor` is NNI's | per-channel weights lose less, cost nothing at run time, and batch norm folds into them exactly |
| affine `int8` activations lie on -127..127 | on -128..127 | a runtime saturates at -128; a grid that stops at -127 could not ship |
| `quant_dtype` is required in every entry and in every target's settings | everything has a default | |
| the targets of a linear or convolution layer include `bias` | `bias` only where it is named | a bias goes to the int32 grid of its layer by itself |
| `out_channel` beside `_input_` fails | applies to the weight; the activation keeps one scale, and the plan says so | the commonest wish in one line |
| `int1` is a grid of nothing but 0 | `int1` is -1 and 1, with method `bnn` | |
| `PtqQuantizer` observes while it trains (`compress(max_steps)`), parameters too | method `ptq` calibrates in eval mode before training, which `Trainer(max_epochs=0)` leaves out; `is_bias_correction` is `calibration={"correct_biases": True}` | no weight moves for the sake of a range |
| `apply_method` is overwritten by the quantizer | honoured; left out, `qat_clamp_round` | |
| a batch with NaN or infinity stays in the range for good | is left out and reported | |
| `clamp_round` and `qat_clamp_round` give weights the scale of a lagging average | weights use their range now | a lagging range clips weights that grow |
| `fuse_names` are tuples | lists, too | YAML has no tuples |
| a name that matches nothing is a `KeyError`, a type or a regular expression is silently nothing | an error with the closest names | |
| settings are found by class name alone | by the class, its dotted path or its name, and for subclasses that keep the forward | two classes of one name differ |
| `_input_<argument>` does nothing for positional arguments | any argument, passed by position or by name | |
| `target_settings['_input_1']` replaces what is said for `_input_` | is merged over it, key by key | |
| a target in `target_settings` that `target_names` leaves out is ignored | is an error | |
| buffers can be targets | parameters only | a buffer has no gradient to train it |
| a target that a registered setting lacks is a `KeyError` | has the defaults, where the module has such a tensor | a registered setting says what is quantized unless told otherwise |
| a fused activation must have `_output_` among the targets | need not: the result is then a float ReLU | |
| a convolution whose output is read twice is fused, and wrong | refused, with the name of the other reader | |
| nothing is fused unless `fuse_names` lists it | `fuse_names: auto` is the default, `[]` turns it off | a group that the recorded forward proves is never wrong |
| ReLU6 is no fusion pattern | it is | the page's own model uses it |
| a list granularity on an activation is padded at the front, over the batch too | refused where dimension 0 would have a scale for each index | such a scale fits one batch size only |
| the order in which modules are wrapped changes from run to run | is that of the model | |
| a distilled teacher stays in train mode, and its batch norm moves | eval mode, and as it was afterwards | |
| `kl` has temperature 2 and sums over all positions of a sample | `temperature`, 2 by default; the mean over positions (equal for logits (N, classes)) | the weight need not change with the length of a text |
| the model's own output cannot be distilled | an entry that selects nothing | logits are what most distil |
| Adaptive1dLayerwiseDistiller bridges the last dimension | by itself where features differ in number, channels, too | |
"""


def page() -> str:
    """`CONFIG.md`."""
    parts = [
        _INTRODUCTION,
        "## Which modules",
        "",
        "((`op_names` and `op_names_re` together) and `op_types`) without what the exclude keys say. At least one of the first three",
        "must be there. A pattern or a preset may sweep up modules that have no setting: they are left, and the plan says so.",
        "",
        *_table(SELECTION),
        "",
        "## Which tensors, and fusion",
        "",
        *_table({name: ENTRY[name] for name in ("target_names", "target_settings", "fuse_names", "high_precision_output")}),
        "",
        "## How they are quantized",
        "",
        "In an entry these hold for all its targets, in `target_settings` for one.",
        "",
        *_table(QUANTIZATION),
        "",
        "Block sizes, precisely:",
        "",
        *_docstring(Blocks),
        "",
        _PRECEDENCE,
        "## Presets",
        "",
        'A preset\'s types that a model lacks are no error. An entry after it refines it: `["int8", {...}]`.',
        "Of operators a preset takes only those that work on what quantized layers made: masks of attention, positions and variances",
        "stay float. `print(plan)` ends with what stays float, and why.",
        "",
        "| name | stands for |",
        "|---|---|",
        *(f"| `{name}` | `{json.dumps(entries)}` |" for name, entries in PRESETS.items()),
        "",
        "## Settings: what a type has unless told otherwise",
        "",
        "`QuantizationSetting.register(name_or_class, setting)` adds a type, `QuantizationSetting.temporary` for the length of a",
        "`with` block, and the argument `settings` of the callback for one run. Registered at start:",
        "",
        "| types | targets |",
        "|---|---|",
        *_registered(),
        "",
        "A parameter is rounded where the module's own forward reads it by its name (`self.p1`). What it reads otherwise stays float:",
        "through `self.parameters()`, in another method that is called from outside, in a generator, in a part that",
        "`torch.utils.checkpoint` computes a second time; such a module cannot be converted, or must be left out.",
        "",
        "Operators that models call as functions (`F.relu(x)`, `a + b`, `torch.cat`) have settings, too: ",
        f"{', '.join(OPERATORS)}. They are found in the recorded forward and named after the module whose forward calls them:",
        "`layer1.0.add`, the second of that forward `layer1.0.add_1`; `print(plan)` shows the names. `_input_` is the first tensor that",
        "an operator reads, `_input_1` the second; of `cat`, `stack` and `einsum` all are meant. A number as operand (`x + 1`) stays one.",
        "What only moves values (view, flatten, permute, split, max_pool, padding with 0, ...) needs no quantizer: the grid goes through.",
        "",
        _FUSION,
        _DISTILLATION,
        *_table(DISTILLATION),
        "",
        _NOTES,
        _PRUNING,
        "| option | default | meaning |",
        "|---|---|---|",
        *(f"| `{name}` | {default} | {text} |" for name, (_, default, text) in _OPTIONS.items()),
        "",
        _PRUNING_MORE,
        "The keys, in an entry for all its targets, in `target_settings` for one:",
        "",
        *_table({name: PRUNING_ENTRY[name] for name in ("target_names", "target_settings")} | PRUNING),
        "",
        f"Registered in `PruningSetting`: {', '.join(PruningSetting.registry)}.",
        "",
        _DEVIATIONS,
    ]
    return "\n".join(parts)


def _table(keys: Mapping[str, Key]) -> list[str]:
    rows = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for name, key in keys.items():
        values = key.values or ", ".join(f"`{word}`" for word in key.schema["enum"])
        rows.append(f"| `{name}` | {values} | {key.default} | {key.text} |")
    return rows


def _docstring(thing: type) -> list[str]:
    text = thing.__doc__ or ""
    return [line.strip() for line in text.strip().splitlines()]


def _registered() -> Iterable[str]:
    groups: dict[str, list[str]] = {}
    for name, setting in QuantizationSetting.registry.items():
        if name not in OPERATORS:
            words = [f"`{t}`" + (" (in_channel)" if keys["granularity"] == "in_channel" else "") for t, keys in setting.items()]
            groups.setdefault(", ".join(words), []).append(name)
    return [f"| {', '.join(names)} | {targets} |" for targets, names in groups.items()]


def files() -> dict[str, str]:
    """What is written, by the names of files."""
    schemas = {f"{name}.schema.json": json.dumps(schema(), indent=2) + "\n" for name, schema in SCHEMAS.items()}
    return {**schemas, "CONFIG.md": page()}


def write() -> None:
    """Write them all."""
    for name, text in files().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
