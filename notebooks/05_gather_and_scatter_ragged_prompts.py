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
# # Gather and scatter ragged prompts
#
# **You will** take the rollout of notebook 01 apart: gather the prompts of four ranks by hand, look at what travels, have
# vLLM complete them, scatter the completions, and break it in the two ways in which it usually breaks.
#
# **You will learn** what the offsets are for, how equal slicing goes wrong without a word, how a mix-up is noticed, and
# why a rank without prompts must still take part.
#
# **You need** notebooks 01 and 02, two cores, 2 GiB of free memory, no GPU, no network, and about a minute.

# %%
import pandas as pd

import workbench as wb
from workbench import demo
from workbench.models.addition import is_right

# %load_ext workbench

# %%
GREEDY = wb.Sampling(temperature=0.0, max_tokens=96)
KV_CACHE_BYTES = 256 * 2**20

# %% [markdown]
# Four ranks and an engine beside them. The ranks have three, one, no and two additions to do: a *ragged* set.

# %%
# %launch 4

# %%
engine = wb.start_engine(cluster, model="tiny", kv_cache_bytes=KV_CACHE_BYTES, dtype="float32")
engine

# %%
# %%ranks
from workbench.models.addition import sample_problems

mine = [problem.prompt for problem in sample_problems([3, 1, 0, 2][rank], num_digits=[1, 2], seed=rank)]
mine

# %% [markdown]
# ## Gather
#
# One engine works for all, so all prompts go to one rank, the root. `offsets` is what must not be lost on the way: rank
# r's prompts are those from `offsets[r]` to `offsets[r + 1]`. Every rank knows the offsets, only the root has the prompts.
# Before you look: what are the five numbers for three, one, no and two prompts?

# %%
# %%ranks
pipeline = wb.RootedRollout(group, engine=None)
gathered = pipeline.gather_prompts(mine)
gathered.offsets.tolist(), gathered.prompts

# %% [markdown]
# Rank 2 has nothing: its two offsets are equal, 4 and 4.
#
# ## Generate
#
# Usually the root calls the engine; here this notebook does, to see it happen.

# %%
(gathered,) = cluster.pull("gathered", ranks=0)
completed = engine.generate(list(gathered.prompts), GREEDY)
pd.DataFrame({"prompt": completed.prompts, "completion": completed.texts, "tokens": completed.lengths})

# %% [markdown]
# ## Scatter
#
# The root cuts the completions at the offsets and sends each rank its slice. All ranks make the call; the root brings the
# completions, the others `None`.

# %%
cluster.push({"completed": None})
cluster.push({"completed": completed}, ranks=0)

# %%
# %%ranks
batch = pipeline.scatter_completions(completed, gathered.offsets)
dict(zip(batch.prompts, batch.texts, strict=True))

# %% [markdown]
# Everybody has the answers to its own questions. `wb.rollout` does the same three steps in one call:

# %%
run = wb.rollout(cluster, "mine", engine=engine, sampling=GREEDY, sleep_level=None)
by_hand = [text for texts in cluster.pull("list(batch.texts)") for text in texts]
print("the same completions:", by_hand == run.completions["text"].tolist())

# %% [markdown]
# ## How equal slicing goes wrong
#
# A popular way is to cut what was gathered into equal slices, total // world size for each rank. It is right as long as
# all ranks have equally many prompts. Here are six completions for four ranks, so one for each:

# %%
owners = [rank for rank, prompts in enumerate(cluster.pull("mine")) for _ in prompts]
takers = demo.equal_slicing([3, 1, 0, 2])
pd.DataFrame({"prompt": completed.prompts, "asked by rank": owners, "equal slicing gives it to": [str(taker) for taker in takers]})

# %% [markdown]
# Only the first goes where it belongs, and the last two to nobody. What does that do to training? Each rank rewards the
# completions it was given against its own prompts, in order:

# %%
right, sliced = [], []
for rank, prompts in enumerate(cluster.pull("mine")):
    given = [text for text, taker in zip(completed.texts, takers, strict=True) if taker == rank]
    right += [is_right(prompt, text) for prompt, text in zip(prompts, run.batch(rank).texts, strict=True)]
    sliced += [is_right(prompt, text) for prompt, text in zip(prompts, given, strict=False)]
print(f"completions that are right: {sum(right)} of {len(right)}")
print(f"seen through equal slices:  {sum(sliced)} of {len(sliced)}")

# %% [markdown]
# No error, no warning, and a reward that has to do with other prompts. That is why every completion here carries where it
# came from.
#
# ## A mix-up is noticed
#
# On purpose: an engine is quicker when prompts of equal length stand beside each other, so somebody sorts them, and
# forgets to sort the completions back. Look at the two prompts in the error.

# %% tags=["raises-exception"]
in_other_order = engine.generate(sorted(gathered.prompts, key=len), GREEDY)
cluster.push({"completed": in_other_order}, ranks=0)
cluster.execute("batch = pipeline.scatter_completions(completed, gathered.offsets)")

# %% [markdown]
# The root noticed before anything was sent, and all ranks raised the same error: none of them is left waiting.
#
# ## Why a rank without prompts must still take part
#
# Rank 2 has nothing to gather. On purpose it is clever and skips the call:

# %% tags=["raises-exception"]
# %%ranks
if mine:
    gathered = pipeline.gather_prompts(mine)

# %% [markdown]
# Gathering begins with a meeting in which every rank tells how many prompts it brings, be it none; without rank 2 the
# others would wait for ever. With `[]` it takes part, and that costs it next to nothing:

# %%
# %%ranks
gathered = pipeline.gather_prompts(mine)
gathered.offsets.tolist()

# %% [markdown]
# The same holds one step further: a rank that asked for nothing waits as long as all others do. In the picture, rank 2's
# *generate* is its wait for the engine, and it ends when that of the others ends.

# %%
run.plot_timeline()

# %% [markdown]
# ## Exercise
#
# `num_samples` says how many completions each prompt gets, a number per prompt on each rank, 0 allowed. Give rank 0's
# prompts 2, 0 and 1 of them, all others one each. Which lengths do the batches then have? Begin here:

# %%
num_samples = [[2, 0, 1], [1], [], [1, 1]]

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# sampled = wb.rollout(cluster, "mine", engine=engine, sampling=wb.Sampling(seed=0), num_samples=num_samples)
# counts = cluster.pull("len(batch)")
# assert counts == [3, 1, 0, 2]
# counts, cluster.pull("batch.prompt_index.tolist()")
# ```
#
# Three on rank 0, and its second prompt is not among them: `prompt_index` is `[0, 0, 2]`. The offsets of the prompts are
# the same as before; how the completions are cut is counted again, from the samples.
#
# </details>

# %%
cluster.close()
