"""Data for the step: embedded examples, chat formatting and collation, the demonstration model."""

from sap_fast.data.collate import collate, collate_pairs
from sap_fast.data.examples import Example, Pair, benign_examples, safety_pairs

__all__ = ["Example", "Pair", "benign_examples", "collate", "collate_pairs", "safety_pairs"]
