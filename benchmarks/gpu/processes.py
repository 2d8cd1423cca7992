"""Runs stages in processes of their own, so that a crash, a hang or a lost GPU costs one test and no more.

The processes of a stage write to ``results.jsonl`` themselves, and their parent follows the file. A test in which its
process ends, or which does not end, is noted with that outcome, and another process takes over the rest of the share.
When its time is over a stage is killed, whatever it is doing: it never takes longer than it was given.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.record import ROOT
from benchmarks.gpu import results
from benchmarks.gpu.reporter import FATAL
from benchmarks.gpu.results import DIED, HUNG, Item

# Of a stage's time, the end in which nothing new begins and what runs may finish: seconds, and at most that share.
GRACE, GRACE_SHARE = 12.0, 0.25
# Processes that end, or do nothing, before their first test: as many are tried for a share.
_FALSE_STARTS = 2
_POLL, _REAPED = 0.1, 3.0
# pytest's codes for: all passed, some failed, stopped, none were left.
_ENDED, _STOPPED = (0, 1, 5), 2
_PR_SET_PDEATHSIG = 1


def grace_of(seconds: float) -> float:
    """Return, of a stage's seconds, those at its end in which nothing new begins."""
    return min(GRACE, GRACE_SHARE * seconds)


def end_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends, however that ends."""
    with suppress(OSError, AttributeError):  # elsewhere than on Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass(frozen=True)
class Tests:
    """A stage of tests.

    Attributes:
        arguments: for pytest: files, ``-k``, options of the plugin.
        workers: processes that share the tests.
        environment: variables beside the process's own; None unsets one.
        before: a program that each process runs under, with its arguments.
        hang: seconds after which a test counts as hung.
        startup: seconds that a process may take to its first test: a cold disk reads torch's libraries slowly.
    """

    __test__ = False  # it is none of pytest's

    stage: str
    arguments: Sequence[str]
    workers: int = 1
    environment: Mapping[str, str | None] = field(default_factory=dict)
    before: Sequence[str] = ()
    hang: float = 60.0
    startup: float = 90.0


@dataclass(frozen=True)
class Command:
    """A stage that is one command.

    Attributes:
        arguments: of this Python.
        rows: the file that it adds its measurements to, a JSON object a line, if there is one.
    """

    stage: str
    arguments: Sequence[str]
    environment: Mapping[str, str | None] = field(default_factory=dict)
    rows: Path | None = None


class Process:
    """A process in a session of its own, that ends with everything it started."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str | None]) -> None:
        variables = {**os.environ, **environment}
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={name: value for name, value in variables.items() if value is not None},
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    @property
    def code(self) -> int | None:
        """The exit code, minus the signal that ended it; None while it runs."""
        return self._process.poll()

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def kill(self, *, wait: bool = True) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        if not wait:
            return
        with suppress(subprocess.TimeoutExpired):  # one that a driver holds ends when it lets go of it
            self._process.wait(_REAPED)


