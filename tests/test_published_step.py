"""The published step: its tidy form against the reimplementation, its released form's faults."""

import copy

import pytest
import torch
from oracle import (
    ALL_LINEAR,
    VOCAB,
    everything_in_float64,
    lora,
    margins,
    random_batch,
    random_pairs,
    tiny_model,
    token_log_p,
    unit_direction,
)
from reimplementation import trajectory
from torch import Tensor, nn

from benchmarks.common import solved
from benchmarks.published import parts
from benchmarks.published.step import PublishedStep
from sap_fast import SAPConfig
from sap_fast.batch.rows import pack_pairs
from sap_fast.method.direction import Direction
from sap_fast.model.read import read_decoder

LAYERS, STEPS = (1, 2), 5


def snapshot(model: nn.Module) -> dict:
    """All that a step may leave behind, gradients aside."""
    return {
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "attributes": [sorted(module.__dict__) for module in model.modules()],
        "hooks": [
            list(hooks)
            for module in model.modules()
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        ],
        "parameters": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        "slots": [list(module._parameters) for module in model.modules()],
        "state": {name: value.clone() for name, value in model.state_dict().items()},
    }


def assert_same(found: dict, expected: dict) -> None:
    state, expected_state = found.pop("state"), expected.pop("state")
    assert found == expected
    assert state.keys() == expected_state.keys()
    assert all(torch.equal(state[name], value) for name, value in expected_state.items())


def with_late_answer_changed(pairs: dict) -> tuple[dict, int]:
    """Pairs in which one token late in the first chosen answer is another one, and its column."""
    changed = {key: value.clone() for key, value in pairs.items()}
    column = int(pairs["attention_mask"][0].sum()) - 2
    for key in ("input_ids", "labels"):
        changed[key][0, column] = 3 + (pairs["input_ids"][0, column] - 2) % (VOCAB - 3)
    assert pairs["labels"][0, column] not in (-100, changed["labels"][0, column])
    return changed, column


def direction_of(model: nn.Module, pairs: dict, config: SAPConfig) -> Direction:
    decoder = read_decoder(model)
    rows = pack_pairs(pairs, vocab_size=VOCAB, device=decoder.device)
    with decoder.installed():
        return solved.direction(decoder, rows, {}, config)


def test_tidy_form_follows_the_reimplementation() -> None:
    model = tiny_model("llama", ("q_proj", "v_proj", "down_proj"))
    twin = copy.deepcopy(model)
    batches = [random_batch() for _ in range(STEPS)]
    pairs = [random_pairs() for _ in range(STEPS)]
    optimizer = torch.optim.AdamW(lora(model).values(), lr=1e-2)
    history: list[tuple[dict[str, Tensor], dict[int, Tensor]]] = []
    with everything_in_float64(model):
        with PublishedStep(model, LAYERS) as published:
            for batch, pair in zip(batches, pairs, strict=True):
                published.step(batch, pair)
                optimizer.step()
                probe = {j: v.detach().clone() for j, v in published.probe.items()}
                history.append(({n: p.detach().clone() for n, p in lora(model).items()}, probe))
        truth = trajectory(twin, batches, pairs, LAYERS, released=True, radius=2e-5)
    # The two compute the same quantities in another order. Each probe gradient is a difference of
    # nearly equal numbers, relatively 2e-5 apart, so that rounding of 1e-16 counts as 5e-12; AdamW
    # divides by a gradient's own size, hence ten times that for entries smaller than the rest.
    for (theta, probe), (true_theta, true_probe) in zip(history, truth, strict=True):
        for name, value in true_theta.items():
            assert torch.allclose(theta[name], value, rtol=0, atol=1e-10)
        for j, value in true_probe.items():
            assert torch.allclose(probe[j], value, rtol=0, atol=1e-10)
            assert value.abs().max() > 1e-2


def test_tidy_form_leaves_the_task_gradient_and_no_trace() -> None:
    model, batch, pairs = tiny_model("llama-biased"), random_batch(), random_pairs()
    model.train()
    before = snapshot(model)
    with PublishedStep(model, LAYERS) as published:
        loss = published.step(batch, pairs)
        gradient = {name: p.grad.clone() for name, p in lora(model).items()}
    assert_same(snapshot(model), before)
    # The probe of the first step is zero: its gradient is plain fine-tuning's.
    plain = parts.task_loss(model, batch)
    assert torch.equal(loss, plain.detach())
    for g, true in zip(gradient.values(), torch.autograd.grad(plain, list(lora(model).values())), strict=True):
        assert torch.equal(g, true)


@pytest.mark.parametrize("as_released", [False, True], ids=["tidy", "released"])
def test_close_takes_everything_off_after_an_exception(as_released: bool) -> None:
    model = tiny_model("llama")
    before = snapshot(model)
    with (
        pytest.raises(KeyError),
        PublishedStep(model, LAYERS, as_released=as_released) as published,
    ):
        published.step({}, {})
    assert_same(snapshot(model), before)


def test_weights_come_back_when_the_moved_pass_fails() -> None:
    model, u = tiny_model("llama"), unit_direction(tiny_model("llama"), random_pairs())
    theta = lora(model)
    before = snapshot(model)
    with (
        pytest.raises(ZeroDivisionError),
        parts.moved(theta, u, torch.tensor(0.3, dtype=torch.float64)),
    ):
        assert not any(torch.equal(p, before["state"][name]) for name, p in theta.items())
        raise ZeroDivisionError
    assert_same(snapshot(model), before)


