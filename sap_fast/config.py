"""The settings of the method, and its two published presets."""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from inspect import cleandoc
from textwrap import TextWrapper
from typing import Any, Literal, TypeVar, get_args, get_type_hints

Layers = Sequence[int] | Callable[[int], Sequence[int]]
T = TypeVar("T")


def paper_layers(depth: int) -> range:
    """Choose layers 11 to 20 of 32, counted from 1 (arXiv 2505.16737, Table 7), at the same share of depth."""
    return range(round(10 / 32 * depth), max(round(20 / 32 * depth), round(10 / 32 * depth) + 1))


def released_layers(depth: int) -> tuple[int, ...]:
    """Choose layers 3 and 9 of 32, counted from 0 (released ``main.py``), at the same share of depth."""
    return tuple(sorted({round(3 / 32 * depth), round(9 / 32 * depth)}))


def _setting(default: T, help: str) -> T:
    """Make a field with its explanation, which ``help(SAPConfig)`` and the command's ``--help`` show alike."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class SAPConfig:
    """Settings of Safety-Aware Probing. Immutable; ``replace(**changes)`` gives a changed copy.

    Raises:
        ValueError: a value out of its range, named.
    """

    probe_layers: Layers = _setting(  # noqa: RUF009 (it returns a field)
        paper_layers, "layers whose output gets a probe, counted from 0, or a function of the model's depth"
    )
    guard: Literal["probe", "project", "counter", "probe+project"] = _setting(
        "probe",
        "what the harmful direction u is used for: probe is SAP; project takes from the task gradient g its component "
        "toward harm, when it has one; probe+project does both; counter adds counter * |g| u to g",
    )
    schedule: Literal["lagged", "fresh"] = _setting(
        "lagged",
        "where the gradient is taken: lagged, at the probe found in the last step, and the same pass finds the next "
        "one; fresh, at a probe that is found first, in the same step",
    )
    gradient: Literal["dual", "finite_difference"] = _setting(
        "dual", "how the probe's gradient is computed: dual (exact) or finite_difference, for comparison"
    )
    radius: float = _setting(
        2e-5, "length of the finite difference, and the alpha of the adamw update, relative to |theta|"
    )
    probe_update: Literal["sign", "normalised", "adamw"] = _setting(
        "sign",
        "how the probe is found, from zero, on its gradient G = grad_V L_dot: sign (strength * sign G), normalised "
        "(strength * G / |G| over all layers together) or adamw (one step of learning rate strength on -alpha G; its "
        "moments persist)",
    )
    strength: float = _setting(0.01, "size of the probe")
    strength_unit: Literal["relative", "absolute"] = _setting(
        "relative",
        "of strength: relative to each layer's scale, the median over tokens of its output's RMS; or absolute, in the "
        "units of the hidden state",
    )
    safety_loss: Literal["difference", "logsigmoid"] = _setting(
        "difference",
        "loss of a pair, of which the mean is taken: difference is -(log p(chosen) - log p(rejected)), which does not "
        "saturate; logsigmoid is -log sigmoid(margin / temperature)",
    )
    per_token: bool = _setting(True, "whether log-probabilities are means over an answer's tokens, else sums")
    temperature: float = _setting(1.0, "of the safety loss logsigmoid")
    probe_in_safety_pass: bool = _setting(
        False, "whether the probe in use acts while the harmful direction is computed"
    )
    counter: float = _setting(0.1, "strength of the guard counter")
    restart: Literal["auto", "store", "recompute"] = _setting(
        "auto",
        "how the schedule fresh reaches its outer pass: store keeps what lies beneath the lowest probe, recompute runs "
        "it again, auto stores for one micro-batch and recomputes for several",
    )
    probe_every: int = _setting(
        1,
        "the direction and the dual pass are taken in every so many steps; those in between are ordinary passes in the "
        "presence of the probe last found",
    )
    direction_every: int = _setting(1, "a direction is found in every so many steps, and used until the next is")
    direction_min_cosine: float | None = _setting(
        None,
        "if the cosine of a new direction with the one before it is less, directions are found twice as often from "
        "then on; if not, half as often, up to direction_every. None leaves the interval alone. Reads one number from "
        "the device with each direction",
    )
    tangent_fraction: float = _setting(
        1.0,
        "share of a batch's sequences, drawn anew in each step, that carry tangents. The probe's gradient is then an "
        "unbiased estimate; that of the weights stays exact",
    )
    pairs_per_step: int | None = _setting(
        None, "how many of the pairs given to a step are drawn for the direction; None is all of them"
    )
    share_prefixes: bool = _setting(
        True,
        "whether what sequences begin with in common (a system prompt, the prompt of a pair) is computed once; exact. "
        "A task batch under dropout shares nothing, since the masks differ",
    )
    attention: Literal["auto", "own", "flash_attn", "varlen_attn", "sdpa"] = _setting(
        "auto",
        "what serves attention in ordinary passes, those without tangents; dual ones always have the library's own. "
        "auto: the first of what is there that gives the same bits from run to run (sap-fast info tells which, and why "
        "not the others); or own, flash_attn (the package), varlen_attn, sdpa (PyTorch's). They differ in rounding. "
        "One that cannot serve the model is refused at attach",
    )
    delayed_direction: bool = _setting(
        False,
        "each step uses the direction that the last one found, so that the pairs, which give the next one, share their "
        "passes through the model with the task batch (with its first micro-batch). The first step finds its own. "
        "Takes the memory of both at once",
    )
    float8: bool | Literal["emulated"] = _setting(
        False,
        "the products with frozen weights are formed in float8 (e4m3, scaled by rows) where only the direction and the "
        "probe's gradient depend on them; the loss and the gradient of the weights, at the direction and the probe in "
        "use, stay exact. True needs an NVIDIA GPU of compute capability 9.0 (Hopper) or newer and a bfloat16 model; "
        "holds two copies of these weights, together as large as one in bfloat16. emulated gives the same rounding on "
        "any device and in any dtype and saves nothing",
    )
    check: Literal["now", "deferred"] = _setting(
        "now",
        "when the step's numbers are looked at: now, before .grad is written; or deferred, which leaves a flag on the "
        "device and raises at the next step, without the guarantee that nothing was written. That step's batch is "
        "packed before, while the device still works on this one's",
    )
    graph: bool = _setting(
        False,
        "whether steps are captured as CUDA graphs and replayed, which takes the host's work on the passes away: for "
        "steps that are bound by launches. Rows are then padded to shipped sizes. Needs the check to be deferred, and "
        "--graph on the command line sees to it; where something blocks it, steps run eagerly, and a warning says why",
    )

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            choices = get_args(hint)
            value = getattr(self, name)
            if choices and all(isinstance(choice, str) for choice in choices) and value not in choices:
                raise ValueError(f"{name} must be one of {list(choices)}, but is {value!r}")
        for name in ("radius", "temperature"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be positive and finite, but is {getattr(self, name)}")
        for name in ("strength", "counter"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be finite and not negative, but is {getattr(self, name)}")
        self._check_savings()
        self._check_graph()

    def _check_savings(self) -> None:
        """Refuse what cannot save anything, or would change the method without saying so."""
        if not isinstance(self.share_prefixes, bool):
            raise ValueError(f"share_prefixes must be True or False, but is {self.share_prefixes!r}")
        for name in ("probe_every", "direction_every", "pairs_per_step"):
            value = getattr(self, name)
            if value is None and name == "pairs_per_step":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, but is {value!r}")
        if not 0 < self.tangent_fraction <= 1:
            raise ValueError(f"tangent_fraction must be more than 0 and at most 1, but is {self.tangent_fraction}")
        if self.direction_min_cosine is not None and not -1 <= self.direction_min_cosine <= 1:
            raise ValueError(f"direction_min_cosine must lie between -1 and 1, but is {self.direction_min_cosine}")
        if not self.uses_probe and (self.probe_every > 1 or self.tangent_fraction < 1):
            raise ValueError(
                f"guard={self.guard!r} has no probe: leave probe_every and tangent_fraction at 1, and for fewer "
                "directions set direction_every"
            )
        if self.gradient == "finite_difference" and self.tangent_fraction < 1:
            raise ValueError("tangent_fraction belongs to gradient='dual': a finite difference has no tangents")
        self._check_shortcuts()

    def _check_shortcuts(self) -> None:
        """Refuse settings that have nothing to join or to round."""
        if not isinstance(self.delayed_direction, bool):
            raise ValueError(f"delayed_direction must be True or False, but is {self.delayed_direction!r}")
        if not isinstance(self.float8, bool) and self.float8 != "emulated":
            raise ValueError(f"float8 must be True, False or 'emulated', but is {self.float8!r}")
        if self.gradient == "finite_difference" and (self.float8 or self.delayed_direction):
            name = "float8" if self.float8 else "delayed_direction"
            raise ValueError(f"{name} belongs to gradient='dual': a finite difference has no tangents")
        if self.delayed_direction and not self.uses_probe:
            raise ValueError(
                f"guard={self.guard!r} has no dual pass for the pairs to share: leave delayed_direction off, and for "
                "fewer directions set direction_every"
            )
        if self.delayed_direction and self.schedule != "lagged":
            raise ValueError(
                f"delayed_direction needs schedule='lagged', but schedule is {self.schedule!r}: only there is one pass "
                "over the task batch that all of a step's numbers come from"
            )

    def _check_graph(self) -> None:
        """Refuse what needs numbers from the device in the middle of a step, or before the next begins."""
        if not isinstance(self.graph, bool):
            raise ValueError(f"graph must be True or False, but is {self.graph!r}")
        if self.graph and self.check != "deferred":
            raise ValueError(
                f"graph=True needs check='deferred', but check is {self.check!r}: looking at a step's numbers before "
                "its gradient is written waits for the device"
            )
        if self.graph and self.direction_min_cosine is not None:
            raise ValueError(
                "graph=True and direction_min_cosine do not go together: the cosine is read from the device with each "
                "direction. Leave direction_min_cosine at None and set direction_every"
            )

    @classmethod
    def released(cls, **changes: Any) -> "SAPConfig":
        """Return the settings of the authors' released code, without its faults; the gradient is exact here.

        Sources, in the repository ChengcanWu/SAP (Apache-2.0), folder SAPcode:

        - ``probe_layers`` 3 and 9 of 32: ``main.py``, ``v_register_layer = [3, 9]`` (a bias on ``mlp.down_proj``,
          which is the layer's output)
        - ``schedule="lagged"``, ``guard="probe"``: ``train.py``, the probe stepped at the end of step t acts in t + 1
        - ``radius=2e-5``: ``main.py``, ``grad_rate = 2e-5``; ``train.py``, times the norm of all LoRA A and B
        - ``probe_update="adamw"``, ``strength=0.05`` absolute: ``main.py``, ``v_lr = 0.05``; ``train.py``,
          ``zero_params(bias_optimizer); bias_optimizer.step()``; ``model.py``, ``AdamW`` with its defaults
        - ``safety_loss="logsigmoid"``, sums, ``temperature=1``: ``train.py``, ``compute_contrastive_gradients``
        - ``probe_in_safety_pass=True``: ``train.py``, the bias is never switched off
        """
        preset = cls(
            probe_layers=released_layers,
            schedule="lagged",
            radius=2e-5,
            probe_update="adamw",
            strength=0.05,
            strength_unit="absolute",
            safety_loss="logsigmoid",
            per_token=False,
            temperature=1.0,
            probe_in_safety_pass=True,
        )
        return replace(preset, **changes)

    @classmethod
    def paper(cls, **changes: Any) -> "SAPConfig":
        """Return the settings of Algorithm 1 of the paper (arXiv 2505.16737), as far as descriptions of it tell.

        Written from the abstract and secondary accounts of the paper, not checked against its full text.

        - ``probe_layers``: outputs of layers 11 to 20 of 32, Table 7 ("middle layers are most effective")
        - ``schedule="fresh"``: Algorithm 1, the probe found in a step acts in that step
        - ``probe_update="normalised"``: Algorithm 1, ``V = beta * grad / |grad|`` of ``L_su``
        - ``safety_loss="difference"``: the paper's contrastive loss, ``L(safe) - L(harmful)``; ``per_token`` is our
          reading, since a language-modelling loss is a mean over tokens
        - ``probe_in_safety_pass=False``: Algorithm 1 takes the direction at W alone
        - ``strength=0.02`` relative is ours: the paper's beta is in the units of its models' hidden states
        """
        preset = cls(
            probe_layers=paper_layers,
            schedule="fresh",
            probe_update="normalised",
            strength=0.02,
            strength_unit="relative",
            safety_loss="difference",
            per_token=True,
            probe_in_safety_pass=False,
        )
        return replace(preset, **changes)

    def replace(self, **changes: Any) -> "SAPConfig":
        """Return a copy with some settings changed."""
        return replace(self, **changes)

    @property
    def uses_probe(self) -> bool:
        return "probe" in self.guard.split("+")

    def layers_of(self, depth: int) -> tuple[int, ...]:
        """Return the probed layers in a model of ``depth`` layers.

        Raises:
            ValueError: none, a repeated one, or one out of range.
        """
        chosen = self.probe_layers(depth) if callable(self.probe_layers) else self.probe_layers
        try:
            layers = tuple(operator.index(layer) for layer in chosen)
        except TypeError:
            raise ValueError(
                f"probe_layers must be a sequence of layer numbers, or a function of the depth, but gives {chosen!r}"
            ) from None
        if not layers:
            raise ValueError("probe_layers is empty; name at least one layer, or use guard='project'")
        for layer in layers:
            if not 0 <= layer < depth:
                raise ValueError(f"probe_layers holds {layer!r}; the model has layers 0 to {depth - 1}, counted from 0")
        if len(set(layers)) < len(layers):
            raise ValueError(f"probe_layers {list(layers)} repeats a layer")
        return tuple(sorted(layers))


# help() shows a class's docstring, but not what its fields say of themselves.
_LINES = TextWrapper(116, initial_indent=4 * " ", subsequent_indent=8 * " ", break_on_hyphens=False)
SAPConfig.__doc__ = "\n".join(
    [cleandoc(SAPConfig.__doc__ or ""), "", "Attributes:"]
    + [_LINES.fill(f"{setting.name}: {setting.metadata['help']}.") for setting in fields(SAPConfig)]
)
