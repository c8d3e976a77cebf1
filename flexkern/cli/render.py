"""``flexkern render``: flags become a checkpoint and orders.

Checks go from cheap to dear, and torch is loaded in between, so that most mistakes are told at once.
"""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexkern.checks import did_you_mean
from flexkern.cli import status
from flexkern.cli.batch import BAD, Batch, Plan, validate_demo
from flexkern.cli.carry import carry_out, make_watch, open_log, render_all
from flexkern.cli.errors import in_flags, note, refuse, refusing, translated
from flexkern.cli.flags import Flags, size_words
from flexkern.cli.jobs import Setting, read_settings
from flexkern.cli.policies import DEMO, base_preset, chosen_model, chosen_overrides, is_family, without_effect
from flexkern.cli.ranks import count_ranks, open_ranks, torchrun_count, validate_count
from flexkern.cli.research import Research, read_research
from flexkern.cli.resume import options_from, validate_alone
from flexkern.cli.videos import chosen_videos, timed, validate_targets
from flexkern.policies import get_preset
from flexkern.render.encoding import STDOUT

if TYPE_CHECKING:
    from flexkern.model.checkpoint import Checkpoint, Parts
    from flexkern.model.families import Family
    from flexkern.render import Order


@dataclass(kw_only=True)
class Render(Flags):
    """Render a video of any length; pictures reach the file as they are made, and Ctrl-C leaves a playable one."""

    def run(self) -> int:
        if self.resume is not None:
            return self.go_on(self.resume)
        with ExitStack() as held:
            with refusing(*BAD):
                batches = self.begin()
                ranks = held.enter_context(open_ranks(count_ranks(self.gpus), batches[0].device))
            for batch in batches:
                batch.ranks = ranks
            return render_all(batches, self)

    def go_on(self, target: Path) -> int:
        """The render to the file, from its last checkpoint. Returns the exit status."""
        with ExitStack() as held:
            return self.resumed(target, held)

    def resumed(self, target: Path, held: ExitStack) -> int:
        """As ``go_on``; held: what ends with it."""
        with refusing(*BAD):
            validate_alone(self)
            from flexkern.render import clear_parts, find_stopped, resume

            stopped = find_stopped(target)
            if stopped.done:
                clear_parts(target)
                print(f"{target}: is whole, there was nothing left to do")
                return status.DONE
            begun = Render(**options_from(stopped.record["options"]))
            begun.threads = (
                self.threads or begun.threads or stopped.record["identity"].get("threads")
            )  # sums depend on it
            begun.graphs &= self.graphs
            begun.gpus = self.gpus or (begun.gpus if torchrun_count() == 1 else None)
            batch = begun.batch(
                Setting(command=begun), begun.follow_research(), [replace(stopped.order, target=target)]
            )
            begun.check(batch)
            batch.ranks = held.enter_context(open_ranks(count_ranks(begun.gpus), batch.device))
            job = resume(target, batch.open(), batch.family, anyway=self.resume_anyway, tell=note)
            watch = make_watch(self, open_log(self), job.order)
        ending = carry_out(job, batch.family, watch)
        if ending.status >= status.SIGNAL:
            note(ending.message)
        elif ending.status != status.DONE:
            refuse(ending.message, ending.status)
        return ending.status

    def begin(self) -> list[Batch]:
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
        validate_targets([*targets, *sidecars], read | ({"the job file": self.job} if self.job else {}))
        if STDOUT in targets and len(targets) > 1:
            raise ValueError(f"stdout takes one video, got {len(targets)}")
        if len(targets) == 1 and self.job is None and self.data_path is None and targets[0] != STDOUT:
            validate_new(targets[0], overwrite=self.overwrite)
        batches: list[Batch] = []
        for plan in plans:
            with plan.setting.blaming():
                batch = plan.setting.command.measure(plan)
            if batches and batches[-1].shares(batch):
                batches[-1].orders += batch.orders
            else:
                batches.append(batch)
        for batch in batches:
            with batch.setting.blaming():
                batch.setting.command.check(batch)
        return batches

    def read(self, setting: Setting["Render"]) -> Plan:
        """What is asked for, from flags and small files alone."""
        self.validate_flags()
        if (size := self.read_size()) is not None:
            note(size_words(*size))
        research = self.follow_research()
        self.loras()
        self.model = chosen_model(self.model, self.config_path, self.weights)
        base = base_preset(self.preset, self.model, research)
        overrides = chosen_overrides(self, base, research, setting.overrides)
        preset = get_preset(base.name, overrides)
        if idle := without_effect(preset, overrides, research):
            note(idle)
        videos = chosen_videos(self, preset, research, setting.inline)
        self.chosen_weights()
        return Plan(setting=setting, research=research, base=base, overrides=overrides, videos=videos)

    def measure(self, plan: Plan) -> Batch:
        """The orders, with the length of each video in pictures, once the family is known."""
        from flexkern.pipeline import validate_device
        from flexkern.render import Order, validate_form

        if self.device:
            validate_device(self.device, "--device")
        family = self.chosen_family(plan.research)
        lengths = {video.shown: timed(video.shown, self, family, plan.research) for video in plan.videos}
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
        return self.batch(plan.setting, plan.research, orders)

    def batch(self, setting: Setting[Any], research: Research | None, orders: "list[Order]") -> Batch:
        """Orders, with what makes them."""
        import torch

        from flexkern.pipeline import validate_device

        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        validate_device(device, "--device")
        family = self.chosen_family(research)
        checkpointed = is_family(self.model)
        return Batch(
            setting=setting,
            family=family,
            device=device,
            threads=self.threads or torch.get_num_threads(),
            orders=orders,
            checkpoint=self.chosen_checkpoint(family) if checkpointed else None,
            weights=None if checkpointed else self.chosen_weights(),
        )

    def check(self, batch: Batch) -> None:
        """Find the parts of the batch's checkpoint, and check them for its orders before weights are read."""
        from flexkern.demo import WEIGHTS, encode_prompts, read_config
        from flexkern.pipeline import MissingPart, check, validate_preset

        if batch.checkpoint is None:
            validate_demo(batch.weights)
            validate_count(
                count_ranks(self.gpus), batch.device, read_config(batch.weights or WEIGHTS), batch.family.size
            )
            for prompt in batch.prompts:
                encode_prompts([prompt])
            return
        family, orders = batch.family, batch.orders
        try:
            parts = batch.parts = check(
                batch.checkpoint,
                prompts=batch.prompts,
                preset=orders[0].method,
                frames=family.frames(orders[0].pictures),
                image=self.image,
                pixels=self.latents is None,
                backend=self.backend,
                device=batch.device,
            )
        except MissingPart as error:
            raise ValueError(translated(error.part, error.why)) from None
        validate_count(count_ranks(self.gpus), batch.device, parts.config, family.size)
        for order in orders[1:]:
            validate_preset(parts, order.method, family.frames(order.pictures), begins=self.image is not None)
        found = {"the transformer": parts.transformer, "the VAE": parts.vae, "the text encoder": parts.text_encoder}
        validate_targets([order.target for order in orders], {name: path for name, path in found.items() if path})
        for line in (str(parts), str(parts.backend), *map(in_flags, parts.notes), *self.not_needed(parts)):
            note(line)

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
            note(f"{self.config_path}: use_infinite_attention is not followed: --preset is")
        if research.note:
            note(research.note)
        return research

    def not_needed(self, parts: "Parts") -> list[str]:
        """What was named and is not used."""
        words = []
        if self.vae is not None and parts.vae is None:
            words.append(f"--vae {self.vae} is not needed: --latents are not decoded")
        if parts.text_encoder is None and parts.embeddings is not None:
            named = {"--text-encoder": self.text_encoder, "--tokenizer": self.tokenizer}
            words += [f"{name} {path} is not needed: {parts.embeddings} is" for name, path in named.items() if path]
        return words

    def chosen_weights(self) -> Path | None:
        """The file that --model or --weights names, None for the one that comes with flexkern."""
        if self.model == DEMO or is_family(self.model):
            return self.weights
        if self.weights is not None:
            raise ValueError("give --model FILE or --weights FILE, not both")
        if not Path(self.model).exists():
            from flexkern.model.families import FAMILIES

            known = f"expected demo, {', '.join(FAMILIES)} or a safetensors file"
            raise FileNotFoundError(f"there is no model {self.model!r}: {known}{did_you_mean(self.model, FAMILIES)}")
        return Path(self.model)

    def chosen_family(self, research: Research | None) -> "Family":
        """The family of --model with what --config-path, --chunk, --first-chunk and --size change; or the demo's."""
        from flexkern import demo
        from flexkern.model.families import FAMILIES

        if not is_family(self.model):
            self.validate_for_demo()
            return demo.family()
        family = FAMILIES[self.model]
        given: dict[str, Any] = dict(research.family if research else {})
        first_steps = given.pop("first_steps", None)
        given |= {name: value for name in ("chunk", "first_chunk") if (value := getattr(self, name)) is not None}
        if (size := self.read_size()) is not None:
            given["size"] = family.latent_size(*size)
        family = family.override(**given)
        if first_steps is None:
            return family
        return replace(family, schedule=replace(family.schedule, first_steps=first_steps))

    def chosen_checkpoint(self, family: "Family") -> "Checkpoint":
        """The checkpoint that the flags name."""
        from flexkern.pipeline import Checkpoint

        if self.weights is None:
            raise ValueError(f"--model {self.model} needs --weights PATH, a file or a folder")
        return Checkpoint(
            weights=self.weights,
            family=family,
            vae=self.vae,
            vae_backend=self.vae_backend or "auto",
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            embeddings=self.embeddings,
            lora=self.loras() or None,
            ema=True if self.ema else False if self.no_ema else None,
            dtype=self.dtype or "bfloat16",
        )
