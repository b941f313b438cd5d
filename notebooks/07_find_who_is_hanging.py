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
# # Find who is hanging, stop, replay
#
# **You will** look into a cell that hangs, stop it without losing anything, find the rank that all others wait for, and
# trace a sum that went wrong to one call on one rank, by running the ranks again, alone.
#
# **You will learn** to tell a hang from a slow rank, what stopping leaves, and how to debug a rank without its peers.
#
# **You need** notebook 02, two cores, 1 GiB of free memory, no GPU, no network, and half a minute.

# %%
import tempfile
import time

import pandas as pd

import workbench as wb

# %load_ext workbench

# %%
pd.set_option("display.max_colwidth", 120)

# %%
# %launch 4

# %% [markdown]
# ## It hangs
#
# Four ranks train, and on purpose rank 2 waits in step 3 for a file that never arrives. The cell runs in the background,
# so that this notebook stays free to ask. (Beside a cell that is not in the background, press the stop
# button: it frees the ranks and tells the same.)

# %%
# %%ranks --bg --out training
import time


def load(step):
    if rank == 2 and step == 3:
        time.sleep(600)
    return torch.full((4,), float(step))


for step in range(10):
    gradient = load(step)
    dist.all_reduce(gradient)

# %%
time.sleep(1)
diagnosis = cluster.diagnose()
print(diagnosis.sentence)

# %% [markdown]
# Three ranks stand in line 12 and wait for the fourth, which is in line 6. None of them was asked: ranks leave word of
# each collective that they begin, and where rank 2 is, was read from outside. The same in full:

# %%
pd.DataFrame(diagnosis.waiting.values())[["rank", "op", "sequence", "group", "missing", "line", "source"]]

# %% [markdown]
# Is this a deadlock? No: rank 2 might still come, and then all would go on. So nothing was ended; that is for you to
# decide.

# %%
print("certain to hang for ever:", diagnosis.is_certain_deadlock)

# %% [markdown]
# ## Stop
#
# `interrupt` frees every rank, whether it waits, sleeps or computes. Names are kept, so you can look how far each came.

# %%
cluster.interrupt()
training.wait(10)
cluster.pull("step")

# %% [markdown]
# ## Everything is slow
#
# A rank that is late makes all others wait, and then all look slow. On purpose rank 1 comes half a second late to the
# third of five collectives. In the table is how long each rank waited for its peers; look for the one that did not.

# %%
with cluster.inject(wb.Fault(rank=1, op="all_reduce", at=3, action="delay", delay_s=0.5)):
    cluster.execute("for _ in range(5): dist.all_reduce(torch.ones(4))")
ledger = cluster.ledger()
waits = ledger[ledger["cell"] == ledger["cell"].max()].pivot(index="sequence", columns="rank", values="wait_s")
waits.reset_index(drop=True).round(1)

# %% [markdown]
# In row 2 three ranks waited for half a second and rank 1 did not: it is the late one.
#
# ## Everything is nonsense
#
# Now a training that works: all ranks fit the same three weights, each on data of its own, and share their gradients. On
# purpose one bit flips on one rank, in what one `all_reduce` brought it. While it runs, a *tape* of every rank is kept.

# %%
cluster.push({"truth": [1.0, 2.0, 3.0]})
tape = tempfile.TemporaryDirectory()
with cluster.record(tape.name), cluster.inject(wb.Fault(rank=3, op="all_reduce", at=5, action="corrupt", seed=2)):
    result = cluster.execute("""
torch.manual_seed(rank)
weights = torch.zeros(3)
for step in range(8):
    x = torch.randn(16, 3)
    error = x @ weights - x @ torch.tensor(truth)
    gradient = x.T @ error / 16
    dist.all_reduce(gradient)
    weights -= 0.3 * gradient / world_size
weights.tolist()
""")
result

# %% [markdown]
# No error, and all ranks ended far from 1, 2, 3, because the sums carry what one of them got wrong to all. Who began?
#
# ## Replay
#
# `wb.replay` runs one rank again, alone, in this process: its code for real, what came from its peers from the tape. It
# is the same to the last bit, and an ordinary debugger works in it. Here all four, one after the other; the table has the
# sum of what each `all_reduce` gave each rank. All ranks should agree in every row.

# %%
replayed = [wb.replay(tape.name, rank=rank) for rank in range(4)]
pd.DataFrame({f"rank {one.rank}": [f"{call.outputs[0].sum():.5g}" for call in one.collectives] for one in replayed})

# %% [markdown]
# In row 4 rank 3 was given something else than the others, and from the next row on the sums are nonsense everywhere.
# Which call was that?

# %%
odd = replayed[3].collectives[4]
print(f"line {odd.line} of the cell: {odd.text}")
print("rank 0 was given", replayed[0].collectives[4].outputs[0].tolist())
print("rank 3 was given", odd.outputs[0].tolist())

# %% [markdown]
# One number of three, one bit of it. From a shell, `workbench replay DIR --rank 3 --pytest test_rank_3.py` writes a test
# that does the same, to keep.
#
# ## Ranks that disagree
#
# Not every mistake hangs. On purpose rank 1 brings other numbers than the rest: gloo would end the process or mix up the
# bytes. Here what ranks are about to do is compared before it is done; read the table in the error.

# %% tags=["raises-exception"]
# %%ranks
loss = torch.ones(2, dtype=torch.float64 if rank == 1 else torch.float32)
dist.all_reduce(loss)

# %% [markdown]
# ## Exercise
#
# Some rank is late again, at a collective that you are not told. Find it in the ledger, without looking at `secret`:

# %%
secret = sum(map(ord, "which rank is it?")) % 4
with cluster.inject(wb.Fault(rank=secret, op="any", at=7, action="delay", delay_s=0.4)):
    cluster.execute("""
for _ in range(5):
    dist.all_reduce(torch.ones(4))
    dist.barrier()
""")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# ledger = cluster.ledger()
# late = ledger[ledger["cell"] == ledger["cell"].max()].groupby("rank")["wait_s"].sum().idxmin()
# assert late == secret
# print(f"rank {late} waited least: the others waited for it")
# ```
#
# </details>

# %%
cluster.close()
tape.cleanup()
