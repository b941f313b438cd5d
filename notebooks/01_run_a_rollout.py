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
# # Run a rollout
#
# **You will** start four ranks from this notebook, let them make prompts of their own, and run the rollout of
# distributed RL over them with a real vLLM engine: *gather* the prompts, *generate*, *scatter* the completions. Then
# the engine sleeps and wakes, a rank goes missing in a collective, and the next cell goes on as if nothing had
# happened.
#
# **You will learn** why completions must find their way back to the rank that asked, what sleep gives back, how long
# completions are, and what a deadlock looks like when somebody explains it.
#
# **You need** two cores, 2 GiB of free memory, no GPU, no network, and about a minute.

# %%
import time

import pandas as pd

import workbench as wb
from workbench import demo
from workbench.models.addition import is_right

# %%
pd.set_option("display.max_colwidth", 120)

GREEDY = wb.Sampling(temperature=0.0, max_tokens=96)
SAMPLED = wb.Sampling(n=4, temperature=1.0, max_tokens=96, seed=0)
NUM_STEPS = 3
KV_CACHE_BYTES = 512 * 2**20

# %% [markdown]
# ## Four ranks
#
# Each rank is a process of its own; together they form a `torch.distributed` world over gloo. They live until
# `close()`: names that one cell leaves are there in the next.

# %%
cluster = wb.launch(4)
print(cluster)

# %% [markdown]
# `execute` runs a cell on every rank. This one makes additions of one to four digits, a different number on each rank:
# six, two, none and five. Such prompts are called *ragged*. Equal outputs are shown once.

# %%
cluster.execute("""
from workbench.models.addition import sample_problems

mine = [problem.prompt for problem in sample_problems([6, 2, 0, 5][rank], num_digits=[1, 2, 3, 4], seed=rank)]
mine
""")

# %% [markdown]
# ## 1. A ragged rollout
#
# The engine is real vLLM in a process of its own, with the small bundled model `tiny`, which adds numbers and writes
# out its work. `"mine"` names the variable on the ranks: this notebook only watches, the prompts and completions travel
# between the ranks.

# %%
engine = wb.start_engine(cluster, model="tiny", kv_cache_bytes=KV_CACHE_BYTES, dtype="float32")
pids = engine.pids  # to compare with at the end
run = wb.rollout(cluster, "mine", engine=engine, sampling=GREEDY, sleep_level=None)
print(demo.name_engine(run))

# %% [markdown]
# Are these vLLM's own tokens? A bare `vllm.LLM`, in a fresh process that knows nothing of ranks, completes the same
# prompts.

# %%
prompts = [prompt for of_rank in cluster.pull("mine") for prompt in of_rank]
table = demo.compare(run, demo.bare_vllm(prompts, GREEDY))
print("equal:", (table["as bare vLLM"] == "equal").sum(), "of", len(table))
table

# %% [markdown]
# The last column is what many training scripts do: cut the gathered completions into equal slices, total // world size
# for each rank. With ragged prompts most of them would go to a rank that never asked, and what is left over to nobody.
# Nothing would fail; the rewards would just belong to other prompts. Here each completion carries where it came from,
# and that is checked when it comes back.
#
# Every rank now has its own completions under the name `batch`:

# %%
cluster.execute("len(batch.prompts), len(batch), list(batch.texts[:1])")

# %% [markdown]
# ## 2. The engine sleeps and wakes
#
# While the ranks train, the engine's memory is in the way. Asleep at level 1 it keeps its weights in a file and gives
# back the rest. Look at the numbers: they are the memory of the engine's process as the operating system counts it
# (PSS), in MiB, rounded to tens.

# %%
readings = {"awake": demo.memory_mib(engine)}
engine.sleep(1)
readings[engine.status] = demo.memory_mib(engine)
engine.wake_up()
readings["awake again"] = demo.memory_mib(engine)
pd.DataFrame(readings).T.round(-1)

# %% [markdown]
# The 512 MiB of the KV cache and the weights (2 MiB) are gone and come back; what stays is Python, torch and vLLM
# themselves. And the engine still knows what it knew:


# %%
def greedy_tokens():
    run = wb.rollout(cluster, "mine", engine=engine, sampling=GREEDY, sleep_level=None)
    return demo.tokens_of(run)


first = demo.tokens_of(run)
print("same tokens after waking:", greedy_tokens() == first)

# %% [markdown]
# ## How long are completions?
#
# Now as in training: four samples of each prompt at temperature 1, three steps, and after each step the engine sleeps.

# %%
sampled = wb.rollout(cluster, "mine", engine=engine, sampling=SAMPLED, sleep_level=1, num_steps=NUM_STEPS)
done = sampled.completions
num_right = sum(is_right(prompt, text) for prompt, text in zip(done["prompt"], done["text"], strict=True))
print(f"{len(done)} completions, {num_right} of them answer right")

# %% [markdown]
# Before you look: each addition has one right work-out of known length. Where should the tail come from?

# %%
sampled.plot_lengths()

# %% [markdown]
# Peaks are the numbers of digits; the tail are second attempts. A `?` in a completion doubts the attempt before it and
# begins again, some until the limit cuts them:

# %%
longest = done.sort_values("length_tokens", kind="stable").tail(3)
longest[["prompt", "text", "length_tokens", "finish_reason"]]

# %% [markdown]
# What ran when? On a rank, *generate* is the wait for the engine: all of them wait for the longest completion of the
# step, also rank 2, which asked for none.

# %%
sampled.plot_timeline()

# %% [markdown]
# And the memory of all processes, read from outside ten times a second. It falls whenever the engine sleeps; here it is
# woken at once for the next step, in training the ranks would use the room meanwhile.

# %%
sampled.plot_memory()

# %% [markdown]
# ## 3. A rank is missing
#
# Rank 2 skips a collective on purpose. Usually the others would now wait until a timeout of half an hour, and nobody
# would say why. Watch how the cell ends.

# %% tags=["raises-exception"]
began = time.monotonic()
try:
    cluster.execute("""
if rank != 2:
    dist.barrier()
""")
finally:
    print("ended within a second:", time.monotonic() - began < 1)

# %% [markdown]
# The first line says it all: who waits, where, and for whom. It is also kept:

# %%
print(cluster.last_diagnosis.sentence)

# %% [markdown]
# ## 4. The next cell
#
# Names are still there, the engine is the same process, and so are the tokens.

# %%
print("prompts on each rank:", cluster.pull("len(mine)"))
print("same tokens:", greedy_tokens() == first, "- same engine process:", engine.pids == pids)

# %% [markdown]
# ## Exercise
#
# Level 2 discards the weights instead of keeping them. Put the engine to sleep at level 2, look at its memory, wake it, and
# compare the greedy tokens once more. Where did the weights come from? Begin here:

# %%
print("the engine is", engine.status)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# engine.sleep(2)
# print(demo.memory_mib(engine))
# engine.wake_up()
# assert greedy_tokens() == first
# ```
#
# They were loaded again from the checkpoint, or, had a training loop pushed newer ones, from what it pushed last. Notebook
# 06 goes on from here.
#
# </details>
#
# Closing ends the ranks and the engine; so does the end of the notebook's kernel, whichever way it ends.

# %%
cluster.close()
print(cluster)

# %% [markdown]
# **Try next:** other prompts per rank in the first cell on the ranks, or `mode="grouped", tp=2` in `start_engine`.
