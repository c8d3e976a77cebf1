"""Values that are not finite: the error that says where they began, and what finds that out.

Whether a chunk is finite is one flag, computed on its device and read with its pictures. Only where it is not, the
chunk's passes run once more with hooks that look at what every module makes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flexkern.hostcopy import HostCopy

OVERFLOWS = "float16 ends at 65504: try bfloat16 or float32 (dtype, --dtype)"
DAMAGED = "the weights may be damaged, or a LoRA's scale too large: try {}"
HANDED_IN = "it was handed in so: look at what made it"
OF_ENCODER = "the text encoder's weights are damaged or lost too many bits: try those in bfloat16"


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
        precise = "without the LoRA, or other weights" if dtype == torch.float32 else "float32, or without the LoRA"
        advice = advice or (OVERFLOWS if dtype == torch.float16 else DAMAGED.format(precise))
        name = str(dtype).removeprefix("torch.")
        verb = "are" if what.split(" of ")[0].endswith(("latents", "pictures")) else "is"
        super().__init__(f"{what} {verb} not finite in {name}{f': {began}' if began else ''}; {advice}")


def all_finite(*tensors: Tensor) -> Tensor:
    """Whether all values are finite, as a bool on their device; integers are.

    Looks at the extremes alone: aminmax passes on what is not finite, at a twentieth of the cost of isfinite on a CPU.
    """
    floating = [tensor.detach() for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    if not floating:
        return torch.ones((), dtype=torch.bool, device=tensors[0].device if tensors else "cpu")
    return torch.stack([torch.isfinite(torch.stack(torch.aminmax(tensor))).all() for tensor in floating]).all()


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
        self._values = HostCopy(torch.stack([value.to(values[0].device) for value in values]))

    def known(self) -> bool:
        """Whether ``read`` would not wait."""
        return self._values.is_there()

    def read(self) -> list[bool]:
        """The bools, once the device has computed them."""
        found: list[bool] = self._values.wait().tolist()
        return found


@dataclass(slots=True)
class _Made:
    """A chunk whose flags have not been read."""

    what: str
    index: int | None
    flags: Flags
    passes: Sequence[tuple[Tensor, float]]
    predict: Callable[[Tensor, float], Tensor] | None


class Watch:
    """Tells of a session's chunks that are not finite, without making it wait.

    Args:
        model: What made them, for the dtype, and for the names of its modules.
    """

    def __init__(self, model: Any):
        self.model = model
        self._made: list[_Made] = []
        self._error: NotFiniteError | None = None

    def add(
        self, what: str, latents: Tensor, decode: object, *, index: int | None = None,
        passes: Sequence[tuple[Tensor, float]] = (), predict: Callable[[Tensor, float], Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Keep the flags of a chunk.

        Args:
            what: The chunk, in words.
            latents: What it became.
            decode: What has just made pictures of it; its attribute ``finite`` says whether they were, before rounding.
            index: Of the chunk.
            passes: Input and timestep of each denoising step.
            predict: Runs such a step again, until ``moved_on``.
        """
        pictures = getattr(decode, "finite", None)
        flags = (all_finite(latents), pictures) if isinstance(pictures, Tensor) else (all_finite(latents),)
        self._decoded = decode
        self._made.append(_Made(what, index, Flags(*flags), passes, predict))

    def moved_on(self) -> None:
        """The cache has changed: no pass of the chunks so far can be run again."""
        for made in self._made:
            made.passes, made.predict = (), None

    def validate(self, *, wait: bool) -> None:
        """Raise NotFiniteError for the first chunk that is not finite. wait: also for what the device has not done."""
        if self._error is not None:
            raise self._error
        while self._made and (wait or self._made[0].flags.known()):
            latents, *pictures = self._made[0].flags.read()
            if not latents:
                self._error = self._traced(self._made[0])
            elif not all(pictures):
                dtype = getattr(self._decoded, "dtype", self.model.dtype)
                self._error = NotFiniteError(
                    f"the pictures of {self._made[0].what}", dtype, chunk=self._made[0].index, layer="decoder",
                    began="they began in the decoder, the latents are finite", advice="try a decoder in float32",
                )  # fmt: skip
            if self._error is not None:
                raise self._error
            self._made.pop(0)

    def _traced(self, made: _Made) -> NotFiniteError:
        """The error, once the passes have shown where it began."""
        error = partial(NotFiniteError, f"the latents of {made.what}", self.model.dtype, chunk=made.index)
        for step, (z, timestep) in enumerate(made.passes):
            assert made.predict is not None, "passes come with what runs them"
            where = f"denoising step {step + 1} of {len(made.passes)} (timestep {timestep:g})"
            if not all_finite(z):
                return error(began=f"they began in the noise before {where}", step=step, advice="look at the noise")
            out, origin = first_not_finite(self.model, partial(made.predict, z, timestep))
            if origin is not None or not all_finite(out):
                layer = None if origin is None else origin.module
                return error(began=f"they began {origin or 'in the model'} in {where}", step=step, layer=layer)
        return error()


class Origin(NamedTuple):
    """Where in a model the first value that is not finite appears."""

    module: str
    """name of the module"""
    inside: bool
    """whether the module made it; else its input had it, from something that is no module"""

    def __str__(self) -> str:
        return f"in {self.module}" if self.inside else f"before {self.module}"


def first_not_finite(model: object, run: Callable[[], Tensor]) -> tuple[Tensor, Origin | None]:
    """What a forward gives, and where in it the first value that is not finite appears.

    Args:
        model: A module, or an object that has one as an attribute.
        run: Calls the model.

    Returns:
        The result of run, and None where every module's values are finite or there is no module to look at.
    """
    held = vars(model).values() if hasattr(model, "__dict__") else ()
    module = model if isinstance(model, nn.Module) else next((v for v in held if isinstance(v, nn.Module)), None)
    found: list[Origin] = []

    def look(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            if not found and not _finite(out):
                found.append(Origin(name, inside=_finite((args, kwargs))))

        return hook

    named = [] if module is None else [(name, part) for name, part in module.named_modules() if name]
    handles = [part.register_forward_hook(look(name), with_kwargs=True) for name, part in named]
    try:
        out = run()
    finally:
        for handle in handles:
            handle.remove()
    return out, found[0] if found else None


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
