"""The check of a job before a fleet begins: everything that can be told where the fleet is started."""

import json
from dataclasses import replace

from flexkern.render.spec import JobSpec
from flexkern.render.worker import Worker

OURS = "ranks must"  # what a worker says of what is gpus-per-job to whoever starts a fleet
GPU_BACKENDS = ("auto", "sdpa", "reference")  # that run on a CPU, too


class Checker:
    """Checks jobs one after the other; what jobs have in common is looked at once.

    A job's prompts are checked each; of jobs that differ in prompts, seed and output alone, files, sizes, preset and
    length are looked at for the first. What is wrong in another all the same is told by the worker that gets it.

    Args:
        here: Whether jobs are rendered on this machine. Elsewhere device and backend are left for the worker to judge.
        threads: Of a worker.
        ranks: Of a worker.
    """

    def __init__(self, *, here: bool, threads: int = 0, ranks: int = 1):
        self._here, self._worker = here, Worker(device=None if here else "cpu", threads=threads, ranks=ranks)
        self._seen: set[str] = set()
        self._prompts: set[tuple[str, str]] = set()

    def __call__(self, spec: JobSpec) -> None:
        """Raises ValueError or OSError where the job will not do."""
        target = spec.target
        if not self._here:
            spec = replace(spec, device=None, backend=spec.backend if spec.backend in GPU_BACKENDS else "auto")
        times = [(one.at, one.cut) for one in spec.script]
        said = spec.to_dict() | {"prompt": None, "prompts": [times, len(spec.texts)], "seed": 0}
        said |= {"out": target.suffix, "latents": None if spec.latents is None else target.suffix}
        kind = json.dumps(said, sort_keys=True)
        texts = [*([spec.prompt] if spec.prompt else []), *(one.prompt for one in spec.script), *spec.texts]
        model = f"{spec.model} {spec.embeddings}"
        if kind not in self._seen:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._worker.check(spec)
            except ValueError as error:
                if not str(error).startswith(OURS):
                    raise
                raise ValueError(f"gpus-per-job must{str(error).removeprefix(OURS)}") from None
            self._seen.add(kind)
        elif any((model, text) not in self._prompts for text in texts):
            self._worker.check_prompts(spec, texts)
        self._prompts.update((model, text) for text in texts)
