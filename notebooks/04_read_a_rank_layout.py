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
# # Read a rank layout
#
# **You will** lay ranks out on axes the way vLLM does, read from a picture who works with whom, see where a popular
# formula goes wrong, and have four real ranks form the groups and use them.
#
# **You will learn** what tp, pp and dp mean for a single rank, how to go from a rank to its groups and back, which
# layers a rank holds, and how a mix-up of groups is told.
#
# **You need** notebook 02, two cores, 1 GiB of free memory, no GPU, no network, and half a minute.

# %%
import pandas as pd

import workbench as wb

# %load_ext workbench

# %% [markdown]
# ## Eight ranks on three axes
#
# *Tensor parallel* (tp) ranks share every layer, *pipeline parallel* (pp) ranks hold different layers, *data parallel*
# ones hold copies. A layout needs no processes, it is arithmetic: a size for each axis, and what is left over of the
# world is `external_dp`, copies that know nothing of each other.

# %%
layout = wb.Layout(world_size=8, tp=2, pp=2)
layout

# %% [markdown]
# Read a row: rank 5 is the second half (tp 1) of the first stage (pp 0) of the second copy (external_dp 1). Ranks that
# differ in one axis only are a *group* of that axis.

# %%
print("tp:", layout.groups("tp"))
print("pp:", layout.groups("pp"))
print("external_dp:", layout.groups("external_dp"))
print("rank 5:", layout.coords(5))

# %% [markdown]
# The same as a picture. Neighbours of the same colour are a tp group. Before you look at the second one: which ranks pass
# activations on to each other?

# %%
wb.view.plot_layout(layout, color_by="tp")

# %%
wb.view.plot_layout(layout, color_by="pp")

# %% [markdown]
# Ranks 0 and 2 pass them on, and so do 1 and 3, 4 and 6, 5 and 7: each stays in its own half and its own copy.
#
# With a kernel the next cell is a picture to touch: click a rank, or walk with the arrow keys, and all its groups light
# up.

# %%
wb.view.layout_explorer(layout)

# %% [markdown]
# ## Which layers does a rank hold?
#
# pp cuts the layers into stages. Thirty layers over four stages do not divide; vLLM gives the remainder to the stages in
# the middle, since the first and the last have the embedding and the head to do.

# %%
wb.partition_layers(30, 4)

# %%
deep = wb.Layout(world_size=8, tp=2, pp=4)
pd.DataFrame({"stage": [deep.stage_of(r) for r in range(8)], "layers": [deep.layers_of(r, 30) for r in range(8)]}).rename_axis("rank")

# %% [markdown]
# ## A formula that goes wrong
#
# Many scripts compute the number of the tp group as `rank // tp`. That holds for the layouts above. Now two nodes of
# eight accelerators that are joined so closely that tp runs *across* them, while the pipeline stays inside each:

# %%
joined = wb.Layout.supernode()
wb.view.plot_layout(joined, color_by="tp")

# %%
tp = joined.degree("tp")
by_formula = [tuple(range(first, first + tp)) for first in range(0, 16, tp)]
print("tp groups:      ", joined.groups("tp"))
print("by the formula: ", by_formula)
num_wrong = sum(joined.group_of(rank, "tp") != by_formula[rank // tp] for rank in range(16))
print(f"{num_wrong} of 16 ranks would work with the wrong peers")

# %% [markdown]
# Nothing would fail, the numbers would just be other numbers. So ask the layout: `group_of`, `index_in_group`,
# `neighbours`, `rank_at`. They answer from the groups and hold for every layout, also for Megatron's, where a string says
# which axis varies fastest:

# %%
usual = wb.Layout.megatron(world_size=16, tp=2, pp=2, order="tp-cp-ep-dp-pp")
other = wb.Layout.megatron(world_size=16, tp=2, pp=2, order="tp-pp-dp")
print("pipeline of rank 0:", usual.group_of(0, "pp"), "and", other.group_of(0, "pp"))

# %% [markdown]
# Sizes that cannot be are refused, with those that can:

# %% tags=["raises-exception"]
wb.Layout(world_size=8, tp=3)

# %% [markdown]
# ## On real ranks
#
# `--layout` has the ranks form a `torch.distributed` group for each axis. In a cell they are `groups["tp"]` and so on,
# with vLLM's operations. Each rank brings its own number; add up in your head what the tp groups (0, 1) and (2, 3) get.

# %%
# %launch 4 --layout tp=2,pp=2

# %%
# %%ranks
mine = torch.tensor([rank])
{"tp": groups["tp"].ranks, "sum over tp": groups["tp"].all_reduce(mine).item()}

# %% [markdown]
# And what a pipeline does: the first stage sends on, the last one receives. Selectors know the axes too.

# %%
# %%ranks
pipeline = groups["pp"]
if pipeline.is_first_rank:
    pipeline.send(mine * 10)
    received = None
else:
    received = pipeline.recv(mine.shape, mine.dtype).item()
received

# %%
# %%ranks pp=1,tp=0
rank, received

# %% [markdown]
# ## The wrong group
#
# On purpose: rank 3 takes its pp group where all others take their tp group. So rank 2 waits for rank 3, and rank 3 waits
# for rank 1. Follow the chain in the first line of the error to its end: who is it that will never come, and why?

# %% tags=["raises-exception"]
# %%ranks
axis = "pp" if rank == 3 else "tp"
groups[axis].all_reduce(mine).item()

# %% [markdown]
# Rank 1 did its sum with rank 0, as it should, and has left. Rank 3 waits for it in a group where rank 1 never had
# anything to do; rank 2 waits only because rank 3 does. All of them are free again, and the groups are in order:

# %%
# %%ranks
groups["tp"].all_reduce(mine).item()

# %% [markdown]
# ## Exercise
#
# A model of 48 layers runs on 32 ranks with tp 4 and pp 4. Which ranks hold layer 20? Begin here:

# %%
question = wb.Layout(world_size=32, tp=4, pp=4)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# stages = wb.partition_layers(48, 4)
# holders = [rank for rank in range(32) if 20 in range(*question.layers_of(rank, 48))]
# assert holders == list(question.where(pp=1))
# holders
# ```
#
# Stage 1 has layers 12 to 23, and each of the two copies has four ranks in it: 4 to 7 and 20 to 23.
#
# </details>

# %%
cluster.close()
