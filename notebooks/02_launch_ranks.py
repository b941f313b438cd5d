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
# # Launch ranks and talk to them
#
# **You will** start four ranks, run cells on all of them or on some, move values to and fro, let a cell run beside this
# notebook, and look at two accidents: a rank that raises and a rank that dies.
#
# **You will learn** what lives where, how to name ranks, how to read a rank's failure, and what is left after it.
#
# **You need** two cores, 1 GiB of free memory, no GPU, no network, and half a minute.

# %%
import workbench as wb

# %load_ext workbench

# %% [markdown]
# `%launch` starts the ranks and binds the variable `cluster`; in a script that is `cluster = wb.launch(4)`.

# %%
# %launch 4

# %% [markdown]
# ## Cells on ranks
#
# A cell that begins with `%%ranks` runs on every rank, each a process of its own. They know `rank`, `world_size`,
# `torch`, `dist` and `group` from the start. Look at how the output is shown: what all ranks said stands there once,
# what differs stands there with the ranks that said it.

# %%
# %%ranks
print("the world has", world_size, "ranks")

# %%
# %%ranks
x = rank // 2
x

# %% [markdown]
# Names stay until the next cell. This one runs on some ranks only: `0,2-3` are numbers and ranges, `all` is everybody.

# %%
# %%ranks 0,2-3
x += 100

# %%
# %%ranks
x

# %% [markdown]
# Rank 1 kept its 0. And this notebook? Its own process, the *driver*, is no rank. `x` was never here:

# %% tags=["raises-exception"]
x

# %% [markdown]
# The last line says where to look. `pull` brings a name, or any expression, as a list in rank order; `push` binds names
# on ranks.

# %%
cluster.push({"base": 1000})
cluster.pull("base + x")


# %% [markdown]
# ## Functions
#
# A function of this notebook travels to the ranks with all that it needs. `wb.current()` is where it finds itself.


# %%
def describe(word):
    here = wb.current()
    return f"{word} from {here.rank} of {here.world_size}"


cluster.run(describe, "greetings", ranks=[0, 3])

# %% [markdown]
# ## Ranks talk to each other
#
# A *collective* is a call that all ranks make together. `all_reduce` adds up what each of them brings and gives
# everybody the sum. Before you look: ranks bring 0, 1, 2 and 3. What does each hold afterwards?

# %%
# %%ranks
t = torch.ones(2) * rank
dist.all_reduce(t)
t.tolist()

# %% [markdown]
# Six on all of them, shown once. Ranks can also be named by their place in a layout (notebook 04 is about layouts): here
# two groups of two, and then only the first of each.

# %%
cluster.use(wb.Layout(world_size=4, tp=2, dp=2))

# %%
# %%ranks tp=0
groups["tp"].ranks

# %% [markdown]
# ## Beside the notebook
#
# With `--bg` a cell runs on while this notebook does something else. Meanwhile the ranks are busy, and a second cell is
# refused rather than queued:

# %%
# %%ranks --bg --out waiting
import time

time.sleep(2)
rank * rank

# %% tags=["raises-exception"]
cluster.pull("x")

# %%
print("done:", waiting.done(), "- busy ranks:", [status.rank for status in cluster.status() if status.state == "running"])
waiting.result()

# %% [markdown]
# ## A rank raises
#
# On purpose: rank 2 has one column too many. The others are in the collective by then and would wait for ever. Read the
# first line, then find the line of the cell in the traceback.

# %% tags=["raises-exception"]
# %%ranks
weights = torch.ones(3, 2)
batch = torch.ones(4, 4 if rank == 2 else 3)
out = batch @ weights
dist.all_reduce(out)

# %% [markdown]
# The traceback is the rank's own, the others were freed, and names are kept, so rank 2 can be asked:

# %%
# %%ranks
tuple(batch.shape)

# %% [markdown]
# ## A rank dies
#
# `kill` ends a rank as a crash would (`kill -9`). The next cell says so instead of waiting:

# %%
cluster.kill(2)

# %% tags=["raises-exception"]
# %%ranks
x

# %% [markdown]
# `respawn` brings it back, empty; the others keep their names. All of them form a new process group: the cluster's
# *generation* counts these.

# %%
# %ranks respawn 2

# %%
# %%ranks
globals().get("x", "nothing here")

# %%
# %%ranks --timeout 10
t = torch.ones(1)
dist.all_reduce(t)
t.item()

# %%
cluster.generation

# %% [markdown]
# ## Exercise
#
# Pass a number around: every rank sends its own rank to the next one (`dist.send(tensor, dst)`) and receives from the
# one before (`dist.recv(tensor, src)`), so that rank 0 ends with 3, rank 1 with 0, and so on. A `send` ends only when its
# receiver has come. What does the workbench say if all ranks send first? Begin here:

# %%
# %%ranks
following, previous = (rank + 1) % world_size, (rank - 1) % world_size
mine, theirs = torch.tensor([rank]), torch.tensor([-1])

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# %%ranks
# if rank % 2 == 0:
#     dist.send(mine, following)
#     dist.recv(theirs, previous)
# else:
#     dist.recv(theirs, previous)
#     dist.send(mine, following)
# assert theirs.item() == previous
# theirs.item()
# ```
#
# If all send first, each waits for the next one to receive, in a circle, and the cell ends with a `RankDeadlock` that goes
# round it once. So half of them receive first. (`dist.batch_isend_irecv` begins both at once.)
#
# </details>

# %%
cluster.close()
