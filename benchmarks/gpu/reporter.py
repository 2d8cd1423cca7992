"""The pytest plugin by which a stage's processes share its tests, stop in time, and write what they find.

A test that has begun is noted before it runs, and its result the moment it is known, so that whoever started the
process can tell which test it died in, or hangs in, and start another on the rest. A process whose GPU no longer
answers (an illegal access ends a CUDA context for good) reports the test that did it and ends itself with ``FATAL``.
"""

import gc
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import results
from benchmarks.gpu.results import FAILED, PASSED, SKIPPED, Item

# The exit code of a process whose CUDA context was lost, as of ``benchmarks.step``.
FATAL = 70
# Of a traceback, its last characters.
_TRACEBACK = 6000
OUT_OF_TIME = "time"
# Bytes of GPU memory that a process may keep between two tests.
_KEPT = 2**30


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks.gpu")
    group.addoption("--found", type=Path, help="the results.jsonl to write to")
    group.addoption("--stage", help="what its lines call the stage")
    group.addoption("--share", default="0/1", help="K/N: every Nth of the tests, from the Kth on")
    group.addoption("--deadline", type=float, help="in seconds since 1970: no test begins after it")
    group.addoption("--only", help="run the tests whose ids match; * and ? are special")
    group.addoption("--again", action="store_true", help="run the tests alone that failed in an earlier run")
    group.addoption("--spread", action="store_true", help="one test of each kind and op first, then another of each")
    group.addoption("--arch", help="what benchmarks/gpu/variants.py compiles for; by default this machine's GPU")
    group.addoption("--size", choices=["tiny", "real"], help="of what benchmarks/gpu/smoke.py and ops.py run on")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--found") is not None:
        config.pluginmanager.register(_Reporter(config), "benchmarks.gpu.reporter.found")


class _Reporter:
    """Chooses tests and reports them to one file."""

    def __init__(self, config: pytest.Config) -> None:
        option = config.getoption
        self.path, self.stage, self.deadline = option("--found"), option("--stage"), option("--deadline")
        self.only, self.again, self.spread = option("--only"), option("--again"), option("--spread")
        self.index, self.of = map(int, option("--share").split("/"))
        self.stopped = False
        self._reports: list[pytest.TestReport] = []
        self._reason = ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        lines = results.read(self.path)
        settled = results.settled(lines)
        failed = results.wrong(line for line in lines if line.get("earlier"))
        chosen = [item for item in items if results.matches(_id(item), self.only)]
        if self.again:
            chosen = [item for item in chosen if _id(item) in failed]
        if self.spread:
            chosen = _spread(chosen)
        # What failed in an earlier run comes last: what that run has not tried is more telling.
        chosen.sort(key=lambda item: not self.again and _id(item) in failed)
        # A share is of what was chosen, not of what is left: a process that takes over finds the same.
        items[:] = [item for item in chosen[self.index :: self.of] if _id(item) not in settled]
        self._tell({"kind": "collected", "count": len(items)})

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported is a failure of its own, told by one process of its stage."""
        if report.failed and self.index == 0 and results.matches(report.nodeid, self.only):
            lines = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")]
            reason = results.brief(lines[-1].removeprefix("E ") if lines else "it could not be collected")
            item = Item(report.nodeid, self.stage, FAILED, 0.0, reason, str(report.longrepr)[-_TRACEBACK:])
            results.append(self.path, item.line)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if self.deadline is not None and time.time() > self.deadline:
            item.session.shouldstop = OUT_OF_TIME
            self.stopped = True
            return True
        self._reports, self._reason = [], ""
        self._tell({"kind": "begin", "id": _id(item)})
        return None

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[Any]) -> Iterator[None]:
        outcome = yield
        report: pytest.TestReport = outcome.get_result()  # type: ignore[attr-defined]
        self._reports.append(report)
        if report.failed and call.excinfo is not None and not self._reason:
            self._reason = results.brief(call.excinfo.exconly())
        lost = report.failed and _context_is_lost()
        if call.when == "teardown" or lost:
            results.append(self.path, self._item(item).line | {"share": self.index})
        if lost:
            os._exit(FATAL)
        if call.when == "teardown":
            _give_back()

    def _item(self, item: pytest.Item) -> Item:
        failed = [report for report in self._reports if report.failed]
        skipped = [report for report in self._reports if report.skipped]
        reason, outcome = self._reason, FAILED if failed else SKIPPED if skipped else PASSED
        if outcome == SKIPPED:
            where = skipped[0].longrepr
            reason = results.brief(str(where[2] if isinstance(where, tuple) else where)).removeprefix("Skipped: ")
        traceback = "\n".join(str(report.longrepr) for report in failed)[-_TRACEBACK:]
        seconds = round(sum(report.duration for report in self._reports), 3)
        return Item(_id(item), self.stage, outcome, seconds, reason, traceback, dict(item.user_properties))

    def pytest_sessionfinish(self) -> None:
        self._tell({"kind": "share", "stopped": self.stopped})

    def _tell(self, line: dict[str, Any]) -> None:
        results.append(self.path, line | {"stage": self.stage, "share": self.index})


def _id(item: pytest.Item) -> str:
    """Return pytest's node id; of a test in a file that is not the project's, with the name of the file."""
    return item.nodeid if not item.nodeid.startswith("::") else item.path.name + item.nodeid


def _spread(items: list[pytest.Item]) -> list[pytest.Item]:
    """Order tests: one of each function and op, then the second of each, and so on."""
    seen: Counter[tuple[str, str]] = Counter()
    turns = {}
    for item in items:
        name = _id(item).partition("[")[0]
        key = name, _op(item)
        turns[_id(item)] = seen[key]
        seen[key] += 1
    return sorted(items, key=lambda item: turns[_id(item)])


def _op(item: pytest.Item) -> str:
    """Return the op that a test is of; empty if of none."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    op = parameters.get("op") or getattr(parameters.get("case"), "subject", None)
    return getattr(op, "op", None) or getattr(op, "name", "")


def _context_is_lost() -> bool:
    """Tell whether this process has used the GPU, and it answers no more."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:  # of whatever type: it does not
        return True
    return False


def _give_back() -> None:
    """Let the other processes have the GPU memory that this one keeps and does not use."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized() and torch.cuda.memory_reserved() > _KEPT:
        gc.collect()
        torch.cuda.empty_cache()
