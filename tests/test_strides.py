"""Tensors that are not contiguous: gloo takes some for others and says nothing, so the check does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import workbench as wb
from workbench.ranks.cluster import Cluster

MISREAD = {  # call, of `s = arange(8.)[::2]` -> (operation, the tensor as told)
    "dist.all_reduce(s)": ("all_reduce", "float32[4] with strides [2]"),
    "dist.all_reduce(s, async_op=True).wait()": ("all_reduce", "float32[4] with strides [2]"),
    "dist.all_reduce(torch.ones(1).expand(4))": ("all_reduce", "float32[4] with strides [0]"),
    "dist.all_reduce(torch.ones(2, 6)[:, :4].to(torch.int64))": ("all_reduce", ""),  # a copy, and so contiguous
    "dist.all_reduce(torch.ones(2, 6)[:, :4])": ("all_reduce", "float32[2, 4] with strides [6, 1]"),
    "dist.broadcast(s, 1)": ("broadcast", "float32[4] with strides [2]"),
    "dist.reduce(s, 0)": ("reduce", "float32[4] with strides [2]"),
    "dist.scatter(s, [torch.ones(4)] * 2 if rank == 0 else None)": ("scatter", "float32[4] with strides [2]"),
    "dist.scatter(torch.ones(4), [s, s] if rank == 0 else None)": ("scatter", "float32[4] with strides [2]"),
    "dist.reduce_scatter(s, [torch.ones(4)] * 2)": ("reduce_scatter", "float32[4] with strides [2]"),
}
RIGHT = {  # call, of `s = arange(8.)[rank::2]` and `t = s.view(2, 2).t()` -> what `y` is on both ranks
    "y = t; dist.all_reduce(y)": [[1.0, 9.0], [5.0, 13.0]],
    "y = t; dist.broadcast(y, 1)": [[1.0, 5.0], [3.0, 7.0]],
    "y = torch.zeros(2, 8)[:, ::2]; dist.all_gather([y[0], y[1]], s)": [[0.0, 2.0, 4.0, 6.0], [1.0, 3.0, 5.0, 7.0]],
    "y = torch.zeros(8); dist.all_gather_into_tensor(y, s)": [0.0, 2.0, 4.0, 6.0, 1.0, 3.0, 5.0, 7.0],
    "y = s.clone(); dist.all_reduce(y)": [1.0, 5.0, 9.0, 13.0],
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with wb.launch(2) as made:
        yield made


@pytest.mark.parametrize("call", MISREAD)
@pytest.mark.parametrize("times", [1, 3], ids=["at first", "again"])
def test_a_tensor_that_gloo_would_misread_is_refused(cluster, call, times):
    op, what = MISREAD[call]
    contiguous = "s = torch.arange(4.) if i < 2 else torch.arange(8.)[::2]" if times > 1 else "s = torch.arange(8.)[::2]"
    source = f"kept = rank\nfor i in range({times}):\n    {contiguous}\n    {call}"
    if not what:
        cluster.execute(source, timeout_s=15)
        return
    with pytest.raises(wb.RankFailed) as caught:
        cluster.execute(source, timeout_s=15)
    text = str(caught.value)
    assert f"GroupError: rank {caught.value.rank}: {op} was given a tensor that is not contiguous: {what}" in text
    assert "a wrong result, without an error" in text and f"y = x.contiguous(); dist.{op}(y, ...); x.copy_(y)" in text
    assert f"----> 4     {call}" in text and "workbench/ranks" not in text
    cluster.execute("x = torch.ones(2); dist.all_reduce(x)", timeout_s=15)
    assert cluster.pull("kept") == [0, 1] and cluster.pull("x")[1].tolist() == [2.0, 2.0] and cluster.generation == 0


@pytest.mark.parametrize("call", RIGHT)
def test_what_gloo_takes_right_is_let_through(cluster, call):
    cluster.execute(
        "found = []\nfor i in range(3):\n    s = torch.arange(8.)[rank::2]\n"
        f"    t = s.clone().view(2, 2).t()\n    {call.replace('; ', chr(10) + '    ')}\n    found.append(y.tolist())",
        timeout_s=15,
    )
    assert cluster.pull("found") == [[RIGHT[call]] * 3] * 2


@pytest.mark.parametrize("call", ["all_reduce(x)", "broadcast(x, 0)", "reduce(x, 0)"])
def test_ranks_must_agree_on_strides(cluster, call):
    source = f"for i in range(3):\n    x = torch.ones(2, 4)\n    if i == 2 and rank: x = x.t().contiguous().t()\n    dist.{call}"
    with pytest.raises(wb.CollectiveMismatch, match=r"float32\[2, 4\] strides \[1, 2\]"):
        cluster.execute(source, timeout_s=15)


def test_without_the_check_gloo_has_its_way():
    with wb.launch(2, check_collectives=False) as cluster:
        cluster.execute("x = torch.ones(8)[::2]\ndist.all_reduce(x)", timeout_s=15)
        assert cluster.pull("x")[0].tolist() != [2.0] * 4
