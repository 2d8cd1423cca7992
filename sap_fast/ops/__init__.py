"""The dual operations. Each folder: a public function, its primal in ``reference.py``, its inputs in ``cases.py``."""

from sap_fast import _C  # noqa: F401
from sap_fast.ops.attention import attention
from sap_fast.ops.glu import glu
from sap_fast.ops.linear_cross_entropy import linear_cross_entropy
from sap_fast.ops.lora_linear import LoRATarget, dropout_mask, lora_linear
from sap_fast.ops.lora_linear.grouped import Group, lora_linear_grouped
from sap_fast.ops.probe_rms_norm import probe_rms_norm
from sap_fast.ops.rms_norm import rms_norm
from sap_fast.ops.rotary import rotary
from sap_fast.ops.take_rows import RowIndex, take_rows

__all__ = [
    "Group",
    "LoRATarget",
    "RowIndex",
    "attention",
    "dropout_mask",
    "glu",
    "linear_cross_entropy",
    "lora_linear",
    "lora_linear_grouped",
    "probe_rms_norm",
    "rms_norm",
    "rotary",
    "take_rows",
]
