"""Safety-Aware Probing inside Hugging Face's trainers."""

from sap_fast.hf.trainer import SAPTrainer

__all__ = ["SAPTrainer"]
