"""What the played tests of the Hopper kernel must notice.

By name: (variant, text that stands in the sources once, what replaces it). The variant is the one of
hopper_variants.py, or of OTHERS, that runs what is broken.
"""

from flexkern.kernels.attention.hopper_variants import Variant

OTHERS = {"pairs": Variant(one_arrive=True), "named-early": Variant(signal="named", early_free=True)}

SCORES_DONE = "\n    score, next_rest = wait_for(2 if TILE.rest > 0 else 1, score, next_rest, NEXT)\n"
KEYS_FREE = "    if not VARIANT.one_arrive:\n        free_tile(ring.k, n + 1, VARIANT)\n"
PRODUCT_DONE = """    if NEXT.rest > 0:
        acc, p_next, next_rest = warpgroup_mma_wait(0, deps=(product, p_next, next_rest))
    else:
        acc, p_next = warpgroup_mma_wait(0, deps=(product, p_next))
"""
PAIR_FREE = "    if VARIANT.one_arrive:\n        free_tile(ring.k, n + 1, VARIANT)\n"
VALUES_FREE = PAIR_FREE + "    else:\n        free_tile(ring.v, n, VARIANT)\n"
LAST_DONE = "    acc = warpgroup_mma_wait(0, deps=(acc,))\n"
LAST_FREE = "    if not VARIANT.one_arrive:\n        free_tile(ring.v, n, VARIANT)\n"
FETCH_REST = "        load_block(box, [page, start + TILE.rows, column], full, rest_of(buffers, n, BOX, VARIANT))\n"
PASSED = "    pass_turn(turns, VARIANT)\n"

PLAIN = {
    "the fetching warp waits for the wrong use": ("(n // VARIANT.stages & 1) ^ 1)", "n // VARIANT.stages & 1)"),
    "it never waits": ("        wait_free(buffers, n, VARIANT)\n", "        pass\n"),
    "it expects too few bytes": ("FETCHED * buffers.tiles.shape[2] * 2)", "FETCHED * buffers.tiles.shape[2])"),
    "one warpgroup is enough to free a buffer": ("init(free.index(b), count=2)", "init(free.index(b), count=1)"),
    "values are not waited for": ("    wait_full(ring.v, n, True, VARIANT)\n    product", "    product"),
    "keys are not waited for": ("    wait_full(ring.k, n + 2, more, VARIANT)\n", ""),
    "keys of the next item are waited for": ("ring.k, n + 2, more", "ring.k, n + 2, True"),
    "keys are freed before they are read": (SCORES_DONE + KEYS_FREE, "\n" + KEYS_FREE + SCORES_DONE[1:]),
    "values are freed before they are read": (PRODUCT_DONE + VALUES_FREE, VALUES_FREE + PRODUCT_DONE),
    "the product is used too early": (
        "warpgroup_mma_wait(0, deps=(product, p_next))", "warpgroup_mma_wait(1, deps=(product, p_next))",
    ),
    "the last values are never freed": (LAST_DONE + LAST_FREE, LAST_DONE),
    "keys and values lie in one ring": (
        "fetch(values, box_v, ring.v, n - 1, page", "fetch(values, box_v, ring.k, n - 1, page",
    ),
    "the query is not published": ("    fence_async_shared()  # wgmma", "    # wgmma"),
    "the query is not turned again": ("        store_query(q, loaded", "        (q, loaded"),
    "it is overwritten too early": (SCORES_DONE, "\n    q.tensor.fill_(0)" + SCORES_DONE),
    "each half looks at its own frame": (
        "query = QueryRows(rows_ptr, row, item, sizes, tables)",
        "query = QueryRows(rows_ptr, row, item._replace(frame=row // S), sizes, tables)",
    ),
    "both halves store the same fragment": ("item.fragment * BLOCK_M + turns.half * ROWS", "item.fragment * BLOCK_M"),
    "hidden frames are fetched": ("key_frame + 1, item.end, HAS_BIAS)", "key_frame + 1, item.end, False)"),
    "tokens past the frame's end count": ("    if KEYS < N:", "    if False:"),
    "an accumulator is not rescaled": ("    acc *= gl.convert_layout(alpha, state)[:, None]\n", ""),
    "the bias of the frame before": ("            bias = load_bias(bias_ptr, frame, read, following, HAS_BIAS)\n", ""),
}  # fmt: skip

