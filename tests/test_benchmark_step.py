"""The benchmark of a whole step runs end to end, times nobody who is wrong, and says who is left out."""

import json
import math
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_benchmarks import read
from torch import nn

import sap_fast
from benchmarks.common import ceiling, models
from benchmarks.ops.peers import installed
from benchmarks.published.parts import trained
from benchmarks.step import __main__ as step
from benchmarks.step import bases, contenders, peers
from benchmarks.step.batches import Given, Shapes, rows
from benchmarks.step.check import Exact, check, compare
from benchmarks.step.contenders import CONTENDERS, Contender
from benchmarks.step.counts import Allocations, Counting, Ops, launches
from benchmarks.step.rounds import Rounds
from benchmarks.step.run import Run
from benchmarks.step.suite import RATIOS, Suite

SHAPES = Shapes(4, 40, 2, 40)
OPTIONAL = {"trl-sft": "trl", "liger-sft": "liger_kernel"}
KEYS = {
    *("contender", "device", "dtype", "padding", "options", "ms", "ms_least", "ms_most", "tokens_per_s"),
    *("ratio_to_plain_sft", "ratio_to_published_tidy", "ratio_to_released", "peak_memory", "launches"),
    *("tflop", "tflops_per_s", "share_of_ceiling", "floor_ms", "ms_over_floor"),
    *("rounds", "period", "round_ms", "task_shape", "task_tokens", "task_scored", "task_rows", "task_lengths"),
    *("pair_shape", "pair_tokens", "pair_scored", "pair_rows", "pair_lengths"),
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "SMALL", SHAPES)
    monkeypatch.setattr(ceiling, "MATRIX", {"cpu": 64, "cuda": 64})
    monkeypatch.setattr(ceiling, "COPIED", {"cpu": 2**16, "cuda": 2**16})


def given(kind: str = "real", shapes: Shapes = SHAPES) -> Given:
    return rows(models.WordTokenizer(), models.examples(), shapes, kind, "cpu")


def tiny() -> nn.Module:
    model = models.with_lora(models.tiny_base()[0])
    bases.wake(model)
    return model


# The command


def test_every_contender_has_its_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    assert step.main(["--model", "tiny", "--dtype", "float32", "--rounds", "1", "--json", str(path)]) == 0
    result, said = read(path), capsys.readouterr().out
    found = {row["contender"]: row for row in result["rows"]}
    skipped = {entry["contender"]: entry["reason"] for entry in result["skipped"]}
    assert found.keys() | skipped.keys() == CONTENDERS.keys()
    assert not found.keys() & skipped.keys() and not result["refused"]
    for name, package in OPTIONAL.items():
        if installed(package) is None:
            assert skipped[name] == f"{package} is not installed"
            assert f"skipped: {name}, {package} is not installed" in said
    for name in ("float8", "delayed+float8"):
        assert skipped[name].startswith("float8=True needs an NVIDIA GPU, but the model is on cpu")
    for name, row in found.items():
        assert row.keys() == KEYS, name
        assert (row["padding"], row["dtype"], row["rounds"]) == ("real", "float32", 1)
        assert 0 < row["ms_least"] <= row["ms"] <= row["ms_most"]
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["task_tokens"] / row["ms"])
        assert row["launches"] > 100
        assert row["ms_over_floor"] == pytest.approx(row["ms"] / row["floor_ms"])
        assert row["tflops_per_s"] == pytest.approx(1e3 * row["tflop"] / row["ms"])
        assert row["share_of_ceiling"] == pytest.approx(row["tflops_per_s"] / result["ceilings"][0]["tflops_per_s"])
        tokens = sum(row["task_lengths"]), sum(row["pair_lengths"])
        shares = CONTENDERS[name].method in ("lagged", "fresh") and not name.startswith(("lagged-", "direction-kept"))
        if shares:  # pairs share their prompts
            assert row["pair_rows"] < tokens[1]
        assert shares or (row["task_rows"], row["pair_rows"]) == tokens, name
        for key, other in RATIOS.items():
            assert row[key] == pytest.approx(row["ms"] / found[other]["ms"])
    tokens = {name: (sum(row["task_lengths"]), sum(row["pair_lengths"])) for name, row in found.items()}
    task, pairs = found["lagged"]["task_tokens"], found["lagged"]["pair_tokens"]
    padded = math.prod(found["lagged"]["task_shape"]), math.prod(found["lagged"]["pair_shape"])
    assert tokens["lagged"] == tokens["fresh"] == tokens["probe-every"] == tokens["delayed"] == (task, pairs)
    assert tokens["own-sft"] == (task, 0) and tokens["plain-sft"] == (padded[0], 0)
    assert tokens["tidy"] == tokens["lagged-padded"] == padded > (task, pairs)
    assert tokens["released"] == (4 * 40, 2 * 40)
    # What an option saves, by the number of ops: a mean step of a period against the step that finds everything.
    count = {name: row["launches"] for name, row in found.items()}
    assert count["own-sft"] < count["probe-every"] < count["direction-every"] < count["lagged"] < count["tidy"]
    assert found["probe-every"]["period"] == 8 and found["probe-every"]["options"]["probe_every"] == 8
    assert count["own-sft"] < count["direction-kept"] < count["direction-every"]
    # Beside the weights of all, a step without pairs holds least, and tangents of a quarter of the sequences little.
    memory = {name: row["peak_memory"] for name, row in found.items()}
    assert memory["own-sft"] < memory["lagged"] and memory["own-sft"] < memory["plain-sft"]
    assert memory["tangents"] <= memory["lagged"] <= memory["lagged-padded"]
    # It is no SmolLM2; that steps are the same again is looked at on any model.
    assert [target["verdict"] for target in result["targets"]] == ["not measured"] * 4 + ["met"]
    (digest,) = result["digests"]
    assert (digest["dtype"], digest["identical"], digest["layers"]) == ("float32", True, 4)
    assert (len(result["ceilings"]), result["ceilings"][0]["visits"]) == (1, 1)
    assert len(said.splitlines()) == len(found) + len(skipped) + 5


