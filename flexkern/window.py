"""What a denoising loop needs of cache, plans and policies: it says which frames it runs, the window does the rest.

``flexkern.session`` is one such loop, those of the research repositories are others. A loop calls the model several
times for the same frames, then for the next ones. ``prepare`` tells these apart by their indices; all bookkeeping is on
the host, in Python's integers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flexkern.backends import Backend
from flexkern.cache import FrameCache, Mix
from flexkern.memory import PagedMemory
from flexkern.plan import ChunkPlan, PlanBuffers, band_split, make_plan, place_turns
from flexkern.policies import Preset, SinkWindow
from flexkern.state import State, nest, plain, require_same, within
from flexkern.tokens import TokenChooser


class CacheWindow:
    """The cached frames of one video, and the plan of the chunk that is being computed, for all layers.

    Every page is allocated at once, so that a lack of memory shows before any work.

    Args:
        preset: Its position, retention and switch policies act, with the values in use (``Preset.resolve``).
        backend: The module that computes.
        layers: Layers of the model.
        heads: Heads of a layer.
        head_dim: Channels of a head.
        eps: Of the RMSNorm of queries and keys.
        dtype: Of the pages.
        device: Of the pages.
        batch: Videos that go in step.
        rows: Token rows of a frame.
        columns: Token columns of a frame.
        target: Latent frames of the video, for policies that depend on it.

    Attributes:
        frames: Absolute indices of the frames being computed; empty before the first chunk.
        chooser: What chooses tokens; None where the preset has none chosen.
        cache: The frames that are kept.

    Raises:
        ValueError: The preset's positions do not fit the model.
    """

    def __init__(
        self, preset: Preset, backend: Backend, *, layers: int, heads: int, head_dim: int, eps: float,
        dtype: torch.dtype, device: torch.device, batch: int, rows: int, columns: int, target: int | None = None,
    ):  # fmt: skip
        self.preset, self.backend, self.eps = preset.resolve(), backend, eps
        self.heads, self.bands = heads, band_split(head_dim)[0]
        self.shape = batch, rows, columns
        preset.position.multipliers(1.0, self.bands, heads)
        with torch.inference_mode(False):  # pages outlive the mode they were made in
            self.cache = self._allocate(
                layers=layers, batch=batch, pages=preset.retention.pages, tokens=rows * columns, heads=heads,
                head_dim=head_dim, dtype=dtype, device=device,
            )  # fmt: skip
            self.place_turn = place_turns(rows, columns, head_dim).to(device)
            self.chooser = self._make_chooser(preset)
        self.buffers = PlanBuffers(device)
        self.begin(target)

    def __repr__(self) -> str:
        batch, rows, columns = self.shape
        held = f"{len(self.cache.listed)} of {self.preset.retention.pages} pages"
        return f"CacheWindow(preset {self.preset.name!r}, {held} in use, {batch} x {rows}x{columns} tokens a frame)"

    def begin(self, target: int | None = None) -> None:
        """Forget every frame. target: latent frames of the video to come, for policies that depend on it."""
        self.target, self.frames = target, range(0)
        self._memory: PagedMemory | None = None
        self._written: list[int] = []
        self._cut = False
        self.cache.keep([])
        if self.chooser is not None:
            self.chooser.begin()

    @property
    def memory(self) -> PagedMemory:
        """What the layers attend through in a pass over ``frames``. Raises RuntimeError before the first chunk."""
        if self._memory is None:
            raise RuntimeError("no chunk is being computed: call prepare first")
        return self._memory

    def prepare(self, start: int, count: int, *, cut: bool = False) -> PagedMemory:
        """Prepare a pass over frames [start, start + count), and return what its layers attend through.

        The same chunk again returns its memory; the next chunk evicts, allocates pages and plans; start == 0 begins a
        new video. A video may begin at any frame.

        Args:
            start: Absolute index of the first frame.
            count: Frames computed together.
            cut: Whether the chunk begins a new scene.

        Raises:
            ValueError: The frames neither are those being computed nor follow them, or the window is too small.
            NotImplementedError: A retention policy of one's own wants tokens chosen.
        """
        frames = range(start, start + count)
        if self._memory is not None and frames == self.frames:
            return self._memory
        if start == 0 and self.frames:
            self.begin()
        if self.frames and start != self.frames.stop:
            raise ValueError(
                f"frames must be {list(self.frames)} again, or follow them from {self.frames.stop} on, "
                f"got {list(frames)}"
            )
        kept = self.preset.retention.keep(self.cache.frames, count)
        mixes, pick = self.cache.keep(kept.pages, kept.seen)
        if pick is not None and self.chooser is None:
            raise NotImplementedError("only a SinkWindow has tokens chosen, not a retention policy of one's own")
        if mixes:
            self._blend(mixes)
        slots = self.cache.allocate(frames)
        if self.chooser is not None:
            self.chooser.prepare(frames, slots, pick)
        return self._plan(frames, slots, cut)

    @property
    def recent(self) -> int:
        """How many of the last frames, clean, the loop must have at hand for a change of prompt; 0 for none."""
        policy = self.preset.switch
        return policy.recent or 0 if policy.kind == "recache" else 0

    def switch(self) -> int:
        """Do to the cache what the preset does at a change of prompt.

        Returns how many of the last frames the loop must now run once more, clean and in one pass; 0 for none.
        """
        policy, pinned = self.preset.switch, self.preset.retention.pinned
        listed = len(self.cache.listed)
        if policy.kind == "flush":
            first = listed - (policy.recent or listed)
            self.cache.keep([i for i in range(listed) if i < pinned or i >= first])
            self._memory, self._written = None, []  # pages of its plan are gone
        count = min(self.recent, listed)
        if not count:
            return 0
        end = self.frames.stop
        again = range(end - count, end)
        if not policy.keep_sink:
            self.cache.keep(range(listed - count, listed))
        first = len(self.cache.listed) - count  # their index in the list
        if not policy.keep_sink or count == end:
            pinned = 0
        spared = max(0, pinned - first)  # those in the sink are run, but not written
        if spared >= count:
            return 0
        self.cache.rename(first + spared, again[spared:])
        self._plan(again, [-1] * spared + self.cache.slots[first + spared :])
        return count

    def state(self) -> State:
        """All that later chunks depend on: the pages in use, and the chunk that was computed last."""
        return {
            **nest("made_for", self._identity()), **nest("cache", self.cache.state()), "target": self.target,
            "frames": [self.frames.start, self.frames.stop], "written": list(self._written), "cut": self._cut,
            **({} if self.chooser is None else nest("chooser", self.chooser.state())),
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state``, bit for bit on the same device and backend.

        Raises:
            ValueError: The state is of another preset, model or shape; the message names what differs.
        """
        require_same("window", self._identity(), within("made_for", state))
        self.cache.restore(within("cache", state))
        self.target, self.frames = state["target"], range(*state["frames"])
        self._memory, self._written = None, []
        if self.chooser is not None:
            self.chooser.restore(within("chooser", state))
            self.chooser.prepare(self.frames, state["written"], None)
        if state["written"]:
            self._plan(self.frames, state["written"], state["cut"])

    def _identity(self) -> State:
        layers, _, pages, _, _, head_dim = self.cache.keys.shape
        return plain({
            **nest("preset", self.preset.describe()), "layers": layers, "heads": self.heads, "head_dim": head_dim,
            "eps": self.eps, "dtype": str(self.cache.keys.dtype), "shape": self.shape, "pages": pages,
        })  # fmt: skip

    @torch.inference_mode(False)  # plans outlive the mode they were made in
    def _plan(self, frames: range, slots: Sequence[int], cut: bool = False) -> PagedMemory:
        attended = self.cache.attended
        visible, read = [page.frame for page in attended], [page.slot for page in attended]
        phases = self.preset.position.phases(
            query=frames, visible=visible, bands=self.bands, heads=self.heads, target=self.target, cut=cut
        )
        plan = make_plan(phases, write_slots=slots, read_slots=read, place_turn=self.place_turn)
        memory = self._attend_by(plan, slots)
        self._memory, self.frames, self._written, self._cut = memory, frames, list(slots), cut
        return memory

    def _allocate(self, **sizes: Any) -> FrameCache:
        """The cache of these sizes, which are ``FrameCache``'s arguments."""
        return FrameCache(**sizes)

    def _blend(self, mixes: Sequence[Mix]) -> None:
        """Compute pages from others, in every layer."""
        self.cache.blend(mixes, self.place_turn)

    def _attend_by(self, plan: ChunkPlan, slots: Sequence[int]) -> PagedMemory:
        """What layers attend through by a plan on the CPU; slots: those it writes to, -1 where a frame is not kept."""
        hear = None if self.chooser is None else self.chooser.hear
        return PagedMemory(self.cache, self.buffers.hold(plan), self.backend, self.eps, hear)

    def _make_chooser(self, preset: Preset) -> TokenChooser | None:
        """What chooses tokens of frames that leave, where the preset's retention wants that."""
        retention = preset.retention
        if not preset.chooses_tokens or not isinstance(retention, SinkWindow):
            return None
        frequencies = torch.from_numpy(preset.position.frequencies(self.bands))
        return TokenChooser(self.cache, frequencies, votes=retention.recent, reuse=retention.reuse)
