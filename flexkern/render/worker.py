"""A render worker: jobs in, videos out, for whoever is not the command line: a farm, a server, a notebook.

    worker = Worker()
    worker.check(spec)  # raises what is wrong with it, before anything is loaded
    outcome = worker.run(spec, on_progress=print)

Weights stay loaded from job to job as long as the jobs share them, and a prompt is encoded once. A video that is there
already, made by just this job, is not made again; one that was stopped goes on from its last checkpoint. So whoever
runs jobs need not know what became of an earlier try: the same call again is right after any of them.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flexkern.checks import require
from flexkern.finite import NotFiniteError
from flexkern.parallel import RankError
from flexkern.policies import get_preset
from flexkern.render import status
from flexkern.render.assembly import (
    chosen_checkpoint,
    chosen_family,
    chosen_weights,
    given_of,
    in_fields,
    inputs_of,
    saved_options,
    shown_of,
    timed,
    with_stand_ins,
)
from flexkern.render.batch import Batch, begun
from flexkern.render.checkpoint import EVERY, is_out_of_memory, memory_words
from flexkern.render.choices import base_preset, chosen_model, chosen_threads, is_family, validate_for_demo
from flexkern.render.encoding import STDOUT
from flexkern.render.ending import carry_out
from flexkern.render.held import Encoded, HeldRanks
from flexkern.render.job import Job, Stop, prepare
from flexkern.render.order import Order
from flexkern.render.outputs import validate_form
from flexkern.render.record import read_record
from flexkern.render.research import read_research
from flexkern.render.sidecar import sidecar_path
from flexkern.render.spec import JobSpec
from flexkern.render.stopped import clear_parts, resume
from flexkern.render.target import validate_targets
from flexkern.render.watch import Listener, Watch

if TYPE_CHECKING:
    from flexkern.engine import Engine

Status = Literal["done", "stopped", "failed", "refused"]
Stage = Literal["loading", "rendering"]
ABSENT = FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError
STATUSES: dict[int, Status] = {status.DONE: "done", status.FAILED: "failed", status.REFUSED: "refused"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a job ended."""

    status: Status
    """done; stopped: the same job again may end otherwise, and goes on from its checkpoint where there is one;
    failed: it would fail again; refused: before any work"""
    message: str
    """one sentence; why, where it is not done"""
    code: int
    """exit status that ``flexkern render`` would have, one of ``flexkern.render.status``"""
    pictures: int
    """made so far, or kept, in all tries"""
    resumed_from: int | None
    """the picture at which a checkpoint was taken up; None where it began with the first"""
    signal: int = 0
    """number of a signal that came while pictures were made, 0 for none: whoever has other jobs begins none"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a job is, after each of its chunks."""

    stage: Stage
    """loading: weights and prompts; rendering: pictures are made"""
    pictures: int
    """in the file so far, those of an earlier try included"""
    of: int
    """length of the video in pictures; 0 until it is known"""
    chunk_seconds: float | None
    """of the last chunk, denoising and decoding; None before the first"""
    seconds_left: float | None
    """until the end, if it goes on like this; None before the first chunk"""


class _Telling:
    """Turns the events of a ``Watch`` into ``Progress``, and hands them on."""

    def __init__(self, hear: Callable[[Progress], None] | None, log: Listener | None):
        self._hear, self._log, self._of = hear, log, 0

    def write(self, event: str, **about: Any) -> None:
        if self._log is not None:
            self._log.write(event, **about)
        if self._hear is None or event not in ("started", "chunk"):
            return
        spent = about["denoise_seconds"] + about["decode_seconds"] if event == "chunk" else None
        left = about["left_seconds"] if event == "chunk" else None
        made, of = about["made"], about["pictures"]
        self._hear(Progress(stage="rendering", pictures=made, of=of, chunk_seconds=spent, seconds_left=left))


