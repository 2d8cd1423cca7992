"""Fast, exact Safety-Aware Probing (SAP, arXiv 2505.16737): fine-tune a language model and keep it safe.

>>> sap = sap_fast.attach(model, sap_fast.SAPConfig())
>>> report = sap.step(batch, pairs)     # .grad holds the gradient taken in the probe's presence
>>> optimizer.step(); optimizer.zero_grad()
>>> sap.detach()

Start reading at ``sap_fast/dual.py``.
"""

from sap_fast._version import __version__
from sap_fast.config import SAPConfig
from sap_fast.errors import BatchError, StepRefusedError, UnsupportedModelError
from sap_fast.profiling import Profile, profile
from sap_fast.report import StepReport
from sap_fast.step import SAP, attach

__all__ = [
    "SAP",
    "BatchError",
    "Profile",
    "SAPConfig",
    "StepRefusedError",
    "StepReport",
    "UnsupportedModelError",
    "__version__",
    "attach",
    "profile",
]
