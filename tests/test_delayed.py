"""delayed_direction: the pairs run with the task, and give the direction of the next step."""

from typing import Any

import pytest
import torch
from oracle import ALL_LINEAR, random_batch, random_pairs, tiny_model
from steps import CONFIG, gap, grads
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sap_fast
from benchmarks.common import solved
from sap_fast import SAPConfig, StepRefusedError
from sap_fast.batch.rows import pack, pack_pairs
from sap_fast.method.direction import Direction
from sap_fast.method.passes import Micro
from sap_fast.method.probe import Probe
from sap_fast.method.reduce import Gradients
from sap_fast.model.decoder import Decoder
from sap_fast.model.read import read_decoder

DELAYED = CONFIG.replace(delayed_direction=True)
# The sums of a product over more rows come in another order.
ROUNDING = 1e-12


def data(steps: int) -> tuple[list, list]:
    return [random_batch() for _ in range(steps)], [random_pairs() for _ in range(steps)]


def moved(model: nn.Module) -> None:
    """Take a step of plain descent, so that no two directions are found at the same weights."""
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.05 * p.grad
    model.zero_grad()


def probe_of(vectors: Any, decoder: Decoder) -> Probe:
    zero = torch.zeros(len(vectors), decoder.hidden_size, dtype=torch.float64)
    return Probe(tuple(vectors), torch.stack(list(vectors.values())), zero, zero)


def sizes(decoder: Decoder) -> dict[str, Any]:
    return {"vocab_size": decoder.vocab_size, "device": decoder.device}


def apart(
    model: nn.Module, batches: list, pairs: dict, probe: Any, direction: Direction | None, config: SAPConfig
) -> tuple[Gradients, Direction]:
    """Run the two passes one after the other: the direction of these pairs, and the dual pass along ``direction``."""
    decoder = read_decoder(model)
    acting = {j: v[None] for j, v in probe.items()} if config.probe_in_safety_pass else {}
    micros = [Micro(pack(batch, **sizes(decoder)), None) for batch in batches]
    with decoder.installed():
        found = solved.direction(decoder, pack_pairs(pairs, **sizes(decoder)), acting, config)
        u = (direction or found).u
        return solved.dual(decoder, micros, probe_of(probe, decoder), u), found


def close(a: Tensor, b: Tensor, tolerance: float = ROUNDING) -> bool:
    return float((a - b).norm()) <= tolerance * float(b.norm())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("micros", [1, 2])
@pytest.mark.parametrize("acting", [False, True])
@pytest.mark.parametrize("family", ["llama-biased", "gemma3"])
def test_steps_are_those_of_two_passes(family: str, acting: bool, micros: int, checkpointing: bool) -> None:
    """The pass runs along the direction of the last step, whatever the pairs of this one say."""
    model, (batches, pairs) = tiny_model(family, targets=ALL_LINEAR), data(6)
    if checkpointing:
        base: Any = model.get_base_model()
        base._set_gradient_checkpointing(True)
        model.train()
    # The sign of a gradient could turn on a rounding.
    config = DELAYED.replace(probe_in_safety_pass=acting, probe_update="normalised")
    direction: Direction | None = None
    with sap_fast.attach(model, config) as sap:
        for i in range(3):
            probe, given = sap.probe, batches[micros * i : micros * (i + 1)]
            expected, found = apart(model, given, pairs[i], probe, direction, config)
            report = sap.step(given, pairs[i])
            assert gap(grads(model), dict(expected.theta)) < ROUNDING
            assert close(report.loss, expected.loss) and close(report.loss_dot, expected.loss_dot, 1e-10)
            steering = sum((probe[j] * g).sum() for j, g in zip(probe, expected.probe_dot, strict=True))
            assert abs(float(report.steering - steering)) < 1e-10 * float(expected.probe_dot.norm())
            assert close(report.safety_margin, found.margin) and close(report.direction_norm, found.norm)
            cosine = torch.zeros(()) if direction is None else found.u.dot(direction.u)
            assert float(abs(report.direction_cosine - cosine)) < ROUNDING
            assert report.found_direction and report.safety_tokens == found.tokens
            assert sap.state.direction is not None and close(sap.state.direction.vector, found.u.vector)
            direction = found
            moved(model)


