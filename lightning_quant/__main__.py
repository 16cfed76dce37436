# SPDX-License-Identifier: Apache-2.0
"""Owns the command line: `python -m lightning_quant`, a LightningCLI for any model and data, with plan, export and report.

There is no console script: `python -m` has the working directory among the places that a config's `class_path` is imported from,
a script has not. Nor does the package register callbacks with Lightning (entry point `lightning.pytorch.callbacks_factory`):
every Trainer of the environment would get one.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import _TunerExitException
from typing_extensions import override

from lightning_quant.callback import QuantFusionCallback
from lightning_quant.checkpoints import saves_alone
from lightning_quant.config import ConfigError, closest
from lightning_quant.convert import copy_of
from lightning_quant.delivery import with_config
from lightning_quant.export import Profile, check_format, export_with_reports
from lightning_quant.files import check_target
from lightning_quant.options import check_options
from lightning_quant.parity import ParityError
from lightning_quant.report import summarize
from lightning_quant.targets import uncompiled_name

PROGRAM = "python -m lightning_quant"


class QuantTrainer(Trainer):
    """A Trainer that can also end a fit before its first batch, and tell or write what stands there."""

    def plan(self, model: LightningModule, datamodule: LightningDataModule | None = None) -> None:
        """Shows what the config would do to the model: nothing is trained, changed or written."""
        found: list[str] = []

        def make(callback: QuantFusionCallback) -> None:
            callback.plan = callback._make_plan(self, model)
            callback._attach_teacher(model)
            found.append(callback.whole_plan())
            callback._end_teaching()

        self._begin_fit(make, model, datamodule)
        sys.stdout.write(f"{found[0]}\n")

    def export(
        self,
        model: LightningModule,
        ckpt_path: str | None,
        format: Literal["onnx", "pt2", "pt"] | None = None,
        output: str | None = None,
        dynamic_batch: bool = True,
        dynamic_size: bool = False,
        atol: float | None = None,
        min_equal: float | None = None,
        min_int8_share: float | None = None,
        profile: Profile = "onnxruntime",
        signed: bool | None = None,
        reduce_range: bool = False,
        dialect: Literal["lightning_quant", "quantized_decomposed"] = "lightning_quant",
        datamodule: LightningDataModule | None = None,
    ) -> None:
        """Converts a checkpoint and writes the file that is deployed, checked against the converted model.

        Args:
            model: the config's.
            ckpt_path: the checkpoint, saved in a fit with QuantFusionCallback.
            format: onnx, pt2 or pt (numbers and a manifest); left out, the output's suffix, else onnx.
            output: the file to write; left out, it stands beside the checkpoint and has its name.
            dynamic_batch: leave the batch size free.
            dynamic_size: leave height and width, or the length, free.
            atol: allowed difference of any output, relative to its largest value; left out, 1e-4 where every quantized tensor
                comes from integers, else 5e-2.
            min_equal: the least share of equal integers in any layer, from 0 to 1.
            min_int8_share: the least share of multiply-adds that onnxruntime runs in int8, from 0 to 1; of onnx.
            profile: the runtime that an onnx file is for: onnxruntime, openvino or tensorrt.
            signed: activations as int8; left out, as the profile has it; of onnx.
            reduce_range: check that weights have 7 bits, for CPUs without VNNI.
            dialect: the operators of a pt2 file: lightning_quant, our own, or quantized_decomposed.
            datamodule: the config's.
        """
        checkpoint = _checkpoint(ckpt_path)
        path = _target(checkpoint, format, output)
        options: dict[str, Any] = {
            "dynamic_batch": dynamic_batch,
            "dynamic_size": dynamic_size,
            "atol": atol,
            "min_equal": min_equal,
            "min_int8_share": min_int8_share,
            "profile": profile,
            "signed": signed,
            "reduce_range": reduce_range,
            "dialect": dialect,
        }
        check_format(path.suffix, f"output {str(path)!r}")
        check_options(path.suffix, options)
        check_target(path, "output")
        callback = self._attach(model, datamodule, checkpoint)
        if (why := callback._unfinished(model)) is not None:
            raise ConfigError(f"ckpt_path: {why}, so there is nothing to export.")
        entry, example = callback._entry, callback._example
        if example is None:
            raise ConfigError("export: needs example_input, because the forward could not be recorded from the training data.")
        deployed = callback._converted(callback._smaller(copy_of(model))).get_submodule(uncompiled_name(entry))
        with _writing("output", path):
            asked = with_config(path.suffix, options, callback.config_list)
            exported = export_with_reports(deployed, path, example_input=example, **asked)
        sys.stdout.write(f"wrote {exported.path}\n{exported.summary()}\n")

    def report(
        self,
        model: LightningModule,
        ckpt_path: str | None,
        html: str | None = None,
        datamodule: LightningDataModule | None = None,
    ) -> None:
        """Shows the layers of a checkpoint: what quantization costs each, what pruning removes, bytes and operations.

        Args:
            model: the config's.
            ckpt_path: the checkpoint, saved in a fit with QuantFusionCallback.
            html: write the report to this file, too; its folder is made if it is not there.
            datamodule: the config's.
        """
        callback = self._attach(model, datamodule, _checkpoint(ckpt_path))
        if callback._entry:
            sys.stdout.write(f"names are those in {callback._entry!r}\n")
        ships = model if callback.masks is None else callback._smaller(copy_of(model))
        report = summarize(ships.get_submodule(callback._entry), example_input=callback._example)
        sys.stdout.write(f"{report}\n")
        if html is not None:
            with _writing("html", Path(html)):
                Path(html).parent.mkdir(parents=True, exist_ok=True)
                Path(html).write_text(f'<!doctype html><meta charset="utf-8">{report._repr_html_()}\n', encoding="utf-8")

    def _attach(self, model: LightningModule, datamodule: LightningDataModule | None, ckpt_path: str) -> QuantFusionCallback:
        """Prepare `model` as a fit resumed from this checkpoint would."""
        found: list[QuantFusionCallback] = []

        def attach(callback: QuantFusionCallback) -> None:
            if not callback.state_dict():
                raise ConfigError(
                    f"ckpt_path: {ckpt_path!r} holds nothing of {type(callback).__name__}: it was saved without the callback, or "
                    "before it was attached. Give a checkpoint of a fit with this config."
                )
            callback.export = {}  # its files are a fit's
            callback.on_fit_start(self, model)
            saves_alone(model)
            found.append(callback)

        self._begin_fit(attach, model, datamodule, ckpt_path)
        return found[0]

    def _begin_fit(
        self,
        deed: Callable[[QuantFusionCallback], object],
        model: LightningModule,
        datamodule: LightningDataModule | None,
        ckpt_path: str | None = None,
    ) -> None:
        """All that Lightning does before the first batch of a fit, then `deed`."""
        (hook,) = (callback for callback in self.callbacks if isinstance(callback, _Instead))  # type: ignore[attr-defined]
        hook.deed = deed
        with warnings.catch_warnings():
            # Of a checkpoint's other callbacks: they have nothing to do here.
            warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
            self.fit(model, datamodule=datamodule, ckpt_path=ckpt_path)


class _Instead(Callback):
    """Does a deed where a fit would begin, and ends the fit there."""

    deed: Callable[[QuantFusionCallback], object]

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ours = [callback for callback in trainer.callbacks if isinstance(callback, QuantFusionCallback)]  # type: ignore[attr-defined]
        if not ours:
            raise ConfigError(
                "trainer.callbacks: the config has no QuantFusionCallback, so there is nothing to plan or to convert; add "
                "'- class_path: lightning_quant.QuantFusionCallback'."
            )
        self.deed(ours[0])
        raise _TunerExitException  # Lightning's own tuners end a fit this way: teardown, no batch, no error


def _checkpoint(path: str | None) -> str:
    """The path of a checkpoint, which is there."""
    if path is None:
        raise ConfigError("ckpt_path: no checkpoint is named; give --ckpt_path and the path of one that fit saved.")
    if "://" not in path and not os.path.isfile(path):
        folder = Path(path).absolute().parent
        near = closest(os.path.basename(path), os.listdir(folder) if folder.is_dir() else [], 1)
        hint = f" Did you mean {os.path.join(os.path.dirname(path), near[0])!r}?" if near else ""
        gone = "" if folder.is_dir() else ", which does not exist"
        raise ConfigError(f"ckpt_path: there is no file {path!r}; looked in {folder}{gone}.{hint}")
    return path


def _target(ckpt_path: str, format: str | None, output: str | None) -> Path:
    """The file to write: beside the checkpoint, if nothing is said, or in the working directory if that is far away."""
    if output is None:
        return Path(os.path.basename(ckpt_path) if "://" in ckpt_path else ckpt_path).with_suffix(f".{format or 'onnx'}")
    if format is not None and Path(output).suffix != f".{format}":
        raise ConfigError(f"output: {output!r} does not end in .{format}, the format; leave out one of the two.")
    return Path(output)


@contextlib.contextmanager
def _writing(argument: str, path: Path) -> Iterator[None]:
    """Says which argument named a file that cannot be written."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{argument}: {str(path)!r} cannot be written: {error}; give another place.") from error


