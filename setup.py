"""Build script; everything it needs to know today is in ``pyproject.toml``.

The C++ extension ``sap_fast._C``, built from ``csrc/``, will be declared here. It will stay
optional: without it the library is complete, every op being served by its PyTorch reference rules
or by its Triton kernels, and nothing here needs a compiler or PyTorch at build time.
"""

from setuptools import setup

setup()
