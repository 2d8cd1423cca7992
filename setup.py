"""Build script. What the package is stands in ``pyproject.toml``; here is only how ``csrc/`` is built.

``sap_fast._C`` holds one module for each capability of a processor, of which ``sap_fast/_C/__init__.py`` loads one. Its
name says which release of torch it was built with, without which it cannot be loaded. They are built where torch and a
C++20 compiler are at hand, which for torch means ``pip install --no-build-isolation .``; else the library installs
without them, and reference rules serve the CPU.

``python setup.py build_ext --sanitize`` builds them with AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import platform
import re
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    torch = None

# How a translation unit is told what it is compiled for, by capability as torch names it.
CAPABILITIES = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"],
}
FLAGS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-fopenmp", "-Wall", "-Wextra"]
# torch's headers name parameters that they do not use; GCC 12 takes the undefined registers of its own intrinsics for
# mistakes.
FLAGS += ["-Wno-unused-parameter", "-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-unknown-pragmas"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1", "-O1"]


def extensions() -> list:
    """One module for each capability, all of the same sources."""
    release = re.sub(r"\W", "_", torch.__version__)
    sources = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
    return [
        CppExtension(
            f"sap_fast._C.{name}_{release}",
            sources,
            extra_compile_args=[*FLAGS, *flags, f"-DCPU_CAPABILITY={name.upper()}", f"-DCPU_CAPABILITY_{name.upper()}"],
            extra_link_args=["-fopenmp"],
            depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
            optional=True,  # setuptools then copies and packs what was built
        )
        for name, flags in CAPABILITIES.items()
    ]


def build_command() -> type:
    """The command ``build_ext``, which leaves a module out that cannot be built."""

    class Build(BuildExtension):
        user_options = [*BuildExtension.user_options, ("sanitize", None, "build with sanitizers")]  # noqa: RUF012
        boolean_options = [*BuildExtension.boolean_options, "sanitize"]  # noqa: RUF012

        def initialize_options(self) -> None:
            super().initialize_options()
            self.sanitize = False

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                # There is no compiler, or none that torch accepts.
                self.leave_out(self.extensions, error)

        def build_extension(self, extension: CppExtension) -> None:
            # The modules have the same sources, so each needs a folder of its own for its objects.
            kept, self.build_temp = self.build_temp, str(Path(self.build_temp) / extension.name)
            if self.sanitize:
                extension.extra_compile_args += SANITIZE
                extension.extra_link_args += SANITIZE
            try:
                super().build_extension(extension)
            except Exception as error:
                # Whatever the compiler or the helper raises: the library is complete without this module.
                self.leave_out([extension], error)
            finally:
                self.build_temp = kept

        def leave_out(self, extensions: list, error: Exception) -> None:
            """Go on without modules, an earlier build's of the same name included."""
            if self.sanitize:
                raise error
            for extension in extensions:
                Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
                Path(self.get_ext_filename(extension.name)).unlink(missing_ok=True)
                print(f"{extension.name} was not built, so it will be missing: {error}", file=sys.stderr)

    return Build


x86 = platform.system() == "Linux" and platform.machine() == "x86_64"
if torch is not None and x86:
    setup(ext_modules=extensions(), cmdclass={"build_ext": build_command()})
else:
    reason = "torch is not here: pip install --no-build-isolation" if x86 else "they are written for x86-64 Linux"
    print(f"sap_fast._C, the C++ kernels for the CPU, will not be built ({reason}).", file=sys.stderr)
    setup()
