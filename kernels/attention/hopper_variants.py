"""Variants of the Hopper kernel's loop that wait for a GPU to choose between them. Plain Python: imports no Gluon.

They live in one source, behind the switches of ``Variant``, only as long as the measurement is pending
(``python bench/bench_frame_attention.py --what variants``). What loses is deleted, and its switch with it.

Measured is "plain" alone: 650 to 684 TFLOP/s on large shapes, the tensor pipe 73 % busy (H200, 2026-11-26). For 128
keys both warpgroups of an SM need 2048 cycles of its tensor cores, 1056 of its exponential units and 930 issue slots of
each scheduler [arithmetic, from 464 instructions a step]. Only the tensor cores are short of time, so what is lost is
probably lost while both do the same: multiply together, then compute exponentials together. A crude model by cycles
does not show that loss, so turns may bring less. Predictions, in percent of the rate on large shapes at F = 3, R = 21;
the first two against "plain", the others against "turns":

    named              three of the four barriers of a step go; all of them cost 8.7 % at most          +1 to +3
    turns              one softmax lies under the other's products, FlashAttention-3's order            +6 to +11
    turns-mbarrier     the same without inline PTX, but a third arrival and five barriers a step        -5 to -3
    turns-early        keys are freed before the softmax: helps if a fetch takes longer than a step     +0 to +4
    turns-three        a third stage hides the same fetch, for values too, with no trick on ptxas       +0 to +4
    turns-pairs        one arrival and one wait fewer, but keys are freed a softmax later               -2 to +2
    turns-pairs-three  the third stage pays for the later freeing; the shortest loop (461)              +1 to +5
    turns-wide         192 keys a step: a third fewer turns, arrivals and sums of rows; 3.5 of its
                       instructions a key where 128 keys take 3.6                                       +1 to +3
    turns-fold         the last tile's products lie beside those of the one before, so that a frame
                       has one set of latencies less; but 290 bytes spill at its end                    -1 to +1

Tiles with a rest leave room for two stages. The order of a row's sums follows from the tiles, so do its last bits.

What a run decides: the loop with the smallest product of ``ms`` over the shapes of that command becomes SELECTED, of
those whose repeats are all equal; where two differ by less than 1 %, the one with fewer switches. All others go, and
with the last variant whose tiles have a rest all that handles rests. A fault in the protocol would hang: run them under
a time limit.

Compiled (Triton 3.7.1) and not kept:

- Loops unrolled by two: 460 instructions a step for 464 ("plain"), 451 for 461 ("turns-pairs-three"): there are no
  copies of registers to save, only index arithmetic. For that 320 to 540 bytes spill at the edges of frames.
- 128 x 160 keys as 128 + 32: 586 instructions, 3.66 a key; 128 keys take 461, 3.60 a key.
- Pairs of 128 + 64 keys: with no arrival between scores and softmax ptxas finds too few registers and serialises all
  products, so "turns-wide" frees keys and values apart.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """How the roles of a program tell each other that a buffer is free or a turn is over. A constant of the kernel.

    What each switch does to the protocol stands in hopper_ring.py.

    Attributes:
        signal: "mbarrier", which Triton guards with a barrier of the four warps, or "named": named barriers of the
            hardware, where each warp arrives for itself.
        one_arrive: keys of tile m and values of tile m - 1 are freed together, by one arrival.
        ping_pong: the warpgroups take turns at issuing products.
        early_free: keep the arrivals that free buffers where the source has them; ptxas moves those of keys below the
            softmax. Needs "named".
        registers: of a thread that multiplies.
        fetch_registers: of a thread that fetches, which needs 18. 256 threads that multiply and 128 with those that
            fetch share 64 K registers.
        stages: tiles of keys, and of values, that may wait in shared memory. Three fit at 128 channels.
        wide, fold_last: how a frame's keys are cut into tiles (hopper_tiles.py); no more than two stages fit then.
    """

    signal: Literal["mbarrier", "named"] = "mbarrier"
    one_arrive: bool = False
    ping_pong: bool = False
    early_free: bool = False
    registers: int = 232
    fetch_registers: int = 40
    stages: int = 2
    wide: bool = False
    fold_last: bool = False

    def __post_init__(self):
        if self.signal not in ("mbarrier", "named"):
            raise ValueError(f'signal must be "mbarrier" or "named", got {self.signal!r}')
        if self.early_free and self.signal != "named":
            raise ValueError(f'early_free needs signal "named", got {self.signal!r}')
        if not 2 <= self.stages <= 4:  # named barriers 8 to 11 and 12 to 15, one a stage
            raise ValueError(f"stages must be 2, 3 or 4, got {self.stages}")
        if self.wide and self.fold_last:
            raise ValueError("a wide tile has a rest already, got wide and fold_last")
        if self.stages > 2 and (self.wide or self.fold_last):
            raise ValueError(f"two stages of tiles with a rest fit into shared memory, got {self.stages}")
        if 256 * self.registers + 128 * self.fetch_registers > 65536:
            raise ValueError(f"an SM has 65536 registers, got 256 x {self.registers} + 128 x {self.fetch_registers}")


VARIANTS = {
    "plain": Variant(),
    "named": Variant(signal="named"),
    "turns-mbarrier": Variant(ping_pong=True),
    "turns": Variant(signal="named", ping_pong=True),
    "turns-early": Variant(signal="named", ping_pong=True, early_free=True, registers=240, fetch_registers=24),
    "turns-three": Variant(signal="named", ping_pong=True, stages=3, registers=240, fetch_registers=24),
    "turns-pairs": Variant(signal="named", ping_pong=True, one_arrive=True, registers=240, fetch_registers=24),
    "turns-pairs-three": Variant(
        signal="named", ping_pong=True, one_arrive=True, stages=3, registers=240, fetch_registers=24
    ),
    "turns-fold": Variant(
        signal="named", ping_pong=True, one_arrive=True, registers=240, fetch_registers=24, fold_last=True
    ),
    "turns-wide": Variant(signal="named", ping_pong=True, registers=240, fetch_registers=24, wide=True),
}

SELECTED = "plain"  # the only one whose loop a GPU has run

# turns are the one difference of structure that is left to FlashAttention-4, which has this tile, overlap and split of
# registers; with two stages a pair of tiles has about one step to arrive (latency and transfer of 64 KB), with three it
# has two, so that freeing it late costs nothing and its single arrival is pure gain
BEST_ARGUED = "turns-pairs-three"

# The newest Triton with which a loop keeps all it needs in registers. From 3.8 on Triton copies the probabilities
# before each product; the ptxas of 3.9 keeps these copies (32 to 48 instructions a step, and as many registers).
FITS_LAST = {"turns-wide": (3, 8)}


def get_variant(name: str) -> Variant:
    """The variant of that name.

    Raises:
        ValueError: if there is none, naming those there are.
    """
    if name not in VARIANTS:
        close = get_close_matches(name, VARIANTS, 1)
        hint = f", did you mean {close[0]!r}" if close else ""
        raise ValueError(f"no variant {name!r} of the Hopper kernel{hint}: there is {', '.join(VARIANTS)}")
    return VARIANTS[name]
