"""What tests/support/mutate.py breaks: (file, text that stands in it once, what replaces it).

None writes out of bounds: the interpreter would corrupt its own heap.
"""

TESTS = {
    "kernels/pointwise/rms_norm.py": ["kernels/test_rms_norm.py"],
    "kernels/pointwise/modulate.py": ["kernels/test_modulate.py"],
    "kernels/pointwise/gate_residual.py": ["kernels/test_gate_residual.py"],
    "kernels/pointwise/add_modulate.py": ["kernels/test_add_modulate.py"],
    "kernels/pointwise/tokens.py": ["kernels/test_modulate.py", "kernels/test_add_modulate.py"],
    "kernels/pages/norm_rope_write.py": ["kernels/test_norm_rope_write.py"],
    "kernels/vae/add_norm_silu.py": ["kernels/test_add_norm_silu.py"],
    "kernels/vae/to_bytes.py": ["kernels/test_to_bytes.py"],
    "kernels/attention/portable.py": ["kernels/test_frame_attention.py"],
    "kernels/attention/launch.py": ["kernels/test_frame_attention.py"],
    "kernels/attention/work.py": ["kernels/test_frame_attention.py"],
    "kernels/prepared.py": ["kernels/test_prepared.py"],
}

MUTANTS = [
    # the query stays turned for the frame before
    ("kernels/attention/portable.py", "tl.minimum(key_frame + 1, sizes.read - 1)", "key_frame"),
    # turned backwards
    ("kernels/attention/portable.py", "real * cos - imag * sin", "real * cos + imag * sin"),
    # one row too few has the next frame's angle
    ("kernels/attention/portable.py", ">= (item.frame + 1) * S)", "> (item.frame + 1) * S)"),
    # logit_scale reaches the cosine alone
    ("kernels/attention/portable.py", "(sin * scale)[None, :]", "sin[None, :]"),
    # every head has the first one's angle
    ("kernels/attention/portable.py", "item.head % sizes.groups", "0"),
    # the neighbour's first token joins the last tile
    ("kernels/attention/portable.py", "tl.arange(0, LAST_N) < S", "tl.arange(0, LAST_N) <= S"),
    # slots are ignored
    ("kernels/attention/portable.py", "tl.load(tables.slot_ptr + key_frame)", "key_frame"),
    # every video reads the first one's pages
    ("kernels/attention/portable.py", "page = item.batch * sizes.pages + ", "page = "),
    # the running sum is not rescaled
    ("kernels/attention/portable.py", "l_i * alpha + tl.sum(p, 1)", "l_i + tl.sum(p, 1)"),
    # the accumulator is not rescaled
    ("kernels/attention/portable.py", "acc * alpha[:, None])", "acc)"),
    # a bias of the wrong sign
    ("kernels/attention/portable.py", "m_i -= bias", "m_i += 2 * bias"),
    # a bias in base e
    ("kernels/attention/portable.py", "key_frame) * LOG2_E", "key_frame)"),
    # hidden frames are read
    ("kernels/attention/portable.py", 'tl.where(bias > float("-inf"), S, 0)', "S"),
    # a log-sum-exp in base 2
    ("kernels/attention/launch.py", "* LN_2", "* 1.0"),
    # rows without keys are divided by their sum of 0
    ("kernels/attention/launch.py", "tl.where(l_i > 0, l_i, 1.0)", "l_i"),
    # fragments of a cut tile are added as if they had one pivot
    ("kernels/attention/launch.py", "l_i * alpha + l_next * beta", "l_i + l_next"),
    # the second fragment is looked for where the first one lies
    ("kernels/attention/launch.py", "2 * program + cut - begin // read", "2 * program"),
    # the last fragment is forgotten
    ("kernels/attention/launch.py", "range(first, last + 1)", "range(first, last)"),
    # the output is rounded through half precision
    ("kernels/attention/launch.py", "cast(acc / seen[:, None], out", "cast((acc / seen[:, None]).to(tl.float16), out"),
    # P is rounded to bfloat16 whatever the value's dtype
    ("kernels/attention/portable.py", "cast(p, value.dtype)", "cast(p, tl.bfloat16).to(value.dtype)"),
    # owner rounds down
    ("kernels/attention/work.py", "((unit + 1) * programs - 1) // units", "unit * programs // units"),
    # a share that ends where a tile ends is said to touch the next one
    ("kernels/attention/work.py", "(end > (begin // read + 1) * read)", "(end >= (begin // read + 1) * read)"),
    # a share that touches two tiles stops after the first
    ("kernels/attention/work.py", " + (end > (begin // read + 1) * read).to(tl.int32)", ""),
    # neighbours write their fragments to one slot
    ("kernels/attention/work.py", "2 * program + second", "program + second"),
    # a cut tile is taken for one of the first
    ("kernels/attention/work.py", "waves * programs + cut)", "cut)"),
    # a span ends a row early
    ("kernels/attention/work.py", "(span + 1) * SPAN", "(span + 1) * SPAN - 1"),
    # the mean counts the padding
    ("kernels/pointwise/rms_norm.py", "/ CHANNELS + eps", "/ BLOCK_C + eps"),
    # eps is ignored
    ("kernels/pointwise/rms_norm.py", "/ CHANNELS + eps", "/ CHANNELS + 1e-6"),
    # the last row is not written
    ("kernels/pointwise/rms_norm.py", "(offs_r < rows)", "(offs_r < rows - 1)"),
    # no weight
    ("kernels/pointwise/rms_norm.py", " * weight[None, :]", ""),
    # mean of magnitudes instead of squares
    ("kernels/pointwise/rms_norm.py", "tl.sum(x * x, 1)", "tl.sum(tl.abs(x), 1)"),
    # rounded twice
    (
        "kernels/pointwise/rms_norm.py",
        "y = x * inverse[:, None]",
        "y = (x * inverse[:, None]).to(tl.float16).to(tl.float32)",
    ),
    # the rows of an incomplete last block are forgotten
    ("kernels/pointwise/rms_norm.py", "triton.cdiv(rows, block_r)", "rows // block_r"),
    # shift read with the strides of scale
    ("kernels/pointwise/modulate.py", "*shift_strides[:2]", "*scale_strides[:2]"),
    # not 1 + scale
    ("kernels/pointwise/modulate.py", "1.0 + scale", "scale"),
    # scale and shift change places
    ("kernels/pointwise/modulate.py", "1.0 + scale, shift", "1.0 + shift, scale"),
    # every frame gets the shift of the first
    ("kernels/pointwise/modulate.py", "load_row(shift_ptr, batch, frame", "load_row(shift_ptr, batch, 0"),
    # eps is another
    ("kernels/pointwise/modulate.py", "mask_c, eps, CHANNELS", "mask_c, 1e-6, CHANNELS"),
    # rounded twice
    ("kernels/pointwise/modulate.py", "cast(y, out", "cast(y.to(tl.float16).to(tl.float32), out"),
    # padding counts as deviation from the mean
    (
        "kernels/pointwise/tokens.py",
        "tl.where(mask_c[None, :], x - (tl.sum(x, 1) / CHANNELS)[:, None], 0.0)",
        "x - (tl.sum(x, 1) / CHANNELS)[:, None]",
    ),
    # the batch of a frame's row is forgotten
    ("kernels/pointwise/tokens.py", "ptr + batch * stride_b", "ptr"),
    # unbiased variance
    ("kernels/pointwise/tokens.py", "/ CHANNELS + eps", "/ (CHANNELS - 1) + eps"),
    # eps is ignored
    ("kernels/pointwise/tokens.py", "/ CHANNELS + eps", "/ CHANNELS + 1e-6"),
    # variance in one pass, which cancels
    (
        "kernels/pointwise/tokens.py",
        """    x = tl.where(mask_c[None, :], x - (tl.sum(x, 1) / CHANNELS)[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / CHANNELS + eps)
""",
        """    mean = tl.sum(x, 1) / CHANNELS
    inverse = tl.rsqrt(tl.sum(x * x, 1) / CHANNELS - mean * mean + eps)
    x = x - mean[:, None]
""",
    ),
    # no shift
    ("kernels/pointwise/tokens.py", " + shift[None, :]", ""),
    # the last token of a frame is not written
    ("kernels/pointwise/tokens.py", "(offs_s < tokens)", "(offs_s < tokens - 1)"),
    # the batch of x is forgotten
    ("kernels/pointwise/tokens.py", "(batch * frames + frame)", "frame"),
    # no gate
    ("kernels/pointwise/gate_residual.py", "update * gate[None, :]", "update"),
    # the last token of a frame is not written
    ("kernels/pointwise/gate_residual.py", "(offs_s < tokens)", "(offs_s < tokens - 1)"),
    # every batch gets the gate of the first
    ("kernels/pointwise/gate_residual.py", "*gate_strides[:2]", "0, gate_strides[1]"),
    # every frame gets the gate of the first
    ("kernels/pointwise/gate_residual.py", "*gate_strides[:2]", "gate_strides[0], 0"),
    # only the first block of channels is written
    ("kernels/pointwise/gate_residual.py", "% column_blocks * BLOCK_C", "% column_blocks * 0"),
    # rounded twice
    (
        "kernels/pointwise/gate_residual.py",
        "update * gate[None, :]",
        "(update * gate[None, :]).to(tl.float16).to(tl.float32)",
    ),
    # the batch of x is forgotten
    ("kernels/pointwise/gate_residual.py", "(batch * frames + frame)", "frame"),
    # no gate
    ("kernels/pointwise/add_modulate.py", "update *= load_row", "update *= 1.0 + 0.0 * load_row"),
    # a gate although there is none
    ("kernels/pointwise/add_modulate.py", '"HAS_GATE": gate_strides is not None', '"HAS_GATE": True'),
    # every frame gets the gate of the first
    ("kernels/pointwise/add_modulate.py", "*(gate_strides or (0, 0))[:2]", "(gate_strides or (0, 0))[0], 0"),
    # the norm is of x alone
    ("kernels/pointwise/add_modulate.py", "    total += update\n", ""),
    # the sum is stored before the update is added
    (
        "kernels/pointwise/add_modulate.py",
        "cast(total, total_ptr.dtype.element_ty)",
        "cast(total - update, total_ptr.dtype.element_ty)",
    ),
    # the norm is of the rounded sum
    (
        "kernels/pointwise/add_modulate.py",
        "modulated_norm(total, ",
        "modulated_norm(total.to(tl.float16).to(tl.float32), ",
    ),
    # scale and shift read with each other's strides
    (
        "kernels/pointwise/add_modulate.py",
        "*scale_strides[:2], *shift_strides[:2])",
        "*shift_strides[:2], *scale_strides[:2])",
    ),
    # always a modulation
    ("kernels/pointwise/add_modulate.py", "offset + scale, ", "1.0 + scale, "),
    # rows are read as if each product stood alone
    ("kernels/pages/norm_rope_write.py", "row = token * ROW", "row = token * CHANNELS"),
    # the queries of two tokens are written to one row
    ("kernels/pages/norm_rope_write.py", "out_ptr + token * CHANNELS", "out_ptr + token // 2 * CHANNELS"),
    # the mean counts the padding
    ("kernels/pages/norm_rope_write.py", "/ (2 * HEADS * PAIRS) + eps", "/ (2 * BLOCK_H * BLOCK_P) + eps"),
    # eps is ignored
    ("kernels/pages/norm_rope_write.py", "/ (2 * HEADS * PAIRS) + eps", "/ (2 * HEADS * PAIRS) + 1e-6"),
    # the mean sees half of the channels
    ("kernels/pages/norm_rope_write.py", "tl.sum(real * real + imag * imag)", "tl.sum(real * real + real * real)"),
    # turned backwards
    ("kernels/pages/norm_rope_write.py", "real * cos - imag * sin", "real * cos + imag * sin"),
    # temporal pairs lose their cosine of 1
    ("kernels/pages/norm_rope_write.py", "tl.where(turned, cos, 1.0)", "tl.where(turned, cos, 0.0)"),
    # the turn of another place
    ("kernels/pages/norm_rope_write.py", "place.to(tl.int64) * (2 * PLACE_PAIRS)", "place.to(tl.int64) * PLACE_PAIRS"),
    # one pair off
    (
        "kernels/pages/norm_rope_write.py",
        "offs_p - (PAIRS - PLACE_PAIRS), turned",
        "offs_p // 2 - (PAIRS - PLACE_PAIRS) // 2, turned",
    ),
    # imaginary channels take the weight of real ones
    ("kernels/pages/norm_rope_write.py", "imag * inverse * imag_weight", "imag * inverse * real_weight"),
    # the query takes the key's weight
    (
        "kernels/pages/norm_rope_write.py",
        "query_weight_ptr, cos, sin, out_ptr + token",
        "key_weight_ptr, cos, sin, out_ptr + token",
    ),
    # page 0 is not written
    ("kernels/pages/norm_rope_write.py", "if slot >= 0:", "if slot > 0:"),
    # a negative slot writes page 0
    (
        "kernels/pages/norm_rope_write.py",
        "tl.load(slot_ptr + frame).to(tl.int64)",
        "tl.maximum(tl.load(slot_ptr + frame).to(tl.int64), 0)",
    ),
    # a page's offset in 32 bits
    ("kernels/pages/norm_rope_write.py", "tl.load(slot_ptr + frame).to(tl.int64)", "tl.load(slot_ptr + frame)"),
    # slots are ignored
    ("kernels/pages/norm_rope_write.py", "slot * stride_pp", "frame * stride_pp"),
    # every batch writes the pages of the first
    ("kernels/pages/norm_rope_write.py", "batch * stride_pb + slot", "slot"),
    # the value of page 0 is not written
    ("kernels/pages/norm_rope_write.py", "tl.broadcast_to(slot, BLOCK_C) >= 0", "tl.broadcast_to(slot, BLOCK_C) > 0"),
    # values through the key's weightless path: not copied exactly
    (
        "kernels/pages/norm_rope_write.py",
        "value = cast(value, ",
        "value = cast(value.to(tl.float32) * 1.0001, ",
    ),
    # a compiled kernel that expects aligned pointers gets others
    ("kernels/prepared.py", "return begins % 16 == 0", "return True"),
    # one device's kernel is launched on another
    (
        "kernels/prepared.py",
        "self.compiled.get(where if where >= 0 else current_device())",
        "next(iter(self.compiled.values()))",
    ),
    # tensors of another device are launched on the current one
    ("kernels/prepared.py", "where >= 0 and where != current_device()", "False"),
    # constants in the order in which they were named
    ("kernels/prepared.py", "(constants[name] for name in kernel.arg_names[-len(constants) :])", "constants.values()"),
    # descriptors keep the tensor that they were made for
    ("kernels/prepared.py", "update(self.fields, base=tensor)", "update({**self.fields, 'base': self.fields['base']})"),
    # a launch is made again for every call
    ("kernels/prepared.py", "make(*key) if torch.compiler.is_compiling() else kept(*key)", "make(*key)"),
    # the mean counts the padding
    (
        "kernels/vae/add_norm_silu.py",
        "tl.sqrt(CHANNELS * 1.0)",
        "tl.sqrt(BLOCK_C * 1.0)",
    ),
    # a mean of magnitudes instead of squares
    (
        "kernels/vae/add_norm_silu.py",
        "tl.sqrt(tl.sum(x * x, 1))",
        "tl.sum(tl.abs(x), 1)",
    ),
    # a place of zeros is divided by 0
    (
        "kernels/vae/add_norm_silu.py",
        "tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)",
        "tl.sqrt(tl.sum(x * x, 1))",
    ),
    # a tiny place is held back too early
    (
        "kernels/vae/add_norm_silu.py",
        "tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)",
        "tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-3)",
    ),
    # no gamma
    (
        "kernels/vae/add_norm_silu.py",
        "[:, None] * gamma[None, :]",
        "[:, None]",
    ),
    # no SiLU
    (
        "kernels/vae/add_norm_silu.py",
        "y = y / (1.0 + tl.exp2(-y * LOG2_E))",
        "y = y * 1.0",
    ),
    # a SiLU in base 2
    (
        "kernels/vae/add_norm_silu.py",
        "-y * LOG2_E",
        "-y",
    ),
    # the sum is not stored
    (
        "kernels/vae/add_norm_silu.py",
        "            tl.store(x_ptr + offs, rounded, mask=mask)\n",
        "",
    ),
    # normalised before the sum is rounded
    (
        "kernels/vae/add_norm_silu.py",
        "x = rounded.to(tl.float32)",
        "x = x * 1.0",
    ),
    # the last place is not written
    (
        "kernels/vae/add_norm_silu.py",
        "(offs_r < places)",
        "(offs_r < places - 1)",
    ),
    # the past is forgotten
    (
        "kernels/vae/add_norm_silu.py",
        "if HAS_PAST:",
        "if False:",
    ),
    # the past stands in the wrong order
    (
        "kernels/vae/add_norm_silu.py",
        "(batch * BEFORE + frame) * step",
        "(batch * BEFORE + 1 - frame) * step",
    ),
    # every video has the past of the first
    (
        "kernels/vae/add_norm_silu.py",
        "past_ptr + (batch * BEFORE + frame)",
        "past_ptr + (frame)",
    ),
    # the batch stride of x stands for the addend's
    (
        "kernels/vae/add_norm_silu.py",
        "batch * stride_ab",
        "batch * stride_xb",
    ),
    # the frame before is kept
    (
        "kernels/vae/add_norm_silu.py",
        "if frame >= count:",
        "if frame >= count + 1:",
    ),
    # rounded twice
    (
        "kernels/vae/add_norm_silu.py",
        "y = y / (1.0",
        "y = y.to(tl.float16).to(tl.float32) / (1.0",
    ),
    # halves go up
    (
        "kernels/vae/to_bytes.py",
        "((x + 1.0) * 127.5 + WHOLE) - WHOLE",
        "tl.floor((x + 1.0) * 127.5 + 0.5)",
    ),
    # cut off instead of rounded
    (
        "kernels/vae/to_bytes.py",
        "((x + 1.0) * 127.5 + WHOLE) - WHOLE",
        "(x + 1.0) * 127.5",
    ),
    # one byte too few
    (
        "kernels/vae/to_bytes.py",
        "(x + 1.0) * 127.5 + WHOLE",
        "(x + 1.0) * 127.0 + WHOLE",
    ),
    # what lies above is not clamped
    (
        "kernels/vae/to_bytes.py",
        "tl.minimum(tl.maximum(x, -1.0), 1.0)",
        "tl.maximum(x, -1.0)",
    ),
    # what lies below is not clamped
    (
        "kernels/vae/to_bytes.py",
        "tl.minimum(tl.maximum(x, -1.0), 1.0)",
        "tl.minimum(x, 1.0)",
    ),
    # the last colour is not written
    (
        "kernels/vae/to_bytes.py",
        "offs < count",
        "offs < count - 1",
    ),
    # every video is the first one
    (
        "kernels/vae/to_bytes.py",
        "x_ptr + batch * stride_xb",
        "x_ptr",
    ),
    # written as if the piece were the whole
    (
        "kernels/vae/to_bytes.py",
        "out_ptr + batch * stride_ob",
        "out_ptr + batch * stride_xb",
    ),
]
