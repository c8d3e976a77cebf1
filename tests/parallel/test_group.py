"""How processes meet."""

import os

from flexkern.parallel.group import stdout_aside


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
