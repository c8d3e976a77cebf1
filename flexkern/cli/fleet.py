"""``flexkern fleet``: the jobs of a file, made by many workers."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from flexkern.checks import require
from flexkern.cli.errors import note, refusing
from flexkern.cli.flags import option

if TYPE_CHECKING:
    from flexkern.render.spec import JobSpec
    from flexkern.serve.book import Jobs
    from flexkern.serve.figures import FleetFigures
    from flexkern.serve.fleet import Farm, Shard

HOST = "127.0.0.1"  # this machine alone


@dataclass(kw_only=True)
class Fleet:
    """Render the jobs of a file, thousands of them, on all GPUs of this machine or of a Ray cluster."""

    jobs: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="JOBS")]
    """job file with a job a line, as JSON; out, where it is given, is inside the folder of --out"""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """folder for the videos, their status, the manifest and the summary; made if needed. The same command again goes
    on there"""
    workers: Annotated[int, tyro.conf.arg(metavar="INT")] = 0
    """number of workers; default: one for each GPU, or one where there is none"""
    gpus_per_job: Annotated[float | None, option("FLOAT")] = None
    """GPUs that a worker reserves: 1, a share such as 0.5, or 0 for workers on CPUs; with 2 or more of one machine it
    computes each video on all of them; default: 1 where there are any"""
    address: Annotated[str | None, option("ADDRESS")] = None
    """Ray cluster, such as auto, HOST:6379 or ray://HOST:10001; default: one on this machine, for this command"""
    retries: Annotated[int, tyro.conf.arg(metavar="INT")] = 2
    """how often a job is tried again whose worker was lost, or had no room; a try that gets further uses none"""
    retry_failed: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """try jobs again that failed in an earlier run"""
    shard: Annotated[str | None, option("I/N")] = None
    """render every N-th job from job I, counted from 0, in this process and without Ray, as a Slurm array does"""
    threads: Annotated[int, tyro.conf.arg(metavar="INT")] = 0
    """number of CPU threads of each worker; default: one for the demo, else torch's own choice"""
    metrics_port: Annotated[int | None, option("INT")] = None
    """port at which Prometheus is answered while the fleet runs; 0 takes one that is free, and it is said"""
    metrics_host: Annotated[str, tyro.conf.arg(metavar="NAME|ADDRESS")] = HOST
    """where --metrics-port listens; the default is for this machine alone"""
    progress: bool = True
    """show how many jobs are done"""

    def run(self) -> int:
        with refusing(ValueError, OSError, NotImplementedError), ExitStack() as ends:
            require(self.retries >= 0, f"--retries must be at least 0, got {self.retries}")
            require(self.threads >= 0, f"--threads must be at least 0, got {self.threads}")
            told = "--metrics-host is where --metrics-port listens: give both"
            require(self.metrics_port is not None or self.metrics_host == HOST, told)
            from flexkern.serve.book import Jobs, validate_job_file

            validate_job_file(self.jobs)  # before torch is loaded
            shard = None if self.shard is None else read_shard(self.shard)
            for name in ("workers", "gpus_per_job", "address"):
                told = f"--{name.replace('_', '-')} is for Ray, and --shard renders in this process"
                require(shard is None or not getattr(self, name), told)
            farm, figures = self.farm(shard), self.figures(ends)
            from flexkern.serve.fleet import holding

            require(self.jobs.resolve().parent != self.out.resolve() / "status", f"{self.jobs} is in the status folder")
            self.out.mkdir(parents=True, exist_ok=True)
            folder = self.out.resolve()
            with holding(folder, shard):
                jobs = Jobs(self.jobs, folder, check=self.check)
                models = len(set(jobs.keys))
                note(f"{self.jobs}: {len(jobs)} job{'s' * (len(jobs) != 1)}, {models} model{'s' * (models != 1)}")
                return self.carry_out(jobs, farm, folder, shard, figures)

    def farm(self, shard: "Shard | None") -> "Farm":
        """What renders. Raises ImportError where Ray is needed and is not there."""
        if shard is None:
            from flexkern.serve.actors import RayFarm

            return RayFarm(
                address=self.address,
                workers=self.workers,
                gpus_per_job=self.gpus_per_job,
                options={"threads": self.threads},
                tell=note,
            )
        from flexkern.render import Worker
        from flexkern.serve.alone import Alone

        return Alone(lambda: Worker(threads=self.threads, tell=note))

    def figures(self, ends: ExitStack) -> "FleetFigures | None":
        """What answers Prometheus, until ``ends`` are closed. Raises OSError where the port is taken."""
        if self.metrics_port is None:
            return None
        from flexkern.serve.figures import FleetFigures

        figures = FleetFigures()
        port, end = figures.serve(self.metrics_port, self.metrics_host)
        ends.callback(end)
        note(f"figures for Prometheus at http://{self.metrics_host}:{port}/metrics")
        return figures

    @property
    def check(self) -> "Callable[[JobSpec], None]":
        """Raises what can be told of a job where it will be rendered: here, or on machines that may have GPUs."""
        from flexkern.serve.check import Checker

        if self.shard is not None:
            return Checker(here=True, threads=self.threads)
        from flexkern.serve.actors import ranks_of

        return Checker(here=False, threads=self.threads, ranks=ranks_of(self.gpus_per_job))

    def carry_out(
        self, jobs: "Jobs", farm: "Farm", folder: Path, shard: "Shard | None", figures: "FleetFigures | None"
    ) -> int:
        """Render what is left. Returns the exit status."""
        from flexkern.render import stoppable
        from flexkern.render.meter import Meter
        from flexkern.serve import fleet

        meter = Meter("jobs", shown=self.progress)

        def hear(summary: fleet.Summary, verdict: str) -> None:
            ended = verdict in ("done", "failed", "stopped")
            meter.advance(ended, f"{summary.failed} failed, {summary.tries} tries")

        with stoppable() as signals, meter:
            made = fleet.Fleet(
                jobs,
                farm,
                folder,
                retries=self.retries,
                retry_failed=self.retry_failed,
                shard=shard,
                hear=hear,
                tell=meter.say,
            )
            if figures is not None:
                figures.follow(made, model_of(jobs))
            meter.begin(made.summary.jobs - made.summary.skipped - made.summary.left_failed)
            summary = made.run()
            if summary.interrupted and signals:
                summary.interrupted = signals[0]
        print(f"{self.out}: {summary}")
        return summary.code


def model_of(jobs: "Jobs") -> str:
    """The name of the model of all jobs; ``several`` where they do not share one."""
    from flexkern.render.choices import chosen_model

    if len(set(jobs.keys)) > 1:
        return "several"
    first = jobs[0]
    return chosen_model(first.model, first.config_path, first.weights)


def read_shard(text: str) -> "Shard":
    """The shard that I/N names. Raises ValueError for another form."""
    from flexkern.serve.fleet import Shard

    index, _, of = text.partition("/")
    require(index.isdecimal() and of.isdecimal(), f"--shard must be I/N, such as 0/8, got {text!r}")
    return Shard(index=int(index), of=int(of))