def test_the_first_step_is_the_plain_one() -> None:
    model, (batches, pairs) = tiny_model(), data(1)
    outcomes = []
    for config in (DELAYED, CONFIG):
        model.zero_grad()
        with sap_fast.attach(model, config) as sap:
            report = sap.step(batches[0], pairs[0]).to_dict()
            outcomes.append((grads(model), sap.probe, report))
    (gradient, probe, report), (expected, expected_probe, other) = outcomes
    assert gap(gradient, expected) == gap(probe, expected_probe) == 0 and report == other


def test_the_direction_matters() -> None:
    """The second step differs from the plain one: its pairs have no say in its probe."""
    model, (batches, pairs) = tiny_model(), data(3)
    probes = []
    for config, second in ((DELAYED, 1), (DELAYED, 2), (CONFIG, 1), (CONFIG, 2)):
        model.zero_grad()
        with sap_fast.attach(model, config.replace(probe_update="normalised")) as sap:
            sap.step(batches[0], pairs[0])
            sap.step(batches[1], pairs[second])
            probes.append(sap.probe)
    assert gap(probes[0], probes[1]) < ROUNDING
    assert gap(probes[0], probes[2]) > 1e-3 and gap(probes[2], probes[3]) > 1e-3


@pytest.mark.parametrize(
    ("settings", "directed", "probed"),
    [
        ({"direction_every": 2}, [True, False, True, False, True], [True] * 5),
        ({"probe_every": 2}, [True, False, True, False, True], [True, False, True, False, True]),
    ],
    ids=["direction_every", "probe_every"],
)
def test_steps_between_run_as_without(settings: dict[str, Any], directed: list[bool], probed: list[bool]) -> None:
    model, (batches, pairs) = tiny_model(), data(5)
    config = DELAYED.replace(probe_update="normalised", **settings)
    direction: Direction | None = None
    with sap_fast.attach(model, config) as sap:
        for i in range(5):
            probe = sap.probe
            expected, found = apart(model, [batches[i]], pairs[i], probe, direction, config)
            report = sap.step(batches[i], pairs[i])
            assert (report.found_direction, report.found_probe) == (directed[i], probed[i])
            assert gap(grads(model), dict(expected.theta)) < ROUNDING
            assert close(report.loss_dot, expected.loss_dot, 1e-10)
            direction = found if report.found_direction else direction
            moved(model)


def test_with_tangents_for_some() -> None:
    model, (batches, pairs) = tiny_model(), data(2)
    outcomes = []
    for delayed, second in ((True, 1), (False, 0)):
        torch.manual_seed(3)
        model.zero_grad()
        config = CONFIG.replace(tangent_fraction=0.4, probe_update="normalised", delayed_direction=delayed)
        with sap_fast.attach(model, config) as sap:
            sap.step(batches[0], pairs[0])
            # Without an optimizer the direction of pairs[0] is that of the first step.
            report = sap.step(batches[1], pairs[second])
            outcomes.append((grads(model), sap.probe, report))
    (gradient, probe, report), (expected, expected_probe, other) = outcomes
    assert gap(gradient, expected) < ROUNDING and gap(probe, expected_probe) < 1e-10
    assert report.safety_margin != other.safety_margin


def test_dropout_is_that_of_the_task_alone() -> None:
    """The task's masks are those of a step whose pairs run apart, and the pairs have none."""
    model = tiny_model(lora_dropout=0.3).train()
    batches, pairs = data(2)
    outcomes = []
    for delayed, second in ((True, 1), (False, 0)):
        torch.manual_seed(3)
        model.zero_grad()
        config = CONFIG.replace(probe_update="normalised", delayed_direction=delayed)
        with sap_fast.attach(model, config) as sap:
            sap.step(batches[0], pairs[0])
            report = sap.step(batches[1], pairs[second])
            outcomes.append((grads(model), report))
    assert gap(outcomes[0][0], outcomes[1][0]) < ROUNDING
    decoder = read_decoder(model)
    with decoder.installed():
        quiet = solved.direction(decoder, pack_pairs(pairs[1], **sizes(decoder)), {}, CONFIG)
    assert close(outcomes[0][1].safety_margin, quiet.margin)


