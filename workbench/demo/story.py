"""The demonstration's parts in order, a section each; every claim is checked before it is told.

    ranks, engine -> ragged rollout -> sleep and wake -> sampled rollout with figures -> deadlock -> next cell

Knows clusters, engines and runs. Does not know terminals or files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pandas as pd

import workbench as wb
from workbench.demo.parts import MIB, bare_vllm, compare, memory_mib, name_engine, tokens_of
from workbench.models.addition import is_right
from workbench.ranks.cluster import Cluster
from workbench.view.report import Section

__all__ = ["story"]

WORLD_SIZE = 4
GREEDY = wb.Sampling(temperature=0.0, max_tokens=96)
SAMPLED = wb.Sampling(n=4, temperature=1.0, max_tokens=96, seed=0)
NUM_STEPS = 3
KV_CACHE_BYTES = 512 * MIB
PROMPTS_CELL = """\
from workbench.models.addition import sample_problems
mine = [problem.prompt for problem in sample_problems([6, 2, 0, 5][rank], num_digits=[1, 2, 3, 4], seed=rank)]"""
SKIPPING_CELL = """\
if rank != 2:
    dist.barrier()"""
_LEAST_FREED = 0.9  # of weights and KV cache; what sleep is about


def story(say: Callable[[str], None]) -> Iterator[Section]:
    """Tell the demonstration.

    Args:
        say: told what is begun, before each wait of some seconds.

    Raises:
        WorkbenchError: a claim does not hold, or ranks or engine failed; the ranks are ended.
    """
    say(f"starting {WORLD_SIZE} ranks")
    started = time.monotonic()
    with wb.launch(WORLD_SIZE) as cluster:
        launch_s = time.monotonic() - started
        say("starting vLLM in a process of its own")
        teller = _Teller(cluster, say)
        start_s = time.monotonic() - started - launch_s
        yield from teller.sections(launch_s, start_s)


class _Teller:
    """One cluster and its engine, and what the first part leaves for the others to compare with."""

    def __init__(self, cluster: Cluster, say: Callable[[str], None]) -> None:
        self.cluster = cluster
        self.say = say
        self.engine = wb.start_engine(cluster, model="tiny", kv_cache_bytes=KV_CACHE_BYTES, dtype="float32")
        self.pids = self.engine.pids
        self.first: list[list[int]] = []

    def sections(self, launch_s: float, start_s: float) -> Iterator[Section]:
        self.cluster.execute(PROMPTS_CELL)
        yield self.ragged_rollout(launch_s, start_s)
        yield self.sleep_and_wake()
        yield self.sampled_rollout()
        yield self.deadlock()
        yield self.next_cell()

    def ragged_rollout(self, launch_s: float, start_s: float) -> Section:
        self.say("gather -> generate -> scatter")
        run = self._greedy_rollout()
        self.first = tokens_of(run)
        prompts = [prompt for of_rank in self.cluster.pull("mine") for prompt in of_rank]
        self.say("the same prompts by a bare vllm.LLM, in a process that knows nothing of the ranks")
        table = compare(run, bare_vllm(prompts, GREEDY))
        num_equal, num_misled = int((table["as bare vLLM"] == "equal").sum()), int(table.iloc[:, -1].str.contains(":").sum())
        _claim(num_equal == len(table), f"only {num_equal} of {len(table)} completions have a bare vLLM's tokens", table.to_string())
        text = (
            f"{WORLD_SIZE} ranks stood after {launch_s:.1f} s, the engine ({name_engine(run)}) after {start_s:.1f} s more. Each rank made "
            "prompts of its own, rank 2 none. They were gathered to rank 0, completed by the engine and scattered back.\n\n"
            f"Tokens equal to a bare vllm.LLM's: {num_equal} of {len(table)}. Equal slicing, total // world size prompts a rank, would "
            f"have given {num_misled} of {len(table)} to the wrong rank or to nobody."
        )
        return Section(heading="1. A ragged rollout: each completion back on the rank it came from", text=text, table=table)

    def sleep_and_wake(self) -> Section:
        self.say("sleep and wake")
        held = int(self.engine.memory()[["weights_bytes", "kv_cache_bytes"]].sum().sum()) / MIB
        rows = {"awake": memory_mib(self.engine)}
        self.engine.sleep(1)
        rows[self.engine.status] = memory_mib(self.engine)
        self.engine.wake_up()
        rows["awake again"] = memory_mib(self.engine)
        self._claim_same_tokens("after waking")
        table = pd.DataFrame({"the engine is": list(rows), **pd.DataFrame(rows.values()).to_dict("list")})
        before, asleep, after = table.iloc[:, -1]  # the GPU's where there is one
        for moved, what in ((before - asleep, "fell"), (after - asleep, "rose")):
            _claim(moved >= _LEAST_FREED * held, f"memory {what} by {moved:.0f} MiB only; weights and KV cache hold {held:.0f}", str(table))
        text = (
            f"Weights and KV cache hold {held:,.0f} MiB. Read from outside, the engine's memory fell by {before - asleep:,.0f} MiB when it "
            f"went to sleep (level 1: the weights kept in a file) and rose by {after - asleep:,.0f} MiB when it woke. The same prompts "
            "gave the same tokens."
        )
        return Section(heading="2. The engine sleeps and wakes", text=text, table=table)

    def sampled_rollout(self) -> Section:
        self.say(f"{NUM_STEPS} steps at temperature {SAMPLED.temperature:g}, the engine asleep after each")
        run = wb.rollout(self.cluster, "mine", engine=self.engine, sampling=SAMPLED, sleep_level=1, num_steps=NUM_STEPS)
        done, stats = run.completions, wb.length_stats(run.completions["length_tokens"])
        num_right = sum(is_right(prompt, text) for prompt, text in zip(done["prompt"], done["text"], strict=True))
        text = (
            f"{SAMPLED.n} completions a prompt, {NUM_STEPS} steps, {len(done)} completions: {num_right} answer right. Half are at most "
            f"{stats.median:g} tokens long, the longest {stats.max}: doubts and second attempts make the tail, and "
            f"{run.truncated_share:.0%} ran into the limit of {SAMPLED.max_tokens}. Every rank waits for the longest one.\n\n"
            "Here are the shortest, a middle and the longest one, then all lengths, what ran when (a rank's generate is its wait for the "
            "engine), and the memory, which falls whenever the engine sleeps."
        )
        examples = done.sort_values("length_tokens").iloc[[0, len(done) // 2, -1]]
        table = examples[["origin_rank", "prompt", "text", "length_tokens", "finish_reason"]].rename(
            columns={"origin_rank": "rank", "text": "completion", "length_tokens": "tokens", "finish_reason": "ended by"}
        )
        figures = (run.plot_lengths(), run.plot_timeline(), run.plot_memory())
        return Section(heading="3. Sampled completions: how long they are, who waits, what sleeps", text=text, table=table, figures=figures)

    def deadlock(self) -> Section:
        self.say("a deadlock on purpose")
        began = time.monotonic()
        try:
            self.cluster.execute(SKIPPING_CELL)
        except wb.RankDeadlock as error:
            took_s, told = time.monotonic() - began, str(error)
        else:
            raise wb.WorkbenchError("the demonstration does not hold: a cell in which rank 2 skips a barrier ended without an error")
        text = f"On purpose, in the cell below. {took_s:.2f} s after it began, the cell ended by itself and said which rank waits for whom."
        output = "\n".join(f">>> {line}" for line in SKIPPING_CELL.splitlines()) + f"\n\nRankDeadlock: {told}"
        return Section(heading="4. Rank 2 skips a collective", text=text, output=output)

    def next_cell(self) -> Section:
        self.say("the next cell")
        counts = self.cluster.pull("len(mine)")
        told = f"the engine is {self.engine.status}, its processes {self.engine.pids}; they were {self.pids}"
        _claim(self.engine.pids == self.pids and self.engine.is_sleeping, told)
        self._claim_same_tokens("after the deadlock")
        text = (
            f"The names are still there: the ranks hold {', '.join(map(str, counts))} prompts. The engine was asleep meanwhile and was not "
            "started again: the same process woke for one more rollout of the same prompts and gave the same tokens."
        )
        return Section(heading="5. The next cell", text=text)

    def _greedy_rollout(self) -> wb.Run:
        return wb.rollout(self.cluster, "mine", engine=self.engine, sampling=GREEDY, sleep_level=None)

    def _claim_same_tokens(self, when: str) -> None:
        again = tokens_of(self._greedy_rollout())
        num_same = sum(one == other for one, other in zip(self.first, again, strict=True))
        _claim(num_same == len(again), f"only {num_same} of {len(again)} completions have the same tokens {when}")


def _claim(holds: bool, text: str, seen: str = "") -> None:
    if not holds:
        raise wb.WorkbenchError(f"the demonstration does not hold: {text}\n{seen}".rstrip())
