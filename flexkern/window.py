"""What a denoising loop needs of cache, plans and policies: it says which frames it runs, the window does the rest.

``flexkern.engine`` is one such loop, those of the research repositories are others. A loop calls the model several
times for the same frames, then for the next ones. ``open`` tells these apart by their indices; all bookkeeping is on
the host, in Python's integers.
"""

from types import ModuleType

import torch

from flexkern.cache import FrameCache
from flexkern.memory import PagedMemory
from flexkern.plan import PlanBuffers, band_split, make_plan, place_turns
from flexkern.policies import Preset


class CacheWindow:
    """The cached frames of one video, and the plan of the chunk that is being computed, for all layers.

    chunk: first frame and number of frames of that chunk, None before the first. memory: what its layers attend
    through.
    """

    def __init__(
        self, preset: Preset, backend: ModuleType, *, layers: int, heads: int, head_dim: int, eps: float,
        dtype: torch.dtype, device: torch.device,
    ):  # fmt: skip
        self.preset, self.backend, self.eps = preset, backend, eps
        self.model = {"layers": layers, "heads": heads, "head_dim": head_dim, "dtype": dtype, "device": device}
        preset.position.multipliers(1.0, band_split(head_dim)[0], heads)  # refuses a policy that does not fit the model
        self.shape: tuple[int, int, int] | None = None  # batch, rows, columns
        self.cache: FrameCache | None = None
        self.begin()

    def begin(self, target: int | None = None) -> None:
        """Forget every frame. target: latent frames of the video to come, for policies that depend on it."""
        self.target, self.chunk, self.memory = target, None, None
        if self.cache is not None:
            self.cache.keep([])

    @property
    def frames(self) -> list[int]:
        """Absolute indices of the frames being computed."""
        return [] if self.chunk is None else list(range(self.chunk[0], sum(self.chunk)))

    def open(self, start: int, count: int, shape: tuple[int, int, int], *, cut: bool = False) -> PagedMemory:
        """Be ready for frames start .. start + count - 1: a further pass over the open chunk, the next, or a new video.

        shape: batch, token rows, token columns. cut: the chunk begins a new scene. A video may start at any frame. One
        that is under way goes on with the frame behind its last chunk, or begins anew at 0. Raises ValueError for any
        other frame, and for another shape.
        """
        if start == 0 and self.chunk not in (None, (0, count)):
            self.begin()
        if self.chunk is None:
            self.allocate(shape)
        if shape != self.shape:
            raise ValueError(f"batch, rows and columns must stay {self.shape} within a video, got {shape}")
        if self.chunk == (start, count):
            return self.memory
        if self.chunk is not None and start != sum(self.chunk):
            raise ValueError(
                f"frames must be {self.frames} again, or follow them from {sum(self.chunk)} on, "
                f"got {list(range(start, start + count))}"
            )
        frames = list(range(start, start + count))
        self.cache.keep(self.preset.retention.keep(len(self.cache.pages), count))
        return self._plan(frames, self.cache.open(frames), cut)

    def switch(self) -> int:
        """Do to the cache what the preset does at a change of prompt.

        Returns how many of the last frames the loop must now run once more, clean and in one pass; 0 for none.
        """
        policy, sink = self.preset.switch, self.preset.retention.sink
        pages = len(self.cache.pages) if self.chunk else 0
        if policy.kind == "flush":
            self.cache.keep([i for i in range(pages) if i < sink or i >= pages - policy.recent])
        count = min(policy.recent, pages) if policy.kind == "recache" else 0
        if not count:
            return 0
        end = sum(self.chunk)
        frames = list(range(end - count, end))
        if not policy.keep_sink:
            self.cache.keep(range(pages - count, pages))
        places = range(len(self.cache.pages) - count, len(self.cache.pages))
        pinned = sink if policy.keep_sink and count < end else 0
        written = [frame for place, frame in zip(places, frames, strict=True) if place >= pinned]
        if not written:
            return 0
        self.cache.rename(max(places[0], pinned), written)
        self._plan(frames, [self.cache.slots[place] if place >= pinned else -1 for place in places])
        return count

    @torch.inference_mode(False)  # pages and plans outlive the mode they were made in
    def allocate(self, shape: tuple[int, int, int]) -> None:
        """Pages for a video of that shape are there; ``open`` would make them, but later."""
        if shape == self.shape:
            return
        batch, rows, columns = shape
        self.cache = None  # before the new pages are there
        self.cache = FrameCache(batch=batch, pages=self.preset.retention.window, tokens=rows * columns, **self.model)
        self.place_turn = place_turns(rows, columns, self.model["head_dim"]).to(self.model["device"])
        self.buffers = PlanBuffers(self.model["device"])
        self.shape = shape

    @torch.inference_mode(False)
    def _plan(self, frames: list[int], slots: list[int], cut: bool = False) -> PagedMemory:
        phases = self.preset.position.phases(
            query=frames, visible=self.cache.frames, bands=band_split(self.model["head_dim"])[0],
            heads=self.model["heads"], target=self.target, cut=cut,
        )  # fmt: skip
        plan = make_plan(phases, write_slots=slots, read_slots=self.cache.slots, place_turn=self.place_turn)
        self.memory = PagedMemory(self.cache, self.buffers.hold(plan), self.backend, self.eps)
        self.chunk = frames[0], len(frames)
        return self.memory
