"""``sap-fast info``: versions, devices, and which backend serves each operation."""

import argparse
from collections.abc import Sequence

import torch

from sap_fast.environment import attention_backends, backends, devices, environment, optional_versions

_HEADS = ("operation", "on cpu", "on cuda")


def main(argv: Sequence[str]) -> int:
    """Print the versions, the devices and the backends that are here."""
    argparse.ArgumentParser(prog="sap-fast info", description=__doc__).parse_args(argv)
    versions = environment(torch.device("cpu"))
    skip = ("device", "threads")
    print("Versions")
    for name, value in ({k: v for k, v in versions.items() if k not in skip} | optional_versions()).items():
        print(f"  {name:13} {value}")
    print("Devices")
    for line in devices():
        print(f"  {line}")
    print("Operations")
    rows = [_HEADS, *((op, served["cpu"], served["cuda"]) for op, served in backends().items())]
    for op, cpu, cuda in rows:
        print(f"  {op:30} {cpu:18} {cuda}")
    print("Attention (SAPConfig(attention='auto'))")
    for line in attention_backends():
        print(f"  {line}")
    return 0
