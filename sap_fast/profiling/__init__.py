"""Where the time of a training step goes: plain fine-tuning and Safety-Aware Probing side by side, phase by phase.

``profiler.py`` runs the steps and is the place to start; ``result.py`` is what it finds.
"""

from sap_fast.profiling.profiler import profile
from sap_fast.profiling.result import Profile

__all__ = ["Profile", "profile"]
