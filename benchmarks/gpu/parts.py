"""The parts of a run on a GPU: which stages they have, in which order, and how long each may take.

What tells the most comes first. A stage that ends early leaves its time to those after it.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import record
from benchmarks.gpu import cache, results
from benchmarks.gpu.processes import FATAL, Command, Runner, Tests, grace_of
from sap_fast.ops._cases import every_op

# Seconds that a part takes by default, starts of its processes included.
LIMITS = {"check": 260.0, "time": 330.0, "ahead": 1800.0}
WORKERS = 16
# The most that a stage may take; what a part has beyond its default goes to the tests, and to the whole steps.
COMPILING, SMOKE, TESTS, STEPS = 35.0, 70.0, 200.0, 65.0
AGAIN, CEILINGS, FIDELITY, OPS, PROFILE, FLOAT8_STEPS = 55.0, 20.0, 40.0, 45.0, 40.0, 30.0
# What a command needs to its start, and after the end of what it was told.
STARTING = 12.0
# With less, no stage begins: its processes would hardly have started.
LEAST = 8.0

SMOKE_FILE, VARIANTS_FILE, OPS_FILE = (f"benchmarks/gpu/{name}.py" for name in ("smoke", "variants", "ops"))
# The kernels' contract; then what only a GPU shows.
DEVICE_TESTS = tuple(
    f"tests/{name}.py"
    for name in (
        *("test_kernels", "test_graph_gpu", "test_gpu", "test_kernel_step", "test_float8", "test_attention_backends"),
        *("test_packing_gpu", "test_kernel_edges", "test_kernel_float8", "test_kernel_dropout", "test_benchmark_step"),
        "test_gpu_launches",
    )
)
# Compiling by torch takes longer than it tells.
LEFT_OUT = "not compiles_without_a_graph_break"
# In the interpreter, a handful.
TINY_TESTS = ("tests/test_kernels.py", "-k", "test_agrees_with_the_oracle and 5x7 and float32")

# The stages that are one command.
COMMANDS = ("ceilings", "step", "options", "fidelity", "profile", "float8", "small")

MODEL, SMALL_MODEL = "llama-2-7b", "smollm2-shape"
FIDELITY_MODELS = ("llama", "smollm2-shape")
CHECKED = ("lagged", "graph", "plain-sft")
# In the order of the goals. An H200 gets through the first in some 70 s, of which half is starting and checking.
TIMED = ("lagged", "graph", "own-sft", "plain-sft", "liger-sft", "tidy", "released")
OPTIONS = (
    *("direction-kept", "plain-sft", "own-sft", "probe-every", "direction-every", "direction-every+tangents"),
    *("lagged-padded", "tidy", "trl-sft"),
)
# It holds a second copy of the weights, by products that differ between releases of torch: in a process of its own.
FLOAT8 = ("plain-sft", "lagged", "float8")
SMALL = ("lagged", "graph", "own-sft", "plain-sft")
TINY_CONTENDERS = ("tidy", "plain-sft", "own-sft", "lagged")


def environment(*, tiny: bool) -> dict[str, Any]:
    """Tell where a run takes place: see :func:`benchmarks.common.record.environment`."""
    return record.environment("cpu" if tiny or not torch.cuda.is_available() else "cuda")


def unfit(args: argparse.Namespace) -> str | None:
    """Say why a part cannot run here as it was asked for; None if it can."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if args.part == "ahead":
        return None
    if not args.tiny and not torch.cuda.is_available():
        return "no GPU is at hand; --tiny goes through every stage without one"
    if not args.tiny and interpreted:
        return "TRITON_INTERPRET=1 keeps kernels off the GPU: unset it, or give --tiny"
    if args.sanitize and (args.part != "check" or args.tiny):
        return "--sanitize belongs to --part check, on a GPU"
    if args.sanitize and args.sanitize not in (names := [op.name for op in every_op()]):
        return f"--sanitize takes one of {', '.join(names)}, not {args.sanitize!r}"
    if args.sanitize and sanitizer() is None:
        return "--sanitize needs compute-sanitizer, which comes with CUDA: put it on the PATH"
    return None


def sanitizer() -> str | None:
    """Find compute-sanitizer."""
    beside = "/usr/local/cuda/bin/compute-sanitizer"
    return shutil.which("compute-sanitizer") or (beside if Path(beside).exists() else None)


