"""Processes, channels, groups and who waits for whom; knows nothing of prompts or models.

Where to look (a driver holds a cluster; each rank is a process that runs its cells):

    driver          launch -> processes -> servers (their other end: forkserver), link; conductor keeps it all; cluster is what users hold
    a rank          rank, config, cell, names, snapshot, forming, current
    between them    channel, messages, handle, asking, door (attach: from a shell)
    output          output -> screen -> stream -> surface (page: without scripts), result, shown, progress
    collectives     intercept (awake, board, calls, called, futures, known_groups, leaving, making_groups, operations, shortcut, sockets,
                    store_waits), ledger, stragglers
    diagnosis       diagnosis, outside, observer, memory, doctor
    groups          group = members + collectives + point_to_point; announce, arguments, wire, parcels, tensor_dict, sending, metrics,
                    message_queue, graph_capture; stateless, stateless_gloo; tracing carries one out message by message
    again           recording -> tape -> replay, failures; history -> saving -> session -> reproduce; digest, difference, steady;
                    faults spoil
"""