class SaveFitConfig(SaveConfigCallback):
    """Writes `config.yaml` beside the model that it describes, once a fit is known to begin; of other commands it saves none."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wait: an error in the plan is to leave the files of the fit before as they are."""

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        super().setup(trainer, pl_module, "fit")


# What needs no more of the machine than one process on the CPU, whatever the fit had, and writes nothing.
_INSTEAD: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "plugins": None,
    "sync_batchnorm": False,
    "profiler": None,
    "fast_dev_run": False,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
_OWN = ("plan", "export", "report")


class QuantParser(LightningArgumentParser):
    """Says shortly what is wrong with an argument of our callback: jsonargparse's words for it end in a page of types."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """The last lines on stderr; exit status 2."""
        found = re.search(rf"class_path '[\w.]*{QuantFusionCallback.__name__}':\s*(.*)", message)
        if found is not None:
            wrong = re.match(r"Option '(\w+)\S*' is not accepted", found[1])
            near = closest(wrong[1], list(inspect.signature(QuantFusionCallback).parameters), 1) if wrong else []
            hint = f". Did you mean {near[0]!r}?" if near else ""
            message = f"trainer.callbacks: {QuantFusionCallback.__name__}: {found[1]}{hint}"
        super().error(message, ex)


class QuantCLI(LightningCLI):
    """LightningCLI for any model and data (`class_path`), with three commands that train nothing."""

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(
            trainer_class=QuantTrainer,
            parser_class=QuantParser,
            save_config_callback=SaveFitConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,  # what Lightning takes, too, but with a warning
            parser_kwargs={"prog": PROGRAM, "description": "Lightning's command line, and quantization's"},
            args=list(args),
        )

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        """Lightning's commands and ours, each with the arguments that are no options."""
        own = {name: {"model", "datamodule", "ckpt_path"} for name in _OWN}
        return {**LightningCLI.subcommands(), **own}

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand not in _OWN:
            return parser
        taken = self._subcommand_method_arguments[subcommand]
        if subcommand != "plan":
            text = "The checkpoint: one that was saved in a fit with QuantFusionCallback."
            parser.add_argument("--ckpt_path", "--ckpt", type=str | None, default=None, help=text)
            taken.append("ckpt_path")
        for key in self._subcommand_method_arguments["fit"]:  # a config that fit saved has them all
            if key not in taken:
                parser.add_argument(f"--{key}", type=Any, default=None, help=argparse.SUPPRESS)
        return parser

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """What the command line says overrules its files, wherever they stand in it: a saved config has `ckpt_path: null`."""
        self.config = parser.parse_args(_files_first(args))

    @override
    def _parse_ckpt_path(self) -> None:
        """As in Lightning, a checkpoint's arguments of the model overrule the config's, but only if it has their class, too."""
        path = self.config[self.config["subcommand"]].get("ckpt_path")
        if path and os.path.isfile(path):
            saved = torch.load(path, weights_only=True, map_location="cpu").get("hyper_parameters", {})
            if "_class_path" in saved:  # else it is of a fit in Python, where Lightning would end with an error
                super()._parse_ckpt_path()

    @override
    def before_instantiate_classes(self) -> None:
        """A single callback becomes a list: an error in what jsonargparse takes for a list keeps its cause."""
        trainer = self._get(self.config, "trainer")
        if not isinstance(trainer["callbacks"], list | None):
            trainer["callbacks"] = [trainer["callbacks"]]

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """For our commands: with our callback alone, and what ends the fit before it begins."""
        if self.subcommand in _OWN:
            self.save_config_callback = None
            given = self._get(self.config_init, "trainer")["callbacks"] or []
            ours = [callback for callback in given if isinstance(callback, QuantFusionCallback)]
            kwargs = {**_INSTEAD, "callbacks": [_Instead(), *ours]}
        trainer: Trainer = super().instantiate_trainer(**kwargs)
        return trainer