def test_finite_difference_and_direction_are_the_oracles() -> None:
    model, batch, pairs = tiny_model("llama", ALL_LINEAR), random_batch(), random_pairs()
    vectors = {j: 0.1 * torch.randn(32, dtype=torch.float64) for j in LAYERS}
    from oracle import exact

    before = snapshot(model)
    with everything_in_float64(model):
        u = parts.harmful_direction(model, pairs)
        truth = unit_direction(model, pairs)
        found = parts.finite_differences(model, batch, u, vectors, [1e-6])[1e-6]
        exact_probe_dot = exact(model, batch, u, vectors)[-1]
    assert_same(snapshot(model), before)
    # The same gradient by the same forward, summed in another order: float64 rounding of entries of at most 1.
    assert all(torch.allclose(u[name], value, rtol=0, atol=1e-12) for name, value in truth.items())
    for j, value in exact_probe_dot.items():
        # Wrong by O(radius), here a relative 1e-6 times the size of the third derivative.
        assert (found[j] - value).norm() < 1e-4 * value.norm()


def test_released_form_runs_with_its_quirks(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama", dtype=torch.float32, lora_dropout=0.1)
    with torch.no_grad():
        for name, p in lora(model).items():
            # As after a few steps from zero: smaller than what is added to them.
            p.mul_(1e-6 if "lora_B" in name else 1)
    batch, pairs = random_batch(), random_pairs()
    before, theta = snapshot(model), lora(model)
    flags = [module.training for module in model.modules()]
    with PublishedStep(model, LAYERS, as_released=True, task_length=12, pair_length=16) as published:
        losses = [published.step(batch, pairs) for _ in range(3)]
        assert all(p.grad is not None and p.grad.norm() > 0 for p in theta.values())
        names = [name for name in model.state_dict() if name.endswith("mlp.down_proj.bias")]
        assert len(names) == len(LAYERS)  # a checkpoint taken now would hold the probe
        assert all(v.abs().max() > 1e-3 for v in published.probe.values())
    assert all(torch.isfinite(loss) for loss in losses)
    assert capsys.readouterr().out.splitlines() == ["Batch 1", "Batch 2", "Batch 3"]
    assert [module.training for module in model.modules()] == flags
    # Adding alpha u and taking it away again costs small weights their low bits.
    state = model.state_dict()
    assert state.keys() == before["state"].keys()
    assert any(not torch.equal(state[name], value) for name, value in before["state"].items())
    # ... and no more: three times to and fro in float32, on weights of about 1, whose rounding is 6e-8 each time.
    assert all(torch.allclose(state[name], v, atol=1e-6) for name, v in before["state"].items())


def test_released_form_refuses_an_adapted_down_proj() -> None:
    model = tiny_model("llama", ALL_LINEAR)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layer 1: .*as_released=False"):
        PublishedStep(model, LAYERS, as_released=True)
    assert_same(snapshot(model), before)


def test_released_margin_never_sees_the_answers() -> None:
    """The released input holds no answer: a late token of one changes a label, and no logit."""
    model, pairs = tiny_model("llama"), random_pairs()
    changed, column = with_late_answer_changed(pairs)
    one, two = (parts.prompt_only_pairs(p, 12, pad=0) for p in (pairs, changed))
    assert torch.equal(one["input_ids"], two["input_ids"])
    assert torch.equal(one["attention_mask"], two["attention_mask"])
    assert not torch.equal(one["chosen_labels"], two["chosen_labels"])
    # Where an answer's label stands, the input holds padding.
    assert not one["attention_mask"][one["chosen_labels"] != -100].any()
    # Of the margin only that label's own term changes.
    logits = model(input_ids=one["input_ids"], attention_mask=one["attention_mask"]).logits
    log_p = torch.log_softmax(logits[0, column].double(), -1)
    old, new = pairs["labels"][0, column], changed["labels"][0, column]
    margin = [parts.prompt_only_margins(model, p) for p in (one, two)]
    assert torch.allclose(margin[1] - margin[0], (log_p[new] - log_p[old]) * torch.tensor([1, 0]))


@pytest.mark.parametrize("per_token", [True, False], ids=["per token", "summed"])
def test_sap_fast_feeds_the_answers(per_token: bool) -> None:
    """Fails on a pair loss such as the released one, whose input ends before the answers."""
    model, pairs = tiny_model("llama"), random_pairs(3)
    config = SAPConfig(per_token=per_token)
    found = direction_of(model, pairs, config)
    with everything_in_float64(model):
        forced = margins(model, pairs, per_token=per_token).mean().detach()
        contrast = parts.prompt_only_pairs(pairs, pairs["labels"].shape[1], pad=0)
        blind = parts.prompt_only_margins(model, contrast)
    scored = (pairs["labels"] != -100).sum(1)
    blind = (blind / (scored.chunk(2)[0] if per_token else 1)).mean().detach()
    assert found.margin == pytest.approx(float(forced), rel=1e-8)
    assert abs(float(blind - forced)) > 0.1 * abs(float(forced))

    # A late token of an answer changes how the tokens after it are scored, so the whole direction.
    changed, column = with_late_answer_changed(pairs)
    with everything_in_float64(model):
        (before, _), (after, scored) = token_log_p(model, pairs), token_log_p(model, changed)
        truth = unit_direction(model, changed, per_token=per_token)
    assert scored[0, column] and before[0, column] != after[0, column]
    moved = direction_of(model, changed, config)
    assert moved.margin != found.margin
    # What whole models are held to everywhere: 1e-8 against autograd through transformers' own forward.
    assert all(torch.allclose(moved.u[name], g, rtol=0, atol=1e-8) for name, g in truth.items())
