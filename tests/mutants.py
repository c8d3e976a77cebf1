"""What tests/mutate.py breaks: (file, text that stands in it once, what replaces it).

None writes out of bounds: the interpreter would corrupt its own heap.
"""

TESTS = {
    "kernels/rms_norm.py": ["test_rms_norm.py"],
    "kernels/modulate.py": ["test_modulate.py"],
    "kernels/gate_residual.py": ["test_gate_residual.py"],
    "kernels/norm_rope_write.py": ["test_norm_rope_write.py"],
    "kernels/frame_attention.py": ["test_frame_attention.py"],
    "kernels/merge.py": ["test_frame_attention.py"],
    "kernels/schedule.py": ["test_frame_attention.py"],
    "kernels/frame_attention_fp8.py": ["test_frame_attention_fp8.py"],
    "kernels/norm_rope_write_fp8.py": ["test_norm_rope_write_fp8.py"],
    "kernels/quantize.py": ["test_quantize.py", "test_norm_rope_write_fp8.py", "test_frame_attention_fp8.py"],
}

MUTANTS = [
    # the query stays turned for the frame before
    ("kernels/frame_attention.py", "tl.minimum(key_frame + 1, read - 1)", "key_frame"),
    # turned backwards
    ("kernels/frame_attention.py", "real * cos - imag * sin", "real * cos + imag * sin"),
    # one row too few has the next frame's angle
    ("kernels/frame_attention.py", "offs_m >= left", "offs_m > left"),
    # logit_scale reaches the cosine alone
    ("kernels/frame_attention.py", "(sin * scale)[None, :]", "sin[None, :]"),
    # every head has the first one's angle
    ("kernels/frame_attention.py", "head % groups", "0"),
    # the neighbour's first token joins the last tile
    ("kernels/frame_attention.py", "tl.arange(0, LAST_N) < S", "tl.arange(0, LAST_N) <= S"),
    # slots are ignored
    ("kernels/frame_attention.py", "tl.load(slot_ptr + key_frame)", "key_frame"),
    # every video reads the first one's pages
    ("kernels/frame_attention.py", "page = batch * pages + ", "page = "),
    # the running sum is not rescaled
    ("kernels/frame_attention.py", "l_i * alpha + tl.sum(p, 1)", "l_i + tl.sum(p, 1)"),
    # the accumulator is not rescaled
    ("kernels/frame_attention.py", "acc * alpha[:, None])", "acc)"),
    # a bias of the wrong sign
    ("kernels/frame_attention.py", "m_i -= bias", "m_i += 2 * bias"),
    # a bias in base e
    ("kernels/frame_attention.py", "key_frame) * 1.4426950408889634", "key_frame)"),
    # hidden frames are read
    ("kernels/frame_attention.py", 'tl.where(bias > float("-inf"), S, 0)', "S"),
    # a log-sum-exp in base 2
    ("kernels/merge.py", "* 0.6931471805599453", "* 1.0"),
    # rows without keys are divided by their sum of 0
    ("kernels/merge.py", "tl.where(l_i > 0, l_i, 1.0)", "l_i"),
    # parts of a cut tile are added as if they had one pivot
    ("kernels/merge.py", "l_i * alpha + l_part * beta", "l_i + l_part"),
    # the second part is looked for where the first one lies
    ("kernels/merge.py", "2 * program + cut - begin // read", "2 * program"),
    # the last part is forgotten
    ("kernels/merge.py", "range(first, last + 1)", "range(first, last)"),
    # the output is rounded through half precision
    ("kernels/merge.py", "cast(acc / seen[:, None], out", "cast((acc / seen[:, None]).to(tl.float16), out"),
    # P is rounded to bfloat16 whatever the value's dtype
    ("kernels/frame_attention.py", "cast(p, value.dtype)", "cast(p, tl.bfloat16).to(value.dtype)"),
    # owner rounds down
    ("kernels/schedule.py", "((unit + 1) * programs - 1) // units", "unit * programs // units"),
    # a share that ends where a tile ends is said to touch the next one
    ("kernels/schedule.py", "(end > (begin // read + 1) * read)", "(end >= (begin // read + 1) * read)"),
    # a share that touches two tiles stops after the first
    ("kernels/schedule.py", " + (end > (begin // read + 1) * read).to(tl.int32)", ""),
    # neighbours write their parts to one place
    ("kernels/schedule.py", "2 * program + part", "program + part"),
    # a cut tile is taken for one of the first
    ("kernels/schedule.py", "waves * programs + cut)", "cut)"),
    # a span ends a row early
    ("kernels/schedule.py", "(span + 1) * SPAN", "(span + 1) * SPAN - 1"),
    # the mean counts the padding
    ("kernels/rms_norm.py", "/ CHANNELS + eps", "/ BLOCK_C + eps"),
    # eps is ignored
    ("kernels/rms_norm.py", "/ CHANNELS + eps", "/ CHANNELS + 1e-6"),
    # the last row is not written
    ("kernels/rms_norm.py", "(offs_r < rows)", "(offs_r < rows - 1)"),
    # no weight
    ("kernels/rms_norm.py", " * weight[None, :]", ""),
    # mean of magnitudes instead of squares
    ("kernels/rms_norm.py", "tl.sum(x * x, 1)", "tl.sum(tl.abs(x), 1)"),
    # rounded twice
    ("kernels/rms_norm.py", "y = x * inverse[:, None]", "y = (x * inverse[:, None]).to(tl.float16).to(tl.float32)"),
    # the rows of an incomplete last block are forgotten
    ("kernels/rms_norm.py", "triton.cdiv(rows, block_r)", "rows // block_r"),
    # padding counts as deviation from the mean
    (
        "kernels/modulate.py",
        "tl.where(mask_c[None, :], x - (tl.sum(x, 1) / CHANNELS)[:, None], 0.0)",
        "x - (tl.sum(x, 1) / CHANNELS)[:, None]",
    ),
    # shift read with the strides of scale
    ("kernels/modulate.py", "shift.stride(0), shift.stride(1)", "scale.stride(0), scale.stride(1)"),
    # the batch of scale is forgotten
    ("kernels/modulate.py", "scale_ptr + batch * stride_cb", "scale_ptr"),
    # not 1 + scale
    ("kernels/modulate.py", "(1.0 + scale)", "scale"),
    # unbiased variance
    ("kernels/modulate.py", "/ CHANNELS + eps", "/ (CHANNELS - 1) + eps"),
    # eps is ignored
    ("kernels/modulate.py", "/ CHANNELS + eps", "/ CHANNELS + 1e-6"),
    # variance in one pass, which cancels
    (
        "kernels/modulate.py",
        """    x = tl.where(mask_c[None, :], x - (tl.sum(x, 1) / CHANNELS)[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / CHANNELS + eps)
""",
        """    mean = tl.sum(x, 1) / CHANNELS
    inverse = tl.rsqrt(tl.sum(x * x, 1) / CHANNELS - mean * mean + eps)
    x = x - mean[:, None]
""",
    ),
    # no shift
    ("kernels/modulate.py", " + shift[None, :]", ""),
    # no gate
    ("kernels/gate_residual.py", "update * gate[None, :]", "update"),
    # the last token of a frame is not written
    ("kernels/gate_residual.py", "(offs_s < tokens)", "(offs_s < tokens - 1)"),
    # every batch gets the gate of the first
    ("kernels/gate_residual.py", "gate.stride(0), gate.stride(1)", "0, gate.stride(1)"),
    # every frame gets the gate of the first
    ("kernels/gate_residual.py", "gate.stride(0), gate.stride(1)", "gate.stride(0), 0"),
    # only the first block of channels is written
    ("kernels/gate_residual.py", "% column_blocks * BLOCK_C", "% column_blocks * 0"),
    # rounded twice
    ("kernels/gate_residual.py", "update * gate[None, :]", "(update * gate[None, :]).to(tl.float16).to(tl.float32)"),
    # the batch of x is forgotten
    ("kernels/gate_residual.py", "(batch * frames + frame)", "frame"),
    # the mean counts the padding
    ("kernels/norm_rope_write.py", "/ (2 * HEADS * PAIRS) + eps", "/ (2 * BLOCK_H * BLOCK_P) + eps"),
    # eps is ignored
    ("kernels/norm_rope_write.py", "/ (2 * HEADS * PAIRS) + eps", "/ (2 * HEADS * PAIRS) + 1e-6"),
    # the mean sees half of the channels
    ("kernels/norm_rope_write.py", "tl.sum(real * real + imag * imag)", "tl.sum(real * real + real * real)"),
    # turned backwards
    ("kernels/norm_rope_write.py", "real * cos - imag * sin", "real * cos + imag * sin"),
    # temporal pairs lose their cosine of 1
    ("kernels/norm_rope_write.py", "tl.where(turned, cos, 1.0)", "tl.where(turned, cos, 0.0)"),
    # the turn of another place
    ("kernels/norm_rope_write.py", "place.to(tl.int64) * (2 * PLACE_PAIRS)", "place.to(tl.int64) * PLACE_PAIRS"),
    # one pair off
    (
        "kernels/norm_rope_write.py",
        "offs_p - (PAIRS - PLACE_PAIRS), turned",
        "offs_p // 2 - (PAIRS - PLACE_PAIRS) // 2, turned",
    ),
    # imaginary channels take the weight of real ones
    ("kernels/norm_rope_write.py", "imag * inverse * imag_weight", "imag * inverse * real_weight"),
    # the query takes the key's weight
    (
        "kernels/norm_rope_write.py",
        "query_weight_ptr, turn_ptr, out_ptr + row",
        "key_weight_ptr, turn_ptr, out_ptr + row",
    ),
    # page 0 is not written
    ("kernels/norm_rope_write.py", "if slot >= 0:", "if slot > 0:"),
    # a negative slot writes page 0
    (
        "kernels/norm_rope_write.py",
        "tl.load(slot_ptr + frame).to(tl.int64)",
        "tl.maximum(tl.load(slot_ptr + frame).to(tl.int64), 0)",
    ),
    # a page's offset in 32 bits
    ("kernels/norm_rope_write.py", "tl.load(slot_ptr + frame).to(tl.int64)", "tl.load(slot_ptr + frame)"),
    # slots are ignored
    ("kernels/norm_rope_write.py", "slot * stride_pp", "frame * stride_pp"),
    # every batch writes the pages of the first
    ("kernels/norm_rope_write.py", "batch * stride_pb + slot", "slot"),
    # values through the key's weightless path: not copied exactly
    (
        "kernels/norm_rope_write.py",
        "value = cast(value, ",
        "value = cast(value.to(tl.float32) * 1.0001, ",
    ),
    # the query stays turned for the frame before
    ("kernels/frame_attention_fp8.py", "tl.minimum(key_frame + 1, read - 1)", "key_frame"),
    # turned backwards
    ("kernels/frame_attention_fp8.py", "real * cos - imag * sin", "real * cos + imag * sin"),
    # one row too few has the next frame's angle
    ("kernels/frame_attention_fp8.py", "tl.arange(0, BLOCK_M) >= left", "tl.arange(0, BLOCK_M) > left"),
    # half of the pairs do not count for a row's scale
    ("kernels/frame_attention_fp8.py", "tl.maximum(tl.abs(real), tl.abs(imag))", "tl.abs(real)"),
    # a turn may make a channel larger than the scale reaches
    ("kernels/frame_attention_fp8.py", "(1.4142136 / 448)", "(1.0 / 448)"),
    # the scale of rows forgets the logits' factor
    ("kernels/frame_attention_fp8.py", " * tl.abs(tl.load(scale_ptr + frame))", ""),
    # every query row has the scale of the first frame
    (
        "kernels/frame_attention_fp8.py",
        "(row + tl.arange(0, BLOCK_M)) // S",
        "(row + tl.zeros([BLOCK_M], tl.int32)) // S",
    ),
    # a row of zeros divides by zero
    (
        "kernels/frame_attention_fp8.py",
        "tl.where(largest > 0, largest * (1.4142136 / 448), 1.0)",
        "largest * (1.4142136 / 448)",
    ),
    # all keys have the scale of page 0
    ("kernels/frame_attention_fp8.py", "tl.load(key_scale_ptr + page * heads + head)", "tl.load(key_scale_ptr + head)"),
    # all heads have the value scale of the first
    (
        "kernels/frame_attention_fp8.py",
        "tl.load(value_scale_ptr + page * heads + head)",
        "tl.load(value_scale_ptr + page * heads)",
    ),
    # the accumulator moves the wrong way between pages
    ("kernels/frame_attention_fp8.py", "acc *= v_scale / page_scale", "acc *= page_scale / v_scale"),
    # the accumulator does not move between pages
    ("kernels/frame_attention_fp8.py", "acc *= v_scale / page_scale", "pass"),
    # a hidden frame's scale counts
    ("kernels/frame_attention_fp8.py", 'page_scale = tl.where(bias > float("-inf"), page_scale, v_scale)', "pass"),
    # the last scale is forgotten
    ("kernels/frame_attention_fp8.py", "        acc *= v_scale\n", ""),
    # a wrong bias
    ("kernels/frame_attention_fp8.py", "m_i += bias", "m_i -= 0 * bias"),
    # weights up to 512 saturate
    ("kernels/frame_attention_fp8.py", "tl.max(score, 1) * factor) - 8", "tl.max(score, 1) * factor) - 9"),
    # weights up to 1 lose their small ones
    ("kernels/frame_attention_fp8.py", "tl.max(score, 1) * factor) - 8", "tl.max(score, 1) * factor) - 0"),
    # the pivot is no integer: weights round anew at every cut
    ("kernels/frame_attention_fp8.py", "tl.ceil(tl.max(score, 1) * factor)", "(tl.max(score, 1) * factor)"),
    # the accumulator is not rescaled
    ("kernels/frame_attention_fp8.py", "tl.fma(acc, alpha[:, None], product)", "acc + product"),
    # the sum is not rescaled
    ("kernels/frame_attention_fp8.py", "l_i * alpha + tl.sum(p, 1)", "l_i + tl.sum(p, 1)"),
    # weights meet the values of other tokens
    ("kernels/frame_attention_fp8.py", "dot(in_value_order(to_e4m3(p))", "dot((to_e4m3(p))"),
    # weights stay in float32
    ("kernels/frame_attention_fp8.py", "dot(in_value_order(to_e4m3(p))", "dot(in_value_order(p)"),
    # the neighbour's first token joins the last tile
    ("kernels/frame_attention_fp8.py", "tl.arange(0, LAST_N) < S", "tl.arange(0, LAST_N) <= S"),
    # values of the first head for all
    ("kernels/frame_attention_fp8.py", "channel = (page * heads + head) * D", "channel = page * heads * D"),
    # every video reads the first one's pages
    ("kernels/frame_attention_fp8.py", "page = batch * pages + ", "page = "),
    # slots are ignored
    ("kernels/frame_attention_fp8.py", "tl.load(slot_ptr + key_frame)", "key_frame"),
    # every head has the first one's angle
    ("kernels/frame_attention_fp8.py", "head % groups", "0"),
    # the key's scale is not applied
    ("kernels/norm_rope_write_fp8.py", "to_e4m3(real * inverse)", "to_e4m3(real)"),
    # imaginary channels overwrite their neighbours
    ("kernels/norm_rope_write_fp8.py", "page_ptr + offs + PAIRS", "page_ptr + offs + PAIRS + 1"),
    # page 0 is not written with keys, negative slots are written: the first condition of two
    (
        "kernels/norm_rope_write_fp8.py",
        "slot = tl.load(slot_ptr + frame).to(tl.int64)\n        if slot >= 0",
        "slot = tl.load(slot_ptr + frame).to(tl.int64)\n        if slot > 0",
    ),
    # a negative slot writes values to page 0
    (
        "kernels/norm_rope_write_fp8.py",
        "slot = tl.load(slot_ptr + frame).to(tl.int64)\n    if slot >= 0",
        "slot = tl.maximum(tl.load(slot_ptr + frame).to(tl.int64), 0)\n    if slot >= 0",
    ),
    # every video has the key scales of the first
    (
        "kernels/norm_rope_write_fp8.py",
        "key_scale_ptr + (batch * pages + slot) * HEADS",
        "key_scale_ptr + slot * HEADS",
    ),
    # every head has the key scale of the first
    ("kernels/norm_rope_write_fp8.py", "tl.load(scale_ptr + offs_h, mask", "tl.load(scale_ptr + 0 * offs_h, mask"),
    # tokens in their natural order
    ("kernels/norm_rope_write_fp8.py", "token = token_at(offs_s)", "token = offs_s"),
    # behind the last token of a frame stands the next frame's first
    ("kernels/norm_rope_write_fp8.py", "(token < tokens)[:, None] & ", ""),
    # the places behind the last token are not written
    ("kernels/norm_rope_write_fp8.py", "(offs_s < padded)[None, :]", "(offs_s < tokens)[None, :]"),
    # the largest of signed values
    ("kernels/norm_rope_write_fp8.py", "tl.max(tl.max(tl.abs(value), 1), 0)", "tl.max(tl.max(value, 1), 0)"),
    # what is recorded is the last block's largest, not the largest of all
    ("kernels/norm_rope_write_fp8.py", "tl.atomic_max(", "tl.atomic_xchg("),
    # values of every page under the scale of the first
    ("kernels/norm_rope_write_fp8.py", "tl.load(value_scale_ptr + scale)", "tl.load(value_scale_ptr + head)"),
    # every video writes the values of the first
    (
        "kernels/norm_rope_write_fp8.py",
        "page = batch * stride_pb + slot * stride_pp + (head",
        "page = slot * stride_pp + (head",
    ),
    # every frame stores the values of the first
    (
        "kernels/norm_rope_write_fp8.py",
        "((batch * frames + frame) * tokens + token)",
        "((batch * frames) * tokens + token)",
    ),
    # ties go up
    ("kernels/quantize.py", "0x7FFFF + ((bits >> 20) & 1)", "0x80000"),
    # the largest is one code less
    ("kernels/quantize.py", "tl.minimum(tl.abs(x), 448.0)", "tl.minimum(tl.abs(x), 416.0)"),
    # subnormals are cut off
    ("kernels/quantize.py", "(magnitude + 16384.0)", "(magnitude + 16383.9995)"),
    # NaN becomes 448
    ("kernels/quantize.py", "subnormal, normal), 0x7F)", "subnormal, normal), 0x7E)"),
    # places of tokens: bits exchanged
    ("kernels/quantize.py", "((place & 2) << 2) | ((place & 12) >> 1)", "((place & 4) << 1) | ((place & 10) >> 1)"),
    # places of weights: another order
    ("kernels/quantize.py", ".permute(0, 1, 3, 2, 4)", ".permute(0, 1, 3, 4, 2)"),
    # powers of two below
    ("kernels/quantize.py", "(bits + 0x7FFFFF) & 0x7F800000", "bits & 0x7F800000"),
    # a bound for half of the channels
    ("kernels/quantize.py", "weight.numel() ** 0.5", "(weight.numel() / heads) ** 0.5"),
    # heads of the weight in the wrong order
    ("kernels/quantize.py", ".view(heads, -1).abs().amax(1)", ".view(-1, heads).abs().amax(0)"),
    # no margin
    ("kernels/quantize.py", "seen * (MARGIN / LARGEST)", "seen / LARGEST"),
    # a page that nobody has seen gets the smallest scale
    (
        "kernels/quantize.py",
        "torch.where(seen > 0, power_of_two(seen * (MARGIN / LARGEST)), standing)",
        "power_of_two(seen * (MARGIN / LARGEST))",
    ),
    # every page's scale is renewed
    (
        "kernels/quantize.py",
        "torch.where(is_written, scale_of(value_seen, value_scale), value_scale)",
        "scale_of(value_seen, value_scale)",
    ),
    # what was seen stays for ever
    ("kernels/quantize.py", "value_seen.masked_fill_(is_written, 0)", "pass"),
    # old GPUs pass
    ("kernels/quantize.py", "arch == 80 or ", ""),
    # 8.6 passes
    ("kernels/quantize.py", "< (8, 9)", "< (8, 6)"),
]
