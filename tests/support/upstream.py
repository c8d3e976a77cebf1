"""The published cache semantics, written down a second time for tests: token-major tensors that are rolled and
overwritten.

Self-Forcing and LongLive keep keys rotated at absolute positions; LongLive's infinite attention and Infinity-RoPE keep
them raw and rotate the window anew by index in the cache. ``RollingMemory`` is a ``Memory`` for ``CausalWan``, ``run``
the loop. It shares the transformer and nothing of cache, plan, policies or engine with the package.
"""

import torch
import torch.nn.functional as F

from flexkern.kernels import reference


def deepened(weights):
    """A state dict of twice the layers. What a re-cache forgets does not show in two: the first one's keys do not know
    the prompt.
    """
    layers = {int(name.split(".")[1]) for name in weights if name.startswith("blocks.")}
    more = {
        name.replace(f"blocks.{i}.", f"blocks.{i + len(layers)}.", 1): tensor
        for i in layers
        for name, tensor in weights.items()
        if name.startswith(f"blocks.{i}.")
    }
    return {**weights, **more}


def rope(x, start, rows, columns, positions=None):
    """Interleaved 3D rotation in complex128 of x [B, L, H, D], frames at start.. or at the given positions."""
    pairs = x.shape[-1] // 2
    sizes = pairs - 2 * (pairs // 3), pairs // 3, pairs // 3
    theta = [10000.0 ** (-torch.arange(n, dtype=torch.float64) / n) for n in sizes]
    frames = x.shape[1] // (rows * columns)
    t = torch.arange(start, start + frames) if positions is None else torch.tensor(positions)
    grid = torch.meshgrid(t, torch.arange(rows), torch.arange(columns), indexing="ij")
    angle = torch.cat([g.flatten().double()[:, None] * f for g, f in zip(grid, theta, strict=True)], dim=-1)
    z = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(z * torch.polar(torch.ones_like(angle), angle)[:, None]).flatten(-2).to(x.dtype)


class RollingMemory:
    ops = reference

    def __init__(self, layers, batch, heads, dim, rows, columns, *, window, sink=0, slot=False, keep_pinned=False):
        self.rows, self.columns, self.places = rows, columns, rows * columns
        self.window, self.sink = window * self.places, sink * self.places
        self.slot, self.keep_pinned = slot, keep_pinned
        self.k = torch.zeros(layers, batch, self.window, heads, dim)
        self.v = torch.zeros_like(self.k)
        self.global_end, self.local_end = [0] * layers, [0] * layers
        self.start, self.jump = 0, None

    def attend(self, layer, query, key, value, norms):
        shape = key.shape
        normed = [
            None if x is None else reference.rms_norm(x.flatten(-2), w).view(shape).flatten(1, 2)
            for x, w in zip((query, key), norms, strict=True)
        ]
        (q, k), v = normed, value.flatten(1, 2)
        n, first = k.shape[1], self.start // self.places
        turn = lambda x, at, positions=None: rope(x, at, self.rows, self.columns, positions)
        end = self.start + n
        recompute = end <= self.global_end[layer] and self.start > 0
        grown = self.local_end[layer] + end - self.global_end[layer]
        if grown > self.window:  # shift left, up to the sink
            evicted = grown - self.window
            for cache in (self.k[layer], self.v[layer]):
                cache[:, self.sink : self.window - evicted] = cache[:, self.sink + evicted :].clone()
            grown = self.window
        begin = grown - n
        write = max(begin, self.sink) if recompute and self.keep_pinned else begin
        self.k[layer][:, write:grown] = (k if self.slot else turn(k, first))[:, write - begin :]
        self.v[layer][:, write:grown] = v[:, write - begin :]
        self.global_end[layer], self.local_end[layer] = end, grown
        if query is None:
            return None
        keys, values = self.k[layer][:, :grown], self.v[layer][:, :grown]
        if self.slot:
            at = list(range(grown // self.places))
            if self.jump is not None:
                at[-3:] = range(self.jump, self.jump + 3)
            keys, q = turn(keys, 0, at), turn(q, 0, at[begin // self.places :])
        else:
            q = turn(q, first)
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, keys, values))).transpose(1, 2)
        return out.reshape(shape)


def run(model, memory, prompts, noise, fresh, timesteps, sigma, *, switches=None, cuts=(), prefill=None):
    """Latents [B, frames, C, h, w]. switches: {chunk: callable(state) applied before it}; state has text, memory,
    past.
    """
    text = model.text_keys(prompts, reference)
    past = []
    start = 0

    def forward(x, t, keys_only=False):
        return model(x, torch.full(x.shape[:2], float(t)), text, memory, keys_only=keys_only)

    if prefill is not None:
        for block in prefill.split(3, dim=1):
            memory.start = start * memory.places
            forward(block, 0)
            start += block.shape[1]
    drawn = iter(fresh)
    for chunk, x in enumerate(noise.split(3, dim=1)):
        if switches and chunk in switches:
            prompt, change = switches[chunk]
            text = model.text_keys(prompt, reference)
            change(memory, past, start, forward)
        memory.start = start * memory.places
        memory.jump = 45 if chunk in cuts else None
        for i, t in enumerate(timesteps):
            x0 = (x.double() - sigma(t) * forward(x, t).double()).float()
            if i + 1 < len(timesteps):
                s = sigma(timesteps[i + 1])
                x = (1 - s) * x0 + s * next(drawn)
        forward(x0, 0)
        past.append(x0)
        start += x0.shape[1]
    return torch.cat(past, dim=1)


def recache(memory, past, start, forward, *, keep_sink):
    """LongLive's change of prompt: the window runs again in one forward; without keep_sink the cache is zeroed
    before.
    """
    memory.keep_pinned = keep_sink
    if not keep_sink:
        memory.k.zero_()
        memory.v.zero_()
    frames = min(memory.window // memory.places, start)
    memory.start = (start - frames) * memory.places
    forward(torch.cat(past, dim=1)[:, -frames:], 0)
    memory.keep_pinned = False


def flush(memory, past, start, forward):
    """Infinity-RoPE's change of prompt: the last two frames move up to the sink of one, the rest is forgotten."""
    p = memory.places
    for layer, end in enumerate(memory.local_end):
        for cache in (memory.k[layer], memory.v[layer]):
            cache[:, p : 3 * p] = cache[:, end - 2 * p : end].clone()
    memory.local_end = [3 * p] * len(memory.local_end)
