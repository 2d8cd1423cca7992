"""Runs pytest in a process of its own, within a limit of time, and reads what it found.

The module is also the plugin (``-p benchmarks.gpu_session``) that makes such a run stop in time: what begins after
its deadline is skipped by name, with the reason ``time``.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

# Not from ``models``, which imports torch: what is run here need not.
ROOT = Path(__file__).resolve().parent.parent
DEADLINE, SIZE = "--deadline", "--size"
OUT_OF_TIME = "time"
# What has begun before its deadline may finish in this time. Then pytest is interrupted, is given some time to
# write what it has found, and is killed.
GRACE, INTERRUPTED = 20.0, 10.0
_TAIL = 40
EMPTY: Mapping[str, str] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks.gpu")
    group.addoption(DEADLINE, type=float, help="in seconds since 1970: what has not begun by then is skipped")
    group.addoption(SIZE, choices=["tiny", "real"], help="of what benchmarks/bench_gpu_ops.py times")


def pytest_runtest_setup(item: pytest.Item) -> None:
    deadline = item.config.getoption(DEADLINE)
    if deadline is not None and time.time() > deadline:
        pytest.skip(OUT_OF_TIME)


@dataclass(frozen=True)
class Settings:
    """What a part needs to know.

    Attributes:
        limit: in seconds.
        folder: for files that nobody keeps.
        smollm2: a folder with the model, as transformers saves it.
        data: task data, for rows of real lengths; the embedded ones if None.
        keep: the file that the part's result will be in; what else is kept goes beside it, by the same name.
    """

    tiny: bool
    limit: float
    folder: Path
    smollm2: Path | None = None
    data: Path | None = None
    keep: Path | None = None

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables of a part's process: a tiny run is one on the CPU, GPU or not."""
        return {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if self.tiny else {"KINETO_LOG_LEVEL": "6"}


class Test(NamedTuple):
    """One test: ``passed``, ``skipped`` or ``failed``, why, and what it recorded."""

    __test__ = False  # it is none of pytest's

    name: str
    outcome: str
    reason: str
    properties: Mapping[str, str]


class Session(NamedTuple):
    """What one run of pytest found. ``problem``: why it did not come to its end, if it did not."""

    tests: list[Test]
    seconds: float
    problem: str | None

    @property
    def counts(self) -> dict[str, int]:
        found = Counter(test.outcome for test in self.tests)
        return {outcome: found[outcome] for outcome in ("passed", "failed", "skipped")} | {"dropped": self.dropped}

    @property
    def dropped(self) -> int:
        """How many were skipped for want of time."""
        return sum(test.reason == OUT_OF_TIME for test in self.tests)

    @property
    def failed(self) -> list[Test]:
        return [test for test in self.tests if test.outcome == "failed"]


def run(arguments: Sequence[str], folder: Path, limit: float, environment: Mapping[str, str] = EMPTY) -> Session:
    """Run pytest with this plugin.

    Args:
        arguments: for pytest.
        folder: for files of its own.
        limit: in seconds; what has not begun by then is skipped.
        environment: variables beside the process's own.
    """
    report, log = folder / "report.xml", folder / "log.txt"
    start = time.time()
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu_session", f"{DEADLINE}={start + limit}"]
    command += [f"--junitxml={report}", "-p", "no:cacheprovider", *arguments]
    code = bounded(command, log, limit, environment)
    seconds = time.time() - start
    tests = read(report) if report.exists() else []
    problem = None
    if code is None:
        problem = f"stopped after {limit + GRACE:.0f} s"
    elif code not in (0, 1):  # 1: tests have failed
        problem = f"pytest ended with code {code}"
    elif not tests:
        problem = "no test was found"
    if problem is not None:
        print_end(log)
    return Session(tests, seconds, problem)


def bounded(command: Sequence[str], log: Path, limit: float, environment: Mapping[str, str] = EMPTY) -> int | None:
    """Run a command, its output in ``log``; its exit code, or None if it was stopped for running past its limit."""
    with log.open("w") as stream:
        # A session of its own, so that its children end with it.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        try:
            return process.wait(limit + GRACE)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(INTERRUPTED)
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def print_end(log: Path) -> None:
    """Show how a log ends."""
    print("\n".join(log.read_text(errors="replace").splitlines()[-_TAIL:]), flush=True)


def read(report: Path) -> list[Test]:
    """The tests of a JUnit report."""
    tests = []
    for case in ElementTree.parse(report).iter("testcase"):
        outcome, reason = "passed", ""
        for kind, name in (("skipped", "skipped"), ("failure", "failed"), ("error", "failed")):
            found = case.find(kind)
            if found is not None:
                outcome, reason = name, brief(found.get("message") or "")
        properties = {str(p.get("name")): str(p.get("value")) for p in case.iter("property")}
        tests.append(Test(case.get("name") or "", outcome, reason, properties))
    return tests


def brief(message: str) -> str:
    """The first lines of a message, without a place in anybody's file system."""
    text = " ".join(message.split()).replace(f"{ROOT}/", "").replace(f"{Path.home()}/", "")
    return re.sub(r"(/[\w.+-]+){2,}", lambda path: path[0].rpartition("/")[2], text)[:300]


def parameter(name: str) -> str:
    """What is in the brackets of a test's name."""
    return name.partition("[")[2].removesuffix("]")
