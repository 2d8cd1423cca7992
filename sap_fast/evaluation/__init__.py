"""Measures how safe, how helpful and how good at its task a model is: by likelihoods, and by what it writes."""

from sap_fast.evaluation.generation import generate
from sap_fast.evaluation.likelihood import margins, task_loss
from sap_fast.evaluation.refusals import is_refusal

__all__ = ["generate", "is_refusal", "margins", "task_loss"]
