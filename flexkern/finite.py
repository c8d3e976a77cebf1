"""Values that are not finite: the error that says where they began, and what finds that out.

Whether a chunk is finite is one flag, computed on its device and read with its pictures. Only where it is not, the
chunk's passes run once more with hooks that look at what every module makes.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

OVERFLOWS = "float16 ends at 65504: try bfloat16 or float32 (dtype, --dtype)"
DAMAGED = "the weights may be damaged or a LoRA's scale too large: try other weights, a smaller --lora-scale, or float32"


class NotFiniteError(ValueError):
    """Values that are infinite or not a number, where they were found and where they began.

    Attributes:
        what: What is not finite, such as "the latents of chunk 3".
        dtype: That it was computed in.
        chunk: Index of the chunk, None outside of one.
        step: Denoising step of the chunk, from 0, whose values were the first; None where that is not known.
        layer: The module that made them, by its name in the model; None where that is not known.
    """

    def __init__(
        self, what: str, dtype: torch.dtype, *, began: str = "", chunk: int | None = None, step: int | None = None,
        layer: str | None = None, advice: str | None = None,
    ):  # fmt: skip
        self.what, self.dtype, self.chunk, self.step, self.layer = what, dtype, chunk, step, layer
        advice = advice or (OVERFLOWS if dtype == torch.float16 else DAMAGED)
        name = str(dtype).removeprefix("torch.")
        plural = "are" if what.split(" of ")[0].endswith("s") else "is"
        super().__init__(f"{what} {plural} not finite in {name}{f': {began}' if began else ''}; {advice}")


def all_finite(*tensors: Tensor) -> Tensor:
    """Whether all values are finite, as a bool on their device; integers are."""
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    if not floating:
        return torch.ones((), dtype=torch.bool)
    return torch.stack([torch.isfinite(tensor).all() for tensor in floating]).all()


def validate_finite(what: str, *tensors: Tensor, advice: str | None = None) -> None:
    """Raise NotFiniteError where a value is not finite. Waits for the device.

    Args:
        what: What they are, as the subject of a sentence.
        tensors: On one device.
        advice: What to try; by default as their dtype suggests.
    """
    if not all_finite(*tensors):
        raise NotFiniteError(what, tensors[0].dtype, advice=advice)


class Flags:
    """Bools of a device, told to the host without waiting for them.

    Args:
        values: Bool scalars.
    """

    def __init__(self, *values: Tensor):
        on_device = torch.stack([value.to(values[0].device) for value in values])
        self._event: torch.cuda.Event | None = None
        self._values = on_device
        if on_device.is_cuda:
            self._values = torch.empty(on_device.shape, dtype=torch.bool, pin_memory=True)
            self._values.copy_(on_device, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def known(self) -> bool:
        """Whether ``read`` would not wait."""
        return self._event is None or bool(self._event.query())

    def read(self) -> list[bool]:
        """The bools, once the device has computed them."""
        if self._event is not None:
            self._event.synchronize()
        found: list[bool] = self._values.tolist()
        return found


def first_not_finite(model: object, run: Callable[[], object]) -> str | None:
    """The name of the module in which the first value that is not finite appears while a forward runs.

    Args:
        model: A module, or an object that has one as an attribute.
        run: Calls the model.

    Returns:
        "blocks.1.ffn.2" where that module made it, "before blocks.1.ffn.2" where something that is no module did,
        None where every module's values are finite or there is no module to look at.
    """
    held = vars(model).values() if hasattr(model, "__dict__") else ()
    module = model if isinstance(model, nn.Module) else next((v for v in held if isinstance(v, nn.Module)), None)
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            if not found and not _finite(out):
                found.append(name if _finite((args, kwargs)) else f"before {name}")

        return hook

    named = [] if module is None else [(name, part) for name, part in module.named_modules() if name]
    handles = [part.register_forward_hook(look(name), with_kwargs=True) for name, part in named]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _finite(value: Any) -> bool:
    return all(bool(all_finite(tensor)) for tensor in _tensors(value))


def _tensors(value: Any) -> Iterable[Tensor]:
    """The tensors of arguments and results, at any depth of tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for entry in value:
            yield from _tensors(entry)
