"""How processes meet."""

import os

import pytest
import torch

from flexkern.parallel.group import Group, TCPStore, stdout_aside


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="only Linux lists the threads of a process")
def test_no_thread_of_a_group_is_left_when_it_is_closed():
    """One that lets go of a tensor while Python ends aborts the process: "terminate called without ..."."""
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    before = set(os.listdir("/proc/self/task"))
    group = Group(store, rank=0, ranks=1, device=torch.device("cpu"))
    group.tell("a message")
    assert set(os.listdir("/proc/self/task")) - before
    group.close(lost=False)
    assert not set(os.listdir("/proc/self/task")) - before


def test_what_is_printed_while_ranks_meet_is_no_part_of_a_video(capfd):
    """As the gloo of torch 2.8 prints, from C++."""
    print("before")
    with stdout_aside():
        os.write(1, b"[Gloo] Rank 0 is connected\n")
    print("after")
    assert capfd.readouterr() == ("before\nafter\n", "[Gloo] Rank 0 is connected\n")


def test_a_process_without_stdout_has_ranks_too(monkeypatch):
    def gone(number):
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(os, "dup", gone)
    with stdout_aside():
        pass