class Run:
    """One run of a part: its stages, within the time that is left.

    Args:
        args: of the command.
        folder: for files that nobody keeps.
        end: when the last stage must have ended, in seconds since 1970.
        carried: the folder of what was brought along.
        clock: tells the time.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        runner: Runner,
        folder: Path,
        end: float,
        carried: Path,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.args, self.runner, self.folder, self.end, self._clock = args, runner, folder, end, clock
        # A run on a GPU uses the user's own cache; what is compiled for another device stays apart from it.
        apart = args.tiny or args.part == "ahead"
        self.cache = folder / "triton" if apart else cache.default_folder()
        self.size = "tiny" if args.tiny else "real"
        sources = [carried / cache.NAME, *([args.resume / cache.NAME] if args.resume else [])]
        for source in sources if not args.tiny else []:
            if source.exists():
                count = cache.unpack(source, self.cache)
                print(f"{source}: {count} files of compiled kernels", flush=True)

    @property
    def environment(self) -> dict[str, str | None]:
        """The variables of every stage's processes."""
        threads = "1" if self.args.tiny else "2"
        common: dict[str, str | None] = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": threads}
        common |= {"TRITON_CACHE_DIR": str(self.cache), "PYTHONUNBUFFERED": "1", "KINETO_LOG_LEVEL": "6"}
        common |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        return common | ({"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"} if self.args.tiny else {})

    def seconds(self, most: float, keep: float = 0.0) -> float:
        """Return how long a stage may take: at most ``most``, of what is left less what those after it keep."""
        return min(most, self.end - self._clock() - keep)

    def done(self, stage: str) -> bool:
        """Tell whether an earlier run has come to the end of a stage, and nothing in it was wrong."""
        lines = results.read(self.runner.found)
        ended = any(line["kind"] == "stage" and line["stage"] == stage and line.get("earlier") for line in lines)
        wrong = results.wrong(lines)
        return ended and not any(item.stage == stage and item.id in wrong for item in results.items(lines))

    def tests(self, tests: Tests, most: float, keep: float = 0.0) -> None:
        """Run a stage of tests, if there is time for it and ``--only`` has something in it."""
        name, colons, _ = (self.args.only or "*").partition("::")
        files = [word for word in tests.arguments if word.endswith(".py")]
        elsewhere = name.partition("/")[0] in COMMANDS
        wanted = any(results.matches(file, name) for file in files) if colons else not elsewhere
        if wanted and not self.done(tests.stage):
            self._run(tests.stage, lambda seconds: self.runner.tests(tests, seconds), most, keep)

    def command(self, command: Command, most: float, keep: float = 0.0) -> int | None:
        """Run a stage that is one command, if there is time for it; return its exit code, None if it has none."""
        only = self.args.only
        if self.done(command.stage) or not (only is None or results.matches(command.stage, only.partition("/")[0])):
            return None
        return self._run(command.stage, lambda seconds: self.runner.command(command, seconds), most, keep)

    def steps(
        self, stage: str, contenders: Sequence[str], rounds: int, most: float, keep: float = 0.0, model: str = MODEL
    ) -> None:
        """Run whole steps; where one contender has lost the GPU for all of its process, the others once more."""
        end = self._clock() + self.seconds(most, keep)
        chosen = list(contenders)
        while chosen:
            seconds = self.seconds(end - self._clock())
            code = self.command(_steps(self, stage, chosen, rounds, seconds, model), seconds)
            lost = [row["lost"] for row in results.rows(results.read(self.runner.found), stage) if "lost" in row]
            if code != FATAL or not {*chosen} & {*lost} or end - self._clock() < AGAIN:
                break
            chosen = [name for name in chosen if name not in lost]

    def _run(self, stage: str, run: Callable[[float], Any], most: float, keep: float) -> Any:
        seconds = self.seconds(most, keep)
        if seconds < LEAST:
            self.runner.ended(stage, 0.0, ["not begun: no time was left"], late=True)
            return
        print(f"{stage}: at most {seconds:.0f} s", flush=True)
        return run(seconds)

    def python(self, stage: str, module: str, *arguments: str, rows: bool = True) -> Command:
        """Run one of the benchmarks' commands as a stage; with ``rows`` it is told where to write them."""
        path = self.folder / f"{stage}.jsonl"
        words = ["-m", module, *arguments, *(["--jsonl", str(path)] if rows else [])]
        return Command(stage, words, self.environment, path if rows else None)

    def keep(self) -> None:
        """Pack the kernels that were compiled."""
        if self.cache.exists():
            print(f"{cache.NAME}: {cache.pack(self.cache, self.args.out / cache.NAME)}", flush=True)


def check(run: Run) -> None:
    """Run the part that finds whether everything runs, and is right."""
    args = run.args
    if args.sanitize:
        return sanitize(run)
    variants(run, most=COMPILING, keep=60.0)
    smoke = (SMOKE_FILE, *map(str, args.also), f"--size={run.size}")
    run.tests(Tests("smoke", (*smoke, "--spread"), args.workers, run.environment, hang=45.0), SMOKE, keep=30.0)
    tests = TINY_TESTS if args.tiny else (*DEVICE_TESTS, "-m", "gpu", "-k", LEFT_OUT)
    # However much time there is, of a quarter of an hour ``time`` must have its part, too.
    most = max(TESTS, args.limit - 2 * LIMITS["time"])
    run.tests(Tests("tests", (*tests, "--spread"), args.workers, run.environment), most, keep=STEPS)
    run.steps("step", TINY_CONTENDERS[1::2] if args.tiny else CHECKED, rounds=2, most=STEPS)
    return None


def variants(run: Run, most: float, keep: float = 0.0) -> None:
    """Compile what the smoke launches."""
    # The interpreter leaves nothing to compile. Each kernel is found in its place afterwards.
    environment = run.environment | {"TRITON_INTERPRET": None, "CUBLAS_WORKSPACE_CONFIG": None}
    arch = [f"--arch={run.args.arch}"] if run.args.tiny or run.args.part == "ahead" else []
    arguments = (VARIANTS_FILE, f"--size={run.size}", *arch)
    run.tests(Tests("compile", arguments, run.args.workers, environment, hang=25.0), most, keep)


