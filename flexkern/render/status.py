"""How the command ends, as a number: what a scheduler can act on. The table of the documentation is made of these."""

DONE = 0
FAILED = 1  # it would again: numbers that are not finite, a fault of ours
REFUSED = 2  # before any work: bad input, an output that exists or that another render is writing
NOTHING_KEPT = 73  # EX_CANTCREAT: the output cannot be written, and nothing is left to go on with
CAN_RESUME = 75  # EX_TEMPFAIL: a full disk, no memory; what was made is kept
SIGNAL = 128  # and the number of the signal; what was made is kept

BAD = ValueError, OSError, NotImplementedError  # errors that a user can mend, which before any work are REFUSED

MEANINGS = {
    DONE: ("all went well", "nothing"),
    FAILED: ("it failed, and would again: numbers that are not finite, a fault of flexkern's", "read the error"),
    REFUSED: ("it was refused before any work", "read the line, change the command"),
    NOTHING_KEPT: ("the output cannot be written, and nothing is left to go on with", "make room, begin again"),
    CAN_RESUME: ("the disk is full, the output's folder is gone, memory ran out", "mend that, then `--resume`"),
    SIGNAL + 1: ("SIGHUP: the terminal was closed", "`--resume`"),
    SIGNAL + 2: ("Ctrl-C", "`--resume`"),
    SIGNAL + 15: ("SIGTERM: a time limit, a machine that is taken back", "`--resume`"),
}
