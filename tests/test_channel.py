"""Messages over a socket: whole, in order, large arrays uncopied, broken ends told; also the descriptors that may be shut."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from workbench.ranks import sockets
from workbench.ranks.channel import ChannelReader, ChannelWriter, Packed, pack, receive, unpack


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text(), st.binary(max_size=2000), st.booleans()), max_size=6), st.integers(1, 500))
def test_messages_arrive_whole_however_they_are_cut(messages, size):
    one, two = socket.socketpair()
    with one, two:
        for text, data, has_value in messages:
            ChannelWriter(one).send(text, Packed(data, (bytearray(data), bytearray())) if has_value else None)
        one.shutdown(socket.SHUT_WR)
        stream = b"".join(iter(lambda: two.recv(1 << 16), b""))
    left, right = socket.socketpair()
    with left, right:
        reader = ChannelReader(right)
        right.setblocking(False)
        found: list[Any] = []
        for start in range(0, len(stream), size):
            left.sendall(stream[start : start + size])
            while piece := reader.read():
                found += piece
    assert [(header, None if value is None else (bytes(value.data), [bytes(b) for b in value.buffers])) for header, value in found] == [
        (text, (data, [data, b""]) if has_value else None) for text, data, has_value in messages
    ]


def test_a_large_array_stays_outside_its_pickle_and_is_writable(pair):
    sent = np.arange(3_000_000, dtype=np.int64)
    packed = pack({"big": sent, "text": "small"})
    assert len(packed.data) < 1000 and packed.num_bytes > sent.nbytes
    assert np.shares_memory(np.frombuffer(packed.buffers[0], dtype=np.int64), sent)
    threading.Thread(target=ChannelWriter(pair[0]).send, args=("header", packed)).start()
    header, value = next(receive(ChannelReader(pair[1])))
    assert value is not None
    back = unpack(value)["big"]
    assert header == "header" and np.array_equal(back, sent)
    back[0] = 5


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).reshape(2, 3).t(),
        torch.ones(4, dtype=torch.bfloat16),
        torch.tensor(True),
        torch.zeros(0, 3),
        torch.ones(2, requires_grad=True),
        torch.ones(3, dtype=torch.complex64).conj(),
        torch.eye(3).to_sparse(),
    ],
    ids=lambda tensor: f"{tensor.dtype}-{tuple(tensor.shape)}",
)
def test_tensors_travel_as_they_are(tensor):
    got = unpack(pack({"x": tensor}))["x"]
    assert (got.dtype, got.shape, got.requires_grad, got.layout) == (tensor.dtype, tensor.shape, tensor.requires_grad, tensor.layout)
    assert torch.equal(got.to_dense(), tensor.to_dense())


def test_a_large_tensor_stays_outside_its_pickle():
    packed = pack([torch.zeros(1_000_000)])
    assert len(packed.data) < 1000 and packed.num_bytes > 4_000_000


def test_a_full_socket_keeps_the_rest_for_later(pair):
    pair[0].setblocking(False)
    writer, reader = ChannelWriter(pair[0]), ChannelReader(pair[1])
    pair[1].setblocking(False)
    assert not writer.send("first", Packed(bytes(10_000_000))) and writer.has_pending
    assert not writer.send("second")
    found: list[Any] = []
    while len(found) < 2:
        writer.flush()
        found += reader.read() or []
    assert [header for header, _ in found] == ["first", "second"] and not writer.has_pending and writer.flush()


def test_the_end_of_the_other_side_is_told(pair):
    pair[0].close()
    assert ChannelReader(pair[1]).read() is None and list(receive(ChannelReader(pair[1]))) == []


def test_what_is_no_message_is_refused_before_it_is_unpickled(pair):
    pair[0].sendall(b"GET / HTTP/1.1\r\n")
    with pytest.raises(ConnectionError, match="a channel carried b'GET ' where a message begins: the two ends run different versions"):
        ChannelReader(pair[1]).read()


def test_functions_that_say_wb_travel():
    assert unpack(pack(lambda: wb.Layout(world_size=2).world_size))() == 2
    assert unpack(pack(wb)) is wb


def test_threads_may_send_at_once(pair):
    writer, reader = ChannelWriter(pair[0]), ChannelReader(pair[1])
    threads = [threading.Thread(target=lambda n=n: [writer.send((n, i), Packed(bytes(5000))) for i in range(100)]) for n in range(4)]
    for thread in threads:
        thread.start()
    found: list[Any] = []
    while len(found) < 400:
        found += reader.read() or []
    for thread in threads:
        thread.join()
    for n in range(4):
        assert [header[1] for header, _ in found if header[0] == n] == list(range(100))


def test_only_connected_tcp_sockets_among_the_chosen_are_shut():
    before = sockets.connections()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        local, other = socket.socketpair()
        with socket.create_connection(listener.getsockname()) as client, local, other:
            server, _ = listener.accept()
            with server:
                mine = sockets.connections() - before
                assert {c.fd for c in mine} >= {listener.fileno(), client.fileno(), server.fileno(), local.fileno()}
                stale = sockets.Connection(client.fileno(), "socket:[1]")  # the number of another, earlier socket
                assert sockets.shut([stale]) == 0
                chosen = [c for c in mine if c.fd in (listener.fileno(), client.fileno(), local.fileno())]
                assert sockets.shut(chosen) == 1
                assert server.recv(1) == b"" and client.recv(1) == b""
                with socket.create_connection(listener.getsockname()):
                    listener.accept()[0].close()  # the listener still works
    assert len(os.listdir("/proc/self/fd")) > 0
