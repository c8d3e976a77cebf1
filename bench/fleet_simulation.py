"""What the driver of a fleet costs: its own loop, schedule and manifest, with workers that only exist as events.

python bench/fleet_simulation.py --workers 1000 --jobs 100000

Time is simulated: a job takes minutes of it and microseconds of ours. Workers are lost at random and replaced, jobs are
stopped, and some always kill their worker. Printed are, for a tenth of the jobs and for all, the driver's own time,
memory, and bytes on disk for each job, which must not grow with their number.
"""

import argparse
import heapq
import json
import random
import resource
import tempfile
import time
from pathlib import Path

import machine

from flexkern.serve.book import Jobs
from flexkern.serve.fleet import Fleet, News
from flexkern.serve.task import Result

PICTURES, CHUNK = 960, 12  # of each video: a minute
SPEED = 8.0  # pictures per simulated second
LOAD = 40.0  # seconds for weights
EVERY = 30.0  # seconds between checkpoints


class Clock:
    """Simulated seconds."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class SimulatedFarm:
    """Workers as events in simulated time. Attributes count what was seen of them.

    Args:
        workers: How many there are at a time.
        clock: Simulated seconds; moved by ``wait``.
        chance: Of everything that is left to it.
        life: Seconds that a worker lives on average; 0 for ever.
        bad: Share of jobs that are stopped on their first try.
        poison: Share of jobs that kill their worker, each time.
    """

    def __init__(self, workers, clock, chance, *, life=0.0, bad=0.0, poison=0.0):
        self.clock, self._chance = clock, chance
        self._workers, self._life, self._bad, self._poison = workers, life, bad, poison
        self._events, self._count = [], 0
        self._models, self._kept, self._seen = {}, {}, set()
        self.loads = self.tries = self.most = 0
        self._given = {}

    def start(self):
        for _ in range(self._workers):
            self._make(self._chance.uniform(5, 60))

    def _make(self, seconds):
        name = f"worker-{self._count}"
        self._count += 1
        self._push(seconds, News(worker=name, kind="ready"))

    def _push(self, seconds, news):
        heapq.heappush(self._events, (self.clock.now + seconds, len(self._events), self._count, id(news), news))

    def give(self, worker, task):
        self.tries += 1
        self._given[worker] = task
        self.most = max(self.most, len(self._given))
        model = str(task.spec.model), task.spec.size, task.spec.preset
        load = 0.0 if self._models.get(worker) == model else LOAD
        self.loads += load > 0
        self._models[worker] = model
        kept = self._kept.get(task.number, 0)
        seconds = load + (PICTURES - kept) / SPEED * self._chance.uniform(0.9, 1.1)
        dies = self._chance.expovariate(1 / self._life) if self._life else seconds + 1
        fate = random.Random(task.number).random()
        if fate < self._poison:
            dies = min(dies, load + 20)
        if dies < seconds:
            done = max(0.0, dies - load) // EVERY * EVERY * SPEED
            self._kept[task.number] = min(PICTURES - CHUNK, kept + int(done))
            self._push(dies, News(worker=worker, kind="lost", why="killed by the simulation"))
            return
        first = task.number not in self._seen
        self._seen.add(task.number)
        if first and fate > 1 - self._bad:
            told = Result(ended="stopped", message="No space left on device", pictures=0, made=0, seconds=load)
            self._push(load + 1, News(worker=worker, kind="ended", result=told))
            return
        told = Result(ended="done", message="done", pictures=PICTURES, made=PICTURES - kept, seconds=seconds)
        self._push(seconds, News(worker=worker, kind="ended", result=told))

    def wait(self, seconds):
        if not self._events:
            self.clock.now += seconds
            return []
        at, *_, news = heapq.heappop(self._events)
        self.clock.now = max(self.clock.now, at)
        task = self._given.pop(news.worker, None)
        if news.kind == "lost":
            self._models.pop(news.worker, None)
            self._make(self._chance.uniform(5, 60))
        elif task is not None and news.result.ended == "done":
            self._kept.pop(task.number, None)
            self._seen.discard(task.number)
        return [news]

    def interrupt(self):
        pass

    def close(self):
        pass


def resident():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize()


def write_jobs(path, count, models):
    """So many jobs of so many models that share nothing, mixed."""
    prompt = "a red disc and a blue square on dark green, fast"
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            job = {"model": "self-forcing", "weights": f"/weights/{i % models}.pt", "prompt": prompt, "seconds": 60}
            file.write(json.dumps(job | {"seed": i, "out": f"{i // 1000:03}/{i:06}.mp4"}) + "\n")


def simulate(workers, count, *, models=4, seed=0, folder, **hazards):
    """Run a fleet of so many workers over so many jobs. Returns what was seen, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "jobs.jsonl"
    write_jobs(path, count, models)
    clock, chance = Clock(), random.Random(seed)
    before = resident()
    began = time.process_time()
    jobs = Jobs(path, folder)
    read = time.process_time() - began
    farm = SimulatedFarm(workers, clock, chance, **hazards)
    fleet = Fleet(jobs, farm, folder, clock=clock, statuses=False)
    began = time.process_time()
    summary = fleet.run()
    driver = time.process_time() - began
    grown = resident() - before
    return {
        "workers": workers,
        "jobs": count,
        "done": summary.done,
        "failed": summary.failed,
        "left": summary.waiting + summary.stopped,
        "tries": farm.tries,
        "workers lost": summary.lost,
        "weights loaded": farm.loads,
        "jobs held by the driver, at most": farm.most,
        "simulated hours": round(summary.seconds / 3600, 2),
        "reading and checking, ms per job": round(1000 * read / count, 3),
        "driver, ms per job": round(1000 * driver / count, 3),
        "driver, bytes of memory per job": round(grown / count),
        "manifest, bytes per job": round((folder / "manifest.jsonl").stat().st_size / count),
        "manifest, lines per job": round(2 * farm.tries / count, 2),
    }


def main():
    about = dict(prog=machine.program(), description=machine.described(__doc__))
    parser = argparse.ArgumentParser(**about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--models", type=int, default=4)
    given = parser.parse_args()
    hazards = {"life": 6 * 3600.0, "bad": 0.002, "poison": 0.0005}
    found = []
    for count in (given.jobs // 10, given.jobs):
        with tempfile.TemporaryDirectory() as folder:
            found.append(simulate(given.workers, count, models=given.models, folder=Path(folder).resolve(), **hazards))
    width = max(map(len, found[0]))
    for name in found[0]:
        print(f"{name:{width}}  " + "  ".join(f"{one[name]:>12}" for one in found))


if __name__ == "__main__":
    main()
