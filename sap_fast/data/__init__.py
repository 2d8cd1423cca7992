"""Data for the step: files and formats, chat templates, collation, the embedded examples."""

from sap_fast.data.collate import Collator, collate, collate_pairs
from sap_fast.data.encode import Encoded, Tokens, encode_pairs, encode_tasks, set_chat_template
from sap_fast.data.examples import Example, LookAlike, Pair, benign_examples, look_alikes, safety_pairs
from sap_fast.data.files import Table, read_table

__all__ = [
    "Collator",
    "Encoded",
    "Example",
    "LookAlike",
    "Pair",
    "Table",
    "Tokens",
    "benign_examples",
    "collate",
    "collate_pairs",
    "encode_pairs",
    "encode_tasks",
    "look_alikes",
    "read_table",
    "safety_pairs",
    "set_chat_template",
]
