"""Importing is cheap and touches nothing."""

import subprocess
import sys

PROBE = """
import sys, torch
import sap_fast
assert not torch.cuda.is_initialized()
for name in ("triton", "peft", "transformers"):
    assert name not in sys.modules, f"importing sap_fast imported {name}"
assert all(hasattr(sap_fast, name) for name in sap_fast.__all__)
"""


def test_importing_needs_neither_triton_nor_peft_nor_a_device() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
