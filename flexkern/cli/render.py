"""``flexkern render``: flags become a checkpoint and orders.

Checks go from cheap to dear, and torch is loaded in between, so that most mistakes are told at once.
"""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexkern.cli.carry import finish_one, make_watch, open_log, refusal, render_all
from flexkern.cli.errors import note, refuse, refusing
from flexkern.cli.flags import Flags, size_words
from flexkern.cli.jobs import Setting, read_settings
from flexkern.cli.lots import Lot, Plan
from flexkern.cli.policies import chosen_overrides, without_effect
from flexkern.cli.ranks import count_ranks, open_ranks, torchrun_count
from flexkern.cli.resume import options_from, validate_alone
from flexkern.cli.videos import chosen_videos
from flexkern.policies import get_preset
from flexkern.render import status
from flexkern.render.assembly import chosen_checkpoint, chosen_family, chosen_weights, timed, validate_inputs
from flexkern.render.choices import base_preset, chosen_model, chosen_threads, flag, is_family
from flexkern.render.encoding import STDOUT
from flexkern.render.research import Research, read_research
from flexkern.render.target import validate_targets

if TYPE_CHECKING:
    from flexkern.model.families import Family
    from flexkern.render import Order


@dataclass(kw_only=True)
class Render(Flags):
    """Render a video of any length; pictures reach the file as they are made, and Ctrl-C leaves a playable one."""

    def run(self) -> int:
        if self.resume is not None:
            return self.go_on(self.resume)
        with ExitStack() as held:
            with refusing(*status.BAD):
                lots = self.begin()
                ranks = held.enter_context(open_ranks(count_ranks(self.gpus), lots[0].batch.device))
            for lot in lots:
                lot.batch.ranks = ranks
            return render_all(lots, self)

    def go_on(self, target: Path) -> int:
        """The render to the file, from its last checkpoint. Returns the exit status."""
        with ExitStack() as held:
            return self.resumed(target, held)

    def resumed(self, target: Path, held: ExitStack) -> int:
        """As ``go_on``; held: what ends with it."""
        with refusing(*status.BAD):
            validate_alone(self)
            from flexkern.render import clear_parts, find_stopped, is_whole, resume

            try:
                stopped = find_stopped(target)
                if done := stopped.done:
                    clear_parts(target)
            except FileNotFoundError:
                if not (done := is_whole(target)):
                    raise
            if done:
                print(f"{target}: is whole, there was nothing left to do")
                return status.DONE
            begun = Render(**options_from(stopped.record["options"]))
            begun.threads = (
                self.threads or begun.threads or stopped.record["identity"].get("threads")
            )  # sums depend on it
            begun.graphs &= self.graphs
            begun.gpus = self.gpus or (begun.gpus if torchrun_count() == 1 else None)
            lot = begun.lot(Setting(command=begun), begun.follow_research(), [replace(stopped.order, target=target)])
            lot.check()
            lot.batch.ranks = held.enter_context(open_ranks(count_ranks(begun.gpus), lot.batch.device))
            tell = note if self.progress else lambda _: None
            try:
                engine = lot.batch.open(tell=tell)
                job = resume(target, engine, lot.batch.family, anyway=self.resume_anyway, tell=note)
            except Exception as error:
                ending = refusal(error, begun=True)
                refuse(ending.message, ending.status)
            ends = ExitStack()
            watch = make_watch(self, open_log(self, lot.batch.family.name, ends), job.order)
        with ends:
            ending = finish_one(job, lot.batch.family, watch)
        if ending.status >= status.SIGNAL:
            note(ending.message)
        elif ending.status != status.DONE:
            refuse(ending.message, ending.status)
        return ending.status

    def begin(self) -> list[Lot]:
        """What to make and what makes it, checked as a whole; nothing is loaded. Raises what ``run`` refuses."""
        from flexkern.render import sidecar_path, validate_new, validate_preview

        self.validate_flags()
        if self.preview is not None:
            validate_preview(self.preview)
        plans = []
        for setting in read_settings(self):
            with setting.blaming():
                plans.append(setting.command.read(setting))
        targets = [video.target for plan in plans for video in plan.videos]
        read = {name: path for plan in plans for name, path in plan.setting.command.inputs().items()}
        sidecars = [sidecar_path(target) for target in targets]
        names = ("log", "manifest", "preview")
        others = {flag(name): path for name in names if (path := getattr(self, name)) is not None}
        validate_targets([*targets, *sidecars], read | ({"the job file": self.job} if self.job else {}), others)
        if STDOUT in targets and len(targets) > 1:
            raise ValueError(f"stdout takes one video, got {len(targets)}")
        if len(targets) == 1 and self.job is None and self.data_path is None and targets[0] != STDOUT:
            validate_new(targets[0], overwrite=self.overwrite)
        lots: list[Lot] = []
        ordered: list[tuple[Plan, Lot, list[Order]]] = []
        for plan in plans:
            with plan.setting.blaming():
                lot = plan.setting.command.measure(plan)
            orders = list(lot.batch.orders)
            if lots and lots[-1].batch.shares(lot.batch):
                lots[-1].batch.orders += orders
            else:
                lots.append(lot)
            ordered.append((plan, lots[-1], orders))
        for lot in lots:
            with lot.setting.blaming():
                lot.check()
        for plan, lot, orders in ordered:
            with plan.setting.blaming():
                for order in orders:
                    lot.batch.check_preset(order)
        return lots

    def read(self, setting: Setting["Render"]) -> Plan:
        """What is asked for, from flags and small files alone."""
        self.validate_flags()
        if (size := self.read_size()) is not None:
            note(size_words(*size))
        research = self.follow_research()
        self.validate_loras()
        self.model = chosen_model(self.model, self.config_path, self.weights)
        base = base_preset(self.preset, self.model, research)
        overrides = chosen_overrides(self, base, research, setting.overrides)
        preset = get_preset(base.name).override(overrides)
        if idle := without_effect(preset, overrides, research):
            note(idle)
        videos = chosen_videos(self, preset, research, setting.inline)
        chosen_weights(spec := self.spec())
        validate_inputs(spec)
        return Plan(setting=setting, research=research, base=base, overrides=overrides, videos=videos)

    def measure(self, plan: Plan) -> Lot:
        """The orders, with the length of each video in pictures, once the family is known."""
        from flexkern.pipeline import validate_device
        from flexkern.render import Order, validate_form

        if self.device:
            validate_device(self.device, "--device")
        family = self.chosen_family(plan.research)
        spec = self.spec()
        lengths = {video.shown: timed(video.shown, spec, family, plan.research) for video in plan.videos}
        for told in dict.fromkeys(told for _, _, told in lengths.values() if told):
            note(told)
        encoding = self.encoding()
        if self.latents is None and (speed := encoding.speed(family.fps)) != 1:
            seconds = min(pictures for _, pictures, _ in lengths.values()) / family.fps
            shown = f"{speed:.3g} times as fast, {seconds:g} seconds are shown in {seconds / speed:.3g}"
            note(f"--fps {self.fps:g}: the model makes {family.fps} pictures a second: {shown}")
        orders = [
            Order(
                script=lengths[video.shown][0],
                pictures=lengths[video.shown][1],
                target=video.target,
                preset=plan.base.name,
                overrides=plan.overrides,
                seed=video.seed,
                writes="video" if self.latents is None else "latents",
                image=self.image,
                encoding=encoding,
            )
            for video in plan.videos
        ]
        if self.latents is None:
            height, width = family.picture_size
            for video in plan.videos:
                validate_form(width, height, family.fps, encoding, video.target)
        return self.lot(plan.setting, plan.research, orders)

    def lot(self, setting: Setting[Any], research: Research | None, orders: "list[Order]") -> Lot:
        """Orders, with what makes them."""
        import torch

        from flexkern.pipeline import default_device, validate_device
        from flexkern.render.batch import Batch

        device = self.device or default_device()
        validate_device(device, "--device")
        spec, family = self.spec(), self.chosen_family(research)
        checkpoint = chosen_checkpoint(spec, family, self.vae_backend or "auto")
        batch = Batch(
            base=spec,
            family=family,
            device=device,
            threads=self.threads or chosen_threads(self.model, torch.get_num_threads()),
            orders=orders,
            checkpoint=checkpoint,
            weights=None if checkpoint is not None else chosen_weights(spec),
            graphs=self.graphs,
        )
        return Lot(setting=setting, batch=batch)

    def chosen_family(self, research: Research | None) -> "Family":
        """The family of --model, with what other options change of it; or the demo's."""
        if not is_family(self.model):
            self.validate_for_demo()
        return chosen_family(self.spec(), research)

    def follow_research(self) -> Research | None:
        """The configuration, with what it says in place of options taken, and what is not used told."""
        if self.config_path is None:
            return None
        research = read_research(self.config_path)
        loras = bool(self.lora) and "lora" in research.flags
        if taken := self.take(research):
            note(f"{self.config_path}: taken from it: {', '.join(taken)}")
        self.validate_flags()
        if loras:
            note(f"{self.config_path}: its lora_ckpt and adapter are not used: --lora is")
        if research.preset and self.preset not in (None, research.preset):
            note(f"{self.config_path}: {research.preset_key} is not followed: --preset is")
        if research.note:
            note(research.note)
        return research
