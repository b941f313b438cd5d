# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Put an engine to sleep and study lengths
#
# **You will** put a vLLM engine to sleep at two levels and wake it in parts, push new weights while it is half awake, see
# the memory move over three steps of a rollout, and take the lengths of its completions apart.
#
# **You will learn** what each level keeps, how much comes back and what that costs, why one long completion keeps all
# ranks waiting, and what another limit would have changed.
#
# **You need** notebook 01, two cores, 2 GiB of free memory, no GPU, no network, and about a minute.

# %%
import pandas as pd

import workbench as wb

# %load_ext workbench

# %%
SAMPLED = wb.Sampling(n=8, temperature=1.0, max_tokens=80, seed=0)
KV_CACHE_BYTES = 512 * 2**20
MIB = 2**20


def in_mib(frame):
    """The columns of bytes in MiB; what varies a little from run to run is rounded to tens."""
    columns = [name for name in frame if name.endswith("_bytes")]
    numbers = (frame[columns] / MIB).round().astype(int).round({"other_bytes": -1, "freed_bytes": -1, "regained_bytes": -1})
    return numbers.rename(columns=lambda name: name.replace("_bytes", ", MiB"))


# %% [markdown]
# ## Awake, asleep
#
# Two ranks and one engine for both. Its memory is weights (the model is small: 2 MiB), the KV cache that it was given,
# and everything else: Python, torch, vLLM.

# %%
# %launch 2

# %%
engine = wb.start_engine(cluster, model="tiny", kv_cache_bytes=KV_CACHE_BYTES, dtype="float32")
in_mib(engine.memory())

# %% [markdown]
# Level 1 gives back both and keeps the weights in a file; level 2 keeps nothing. Look at the last column.

# %%
readings = {"awake": engine.memory()}
for level in (1, 2):
    engine.sleep(level)
    readings[f"asleep, level {level}"] = engine.memory()
    engine.wake_up()
in_mib(pd.concat(readings).droplevel(1))

# %% [markdown]
# At level 2 nothing is kept, so on wake the weights are loaded again: those that were pushed last, or the checkpoint's.
# That is what a training loop wants, because by then it has new ones. It wakes the engine in two parts, so that new
# weights arrive before the KV cache takes its room:

# %%
engine.sleep(2)
engine.wake_up(tags=["weights"])
print("half awake:", engine.status)
engine.update_weights(wb.models.state_dict("tiny").items(), version=1)
engine.wake_up(tags=["kv_cache"])
print("then:", engine.status, "- weights of version", engine.weight_version)

# %% [markdown]
# ## A call to a sleeper
#
# On purpose: a request while it sleeps. vLLM by itself would now wait silently, for ever.

# %% tags=["raises-exception"]
engine.sleep(1)
engine.generate(["1+1="], SAMPLED)

# %% [markdown]
# ## Three steps
#
# Now as in training: the engine wakes for each step and sleeps after it. Rank 0 asks for short sums, rank 1 for long ones.

# %%
# %%ranks
from workbench.models.addition import sample_problems

mine = [problem.prompt for problem in sample_problems(8, num_digits=[1, 2] if rank == 0 else [3, 4], seed=rank)]
mine

# %%
run = wb.rollout(cluster, "mine", engine=engine, sampling=SAMPLED, sleep_level=1, num_steps=3)
in_mib(run.sleep_report).assign(step=run.sleep_report["step"]).set_index("step")

# %% [markdown]
# What was freed was measured from outside the process: weights and KV cache, each time (and a little that the step itself
# had left). Nothing was regained after the last step, since the engine still sleeps.
#
# Over time, with what ran under it on the same axis; find the three sleeps. (Memory is read ten times a second, so a sleep
# that is over sooner is hatched, and may not be seen to fall.) With a kernel, the mouse or the arrow keys tell what each
# process held at any time.

# %%
wb.view.memory_explorer(run)

# %% [markdown]
# ## How long are the completions?
#
# Before you look: which rank has the short ones, and what could the tail be?

# %%
run.plot_lengths(by="origin_rank")

# %%
lengths = run.lengths
stats = wb.length_stats(lengths["length_tokens"], lengths["finish_reason"].tolist(), lengths["origin_rank"])
print(f"half are at most {stats.median:g} tokens long, 90 % at most {stats.percentile(90):g}, the longest {stats.max}")
print(f"cut at the limit: {stats.truncated_share:.0%}")
print(f"idle, if each rank generated its own: {stats.idle_share:.0%}")

# %% [markdown]
# The tail are second and third attempts, after a `?`. The last line is the price of unequal lengths: if each rank had an
# engine of its own, rank 0 would be done early and wait for rank 1. With one engine for both, all wait for the longest
# completion.
#
# With a kernel you can turn this around by hand: other curves, ranks or steps compared, and a slider that tries another
# `max_tokens`.

# %%
wb.view.length_explorer(run)

# %% [markdown]
# The same question in numbers: what would a lower limit have cut, and what saved?

# %%
limits = pd.DataFrame({"max_tokens": [20, 30, 40, 60, 80]})
limits["cut, %"] = [round(100 * (lengths["length_tokens"] >= limit).mean(), 1) for limit in limits["max_tokens"]]
limits["tokens, %"] = [
    round(100 * lengths["length_tokens"].clip(upper=limit).sum() / lengths["length_tokens"].sum()) for limit in limits["max_tokens"]
]
limits

# %% [markdown]
# ## Exercise
#
# Are the longest completions at least the right ones? Take the share of right answers among those up to the median
# length, and among the longer ones. Begin here:

# %%
from workbench.models.addition import is_right

done = run.completions
done["is_right"] = [is_right(prompt, text) for prompt, text in zip(done["prompt"], done["text"], strict=True)]

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# by_length = done.groupby(done["length_tokens"] <= stats.median)["is_right"].mean()
# assert by_length[True] > by_length[False]
# by_length.rename({True: "short", False: "long"}).round(2)
# ```
#
# The short ones are right more often: a long sum has more places to slip in, and a doubt (`?`) begins a second attempt.
#
# </details>

# %%
cluster.close()