PENDING = {
    "a pair is freed under another's number": ("pairs", PAIR_FREE, PAIR_FREE.replace("n + 1", "n")),
    "a pair is freed before its values are read": (
        "pairs", PRODUCT_DONE + PAIR_FREE, PAIR_FREE + PRODUCT_DONE + "    if VARIANT.one_arrive:\n        pass\n",
    ),
    "the last values overwrite a pair in use": (
        "turns-pairs", "            wait_free(ring.k, n, VARIANT)\n", "            pass\n",
    ),
    "a turn is not passed on": ("turns", PASSED + "    align", "    align"),
    "the last turn of an item is not passed on": ("turns", PASSED + "    if", "    if"),
    "half 1 begins as well": ("turns-mbarrier", "(n & 1) ^ (1 - turns.half)", "(n & 1) ^ 1"),
    "nobody begins": ("turns-mbarrier", "(n & 1) ^ (1 - turns.half)", "n & 1"),
    "nobody begins by name": ("turns", "        arrive_at(TURN, TURN_THREADS)\n", "        pass\n"),
    "a half wakes itself": ("turns-mbarrier", "barriers.index(1 - turns.half)", "barriers.index(turns.half)"),
    "it wakes itself by name": ("turns", "arrive_at(TURN + 1 - turns.half", "arrive_at(TURN + turns.half"),
    "products are issued out of turn": ("turns", "    take_turn(turns, n, VARIANT)\n    score", "    score"),
    "an item's last product is issued out of turn": (
        "turns-mbarrier", "    take_turn(turns, n, VARIANT)\n    wait", "    wait",
    ),
    "the last turn is left": ("turns", "        meet_at(TURN, TURN_THREADS)\n", "        pass\n"),
    "the first use is waited for": ("named", "elif n >= VARIANT.stages", "elif n >= 0"),
    "a use is not waited for": ("named", "elif n >= VARIANT.stages", "elif n >= VARIANT.stages + 1"),
    "arrivals are left": ("named", "                wait_free(ring.v, n + i, VARIANT)", "                pass"),
    "arrivals of pairs are left": (
        "turns-pairs-three", "                wait_free(ring.k, n + i, VARIANT)", "                pass",
    ),
    "too few threads meet": ("named", "gl.constexpr(256 + 32)", "gl.constexpr(256)"),
    "keys and values share a named barrier": ("named", ", gl.constexpr(12)", ", gl.constexpr(8)"),
    "stages share a named barrier": ("named", "arrive_at(buffers.name + n % VARIANT.stages", "arrive_at(buffers.name"),
    "keys are freed early, before they are read": (
        "named-early", SCORES_DONE + KEYS_FREE, "\n" + KEYS_FREE + SCORES_DONE[1:],
    ),
    "the bytes of a rest are not expected": ("turns-wide", "FIRST + BOX if TILE.rest > 0 else FIRST", "FIRST"),
    "the rest is not fetched": ("turns-fold", FETCH_REST, "        pass\n"),
    "the rest is fetched from the tile's beginning": ("turns-wide", "start + TILE.rows, column", "start, column"),
    "rests lie in one buffer": ("turns-wide", "buffers.rests.index(n % VARIANT.stages)", "buffers.rests.index(0)"),
    "scores are not waited for behind two products": ("turns-fold", "wait_for(2 if TILE.rest > 0 else 1", "wait_for(2"),
    "a rest's values are left out": ("turns-fold", "product = warpgroup_mma(rest,", "warpgroup_mma(rest,"),
    "a rest's keys past the frame's end count": (
        "turns-fold", "        rest = hide_missing(rest, REST, TILE.keys - N)\n", "",
    ),
    "a rest is not in the sum": ("turns-wide", "        l_new += gl.convert_layout(gl.sum(p_rest, 1), rows)\n", ""),
    "two products are not waited for": (
        "turns-wide", "mma_wait(0, deps=(product, p_next, next", "mma_wait(1, deps=(product, p_next, next",
    ),
}  # fmt: skip

MUTANTS = {name: ("plain", *texts) for name, texts in PLAIN.items()} | PENDING

# of these the player must also say what they are
DEADLOCKS = (
    "the last values are never freed", "nobody begins", "nobody begins by name", "a turn is not passed on",
    "the rest is not fetched",
)  # fmt: skip
RACES = (
    "keys are freed before they are read",
    "a pair is freed before its values are read",
    "keys are freed early, before they are read",
)
