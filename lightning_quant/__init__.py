# SPDX-License-Identifier: Apache-2.0
"""lightning_quant: one callback from a LightningModule to a fused int8 model. The public names, nothing else."""

from lightning_quant.callback import QuantFusionCallback as QuantFusionCallback
from lightning_quant.config import ConfigError as ConfigError
from lightning_quant.convert import convert_model as convert_model
from lightning_quant.export import export_model as export_model
from lightning_quant.export import load_deployed as load_deployed
from lightning_quant.fuse import fuse_model as fuse_model
from lightning_quant.parity import ParityError as ParityError
from lightning_quant.patterns import register_fusion as register_fusion
from lightning_quant.plan import make_plan as make_plan
from lightning_quant.prepare import prepare_model as prepare_model
from lightning_quant.prepare import restore_model as restore_model
from lightning_quant.report import summarize as summarize
from lightning_quant.schedule import Schedule as Schedule
from lightning_quant.settings import DistillationSetting as DistillationSetting
from lightning_quant.settings import PruningSetting as PruningSetting
from lightning_quant.settings import QuantizationSetting as QuantizationSetting

__all__ = [
    "ConfigError",
    "DistillationSetting",
    "ParityError",
    "PruningSetting",
    "QuantFusionCallback",
    "QuantizationSetting",
    "Schedule",
    "convert_model",
    "export_model",
    "fuse_model",
    "load_deployed",
    "make_plan",
    "prepare_model",
    "register_fusion",
    "restore_model",
    "summarize",
]