class Tail:
    """Reads the lines that are added to a file."""

    def __init__(self, path: Path, *, from_end: bool) -> None:
        self._path = path
        self._at = path.stat().st_size if from_end and path.exists() else 0

    def __call__(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as stream:
            stream.seek(self._at)
            data = stream.read()
        whole = data.rfind(b"\n") + 1  # a line may be there in part
        self._at += whole
        return results.parsed(data[:whole])


class Runner:
    """Runs stages, one after another.

    Args:
        found: the file for results.
        log: the file for what processes print.
        hang: seconds after which a test counts as hung; None: what its stage says.
        only: the glob of ids that are run; None: all.
    """

    def __init__(self, found: Path, log: Path, *, hang: float | None = None, only: str | None = None) -> None:
        self.found, self.log, self.hang, self.only = found, log, hang, only

    def tests(self, tests: Tests, seconds: float) -> None:
        """Run a stage of tests within so many seconds."""
        start, cut_off = time.time(), 0
        shares = [_Share(self, tests, index, start + seconds - grace_of(seconds)) for index in range(tests.workers)]
        tail = Tail(self.found, from_end=True)
        try:
            for share in shares:
                share.start()
            while any(share.runs for share in shares):
                if time.time() > start + seconds:
                    cut_off = sum(share.runs for share in shares)
                    break
                time.sleep(_POLL)
                # Before the lines are read: what a process has written at its end is then among them.
                codes = [share.code for share in shares]
                for line in tail():
                    if line.get("stage") == tests.stage and not line.get("earlier") and "share" in line:
                        shares[line["share"]].hear(line)
                for share, code in zip(shares, codes, strict=True):
                    share.look(code)
        finally:
            for share in shares:
                share.kill(wait=False)  # all of them first: each takes its time to let go of a GPU
            for share in shares:
                share.kill()
        for share in shares:
            share.cut_off(seconds)
        problems = [share.problem for share in shares if share.problem]
        late = [f"{cut_off} of {tests.workers} processes were cut off after {seconds:.0f} s"] * bool(cut_off)
        left = sum(share.left for share in shares)
        self.ended(tests.stage, time.time() - start, problems or late, left=left, late=not problems)

    def command(self, command: Command, seconds: float) -> int | None:
        """Run a command within so many seconds; its exit code, or None if it was cut off."""
        start = time.time()
        process = Process([sys.executable, *command.arguments], self.log, command.environment)
        tail = None if command.rows is None else Tail(command.rows, from_end=False)
        end, interrupted = start + seconds, False
        try:
            while process.code is None and time.time() < end:
                if time.time() > end - grace_of(seconds) and not interrupted:
                    process.interrupt()
                    interrupted = True
                time.sleep(_POLL)
                self._take(command.stage, tail)
            code = None if interrupted else process.code
        finally:
            process.kill()
            self._take(command.stage, tail)
        problems = []
        if code is None:
            problems.append(f"cut off after {time.time() - start:.0f} s")
        elif code != 0:
            problems.append(f"ended with code {code}; {self.log.name} says why")
        self.ended(command.stage, time.time() - start, problems, late=code is None)
        return code

    def _take(self, stage: str, tail: Tail | None) -> None:
        for row in [] if tail is None else tail():
            results.append(self.found, {**row, "kind": "row", "stage": stage})

    def ended(self, stage: str, seconds: float, problems: Sequence[str], left: int = 0, *, late: bool = False) -> None:
        """Note that a stage is over; ``late``: whether its problems are nothing but want of time."""
        problem = "; ".join(dict.fromkeys(problems)) or None
        line = {"kind": "stage", "stage": stage, "seconds": round(seconds, 1), "problem": problem, "left": left}
        line["late"] = late and problem is not None
        results.append(self.found, line | {"only": self.only})


class _Share:
    """Holds a share of a stage's tests, and the process that is at it."""

    def __init__(self, runner: Runner, tests: Tests, index: int, deadline: float) -> None:
        self._runner, self._tests, self._index, self._deadline = runner, tests, index, deadline
        self._process: Process | None = None
        self._running: dict[str, Any] | None = None
        self._since = 0.0
        self._false_starts, self._worked, self._over, self._stopped = 0, False, False, False
        self.problem: str | None = None
        # Tests that have not begun.
        self.left = 0

    @property
    def runs(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        command = [*self._tests.before, sys.executable, "-m", "pytest", "-p", "benchmarks.gpu.reporter"]
        # What warns is shown and no error: libraries warn on a GPU of what no CPU shows. A step that was to be captured
        # and could not be is an error all the same.
        command += ["--continue-on-collection-errors", "-p", "no:cacheprovider", "-q", "--no-summary"]
        command += ["-W", "default", "-W", "error:graph=True"]
        command += [f"--found={self._runner.found}", f"--stage={self._tests.stage}"]
        command += [f"--share={self._index}/{self._tests.workers}", f"--deadline={self._deadline}"]
        command += [] if self._runner.only is None else [f"--only={self._runner.only}"]
        self._worked, self._since = False, time.time()
        self._process = Process([*command, *self._tests.arguments], self._runner.log, self._tests.environment)

    def hear(self, line: Mapping[str, Any]) -> None:
        """Take in a line that the process has written."""
        match line["kind"]:
            case "collected":
                self.left = line["count"]
            case "begin":
                self._running, self._worked, self._since = dict(line), True, time.time()
                self.left -= 1
            case "result":
                self._running = None
            case "share":
                self._over, self._stopped = True, line["stopped"]

    @property
    def code(self) -> int | None:
        return None if self._process is None else self._process.code

    def look(self, code: int | None) -> None:
        """See whether the process still works, by the code it had ended with, and go on with another if it does not."""
        if self._process is None:
            return
        if code is None:
            hang = self._tests.hang if self._runner.hang is None else self._runner.hang
            allowed = hang if self._worked else self._tests.startup
            if self._running is not None and time.time() - self._since > allowed:
                self._note(HUNG, f"did not end within {allowed:.0f} s")
            elif not self._worked and not self._over and time.time() - self._since > allowed:
                self._false_start(f"no test began within {allowed:.0f} s")
            else:
                return
        elif self._over and (self._worked or code in (*_ENDED, _STOPPED)):
            self._process = None
            if not (code in _ENDED or (code == _STOPPED and self._stopped)):
                self.problem = f"a process came to its end with code {code}; {self._runner.log.name} says why"
            return
        elif self._running is not None:
            how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
            self._note(DIED, f"its process ended by {how}")
        elif code != FATAL:  # else it has reported the test that it was lost in
            self._false_start(f"a process ended with code {code} outside of any test")
        self._go_on()

    def _go_on(self) -> None:
        self.kill()
        if self._false_starts < _FALSE_STARTS and time.time() < self._deadline:
            self.start()

    def _false_start(self, problem: str) -> None:
        self._false_starts += 1
        self.problem = f"{problem}; {self._runner.log.name} says why"

    def _note(self, outcome: str, reason: str) -> None:
        assert self._running is not None
        item = Item(self._running["id"], self._tests.stage, outcome, round(time.time() - self._since, 1), reason)
        results.append(self._runner.found, item.line)
        self._running = None

    def cut_off(self, seconds: float) -> None:
        """Note what was running when the stage's time was over: it had all of the grace to end in."""
        if self._running is not None:
            self._note(HUNG, f"was still running when the {seconds:.0f} s of its stage were over")

    def kill(self, *, wait: bool = True) -> None:
        if self._process is not None:
            self._process.kill(wait=wait)
            self._process = self._process if not wait else None