def test_rows_of_other_kinds_and_another_dtype(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    names, kinds = ["plain-sft", "lagged", "lagged-padded", "released"], ["full", "released"]
    arguments = ["--model", "tiny", "--dtype", "bfloat16", "--rounds", "2", "--rows", *kinds, "--contenders", *names]
    assert step.main([*arguments, "--json", str(path)]) == 0
    result = read(path)
    assert result["skipped"] == [{"contender": "lagged-padded", "reason": "full rows hold no padding: it is lagged"}]
    for kind in kinds:
        found = {row["contender"]: row for row in result["rows"] if row["padding"] == kind}
        assert set(names) - found.keys() == ({"lagged-padded"} if kind == "full" else set())
        assert {row["dtype"] for row in found.values()} == {"bfloat16"}
        assert found["lagged"]["task_shape"] == [4, 40]
        assert found["lagged"]["ratio_to_plain_sft"] > 0
        assert found["lagged"]["ratio_to_published_tidy"] is None  # it is not among them
    assert result["seconds"] > 0


def test_what_has_no_time_left_is_left_out_by_name(tmp_path: Path) -> None:
    suite = Suite("cpu", 5, ["own-sft", "plain-sft"], None, limit=1e-9)
    assert suite.measure(tiny(), "float32", given()) == [] == suite.ceilings
    assert [(entry["contender"], entry["reason"]) for entry in suite.skipped] == [
        ("own-sft", "time"),
        ("plain-sft", "time"),
    ]
    path = tmp_path / "result.json"
    arguments = ["--model", "tiny", "--dtype", "float32", "--contenders", "own-sft", "--limit", "1e-9"]
    assert step.main([*arguments, "--json", str(path)]) == 1
    assert read(path)["rows"] == []


def test_rounds_end_with_the_time() -> None:
    """Only the first contender goes on, without which there would be no row."""
    run = Run(lambda: torch.zeros(()), {}, [1])
    for deadline, expected in ((0.0, [1]), (None, list(range(1, 10)))):
        rounds = Rounds({"a": (run, 1), "b": (run, 2)}, "cpu", deadline=deadline)
        assert list(rounds.take(9)) == expected
        assert len(rounds.seconds["a"]) == len(rounds.seconds["b"]) == len(expected)


def test_who_fails_while_timed_costs_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A failing count of launches does not cost a row its times."""
    calls = Counter[str]()

    def failing(name: str, at: int) -> Contender:
        @contextmanager
        def opened(model: nn.Module, given: Given):
            with peers.plain(model, given) as run:

                def step_() -> torch.Tensor:
                    calls[name] += 1
                    if calls[name] == at:
                        raise torch.OutOfMemoryError("no more room")
                    return run.step()

                yield replace(run, step=step_)

        return Contender(opened)

    def no_launches(*args: Any) -> float:
        raise RuntimeError("the profiler fails")

    # The check takes two steps, a third completes what memory is counted over: this one fails in its second round.
    monkeypatch.setitem(CONTENDERS, "plain-sft", failing("plain-sft", 5))
    monkeypatch.setattr(Suite, "_launches", no_launches)
    path, facts = tmp_path / "result.json", tmp_path / "facts.jsonl"
    arguments = ["--model", "tiny", "--dtype", "float32", "--rounds", "3", "--contenders", "plain-sft", "own-sft"]
    assert step.main([*arguments, "--json", str(path), "--jsonl", str(facts)]) == 1
    result = read(path)
    (row,) = result["rows"]
    assert (row["contender"], row["rounds"], row["launches"]) == ("own-sft", 3, None)
    assert {entry["contender"]: entry["reason"] for entry in result["refused"]} == {
        "plain-sft": "OutOfMemoryError: no more room",
        "own-sft": "RuntimeError: the profiler fails",
    }
    assert "in step_\n" in capsys.readouterr().err  # where it failed
    told = [json.loads(text) for text in facts.read_text().splitlines()]
    assert [fact["rounds"] for fact in told if "ms" in fact] == [2, 3, 3]
    assert {"digest", "reason", "model"} <= {key for fact in told for key in fact}


def test_two_copies_of_the_weights_are_not_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("float8", "delayed+float8"):
        monkeypatch.setitem(CONTENDERS, name, replace(CONTENDERS["lagged"], options={"float8": True}))
    suite = Suite("cpu", 1, ["float8", "delayed+float8"], None)
    assert [row["contender"] for row in suite.measure(tiny(), "float32", given())] == ["float8"]
    ((name, reason),) = [(entry["contender"], entry["reason"]) for entry in suite.skipped]
    assert name == "delayed+float8" and reason.endswith("run it in a process of its own")


def test_large_models_are_made_in_their_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large model is not made in float32 first, which takes twice the memory."""
    made: list[torch.dtype] = []

    def base(dtype: torch.dtype) -> tuple[nn.Module, Any]:
        made.append(dtype)
        return models.llama_base(2, 32, 2, 1024, dtype=dtype)

    monkeypatch.setitem(bases.BASES, "llama-2-7b", base)
    model, _ = bases.ready("llama-2-7b", None, torch.bfloat16, "cpu")
    assert made == [torch.bfloat16]
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    inverse = model.get_base_model().model.rotary_emb.inv_freq
    assert torch.equal(inverse, models.llama_base(2, 32, 2, 1024)[0].model.rotary_emb.inv_freq)


def test_what_makes_no_sense_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    wrong = {
        "a smaller model": ["--model", "llama-2-7b"],
        "--rounds must be at least 1": ["--model", "tiny", "--rounds", "0"],
        "--limit must be positive": ["--model", "tiny", "--limit", "0"],
        "invalid choice: 'nobody'": ["--contenders", "nobody"],
    }
    if not torch.cuda.is_available():
        wrong["no GPU is at hand"] = ["--device", "cuda"]
    for reason, arguments in wrong.items():
        with pytest.raises(SystemExit, match="2"):
            step.main([*arguments, "--json", str(path)])
        assert reason in capsys.readouterr().err
    assert not path.exists()


# Who is wrong is not timed


def test_a_wrong_contender_is_refused_before_timing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = []

    @contextmanager
    def slanted(model: nn.Module, given: Given):
        with peers.plain(model, given) as run:

            def wrong() -> torch.Tensor:
                loss = run.step()
                steps.append(loss)
                next(iter(trained(model).values())).grad.mul_(1.5)
                return loss

            yield Run(wrong, run.scored, run.task_lengths)

    @contextmanager
    def broken(model: nn.Module, given: Given):
        raise ZeroDivisionError("of a kind")
        yield

    monkeypatch.setitem(CONTENDERS, "plain-sft", Contender(slanted))
    monkeypatch.setitem(CONTENDERS, "tidy", Contender(broken))
    path = tmp_path / "result.json"
    names = ["plain-sft", "tidy", "own-sft"]
    arguments = ["--model", "tiny", "--dtype", "float32", "--rounds", "3", "--contenders", *names]
    assert step.main([*arguments, "--json", str(path)]) == 1
    result = read(path)
    assert len(steps) == 1
    assert [row["contender"] for row in result["rows"]] == ["own-sft"]
    reasons = {entry["contender"]: entry["reason"] for entry in result["refused"]}
    assert reasons["plain-sft"].startswith("plain-sft, step 1: the gradient is off by")
    assert reasons["tidy"] == "ZeroDivisionError: of a kind"
    assert "refused: tidy, ZeroDivisionError: of a kind, float32, real" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["fresh", "lagged", "released", "tidy", "probe-every", "delayed"])
