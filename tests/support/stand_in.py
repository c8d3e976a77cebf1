"""Stand-ins for the research pipelines of Self-Forcing and LongLive: their class names, call signatures and cache
dictionaries, around bodies of our own. Small, on the CPU, in float32.

``SelfForcing`` and ``LongLive`` hold the classes that differ; ``pipeline`` puts one together. Keys are kept rotated
(raw where ``infinite``) in tensors that are cloned, shifted and indexed through ``.item()``, as upstream's are;
positions come from a table of 1024 rows and end there.
"""

from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from flexkern.kernels import reference
from flexkern.model.wan import CONFIGS, CausalWan, Stream

CONFIG = CONFIGS["tiny"]


def table(head_dim):
    """Unit complex numbers [1024, D / 2]: what time, row and column turn a head's pairs by at each position."""
    pairs = head_dim // 2
    sizes = pairs - 2 * (pairs // 3), pairs // 3, pairs // 3
    theta = [10000.0 ** (-torch.arange(n, dtype=torch.float64) / n) for n in sizes]
    angle = torch.cat([torch.arange(1024.0).double()[:, None] * each for each in theta], dim=1)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x, freqs, times, grid):
    """x [B, L, H, D], whose frames sit at ``times``."""
    pairs = freqs.shape[1]
    parts = freqs.split((pairs - 2 * (pairs // 3), pairs // 3, pairs // 3), dim=1)
    at = torch.meshgrid(torch.tensor(times), *(torch.arange(n) for n in grid), indexing="ij")
    turn = torch.cat([part[index.flatten()] for part, index in zip(parts, at, strict=True)], dim=1)
    z = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(z * turn[:, None]).flatten(-2).to(x.dtype)


def attention(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


class WanRMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return reference.rms_norm(x, self.weight, self.eps)


class Projections(nn.Module):
    def __init__(self, dim, num_heads, eps=1e-6):
        super().__init__()
        self.dim, self.num_heads, self.head_dim, self.eps = dim, num_heads, dim // num_heads, eps
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = WanRMSNorm(dim, eps), WanRMSNorm(dim, eps)

    def heads(self, x):
        return x.unflatten(-1, (self.num_heads, self.head_dim))


class SelfAttention(Projections):
    """Attention through a cache that is rolled and overwritten; ``protects``: a second run spares the sink."""

    protects = infinite = False

    def __init__(self, dim, num_heads, local_attn_size=-1, sink_size=0):
        super().__init__(dim, num_heads)
        self.local_attn_size, self.sink_size = local_attn_size, sink_size

    def through_cache(self, x, grid_sizes, freqs, cache, start, overwrite_sink=False):
        frames, *grid = grid_sizes[0].tolist()
        places = grid[0] * grid[1]
        q, k = self.heads(self.norm_q(self.q(x))), self.heads(self.norm_k(self.k(x)))
        fresh, n, room, sink = {"v": self.heads(self.v(x))}, k.shape[1], cache["k"].shape[1], self.sink_size * places
        now = list(range(start // places, start // places + frames))
        fresh["k"] = k if self.infinite else rotate(k, freqs, now, grid)
        seen, end = cache["global_end_index"].item(), start + n
        filled = cache["local_end_index"].item() + end - seen
        if self.local_attn_size != -1 and filled > room:
            for name in "kv":
                cache[name][:, sink : sink + 2 * room - sink - filled] = cache[name][:, sink + filled - room :].clone()
            filled = room
        begin = filled - n
        spared = self.protects and end <= seen and start > 0 and not overwrite_sink
        first = max(begin, sink) if spared else begin
        for name, new in fresh.items():
            cache[name][:, first:filled] = new[:, first - begin :]
        keys, values = cache["k"][:, :filled], cache["v"][:, :filled]
        if self.infinite:
            window = list(range(filled // places))
            keys, now = rotate(keys, freqs, window, grid), window[begin // places :]
        out = self.o(attention(rotate(q, freqs, now, grid), keys, values).flatten(2))
        return out, end, filled, end <= seen and start > 0


class CrossAttention(Projections):
    def forward(self, x, context, context_lens, crossattn_cache=None):
        cache = crossattn_cache
        if not cache["is_init"]:
            cache["is_init"] = True
            cache["k"], cache["v"] = self.heads(self.norm_k(self.k(context))), self.heads(self.v(context))
        return self.o(attention(self.heads(self.norm_q(self.q(x))), cache["k"], cache["v"]).flatten(2))


class SelfForcing:
    class CausalWanSelfAttention(SelfAttention):
        def forward(
            self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None
        ):  # fmt: skip
            out, end, filled, _ = self.through_cache(x, grid_sizes, freqs, kv_cache, current_start)
            kv_cache["global_end_index"].fill_(end)
            kv_cache["local_end_index"].fill_(filled)
            return out

    class CausalInferencePipeline(nn.Module):
        def inference(
            self, noise, text_prompts, initial_latent=None, return_latents=False, profile=False, low_memory=False
        ):  # fmt: skip
            if self.kv_cache1 is None:
                self._initialize_kv_cache(noise.shape[0], noise.dtype, noise.device)
                self._initialize_crossattn_cache(noise.shape[0], noise.dtype, noise.device)
            for cache in self.crossattn_cache:
                cache["is_init"] = False
            for cache in self.kv_cache1:
                cache["global_end_index"], cache["local_end_index"] = torch.tensor([0]), torch.tensor([0])
            return self.denoise(noise, [(0, text_prompts)], initial_latent)

        def _initialize_kv_cache(self, batch_size, dtype, device):
            frames = 21 if self.local_attn_size == -1 else self.local_attn_size
            self.allocate(batch_size, frames * self.frame_seq_length)

        def allocate(self, batch, room):
            empty = lambda: torch.zeros(batch, room, CONFIG.num_heads, CONFIG.head_dim)
            index = lambda: torch.tensor([0])
            self.kv_cache1 = [
                {"k": empty(), "v": empty(), "global_end_index": index(), "local_end_index": index()}
                for _ in range(self.num_transformer_blocks)
            ]

        def _initialize_crossattn_cache(self, batch_size, dtype, device):
            self.crossattn_cache = [{"k": None, "v": None, "is_init": False} for _ in self.kv_cache1]

        def run(self, x, timestep, condition, start):
            timestep = torch.full(x.shape[:2], float(timestep))
            caches = {"kv_cache": self.kv_cache1, "crossattn_cache": self.crossattn_cache}
            return self.generator(x, condition, timestep, **caches, current_start=start * self.frame_seq_length)[1]

        def denoise(self, noise, prompts, initial_latent=None):
            """prompts: frame at which each begins, and the prompt. Returns latents, those given included."""
            made, size, prompts = [], self.num_frame_per_block, [(at, self.text_encoder(p)) for at, p in prompts]
            condition = prompts.pop(0)[1]
            for block in () if initial_latent is None else initial_latent.split(size, dim=1):
                self.run(block, 0, condition, size * len(made))
                made.append(block)
            for x in noise.split(size, dim=1):
                start = size * len(made)
                if prompts and start >= prompts[0][0]:
                    condition = prompts.pop(0)[1]
                    self._recache_after_switch(torch.cat(made, dim=1), start, condition)
                first, *later = self.denoising_step_list
                clean = self.run(x, first, condition, start)
                for timestep in later:
                    flat = clean.flatten(0, 1)
                    steps = torch.full(flat.shape[:1], float(timestep))
                    x = self.scheduler.add_noise(flat, torch.randn_like(flat), steps).view_as(clean)
                    clean = self.run(x, timestep, condition, start)
                self.run(clean, self.args.context_noise, condition, start)
                made.append(clean)
            return torch.cat(made, dim=1)


class LongLive:
    class CausalWanSelfAttention(SelfAttention):
        protects = True

        def forward(
            self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None,
            sink_recache_after_switch=False,
        ):  # fmt: skip
            out, end, filled, again = self.through_cache(
                x, grid_sizes, freqs, kv_cache, current_start, sink_recache_after_switch
            )
            return out, (end, filled, {"is_recompute": again})

    class CausalInferencePipeline(SelfForcing.CausalInferencePipeline):
        def inference(self, noise, text_prompts, return_latents=False, profile=False, low_memory=False):
            return self.begin(noise, [(0, text_prompts)])

        def begin(self, noise, prompts):
            self._initialize_kv_cache(noise.shape[0], noise.dtype, noise.device, self.local_attn_size)
            self._initialize_crossattn_cache(noise.shape[0], noise.dtype, noise.device)
            return self.denoise(noise, prompts)

        def _initialize_kv_cache(self, batch_size, dtype, device, kv_cache_size_override=None):
            self.allocate(batch_size, kv_cache_size_override * self.frame_seq_length)

    class InteractiveCausalInferencePipeline(CausalInferencePipeline):
        global_sink = True

        def inference(
            self, noise, *, text_prompts_list, switch_frame_indices, return_latents=False, low_memory=False
        ):  # fmt: skip
            return self.begin(noise, list(zip([0, *switch_frame_indices], text_prompts_list, strict=True)))

        def _recache_after_switch(self, output, current_start_frame, new_conditional_dict):
            for cache in self.crossattn_cache:
                cache["is_init"] = False
            for cache in () if self.global_sink else self.kv_cache1:
                cache["k"].zero_(), cache["v"].zero_()
            count = min(self.local_attn_size, current_start_frame)
            start = current_start_frame - count
            self.generator(
                output[:, start:current_start_frame], new_conditional_dict,
                torch.full((output.shape[0], count), float(self.args.context_noise)), kv_cache=self.kv_cache1,
                crossattn_cache=self.crossattn_cache, current_start=start * self.frame_seq_length,
                sink_recache_after_switch=not self.global_sink,
            )  # fmt: skip


class CausalWanAttentionBlock(nn.Module):
    def __init__(self, attention_class, dim, ffn_dim, num_heads, local_attn_size, sink_size):
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))
        self.self_attn = attention_class(dim, num_heads, local_attn_size, sink_size)
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)
        self.cross_attn = CrossAttention(dim, num_heads)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU("tanh"), nn.Linear(ffn_dim, dim))

    def forward(
        self, x, e, seq_lens, grid_sizes, freqs, context, context_lens, block_mask, kv_cache, crossattn_cache, **start
    ):
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.modulation.unsqueeze(1) + e).unbind(2)
        frames = (e.shape[1], -1)
        y = reference.modulate(x.unflatten(1, frames), scale, shift, 1e-6).flatten(1, 2)
        out = self.self_attn(y, seq_lens, grid_sizes, freqs, block_mask, kv_cache, *start.values())
        y, update = out if self.self_attn.protects else (out, None)
        x = reference.gate_residual(x.unflatten(1, frames), y.unflatten(1, frames), gate).flatten(1, 2)
        x = x + self.cross_attn(self.norm3(x), context, context_lens, crossattn_cache=crossattn_cache)
        y = self.ffn(reference.modulate(x.unflatten(1, frames), ffn_scale, ffn_shift, 1e-6))
        x = reference.gate_residual(x.unflatten(1, frames), y, ffn_gate).flatten(1, 2)
        return x if update is None else (x, update)


class CausalWanModel(CausalWan):
    """Embeddings and head are those of our transformer, whose weights have the same names; the rest is not."""

    model_type, eps, block_mask = "t2v", CONFIG.eps, None

    def __init__(self, attention_class, layers, local_attn_size, sink_size):
        super().__init__(replace(CONFIG, num_layers=layers))
        self.dim, self.patch_size, self.freqs = CONFIG.dim, CONFIG.patch_size, table(CONFIG.head_dim)
        sizes = CONFIG.dim, CONFIG.ffn_dim, CONFIG.num_heads, local_attn_size, sink_size
        self.blocks = nn.ModuleList(CausalWanAttentionBlock(attention_class, *sizes) for _ in range(layers))

    def forward(
        self, x, t, context, seq_len, kv_cache=None, crossattn_cache=None, current_start=0, cache_start=0, **more
    ):
        latents = x.transpose(1, 2)
        x, (e, e0) = self.patchify(latents), self.embed_time(t)
        rows, columns = self.grid(*latents.shape[-2:])
        grid_sizes = torch.tensor([[x.shape[1], rows, columns]] * len(x))
        x, context = x.flatten(1, 2), self.text_embedding(context)
        for block, cache, cross in zip(self.blocks, kv_cache, crossattn_cache, strict=True):
            start = {"current_start": current_start, "cache_start": cache_start, **more}
            x = block(x, e0, None, grid_sizes, self.freqs, context, None, None, cache, cross, **start)
            if isinstance(x, tuple):
                x, (end, filled, update) = x
                if not update["is_recompute"]:
                    cache["global_end_index"].fill_(end)
                    cache["local_end_index"].fill_(filled)
        out = self.head(Stream(x=x.unflatten(1, (e.shape[1], -1))), e, reference)
        return self.unpatchify(out, *latents.shape[-2:]).transpose(1, 2)


class WanDiffusionWrapper(nn.Module):
    def __init__(self, model, scheduler):
        super().__init__()
        self.model, self.scheduler, self.seq_len = model, scheduler, 32760

    def forward(self, noisy_image_or_video, conditional_dict, timestep, **caches):
        x, prompt = noisy_image_or_video, conditional_dict["prompt_embeds"]
        flow = self.model(x.transpose(1, 2), t=timestep, context=prompt, seq_len=self.seq_len, **caches).transpose(1, 2)
        return flow, x - self.scheduler.sigma(timestep.flatten()).view(*timestep.shape, 1, 1, 1) * flow


class FlowMatchScheduler:
    def sigma(self, timestep):
        return (timestep.double() / 1000).float().view(-1, 1, 1, 1)

    def add_noise(self, original_samples, noise, timestep):
        sigma = self.sigma(timestep)
        return (1 - sigma) * original_samples + sigma * noise


def pipeline(
    upstream, weights, *, name="CausalInferencePipeline", window=-1, sink=0, infinite=False, tokens=6, batch=1
):
    """A loaded pipeline of ``SelfForcing`` or ``LongLive``, whose prompts are seeds of random embeddings."""
    attention_class = upstream.CausalWanSelfAttention
    layers = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    model = CausalWanModel(attention_class, layers, window, sink)
    model.load_state_dict(weights)
    for block in model.blocks:
        block.self_attn.infinite = infinite
    made = getattr(upstream, name)()
    made.scheduler = FlowMatchScheduler()
    made.generator = WanDiffusionWrapper(model, made.scheduler)
    made.text_encoder = lambda prompts: {
        "prompt_embeds": torch.cat(
            [
                torch.randn(1, CONFIG.text_len, CONFIG.text_dim, generator=torch.Generator().manual_seed(p))
                for p in prompts
            ]
        )
    }
    made.denoising_step_list = [1000.0, 625.0]
    made.args = SimpleNamespace(context_noise=0)
    made.num_transformer_blocks, made.frame_seq_length, made.num_frame_per_block = layers, tokens, 3
    made.local_attn_size, made.independent_first_frame, made.kv_cache1 = window, False, None
    return made.eval().requires_grad_(False)
