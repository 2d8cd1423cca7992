"""Flags of a command, from the command line and, beneath them, from a YAML or JSON file."""

import json
import sys
from argparse import Action, ArgumentDefaultsHelpFormatter, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sap_fast.cli.errors import CommandError


class _Help(ArgumentDefaultsHelpFormatter):
    """Shows the defaults, but None: what that stands for is said in a flag's own help, if anywhere."""

    def _get_help_string(self, action: Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def parse(command: str, groups: Sequence[type], argv: Sequence[str], about: str) -> tuple[Any, ...]:
    """Parse into one instance of each dataclass in ``groups``.

    A first argument ending in .yaml, .yml or .json is a file of flags; those on the command line win over it.

    Raises:
        CommandError: a file that cannot be read, or names an unknown flag.
        SystemExit: bad flags (the parser prints the usage), or ``--help``.
    """
    from transformers import HfArgumentParser

    parser = HfArgumentParser(
        groups,
        prog=f"sap-fast {command}",
        usage=f"sap-fast {command} [CONFIG.yaml] [--flag ...]",
        description=about,
        formatter_class=_Help,
    )
    _add_denials(parser)
    arguments = list(argv)
    unset: set[str] = set()
    if arguments and not arguments[0].startswith("-"):
        arguments[:1], unset = _flags(Path(arguments[0]), {action.dest: action for action in parser._actions})
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(
            arguments, look_for_args_file=False, return_remaining_strings=True
        )
    except (ValueError, TypeError) as error:  # what a dataclass says of its own values
        raise CommandError(str(error)) from error
    if rest:
        parser.print_usage(sys.stderr)
        raise CommandError(f"unknown arguments: {' '.join(rest)} (sap-fast {command} --help lists the flags)")
    # What no flag has given stays None here, where a dataclass may put something else in its place.
    given = vars(parser.parse_known_args(arguments, Namespace(**dict.fromkeys(unset)))[0])
    for group in parsed:
        for name in unset:
            if given[name] is None and hasattr(group, name):
                setattr(group, name, None)
    return tuple(parsed)


def _add_denials(parser: Any) -> None:
    """Add ``--no_x`` for each switch x that is on, off or not given; HfArgumentParser has it for those that are on."""
    for switch in [action for action in parser._actions if action.const is True and action.default is None]:
        names = f"--no_{switch.dest}", f"--no-{switch.dest.replace('_', '-')}"
        switch.container.add_argument(
            *names, dest=switch.dest, action="store_false", default=None, help=f"--{switch.dest} false"
        )


def _flags(path: Path, known: dict[str, Any]) -> tuple[list[str], set[str]]:
    """Turn a file's settings into the flags that say the same, to be checked alike; and name those set to null."""
    if path.suffix.lower() not in (".yaml", ".yml", ".json"):
        raise CommandError(
            f"{path}: expected flags, or a file of them ending in .yaml, .yml or .json, before the flags"
        )
    settings = _read(path)
    if not isinstance(settings, dict):
        raise CommandError(f"{path}: expected settings by name, but found {type(settings).__name__}")
    flags: list[str] = []
    unset = set()
    for name, value in settings.items():
        key = str(name).replace("-", "_")
        if key not in known:
            raise CommandError(f"{path}: no flag is called {name!r}")
        if value is None:
            unset.add(key)
        elif isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        elif value is False and "no" in (known[key].choices or ()):
            flags.append(f"--{key}=no")  # which YAML takes for a truth value
        else:
            flags.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags, unset


def _read(path: Path) -> Any:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        raise CommandError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise CommandError(f"{path}: cannot be read as settings ({error})") from None
