"""The flags of the method's settings, which every command that takes steps has."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from sap_fast.cli.errors import CommandError
from sap_fast.config import SAPConfig


@dataclass
class MethodArguments:
    """Settings of Safety-Aware Probing; see sap_fast.SAPConfig."""

    preset: Literal["default", "released", "paper"] = field(default="default", metadata={"help": "where to start from"})
    guard: Literal["probe", "project", "counter", "probe+project"] | None = field(
        default=None, metadata={"help": "what the harmful direction is used for; probe is SAP"}
    )
    probe_layers: list[int] | None = field(default=None, metadata={"help": "counted from 0; else the preset's"})
    strength: float | None = field(default=None, metadata={"help": "of the probe"})
    schedule: Literal["lagged", "fresh"] | None = field(default=None, metadata={"help": "which probe acts in a step"})
    probe_every: int | None = field(default=None, metadata={"help": "find direction and probe in every so many steps"})
    direction_every: int | None = field(default=None, metadata={"help": "find a direction in every so many steps"})
    direction_min_cosine: float | None = field(
        default=None, metadata={"help": "find directions more often after one that has turned further than this"}
    )
    tangent_fraction: float | None = field(default=None, metadata={"help": "share of sequences with tangents"})
    pairs_per_step: int | None = field(default=None, metadata={"help": "pairs drawn of those given to a step"})
    delayed_direction: bool = field(default=False, metadata={"help": "pairs run with the task, for the next step"})
    float8: bool = field(default=False, metadata={"help": "tangents and pairs in float8, on Hopper and newer"})
    graph: bool = field(default=False, metadata={"help": "capture and replay steps as CUDA graphs"})
    share_prefixes: bool = field(default=True, metadata={"help": "compute once what sequences begin with in common"})
    attention: Literal["auto", "own", "flash_attn", "varlen_attn", "sdpa"] | None = field(
        default=None, metadata={"help": "what serves attention in passes without tangents"}
    )

    def config(self) -> SAPConfig:
        """The settings.

        Raises:
            CommandError: one is out of its range.
        """
        presets: dict[str, Callable[..., SAPConfig]] = {
            "default": SAPConfig,
            "released": SAPConfig.released,
            "paper": SAPConfig.paper,
        }
        given = {name: value for name, value in vars(self).items() if name != "preset" and value is not None}
        if self.graph:
            given["check"] = "deferred"  # a graph's numbers are looked at behind it
        try:
            return presets[self.preset](**given)
        except ValueError as error:
            raise CommandError(str(error)) from None
