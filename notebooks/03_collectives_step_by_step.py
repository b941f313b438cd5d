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
# # Collectives step by step
#
# **You will** watch four ranks carry out collectives message by message, predict what each holds in the end, compare how
# much travels, and make two collectives meet that do not belong together.
#
# **You will learn** what `all_reduce`, `reduce_scatter`, `all_gather`, `gather`, `scatter` and `broadcast` leave on each
# rank, that one of them is two of the others, and which of them a rollout is made of.
#
# **You need** notebook 02, two cores, 2 GiB of free memory, no GPU, no network, and about a minute.

# %%
import pandas as pd

import workbench as wb

# %load_ext workbench

# %%
# %launch 4

# %% [markdown]
# ## One sum for everybody
#
# Each rank brings four numbers; the tens tell whose they are, the ones which part. `all_reduce` adds them up, and
# everybody has the sums. How? The ranks stand in a ring, and each only ever talks to the next. What you see below was
# carried out just now: real messages between the ranks, kept, and compared with what torch's own `all_reduce` gives.
#
# With a kernel there is a slider, and you see one step at a time; without one the strip shows all of them. Follow one row:
# where does the number grow on its way, and where is it only passed on?

# %%
wb.view.trace_collective(cluster, "all_reduce")

# %% [markdown]
# Six steps: in the first three a part collects its sum on the way around the ring, in the last three the finished sums go
# around once more. These halves have names of their own.
#
# ## The two halves
#
# `reduce_scatter` stops after the first half: every rank has one finished part. `all_gather` is the second half: every
# rank begins with one part and ends with all.

# %%
wb.view.trace_collective(cluster, "reduce_scatter")

# %%
wb.view.trace_collective(cluster, "all_gather")

# %% [markdown]
# Do they really make an `all_reduce` together? On real tensors, without pictures:

# %%
# %%ranks
mine = 10 * (rank + 1) + torch.arange(4)
part = group.reduce_scatter(mine, dim=0)
both = group.all_gather(part, dim=0)
whole = group.all_reduce(mine)
torch.equal(both, whole), whole.tolist()

# %% [markdown]
# ## From many to one, from one to many
#
# Some collectives have a *root*. `gather` brings what all have to it, `scatter` gives every rank its part of what the root
# has, `broadcast` gives everybody all of it. Watch what the ranks that are not the root hold at the end of a `gather`.

# %%
wb.view.trace_collective(cluster, "gather")

# %%
wb.view.trace_collective(cluster, "scatter")

# %%
wb.view.trace_collective(cluster, "broadcast")

# %% [markdown]
# Nothing: their places stay empty, only the root has it all.
#
# ## What travels
#
# Each picture above stands for a record: who sent what to whom, and how many bytes. Summed up, for a whole of four numbers
# of eight bytes:

# %%
ones = {"all_reduce": 4, "reduce_scatter": 4, "all_gather": 1, "gather": 1, "scatter": 4, "broadcast": 4}
traces = {name: cluster.trace_collective(name, [[1] * count] * 4) for name, count in ones.items()}
pd.DataFrame(
    {
        "steps": {name: len(trace.steps) - 2 for name, trace in traces.items()},
        "messages": {name: len(trace.transfers) for name, trace in traces.items()},
        "bytes": {name: sum(message.num_bytes for message in trace.transfers) for name, trace in traces.items()},
        "differs from torch's by": {name: trace.max_difference for name, trace in traces.items()},
    }
)

# %% [markdown]
# `all_reduce` costs what its two halves cost together. In the ring no rank sends more than the others, whatever their
# number; with a root, everything passes through one.
#
# ## A rollout is a gather and a scatter
#
# The rooted rollout of notebook 01, as the messages that it was: prompts to the root, completions back, and each rank's
# slice as long as its prompts were many. Look for the rank that gets nothing.

# %%
prompts = [["1+1=", "2+3="], ["7+8="], [], ["4+4="]]
run = wb.rollout(cluster, prompts, model="tiny", sampling=wb.Sampling(temperature=0.0, max_tokens=24), kv_cache_bytes=2**27)
wb.view.trace_collective(run)

# %% [markdown]
# ## Two that do not belong together
#
# On purpose: rank 2 calls another collective than the rest. Both are legal calls, and both wait for all ranks. Read who
# called what.

# %% tags=["raises-exception"]
# %%ranks
if rank == 2:
    dist.broadcast(mine, src=2)
else:
    dist.all_reduce(mine)

# %% [markdown]
# Nothing was sent yet when this was noticed, so `mine` is what it was, on all ranks:

# %%
# %%ranks
mine.tolist()

# %% [markdown]
# ## Exercise
#
# A ring with a pen: ranks bring `[1, 2, 3, 4]`, `[0, 0, 0, 0]`, `[1, 1, 1, 1]` and `[5, 0, 0, 5]` to a `reduce_scatter`
# that takes the maximum instead of the sum. Which number does each rank end with? Begin here:

# %%
brought = [[1, 2, 3, 4], [0, 0, 0, 0], [1, 1, 1, 1], [5, 0, 0, 5]]

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# answer = cluster.trace_collective("reduce_scatter", brought, reduce_op="max")
# last = answer.steps[-1].held
# assert [last[rank][answer.results[rank][0]] for rank in range(4)] == [(5,), (2,), (3,), (5,)]
# wb.view.trace_collective(answer)
# ```
#
# The maximum of every column: 5, 2, 3 and 5, on ranks 0, 1, 2 and 3.
#
# </details>

# %%
cluster.close()
