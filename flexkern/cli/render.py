"""``flexkern render``: flags become a checkpoint and orders.

Checks go from cheap to dear, and torch is loaded in between, so that most mistakes are told at once.
"""

import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexkern.checks import did_you_mean
from flexkern.cli.errors import note, refuse, refusing, translated
from flexkern.cli.flags import Flags, size_words
from flexkern.cli.policies import DEMO, base_preset, chosen_model, chosen_overrides, is_family
from flexkern.cli.research import Research, read_research
from flexkern.cli.videos import chosen_videos, timed, validate_targets
from flexkern.policies import get_preset

if TYPE_CHECKING:
    from flexkern.engine import Engine
    from flexkern.model.checkpoint import Checkpoint, Parts
    from flexkern.model.families import Family
    from flexkern.render import Order


@dataclass(kw_only=True)
class Render(Flags):
    """Render a video of any length; pictures reach the file as they are made, and Ctrl-C leaves a playable one."""

    def run(self) -> int:
        bad = ValueError, OSError, NotImplementedError
        with refusing(*bad):
            orders, engine, family = self.begin()
            from flexkern.finite import NotFiniteError
            from flexkern.render import prepare, render, stoppable

            for prompt in dict.fromkeys(prompt for order in orders for prompt in order.prompts):
                engine.embed(prompt)  # one that the model cannot follow is told before the first video
            if self.output_folder is not None:
                self.output_folder.mkdir(parents=True, exist_ok=True)
            job = prepare(orders[0], engine, family)
            if not is_family(self.model):  # of a checkpoint it was told before the weights were read
                note(str(engine.backend_choice))
        for number, order in enumerate(orders):
            if number:
                with refusing(*bad):
                    job = prepare(order, engine, family)
            try:
                with stoppable() as signals:
                    finished = job.run(progress=self.progress, loop=render)
            except (OSError, NotFiniteError) as error:  # a full disk, weights that overflow
                refuse(f"{error}; {job.kept}", status=1)
            made = job.writer.pictures
            if not finished:
                note(f"interrupted: {job.kept}")
                return 128 + (signals[0] if signals else signal.SIGINT)
            length = f"{order.pictures} pictures, {order.pictures / family.fps:.1f} s"
            print(f"{order.target}: {length if self.latents is None else f'{family.frames(made)} latent frames'}")
            del job  # one cache at a time
        return 0

    def begin(self) -> "tuple[tuple[Order, ...], Engine, Family]":
        """What to make, and what makes it. Raises what ``run`` refuses."""
        self.validate_flags()
        if (size := self.read_size()) is not None:
            note(size_words(*size))
        research = self.follow_research()
        self.loras()
        self.model = chosen_model(self.model, self.config_path, self.weights)
        base = base_preset(self.preset, self.model, research)
        overrides = chosen_overrides(self, base, research)
        videos = chosen_videos(self, get_preset(base.name, overrides), research)
        weights = self.chosen_weights()

        import torch

        from flexkern.pipeline import validate_device
        from flexkern.render import Order, validate_encoder

        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        validate_device(device, "--device")
        if self.threads:
            torch.set_num_threads(self.threads)
        family = self.chosen_family(research)
        lengths = {video.shown: timed(video.shown, self, family, research) for video in videos}
        for told in dict.fromkeys(told for _, _, told in lengths.values() if told):
            note(told)
        orders = tuple(
            Order(
                script=lengths[video.shown][0],
                pictures=lengths[video.shown][1],
                target=video.target,
                preset=base.name,
                overrides=overrides,
                seed=video.seed,
                writes="video" if self.latents is None else "latents",
                image=self.image,
            )
            for video in videos
        )
        if self.latents is None:
            validate_encoder(*reversed(family.picture_size), family.fps)
        if is_family(self.model):
            engine = self.open_checkpoint(orders, family, device)
        else:
            engine = open_demo(weights, self.backend, device)
        return orders, engine, family

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

    def open_checkpoint(self, orders: "Sequence[Order]", family: "Family", device: str) -> "Engine":
        """The engine of the checkpoint that the flags name, checked for these orders before weights are read."""
        from flexkern.engine import Engine
        from flexkern.pipeline import MissingPart, check, validate_preset

        checkpoint = self.chosen_checkpoint(family)
        prompts = tuple(dict.fromkeys(prompt for order in orders for prompt in order.prompts))
        try:
            parts = check(
                checkpoint,
                prompts=prompts,
                preset=orders[0].method,
                frames=family.frames(orders[0].pictures),
                image=self.image,
                pixels=self.latents is None,
                backend=self.backend,
                device=device,
            )
        except MissingPart as error:
            raise ValueError(translated(error.part, error.why)) from None
        for order in orders[1:]:
            validate_preset(parts, order.method, family.frames(order.pictures), begins=self.image is not None)
        found = {"the transformer": parts.transformer, "the VAE": parts.vae, "the text encoder": parts.text_encoder}
        validate_targets([order.target for order in orders], {name: path for name, path in found.items() if path})
        for line in (str(parts), str(parts.backend), *parts.notes, *self.not_needed(parts)):
            note(line)
        engine = Engine.from_parts(parts)
        if parts.saves_embeddings:
            note(f"{parts.embeddings}: embeddings of {len(prompts)} prompts")
        return engine

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


def open_demo(weights: Path | None, backend: str, device: str) -> "Engine":
    """The engine of the demo, or of weights of its form. Raises ValueError for another form."""
    from flexkern import demo
    from flexkern.model.families import FAMILIES

    try:
        demo.validate_weights(weights or demo.WEIGHTS)
    except ValueError as error:
        raise ValueError(f"{error}; for a checkpoint give --model {' | '.join(FAMILIES)}") from None
    return demo.load_engine(weights or demo.WEIGHTS, backend=backend, device=device)