def test_the_probe_in_use_is_looked_at(name: str) -> None:
    """A contender whose second step forgot its probe would be refused."""
    model = tiny()
    exact, own = Exact(model), models.twin(model)
    with CONTENDERS[name].opened(own, given()) as run:
        assert check(name, own, run, exact) == 2
        before, loss = run.probe(), run.step()
        acting = run.probe() if run.fresh else before
        assert any(v.any() for v in acting.values())
        found = {n: dict(own.named_parameters())[n].grad for n in trained(model)}
        compare(name, loss, found, exact.at(run.scored, acting), exact.tolerance)
        with pytest.raises(AssertionError, match="off by"):
            compare(name, loss, found, exact.at(run.scored, {}), exact.tolerance)


def test_released_draws_dropout_once_it_was_found_right() -> None:
    own = models.twin(tiny())
    with contenders.released(own, given()) as run:
        quiet = [float(run.step()) for _ in range(2)]
        assert run.settle is not None
        run.settle()
        drops = [m for m in own.modules() if isinstance(m, nn.Dropout)]
        assert drops and all(drop.training and drop.p == 0.1 for drop in drops)
        assert float(run.step()) not in quiet


def test_large_models_are_checked_on_a_cut() -> None:
    model = tiny()
    shallow = models.cut(model, 2)
    assert (len(shallow.get_base_model().model.layers), len(model.get_base_model().model.layers)) == (2, 4)
    assert model.config.num_hidden_layers == 4
    suite = Suite("cpu", 1, ["lagged", "tidy", "probe-every"], 2)
    assert [row["contender"] for row in suite.measure(model, "float32", given())] == suite.names
    assert not suite.refused and not suite.skipped


