"""A rooted rollout as steps of messages, read from the records of its run: prompts to the root, completions back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.records import CollectiveStep, CollectiveTrace, Held, RolloutBatch, Transfer

if TYPE_CHECKING:
    from workbench.run import Run

__all__ = ["rollout_trace"]

ROOT = 0
Rows = list[list[Held]]  # [num_members][num_parts]


def rollout_trace(run: Run, step: int = -1) -> CollectiveTrace:
    """One step of a run in rooted mode: gather, generate in the engine's own process, scatter.

    A part is what belongs to one rank: its prompts, later its completions. Bytes are those that each rank's spans counted, the few that
    ranks exchange before each phase included; what passes between the root and the engine is not counted.

    Args:
        step: a negative one counts from the last.

    Raises:
        ValueError: the run was not rooted, or has no such step.
    """
    mode = run.manifest.get("mode")
    if mode != "rooted":
        raise ValueError(
            f"the run was made in mode {mode!r}, where nothing goes to a root and back\nneeded: a run of mode 'rooted'\n"
            "wb.rollout(cluster, prompts, mode='rooted') makes one"
        )
    steps = list(run.batches)
    chosen = steps[step] if -len(steps) <= step < 0 else step
    if chosen not in run.batches:
        raise ValueError(f"the run has no step {step}\nit has {len(steps)}: {', '.join(map(str, steps)) or 'none'}")
    return _traced(run, chosen, list(run.batches[chosen].values()))


def _traced(run: Run, step: int, batches: list[RolloutBatch]) -> CollectiveTrace:
    ranks, engine = list(run.batches[step]), len(batches)
    asked = [f"{len(batch.prompts):,}\nprompt{'' if len(batch.prompts) == 1 else 's'}" for batch in batches]
    made = [f"{len(batch):,} text{'' if len(batch) == 1 else 's'}\n{batch.tokens.size:,} tok" for batch in batches]
    held: Rows = [[None] * len(batches) for _ in range(engine + 1)]
    for place, text in enumerate(asked):
        held[place][place] = text
    steps = [CollectiveStep(title="before: each rank has prompts of its own", transfers=(), held=_kept(held))]

    def move(title: str, span: str, pairs: list[tuple[int, int, int]], texts: list[str], bytes_of: list[int]) -> None:
        start_s, end_s = _times(run, step, span)
        transfers = tuple(
            Transfer(source=a, target=b, part=part, carried=texts[part], num_bytes=bytes_of[part], start_s=start_s, end_s=end_s)
            for a, b, part in pairs
        )
        for _, b, part in pairs:
            held[b][part] = texts[part]
        steps.append(CollectiveStep(title=title, transfers=transfers, held=_kept(held)))

    others = [place for place in range(engine) if place != ROOT]
    nothing = [0] * engine
    move("gather: prompts go to the root", "gather", [(p, ROOT, p) for p in others], asked, _bytes(run, step, "gather", ranks))
    move("generate: the engine takes them all", "generate", [(ROOT, engine, p) for p in range(engine)], asked, nothing)
    held[engine] = list(made)
    move("generate: it gives completions back", "generate", [(engine, ROOT, p) for p in range(engine)], made, nothing)
    move("scatter: each rank gets its own", "scatter", [(ROOT, p, p) for p in others], made, _bytes(run, step, "scatter", ranks))
    steps.append(CollectiveStep(title="after: each rank has its completions", transfers=(), held=_kept(held)))
    return CollectiveTrace(
        op="rooted rollout",
        members=(*(f"rank {rank}" for rank in ranks), "engine"),
        parts=tuple(f"rank {rank}'s" for rank in ranks),
        steps=tuple(steps),
        results=(*((place,) for place in range(engine)), ()),
    )


def _kept(held: Rows) -> tuple[tuple[Held, ...], ...]:
    return tuple(tuple(row) for row in held)


def _times(run: Run, step: int, name: str) -> tuple[float, float]:
    """From the first rank's start of a span to the last one's end, seconds since the run's start; (0, 0) where none was recorded."""
    found = [span for span in run.spans if span.step == step and span.span == name]
    if not found:
        return 0.0, 0.0
    return min(span.start_s for span in found) - run.start_s, max(span.end_s for span in found) - run.start_s


def _bytes(run: Run, step: int, name: str, ranks: list[int]) -> list[int]:
    """What each rank's spans of this name counted, [num_ranks]."""
    return [sum(span.num_bytes for span in run.spans if (span.step, span.span, span.rank) == (step, name, rank)) for rank in ranks]