class Worker:
    """Renders jobs, one after the other; not from two threads at once.

    Args:
        device: cpu, cuda or cuda:N, in place of what jobs say. None: what the job says, else the first GPU, or the CPU
            where there is none.
        threads: CPU threads of torch for jobs that name no number; 0: as ``flexkern render`` chooses.
        every: Seconds between two checkpoints; 0 for one after every chunk.
        ranks: How many processes compute each video together, this one among them: each with a GPU of its own, from
            number 0 on, or on the CPU. They are started with the first job, and stay until the worker is closed. One
            such worker a process.
        tell: Hears what a user should know, a sentence each.

    Raises:
        ValueError: There is no such device, or a number is out of range.
    """

    def __init__(
        self,
        *,
        device: str | None = None,
        threads: int = 0,
        every: float = EVERY,
        ranks: int = 1,
        tell: Callable[[str], None] = lambda _: None,
    ):
        require(threads >= 0, f"threads must be at least 0, got {threads}")
        if device is not None:
            from flexkern.pipeline import validate_device

            validate_device(device)
        self._device, self._threads, self._every, self._tell = device, threads, every, tell
        self._usual = 0  # threads that torch takes by itself, once it is loaded
        self._ranks = HeldRanks(ranks)
        self._loaded: tuple[Batch, Engine] | None = None

    def check(self, spec: JobSpec) -> None:
        """Raise what can be told of a job before anything is loaded: its model, prompts, length, preset and target.

        Raises:
            ValueError: Something in it will not do, or the machine cannot run it.
            FileNotFoundError, PermissionError: A file is not there, or may not be written.
            FileExistsError: The target is there, or was begun, and is not of this job.
            BlockingIOError: Another render is writing it.
        """
        try:
            batch = self._assemble(spec)
            (order,) = batch.orders
            if not begun(order.target):
                batch.skips(order)
        except (ValueError, OSError, NotImplementedError) as error:
            raise _in_words(error) from None

    def check_prompts(self, spec: JobSpec, prompts: Sequence[str]) -> None:
        """Raises ValueError where a job that is like one that was checked has a prompt that its model cannot read."""
        if not is_family(chosen_model(spec.model, spec.config_path, spec.weights)):
            from flexkern.demo import encode_prompts

            encode_prompts(list(prompts))
        elif spec.embeddings is not None:
            from flexkern.model.embeddings import SavedEmbeddings

            SavedEmbeddings(spec.embeddings).width(prompts)

    def run(
        self,
        spec: JobSpec,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        stop: Stop | None = None,
        preview: Path | None = None,
        log: Listener | None = None,
    ) -> Outcome:
        """Make the video of a job, or what is left of it to make.

        Args:
            spec: The job.
            on_progress: Called when loading begins and when rendering does, from this thread; and when a chunk is
                written, one at a time, from the thread that has written it.
            stop: Asked before each chunk; where it says True a checkpoint is written, and the job is stopped.
            preview: A .png or .jpg that is replaced by the newest picture, once a second at most.
            log: Hears the events of ``flexkern render --log``, such as an ``EventLog``.

        Returns:
            How it ended. What is not known to be a matter of the job, room, memory or numbers is raised.

        Raises:
            RankError: Another rank has ended; the same call again starts new ones, and goes on.
        """
        try:
            batch = self._assemble(spec, tell=self._tell)
            (order,) = batch.orders
            if made := self._done(batch, order):
                return made
            if on_progress is not None:
                on_progress(Progress(stage="loading", pictures=0, of=order.pictures, chunk_seconds=None,
                                     seconds_left=None))  # fmt: skip
            engine = self._open(batch)
            about = {"target": str(order.target), "seed": order.seed, "preset": order.preset}
            about |= {"prompt": order.script[0].prompt}
            watch = Watch(progress=False, preview=preview, log=_Telling(on_progress, log), about=about)
            job = self._begin(batch, order, engine, watch)
        except RankError:
            self.close()
            raise
        except BlockingIOError as error:
            return _outcome(status.CAN_RESUME, str(error))
        except NotFiniteError as error:
            return _outcome(status.FAILED, str(error))
        except status.BAD as error:
            transient = isinstance(error, OSError) and error.errno is not None and not isinstance(error, ABSENT)
            return _outcome(status.CAN_RESUME if transient else status.REFUSED, str(_in_words(error)))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.unload()
            return _outcome(status.CAN_RESUME, memory_words(error))
        resumed = job.writer.pictures or None
        ending = carry_out(job, watch, stop=stop)
        if isinstance(ending.cause, RankError):
            self.close()
            raise ending.cause
        made_so_far = job.writer.pictures
        if ending.status != status.DONE:
            return _outcome(ending.status, ending.message, made_so_far, resumed, ending.signal)
        watch.finished(order.target)
        length = f"{order.pictures} pictures, {order.pictures / batch.family.fps:.1f} s"
        length = length if order.writes == "video" else f"{batch.family.frames(made_so_far)} latent frames"
        return _outcome(status.DONE, f"{order.target}: {length}", order.pictures, resumed, ending.signal)

    def unload(self) -> None:
        """Let weights and encoded prompts go."""
        self._loaded = None
        gc.collect()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Let weights and encoded prompts go, and end the other ranks."""
        self.unload()
        self._ranks.close()

    def _assemble(self, spec: JobSpec, tell: Callable[[str], None] = lambda _: None) -> Batch:
        """What makes the video, and the order for it, checked as a whole; nothing is loaded."""
        import torch

        from flexkern.pipeline import default_device, validate_device

        target = spec.target
        require(spec.out != STDOUT, "a worker writes files, not to stdout: give a name as out")
        model = chosen_model(spec.model, spec.config_path, spec.weights)
        research = None if spec.config_path is None else read_research(spec.config_path)
        spec = replace(spec, model=model)
        if research is not None:
            spec = with_stand_ins(spec, research)
            if research.note:
                tell(research.note)
        if not is_family(model):
            validate_for_demo(given_of(spec))
        base = base_preset(spec.preset, model, research)
        overrides = dict(research.policies if research else {}) | dict(spec.overrides)
        preset = get_preset(base.name).override(overrides)
        shown = shown_of(spec)
        family, weights = chosen_family(spec, research), chosen_weights(spec)
        script, pictures, told = timed(shown, spec, family, research)
        if told:
            tell(in_fields(told))
        order = Order(
            script=script,
            pictures=pictures,
            target=target,
            preset=preset.name,
            overrides=overrides,
            seed=spec.seed,
            writes="video" if spec.latents is None else "latents",
            image=spec.image,
            encoding=spec.encoding,
        )
        if order.writes == "video":
            height, width = family.picture_size
            validate_form(width, height, family.fps, spec.encoding, target)
        order.validate_files()
        validate_targets([target, sidecar_path(target)], inputs_of(spec))
        device = self._device or spec.device or default_device()
        validate_device(device)
        self._usual = self._usual or torch.get_num_threads()  # before a job changes it
        checkpoint = chosen_checkpoint(spec, family)
        if spec.embeddings is not None and checkpoint is not None and not spec.embeddings.exists():
            raise FileNotFoundError(f"there are no embeddings at {spec.embeddings}, and a worker writes none")
        batch = Batch(
            base=spec,
            family=family,
            device=device,
            threads=spec.threads or self._threads or chosen_threads(model, self._usual),
            orders=[order],
            checkpoint=checkpoint,
            weights=None if checkpoint is not None else weights,
        )
        batch.check()
        self._ranks.validate(batch)
        return batch

    def _done(self, batch: Batch, order: Order) -> Outcome | None:
        """The outcome of a job whose video is there. Raises FileExistsError where something else is."""
        if begun(order.target):
            if not self._left(order):
                return None
            clear_parts(order.target)  # it was killed after the video was whole
        if not batch.skips(order):
            return None
        return _outcome(status.DONE, f"{order.target}: is there already, made by this job", order.pictures)

    def _left(self, order: Order) -> bool:
        """Whether of a render that was begun nothing but its parts is left to do."""
        try:
            return bool(read_record(order.target)["done"])
        except (ValueError, FileNotFoundError):
            return False

    def _open(self, batch: Batch) -> "Engine":
        """The engine; the one that is loaded, where it does."""
        import torch

        batch.ranks = self._ranks.open(batch.device)
        if self._loaded is not None and self._loaded[0].ranks is batch.ranks and self._loaded[0].shares(batch):
            loaded, engine = self._loaded
            batch.prints = loaded.prints
            torch.set_num_threads(batch.threads)
        else:
            self.unload()
            engine = batch.open(tell=self._tell, keep_encoder=True)
            if engine.text_encoder is not None:
                engine.text_encoder = Encoded(engine.text_encoder)
            self._loaded = batch, engine
            self._tell(str(engine.backend_choice))
        for prompt in batch.prompts:  # one that the model cannot follow is told before the first picture
            engine.embed(prompt)
        return engine

    def _begin(self, batch: Batch, order: Order, engine: "Engine", watch: Watch) -> Job:
        def tell(text: str) -> None:
            self._tell(text)
            watch.warn(text)

        if begun(order.target):
            return resume(order.target, engine, batch.family, order=order, every=self._every, tell=tell)
        options, about = saved_options(batch.base), batch.about(order)
        options |= {"gpus": self._ranks.count} if self._ranks.count > 1 else {}
        return prepare(order, engine, batch.family, options=options, about=about, every=self._every, tell=tell)


def _outcome(code: int, message: str, pictures: int = 0, resumed_from: int | None = None, number: int = 0) -> Outcome:
    said, status = " ".join(message.split()), STATUSES.get(code, "stopped")
    return Outcome(status=status, message=said, code=code, pictures=pictures, resumed_from=resumed_from, signal=number)


def _in_words(error: Exception) -> Exception:
    """An error in words of a job's fields; of the same kind, where it is one of ours."""
    if isinstance(error, FileExistsError):
        return FileExistsError(f"{str(error).partition(': --')[0]}, and is not of this job")
    if isinstance(error, NotImplementedError) or (isinstance(error, ValueError) and not isinstance(error, OSError)):
        return ValueError(in_fields(str(error)))
    if isinstance(error, OSError) and error.errno is None:
        return type(error)(in_fields(str(error)))
    return error