def _files_first(args: Sequence[str]) -> list[str]:
    """The same arguments, those that name config files directly behind the command."""
    begin = next((place for place, word in enumerate(args) if word in QuantCLI.subcommands()), -1) + 1
    files: list[str] = []
    rest: list[str] = []
    words = iter(args[begin:])
    for word in words:
        if word in ("-c", "--config"):
            files += [word, *(value for _, value in zip(range(1), words, strict=False))]
        else:
            (files if word.startswith("--config=") else rest).append(word)
    return [*args[:begin], *files, *rest]


def _own_error(error: BaseException | None) -> ConfigError | ParityError | None:
    """The error of ours that is behind this one, if there is one; jsonargparse wraps what a constructor raises."""
    while error is not None and not isinstance(error, ConfigError | ParityError):
        error = error.__cause__
    return error


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for a ConfigError, 1 for a ParityError, each said in one last line.

    Args:
        args: what stands behind `python -m lightning_quant`; None for what stood there.
    """
    if any(importlib.util.find_spec(name) is None for name in ("jsonargparse", "docstring_parser")):
        sys.stderr.write(f"{PROGRAM} needs jsonargparse: pip install 'lightning_quant[cli]'\n")
        return 2
    try:
        QuantCLI(sys.argv[1:] if args is None else args)
    except Exception as error:
        ours = _own_error(error)
        if ours is None:
            raise
        sys.stderr.write(f"{PROGRAM}: error: {ours}\n")
        return 2 if isinstance(ours, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