# Models


def test_twins_share_frozen_weights_alone() -> None:
    model = tiny()
    for dtype in (None, torch.float32, torch.bfloat16):
        twin = models.twin(model, dtype)
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            shared = p.data_ptr() == q.data_ptr()
            assert shared == (not p.requires_grad and dtype is not torch.bfloat16), name
            assert q.dtype == (torch.bfloat16 if dtype is torch.bfloat16 and not p.requires_grad else torch.float32)
            assert torch.equal(q, p.to(q.dtype)) and q.requires_grad == p.requires_grad


def test_qwen_has_a_model_of_its_shape() -> None:
    base, tokenizer = models.qwen_base(2, 32, 48, 4, 2, 1100)
    assert (base.config.model_type, base.config.vocab_size, base.config.intermediate_size) == ("qwen2", 1100, 48)
    assert base.lm_head.weight.data_ptr() != base.model.embed_tokens.weight.data_ptr()
    with sap_fast.attach(models.with_lora(base)) as sap:
        work = rows(tokenizer, models.examples(), SHAPES, "real", str(base.device))
        assert torch.isfinite(sap.step(work.batch, work.pairs).loss)


# Counts


def test_ops_count_what_computes() -> None:
    x = torch.ones(4, 4, requires_grad=True)
    with Ops() as ops:
        y = (x.view(16)[:8] * 2).sum()  # two views, a product, a sum
        torch.empty(3)
    assert ops.count == 2
    with Ops() as ops:
        y.backward()
    assert ops.count >= 1
    counting = Counting(lambda: x * 2 + 1, "cpu", Allocations("cpu"))
    assert [counting().sum() for _ in range(2)] == [48, 48] and counting.counts == [2, 2]
    assert launches(lambda: None, "cpu") == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_kernels_and_memory_are_counted(tmp_path: Path) -> None:
    x = torch.ones(2**20, device="cuda")
    x + x
    assert launches(lambda: (x + x, x * x), "cuda") == 2
    allocations = Allocations("cuda")
    with allocations.recording():
        x + x
    assert (allocations.peak, allocations.held) == (4 * 2**20, 0)
    path = tmp_path / "result.json"
    arguments = ["--device", "cuda", "--model", "tiny", "--rounds", "1", "--dtype", "float32", "--json", str(path)]
    # Of all contenders the kernels take longer to compile than a test may.
    assert step.main([*arguments, "--contenders", "lagged", "plain-sft"]) == 0
    assert all(row["peak_memory"] > 0 and row["launches"] > 0 for row in read(path)["rows"])