class Products(TorchDispatchMode):
    """Counts matrix products with frozen weights, by the rows that they multiply."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        layers: Any = model.get_base_model().model.layers
        frozen = [p for p in layers.parameters() if not p.requires_grad and p.ndim == 2]
        self._frozen = {p.data_ptr() for p in frozen}
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            x, weight = args[-2:]
            if weight.data_ptr() in self._frozen:
                self.rows.append(len(x))
        if func.overloadpacket is torch.ops.sap_fast.lora_linear:
            self.rows += [args[0].shape[0] * args[0].shape[1]] * len(args[1])
        if func.overloadpacket is torch.ops.sap_fast.lora_linear_backward and args[-1]:
            self.rows += [args[0][0].shape[0] * args[0][0].shape[1]] * len(args[2])
        return func(*args, **(kwargs or {}))


def test_every_weight_is_multiplied_once_a_pass() -> None:
    """In each direction, one product takes the rows of the pairs, the task and its tangents together."""
    model, (batches, pairs) = tiny_model(targets=ALL_LINEAR), data(2)
    task, contrast = (int(b["attention_mask"].sum()) for b in (batches[1], pairs[1]))
    seen = {}
    for delayed in (True, False):
        with sap_fast.attach(model, CONFIG.replace(delayed_direction=delayed, share_prefixes=False)) as sap:
            sap.step(batches[0], pairs[0])
            with Products(model) as products:
                sap.step(batches[1], pairs[1])
        seen[delayed] = products.rows
    # 4 layers of 7 maps; beneath the lowest probe, on layer 1, the backward carries one half. Nothing lies beneath the
    # first layer's q, k and v.
    forward, above, beneath = 4 * 7, 2 * 7, 2 * 7 - 3
    assert sorted(seen[True]) == sorted([2 * task + contrast] * (forward + above) + [task + contrast] * beneath)
    assert sorted(seen[False]) == sorted(
        [2 * task] * (forward + above) + [task] * beneath + [contrast] * (forward + above + beneath)
    )


@pytest.mark.parametrize("check", ["now", "deferred"])
def test_a_refused_step_changes_nothing(check: str) -> None:
    model, (batches, pairs) = tiny_model(), data(3)
    config = DELAYED.replace(check=check, safety_loss="logsigmoid", per_token=False, temperature=1.0)
    with sap_fast.attach(model, config) as sap:
        sap.step(batches[0], pairs[0])
        before = sap.state
        kept = {name: p.detach().clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.fill_(torch.nan)
        if check == "deferred":
            sap.step(batches[1], pairs[1])
        with pytest.raises(StepRefusedError):
            sap.step(batches[1], pairs[1])
        assert sap.state is before
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(kept[name])
        model.zero_grad()
        assert sap.step(batches[1], pairs[1]).found_direction


def test_a_step_without_pairs_leaves_the_direction() -> None:
    model, (batches, pairs) = tiny_model(), data(3)
    with sap_fast.attach(model, DELAYED) as sap:
        sap.step(batches[0], pairs[0])
        before = sap.state.direction
        report = sap.step(batches[1])
        assert sap.state.direction is before and not report.found_direction


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"schedule": "fresh"}, "delayed_direction needs schedule='lagged', but schedule is 'fresh'"),
        ({"gradient": "finite_difference"}, "delayed_direction belongs to gradient='dual'"),
        ({"guard": "project"}, "guard='project' has no dual pass"),
        ({"guard": "counter"}, "guard='counter' has no dual pass"),
        ({"delayed_direction": 1}, "delayed_direction must be True or False, but is 1"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SAPConfig(**{"delayed_direction": True, **settings})