def sanitize(run: Run) -> None:
    """Run one op's smoke under compute-sanitizer, which sees accesses beyond what was allocated."""
    program = sanitizer()
    assert program is not None
    before = (program, "--tool", "memcheck", "--error-exitcode", "99", "--print-limit", "20")
    environment = run.environment | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    arguments = (SMOKE_FILE, f"--size={run.size}", "-k", f"test_op and {run.args.sanitize}-")
    # It takes as long as it takes, many times what Python and the kernels do by themselves.
    inf = float("inf")
    run.tests(Tests("sanitize", arguments, 1, environment, before, hang=inf, startup=inf), inf)


def time_(run: Run) -> None:
    """Run the part that finds how fast all is; first, whether what failed is mended."""
    args = run.args
    files = (SMOKE_FILE, VARIANTS_FILE, *map(str, args.also), *(TINY_TESTS[:1] if args.tiny else DEVICE_TESTS))
    known = {Path(file).name for file in files}
    wrong = results.wrong(results.read(run.runner.found))
    if failed := [id for id in wrong if Path(id.partition("::")[0]).name in known]:
        arguments, workers = (*files, f"--size={run.size}", "--again"), min(args.workers, len(failed))
        run.tests(Tests("again", arguments, workers, run.environment, hang=40.0), AGAIN)
    run.command(run.python("ceilings", "benchmarks.gpu.ceilings", *_device(run)), CEILINGS)
    # By default they get some 150 s; of less time, most of it.
    left = run.seconds(float("inf"))
    timed, rounds = (TINY_CONTENDERS, 1) if args.tiny else (TIMED, 7)
    run.steps("step", timed, rounds, most=max(left - (FIDELITY + OPS + PROFILE + FLOAT8_STEPS), left / 2))
    fidelity = [
        "--json",
        str(run.folder / "fidelity.json"),
        *(["--tiny"] if args.tiny else ["--models", *FIDELITY_MODELS, "--dual"]),
    ]
    fidelity += [] if args.tiny else ["--device", "cuda"]
    run.command(run.python("fidelity", "benchmarks.fidelity", *fidelity), FIDELITY)
    run.tests(Tests("ops", (OPS_FILE, f"--size={run.size}"), 1, run.environment), OPS)
    profile(run)
    if not args.tiny:  # no goal is judged by them
        run.steps("options", OPTIONS, 7, float("inf"))
        run.steps("float8", FLOAT8, 7, float("inf"))
        run.steps("small", SMALL, 7, float("inf"), model=SMALL_MODEL)


def profile(run: Run) -> None:
    """Profile a step by its phases; the page is kept."""
    folder = run.folder / "profile"
    arguments = ["--out", str(folder), *_device(run), *_data(run)]
    tiny, real = ["--model", "tiny", "--small", "--steps", "1"], ["--model", MODEL, "--steps", "3"]
    arguments += tiny if run.args.tiny else real
    run.command(run.python("profile", "benchmarks.step.profile", *arguments, rows=False), PROFILE)
    if (folder / "profile.html").exists():
        shutil.copy(folder / "profile.html", run.args.out / "profile.html")
    if (folder / "profile.json").exists():
        found = json.loads((folder / "profile.json").read_text(encoding="utf-8"))
        results.append(run.runner.found, {"kind": "row", "stage": "profile", "profile": found})


def ahead(run: Run) -> None:
    """Compile without a GPU what ``check`` compiles first."""
    variants(run, most=float("inf"))


def _steps(run: Run, stage: str, contenders: Sequence[str], rounds: int, seconds: float, model: str) -> Command:
    """Time whole steps. The command is told less than it may take, so that it comes to its own end."""
    only = run.args.only
    chosen = list(contenders)
    if only is not None and "/" in only:
        chosen = [name for name in contenders if results.matches(f"{stage}/{name}", only)]
    arguments = ["--json", str(run.folder / f"{stage}.json"), "--rounds", str(rounds), "--dtype", "bfloat16"]
    limit = seconds - grace_of(seconds) - STARTING
    arguments += ["--limit", f"{max(0.2 * seconds, limit, 1.0):.0f}", "--contenders", *(chosen or contenders)]
    if run.args.tiny:
        arguments += ["--model", "tiny"]
    else:
        arguments += ["--model", model, "--device", "cuda", "--published-shapes"]
    arguments += ["--rows", "real", *(["floor"] if (run.args.part, stage) == ("time", "step") else [])]
    return run.python(stage, "benchmarks.step", *arguments, *_data(run))


def _device(run: Run) -> list[str]:
    return ["--device", "cpu" if run.args.tiny else "cuda"]


def _data(run: Run) -> list[str]:
    return ["--data", str(run.args.data.absolute())] if run.args.data else []


PARTS: Mapping[str, Callable[[Run], None]] = {"check": check, "time": time_, "ahead": ahead}
