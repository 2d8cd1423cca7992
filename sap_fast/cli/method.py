"""The flags of the method's settings, which every command that takes steps has."""

from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields, make_dataclass
from typing import Any, get_args, get_type_hints

from transformers.hf_argparser import string_to_bool

from sap_fast.cli.errors import CommandError
from sap_fast.config import Layers, SAPConfig

PRESETS: dict[str, Callable[..., SAPConfig]] = {
    "default": SAPConfig,
    "released": SAPConfig.released,
    "paper": SAPConfig.paper,
}


@dataclass
class _Method:
    """Holds a preset, and by the names of SAPConfig's fields what is to differ from it; None for what is not."""

    _argument_group_name = "Safety-Aware Probing; a setting that is not given is the preset's"  # a heading in --help

    preset: str = field(
        default="default",
        metadata={"help": "where to start from; the values shown are those of default", "choices": tuple(PRESETS)},
    )

    def config(self) -> SAPConfig:
        """Make the settings: the preset with what differs from it.

        Raises:
            CommandError: one is out of its range.
        """
        given = {name: value for name, value in vars(self).items() if name != "preset" and value is not None}
        if given.get("graph"):
            given.setdefault("check", "deferred")  # a graph's numbers are looked at behind it
        try:
            return PRESETS[self.preset or "default"](**given)
        except ValueError as error:
            raise CommandError(str(error)) from None


def _flag(setting: Field[Any], hint: Any) -> tuple[str, Any, Any]:
    """Make a flag of a setting that need not be given."""
    default = setting.default
    shown = f"the function {default.__name__}" if callable(default) else default
    metadata: dict[str, Any] = {"help": f"{setting.metadata['help']} (default: {shown})"}
    kind = hint | None
    if hint == Layers:
        kind = list[int] | None  # a function has no spelling in words
    elif hint is bool or bool in get_args(hint):
        words = [word for part in get_args(hint) for word in get_args(part)]
        metadata |= {"nargs": "?", "const": True, "choices": (True, False, *words)}
        kind = _switch  # HfArgumentParser hands a type that it does not know to argparse, which calls it
    return setting.name, kind, field(default=None, metadata=metadata)


def _switch(text: str) -> bool | str:
    """Return True or False for any of HfArgumentParser's spellings; another word as it is, for the choices to judge."""
    try:
        return string_to_bool(text)
    except ArgumentTypeError:
        return text


_HINTS = get_type_hints(SAPConfig)
MethodArguments = make_dataclass(
    "MethodArguments", [_flag(setting, _HINTS[setting.name]) for setting in fields(SAPConfig)], bases=(_Method,)
)
