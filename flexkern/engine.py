"""The engine: a model with everything that the sessions of its videos share.

    engine = Engine.from_pretrained("self_forcing_dmd.pt")  # VAE and text encoder are found beside it
    session = engine.session("a cat walks on grass", preset="flex", seed=0)
    for chunk in session: ...

The loop itself is ``flexkern.session``.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from flexkern.backends.choice import AUTO, Choice, open_backend
from flexkern.checks import latent_size, require, shown, whole
from flexkern.finite import HANDED_IN, OF_ENCODER, NotFiniteError, all_finite, validate_finite
from flexkern.graphs import find_recorder
from flexkern.model.checkpoint import Checkpoint, Dtype, Parts, load_parts, validate_checkpoint
from flexkern.model.families import Family
from flexkern.model.lora import Loras
from flexkern.model.protocols import Decoder, Encoder, TextEncoder, VideoModel
from flexkern.model.schedule import Schedule
from flexkern.model.vae import VaeBackend
from flexkern.modes import ordinary, without_gradients
from flexkern.noise import Noise
from flexkern.parallel.split import validate_shares
from flexkern.policies import Preset
from flexkern.policies.position import HORIZON
from flexkern.session import Prompt, Session

if TYPE_CHECKING:  # there are builds of torch without what it needs
    from flexkern.parallel import Ranks


class Engine:
    """A model with everything that sessions share. Nothing in it changes while sessions run.

    Args:
        model: A ``CausalWan``, or another ``VideoModel``.
        schedule: Noise levels of a chunk; those of Self-Forcing by default.
        backend: Name of the attention backend, a key of ``flexkern.backends.BACKENDS``; "auto" takes triton on a CUDA
            GPU that can run it, else sdpa. Or what ``choose_backend`` has chosen.
        chunk: Latent frames denoised together.
        text_encoder: Needed for prompts that are text.
        encoder: Needed for videos that begin with pictures.
        decoder: Called once per session; what it returns decodes that session's latents.
        size: Height and width of a latent frame, in Wan 2.1 an eighth of the picture's, for sessions that do not name
            one.
        first_chunk: Latent frames of the first chunk, where it differs (1 for models trained with
            ``independent_first_frame``), for sessions that do not name it.
        horizon: Latent frames that the model was trained on, for presets whose ``position.train_len`` is None.
        graphs: Whether passes of the model are captured as CUDA graphs and replayed, where they can be: on a CUDA GPU,
            with the backend triton. The pictures are the same, bit for bit.
        ranks: Compute the sessions of this engine together (``flexkern.parallel``); None for this process alone.

    Raises:
        ValueError: chunk, first_chunk, size or horizon are no whole numbers >= 1, another argument is of another kind,
            the backend cannot run on the model's device, or with its heads or dtype, or the ranks cannot share it.
        NotImplementedError: There are ranks, and the model is not flexkern's own.

    Attributes:
        backend_name: The backend that runs, a key of ``flexkern.backends.BACKENDS``.
        backend_choice: The same with the reason, for whoever wants to say it.
        recorder: Called once per session; what it returns captures that session's passes. None where nothing does.
    """

    def __init__(
        self, model: VideoModel, *, schedule: Schedule | None = None, backend: str | Choice = AUTO, chunk: int = 3,
        text_encoder: TextEncoder | None = None, encoder: Encoder | None = None,
        decoder: Callable[[], Decoder] | None = None, size: tuple[int, int] = (60, 104),
        first_chunk: int | None = None, horizon: int = HORIZON, graphs: bool = True, ranks: "Ranks | None" = None,
    ):  # fmt: skip
        self.model, self.size = model, latent_size(size)
        self.chunk, self.horizon = whole("chunk", chunk, 1), whole("horizon", horizon, 1)
        self.first_chunk = self.chunk if first_chunk is None else whole("first_chunk", first_chunk, 1)
        self.schedule = Schedule() if schedule is None else schedule
        require(isinstance(self.schedule, Schedule), f"schedule must be a Schedule, got {shown(schedule)}")
        for name, call in (("text_encoder", text_encoder), ("encoder", encoder), ("decoder", decoder)):
            require(call is None or callable(call), f"{name} must be callable, got {shown(call)}")
        self.backend, self.backend_choice = open_backend(
            backend, model.device, head_dim=model.config.head_dim, dtype=model.dtype
        )  # fmt: skip
        self.backend_name = self.backend_choice.name
        self._made_for = model.dtype, model.device
        if model.device.type == "cuda" and callable(stack := getattr(model, "stack_products", None)):
            stack()
        require(isinstance(graphs, bool), f"graphs must be True or False, got {graphs!r}")
        self.ranks = ranks
        if ranks is not None:
            ranks.share(model, self.backend_name, self.size)
        self.recorder = find_recorder(model, self.backend_name) if graphs and ranks is None else None
        self.text_encoder, self.encoder, self.decoder = text_encoder, encoder, decoder

    def __repr__(self) -> str:
        model, config = self.model, self.model.config
        sizes = f"{config.num_layers} layers, {config.num_heads} heads of {config.head_dim}"
        where = f"{str(model.dtype).removeprefix('torch.')} on {model.device}"
        loop = f"backend {self.backend_name!r}, chunks of {self.chunk}, latents of {self.size[0]}x{self.size[1]}"
        return f"Engine({type(model).__name__} of {sizes}, {where}; {loop})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("an Engine is not copied: its sessions share it, in one process; load another for another")

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        family: str | Family | None = None,
        schedule: Schedule | None = None,
        chunk: int | None = None,
        first_chunk: int | None = None,
        size: tuple[int, int] | None = None,
        vae: str | Path | None = None,
        vae_backend: VaeBackend = "auto",
        text_encoder: TextEncoder | str | Path | None = None,
        tokenizer: str | Path | None = None,
        embeddings: str | Path | None = None,
        prompts: Sequence[str] = (),
        encoder: Encoder | None = None,
        decoder: Callable[[], Decoder] | None = None,
        pixels: bool | None = None,
        text: bool | None = None,
        lora: Loras | None = None,
        lora_scale: float = 1.0,
        ema: bool | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        backend: str = AUTO,
        graphs: bool = True,
        ranks: "Ranks | None" = None,
    ) -> "Engine":
        """The engine for a checkpoint on disk, with what ``flexkern render`` finds for it: VAE, text encoder, schedule.

        Args:
            path: Weight file or folder, in any published layout.
            family: How it was trained, a name or a ``Family``. Default: the one that file or folder are named after,
                else self-forcing.
            schedule: Noise levels. Default: the family's, as for chunk, first chunk and size.
            chunk: Latent frames denoised together.
            first_chunk: Latent frames of the first chunk.
            size: Height and width of a latent frame.
            vae: Path of a VAE. Default: the one beside the weights, if there is one.
            vae_backend: What decodes with its weights: flexkern, diffusers, or auto, which takes flexkern where it can.
            text_encoder: Path of a text encoder, or one of your own. Default: the one beside the weights, if any.
            tokenizer: Folder of the tokenizer, where it is not beside the text encoder.
            embeddings: File of saved embeddings, in place of a text encoder.
            prompts: Encoded before the transformer is loaded; then the text encoder (11 GB) goes. Without any it stays.
            encoder: One of your own; then no VAE is looked for.
            decoder: One of your own, called without arguments for each session; then no VAE is looked for.
            pixels: True insists on a VAE, False leaves it out.
            text: True insists on a text encoder or embeddings, False leaves them out.
            lora: LoRA of the transformer, file or folder; or several, as paths or as pairs of a path and its scale.
            lora_scale: Times the scale of each LoRA, which is times alpha / rank.
            ema: None takes the averaged weights where there are any, True insists on them, False takes the raw ones.
            dtype: Of the transformer's weights: bfloat16, float16 or float32.
            device: cpu, cuda or cuda:N.
            backend: Of attention, "auto" or one of ``flexkern.backends.BACKENDS``.
            graphs: Whether passes are captured as CUDA graphs and replayed, where they can be.
            ranks: Compute its sessions together (``flexkern.parallel``).

        Raises:
            FileNotFoundError: A file is not there.
            ValueError: Something does not fit; all is checked from headers, before weights are read.
            NotImplementedError: A kind of checkpoint that is not supported.
            ImportError: Names the extra that is not installed.
        """
        own_text = None if text_encoder is None or isinstance(text_encoder, str | Path) else text_encoder
        own_codec = encoder is not None or decoder is not None
        if own_codec and vae is not None:
            raise ValueError("give vae, or an encoder and a decoder of your own, not both")
        checkpoint = Checkpoint(
            weights=path,
            family=family,
            schedule=schedule,
            chunk=chunk,
            first_chunk=first_chunk,
            size=size,
            vae=vae,
            vae_backend=vae_backend,
            text_encoder=text_encoder if isinstance(text_encoder, str | Path) else None,
            tokenizer=tokenizer,
            embeddings=embeddings,
            lora=lora,
            lora_scale=lora_scale,
            ema=ema,
            dtype=cast(Dtype, str(dtype).removeprefix("torch.")),
        )
        parts = validate_checkpoint(
            checkpoint,
            prompts=prompts,
            pixels=False if own_codec else pixels,
            text=text if own_text is None else False,
            backend=backend,
            device=str(device),
        )
        if ranks is not None:
            validate_shares(parts.config, parts.family.size, ranks.count)
        for note in parts.notes:
            warnings.warn(note, stacklevel=2)
        return cls.from_parts(
            parts, text_encoder=own_text, encoder=encoder, decoder=decoder, graphs=graphs, ranks=ranks
        )

    @classmethod
    def from_parts(
        cls,
        parts: Parts,
        *,
        text_encoder: TextEncoder | None = None,
        encoder: Encoder | None = None,
        decoder: Callable[[], Decoder] | None = None,
        graphs: bool = True,
        ranks: "Ranks | None" = None,
    ) -> "Engine":
        """The engine of parts that were found and validated; the weights are read here.

        Args:
            parts: What ``flexkern.pipeline.check`` returned.
            text_encoder: One of your own, in place of the checkpoint's; so are encoder and decoder.
            encoder: Turns pictures into latents.
            decoder: Called without arguments for each session.
            graphs: Whether passes are captured as CUDA graphs and replayed, where they can be.
            ranks: Compute its sessions together (``flexkern.parallel``).
        """
        loaded, family = load_parts(parts), parts.family
        encode = None if loaded.vae is None else loaded.vae.encode
        return cls(
            loaded.model,
            schedule=family.schedule,
            backend=parts.backend,
            chunk=family.chunk,
            first_chunk=family.first_chunk,
            size=family.size,
            horizon=family.horizon,
            text_encoder=text_encoder or loaded.text_encoder,
            encoder=encoder or encode,
            decoder=decoder or loaded.decoder,
            graphs=graphs,
            ranks=ranks,
        )

    @without_gradients
    def embed(self, prompt: Prompt) -> Tensor:
        """The text encoder's output [B, L, text_dim] for a prompt; a tensor is returned as it is.

        Raises:
            ValueError: It is neither text nor an embedding, it is text and there is no text encoder, or the encoder
                refuses it.
            NotFiniteError: What the text encoder makes of it is not finite.
        """
        if isinstance(prompt, Tensor):
            require(prompt.is_floating_point(), f"an embedding must be floating point, got {prompt.dtype}")
            return prompt
        texts = isinstance(prompt, Sequence) and all(isinstance(text, str) for text in prompt)
        wanted = "a text, several, or an embedding (a tensor [B, L, text_dim])"
        require(texts, f"prompt must be {wanted}, got {shown(prompt)}")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if self.text_encoder is None:
            raise ValueError("this engine has no text encoder: pass the prompt's embedding [B, L, text_dim]")
        if not prompts:
            raise ValueError("prompt must be a string or at least one, got none")
        embedding = ordinary(self.text_encoder(prompts))
        validate_finite(f"the embedding of {prompt!r:.80}", embedding, advice=OF_ENCODER)
        return embedding

    @torch.inference_mode()
    def encode(self, prompt: Prompt) -> Sequence[tuple[Tensor, ...]]:
        """What the model reads of a prompt: cross-attention keys and values [B, L, H, D] of every layer.

        Raises:
            ValueError: As ``embed``, or the embedding does not fit the model.
            NotFiniteError: The embedding, or what the model makes of it, is not finite.
        """
        embedding = self.embed(prompt).to(self.model.device)
        validate_finite("the embedding", embedding, advice=HANDED_IN)
        text = self.model.text_keys(embedding, self.backend)
        if not all_finite(*(tensor for layer in text for tensor in layer)):
            layer = next(index for index, tensors in enumerate(text) if not all_finite(*tensors))
            what = "what the model reads of the prompt"
            raise NotFiniteError(what, text[0][0].dtype, began=f"it began in layer {layer}", layer=f"blocks.{layer}")
        return text

    def session(
        self, prompt: Prompt, *, preset: str | Preset = "flex", seed: int = 0, frames: int | None = None,
        size: tuple[int, int] | None = None, noise: Noise | None = None, first_chunk: int | None = None,
    ) -> "Session":  # fmt: skip
        """Begin a new video, or a batch of them that go in step.

        Args:
            prompt: A text, one per video of the batch, or their embedding [B, L, text_dim].
            preset: The method: a name, or a ``Preset``.
            seed: Of the preset's noise, >= 0; video b of a batch has seed + b.
            frames: Latent frames to make, None for no end; policies that depend on the length of the video need it.
                Chunks are whole: the last one may go beyond it.
            size: Height and width of a latent frame; the engine's by default.
            noise: Replaces the preset's noise.
            first_chunk: Frames of the first chunk; the engine's by default.

        Raises:
            ValueError: Before any work: an argument is of another kind, preset, size or prompt do not fit the model, or
                the model was cast or moved after the engine was made.
        """
        (dtype, device), (cast_to, moved_to) = self._made_for, (self.model.dtype, self.model.device)
        same = (dtype, device) == (cast_to, moved_to)  # the backend was chosen for these
        require(same, f"the model must stay {dtype} on {device}, got {cast_to} on {moved_to}: make the engine last")
        return Session(
            self, prompt, preset=preset, seed=seed, frames=frames, size=size, noise=noise, first_chunk=first_chunk
        )


def frames_for(seconds: float, fps: float, pictures_per_frame: int = 1) -> int:
    """Latent frames for at least ``seconds`` of video; the first gives one picture, others ``pictures_per_frame``.

    Raises ValueError for a time without end, or a rate that is none.
    """
    require(math.isfinite(seconds), f"seconds must be a finite number, got {seconds}")
    require(math.isfinite(fps) and fps > 0, f"fps must be a finite number > 0, got {fps}")
    whole("pictures_per_frame", pictures_per_frame, 1)
    pictures = max(1, math.ceil(seconds * fps - 1e-9))
    return 1 + -(-(pictures - 1) // pictures_per_frame)
