"""The command line: ``sap-fast train | eval | profile | demo | info``."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from sap_fast.cli.errors import CommandError
from sap_fast.errors import BatchError, DataError, StepRefusedError, UnsupportedModelError

_COMMANDS = {
    "train": "fine-tune a model on your data, with Safety-Aware Probing",
    "eval": "measure one or several models: refusals, over-refusal, task loss",
    "profile": "see where the time of your training step goes, and what would cut it",
    "demo": "see it work on a small model, on a CPU if need be",
    "info": "versions, devices, and which backend serves each operation",
}
_EXPECTED = (CommandError, BatchError, DataError, StepRefusedError, UnsupportedModelError)
INTERRUPTED = 130  # what a shell reports for Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; what it refuses is a message and a status, not a traceback.

    Returns:
        0 done, 1 refused, 2 bad usage, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "--version":
        from sap_fast._version import __version__

        print(f"sap-fast {__version__}")
        return 0
    if name not in _COMMANDS:
        print(f"sap-fast: no command {name!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    try:
        command: Callable[[Sequence[str]], int] = import_module(f"sap_fast.cli.{name}").main
        return command(rest)
    except _EXPECTED as error:
        print("\n".join([f"sap-fast: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if "pip install" not in str(error):  # not one of ours, which say what to install
            raise
        print(f"sap-fast: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsap-fast: interrupted", file=sys.stderr)
        return INTERRUPTED


def _usage() -> str:
    lines = "\n".join(f"  {name:7} {what}" for name, what in _COMMANDS.items())
    return f"usage: sap-fast COMMAND [CONFIG.yaml] [--flag ...]\n\n{lines}\n\nsap-fast COMMAND --help lists its flags."
