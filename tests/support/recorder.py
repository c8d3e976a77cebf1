"""Stand-ins for what only a GPU has: graphs whose replays are the captured function again, a backend that asks nothing,
and a count of what would make the host wait.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from flexkern.backends.sdpa import add_modulate, frame_attention, modulate, rms_norm
from flexkern.kernels import reference

__all__ = ["add_modulate", "frame_attention", "modulate", "norm_rope_write", "rms_norm"]


def norm_rope_write(query, key, value, query_weight, key_weight, place_turn, key_pages, value_pages, slots, eps):
    """As the kernel: which pages are written is known to the device alone."""

    def norm_rope(x, weight):
        normed = reference.rms_norm(x.flatten(-2), weight, eps).view_as(x)
        turn = reference.pad_turn(place_turn, x.shape[-1] // 2, front=True)[:, None]
        return reference.rotate(reference.split_pairs(normed), turn)

    index = torch.arange(key_pages.shape[1], dtype=torch.int32)
    for pages, new in ((key_pages, norm_rope(key, key_weight)), (value_pages, value)):
        for frame in range(key.shape[1]):
            here = (index == slots[frame])[None, :, None, None, None]
            pages.copy_(torch.where(here, new[:, frame, None], pages))
    return None if query is None else norm_rope(query, query_weight)


def tensors(*things):
    return [leaf for leaf in tree_leaves(things) if isinstance(leaf, torch.Tensor)]


def address(tensor):
    return tensor.untyped_storage().data_ptr()


class Reads(TorchDispatchMode):
    """found: the addresses of what operations read or wrote, and did not make themselves."""

    def __init__(self):
        super().__init__()
        self.found, self.made, self.kept = set(), set(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found |= {address(t) for t in tensors(args, kwargs or {}) if t.numel()} - self.made
        out = func(*args, **(kwargs or {}))
        new = [t for t in tensors(out) if address(t) not in self.found]
        self.made |= {address(t) for t in new}
        self.kept += new  # no address is used twice
        return out


class Replayed:
    """A graph of the stand-in. Its result lies in memory of its own, which any other replay spoils."""

    def __init__(self, recorder, run):
        self.recorder, self.run = recorder, run
        with Reads() as reads:
            out = run()
        with torch.inference_mode(False):  # replays write to it in any mode
            self.inputs, self.out = reads.found, tree_map(lambda leaf: None if leaf is None else leaf.clone(), out)

    def replay(self):
        self.recorder.replays += 1
        with Reads() as reads:
            out = self.run()
        assert reads.found == self.inputs, "a graph reads where it read when it was captured"
        for graph in self.recorder.graphs:
            for tensor in tensors(graph.out):
                tensor.fill_(torch.nan)
        for mine, new in zip(tensors(self.out), tensors(out), strict=True):
            mine.copy_(new)
        return self.out


class StandIn:
    """A recorder on the CPU. fails: an error that captures raise."""

    bytes = 1000

    def __init__(self, fails=None):
        self.graphs, self.replays, self.fails, self.busy = [], 0, fails, None

    def capture(self, run):
        if self.fails is not None:
            raise self.fails
        self.graphs.append(Replayed(self, run))
        return self.graphs[-1]

    def why_not(self):
        return self.busy


ASKING = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__"}
WAITING = {
    "_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "equal", "is_nonzero", "_unique2",
    "unique_dim", "unique_consecutive", "repeat_interleave",
}  # fmt: skip


class Waits(TorchDispatchMode):
    """found: operations that would wait for a GPU, if all that is reached from the given tensors lay on one.

    Tables of the host, from which nothing on the device went, may be asked for values.
    """

    def __init__(self, *on_device):
        super().__init__()
        self.found, self.kept, self.there, self.asked = [], [], set(), Asked(self)
        self.lie_there(*on_device)

    def lie_there(self, *on_device):
        self.kept += on_device  # no address is used twice
        self.there |= {address(tensor) for tensor in on_device}

    def is_there(self, *things):
        return any(address(tensor) in self.there for tensor in tensors(things))

    def __enter__(self):
        self.asked.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.asked.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        there, name = self.is_there(args, kwargs or {}), func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(t.dtype == torch.bool for t in tensors(args[1]))
        if there and (name in WAITING or masks):
            self.found.append(name)
        out = func(*args, **(kwargs or {}))
        if there:
            self.lie_there(*tensors(out))
        return out


class Asked(TorchFunctionMode):
    """Notes methods that hand values to the host, some of which are no operations."""

    def __init__(self, waits):
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ASKING and self.waits.is_there(args):
            self.waits.found.append(func.__name__)
        return func(*args, **(kwargs or {}))
