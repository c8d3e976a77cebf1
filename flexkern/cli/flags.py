"""The options of ``flexkern render``, and which of them exclude each other."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from flexkern.checks import is_float32, require
from flexkern.render.choices import DEMO, NOT_FOR_DEMO, flag, read_size, validate_for_demo
from flexkern.render.encoding import Form, parse_rate
from flexkern.render.research import Research
from flexkern.render.texts import parse_time

if TYPE_CHECKING:
    from flexkern.render.encoding import Encoding
    from flexkern.render.spec import JobSpec

SEEDS = 2**64
EXCLUSIVE = (
    ("latents", "fps"), ("latents", "crf"), ("latents", "format"),
    ("seconds", "frames"), ("seconds", "num_output_frames"), ("frames", "num_output_frames"), ("prompt", "prompts"),
    ("prompt", "data_path"), ("prompts", "data_path"), ("latents", "data_path"), ("ema", "no_ema"),
    ("latents", "out"), ("latents", "output_folder"), ("out", "data_path"),
    ("job", "data_path"), ("job", "output_folder"),
)  # fmt: skip
NEEDS = (
    ("extended_prompt_path", "data_path"), ("save_with_index", "data_path"), ("i2v", "image"),
    ("resume_anyway", "resume"),
)  # fmt: skip
MAKING = (  # fields of a job that are options of the same name and kind, and say what makes a video
    "model", "weights", "vae", "text_encoder", "tokenizer", "embeddings", "lora", "lora_scale", "dtype", "config_path",
    "size", "chunk", "first_chunk", "image", "seconds", "frames", "num_output_frames", "latents", "backend", "device",
    "threads",
)  # fmt: skip
OUTPUTS = ("out", "latents")


def option(metavar: str, *aliases: str) -> Any:
    """An option that may be left out; its help says what then holds."""
    return tyro.conf.arg(metavar=metavar, aliases=aliases or None, help_behavior_hint="")


def reading(parse: Callable[[str], float], metavar: str) -> Any:
    """How the text of a number's option is read, where more than a number will do; parse raises ValueError."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: parse(words[0]),
        is_instance=lambda value: value is None or isinstance(value, int | float),
        str_from_instance=lambda value: [str(value)],
    )


def parse_seconds(text: str) -> float:
    """Seconds from a number or a time. Raises ValueError where it is neither."""
    try:
        return float(text)
    except ValueError:
        return parse_time(text, "--seconds")


RATE = reading(parse_rate, "RATE")


@dataclass(kw_only=True)
class Flags:
    """What a user says of one or several videos."""

    named: ClassVar[frozenset[str]] = frozenset()
    """the fields that the command line names, those of policies with a dot"""

    job: Annotated[Path | None, tyro.conf.Positional, option("[JOB]")] = None
    """job file, YAML or JSON: one video or several, each with the options below as fields; see `flexkern schema`"""
    model: Annotated[str, tyro.conf.arg(metavar="NAME|FILE")] = DEMO
    """demo, a file of its form, or for --weights: self-forcing, longlive, causvid, rolling-forcing, reward-forcing,
    wan-diffusers"""
    weights: Annotated[Path | None, option("PATH", "--checkpoint-path", "--checkpoint-folder")] = None
    """weight file or folder, in any published layout; a VAE and a text encoder beside the weights are found"""
    vae: Annotated[Path | None, option("PATH")] = None
    """Wan2.1_VAE.pth, a diffusers vae folder, or a tiny decoder (taew2_1); default: the one beside the weights"""
    vae_backend: Annotated[Literal["auto", "flexkern", "diffusers"] | None, option("NAME")] = None
    """what decodes with the VAE's weights: flexkern, diffusers, or auto, which takes flexkern wherever it can; default:
    auto"""
    text_encoder: Annotated[Path | None, option("PATH")] = None
    """models_t5_umt5-xxl-enc-bf16.pth or a transformers folder of UMT5; default: the one beside the weights"""
    tokenizer: Annotated[Path | None, option("PATH")] = None
    """folder of the tokenizer; default: the one beside the text encoder"""
    embeddings: Annotated[Path | None, option("FILE")] = None
    """file of the prompts' embeddings, used instead of a text encoder; written if it does not exist yet"""
    lora: Annotated[tuple[Path, ...], option("PATH"), tyro.conf.UseAppendAction] = ()
    """LoRA to add to the transformer, a file or a folder; may be given several times"""
    lora_scale: Annotated[tuple[float, ...], option("FLOAT"), tyro.conf.UseAppendAction] = ()
    """factor on the LoRA's own scale, which is alpha / rank; default: 1; once for each --lora, in their order"""
    ema: Annotated[bool, tyro.conf.arg(aliases=["--use-ema"]), tyro.conf.FlagCreatePairsOff] = False
    """require the averaged (EMA) weights; without this they are used if the checkpoint has any"""
    no_ema: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """use the raw weights even if the checkpoint has averaged ones"""
    dtype: Annotated[Literal["bfloat16", "float16", "float32"] | None, option("NAME")] = None
    """dtype of the transformer's weights: bfloat16, float16 or float32; default: bfloat16"""
    size: Annotated[str | None, option("HEIGHTxWIDTH")] = None
    """size of the pictures in pixels, height first: 480x832 is landscape; default: as the checkpoint was trained"""
    image: Annotated[Path | None, option("FILE")] = None
    """picture to begin with, scaled and cropped; only for checkpoints whose first chunk is one latent frame"""
    i2v: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """as --image, which must be given: the video begins with a picture"""
    chunk: Annotated[int | None, option("INT")] = None
    """number of latent frames denoised together; default: as the checkpoint was trained"""
    first_chunk: Annotated[int | None, option("INT")] = None
    """number of latent frames in the first chunk; default: as in the others"""
    config_path: Annotated[Path | None, option("FILE")] = None
    """YAML configuration of a research repository: chunk, steps, shift, window, sink, and what stands in for options"""
    prompt: Annotated[str | None, option("TEXT")] = None
    """what the video shows; default, for the demo only: "a red disc and a blue square on dark green, fast" """
    prompts: Annotated[Path | None, option("FILE")] = None
    """file of prompts over time, YAML or JSON: [{at: seconds, prompt: text, cut: true or false}], or {seconds: prompt};
    times are seconds, or text such as 1:30 and 60s"""
    data_path: Annotated[Path | None, option("FILE", "--prompt-file-path")] = None
    """text file of prompts, one a line, JSON lines, or CSV with a column called prompt; each becomes a video in
    --output-folder"""
    extended_prompt_path: Annotated[Path | None, option("FILE")] = None
    """text file of longer prompts, one for each of --data-path; they are shown in place of those"""
    num_samples: Annotated[int | None, option("INT")] = None
    """number of videos of each prompt, with seeds of their own, called NAME-0.mp4 and so on; default: 1"""
    save_with_index: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """name the videos of --data-path by number, which is done in any case"""
    seconds: Annotated[float | None, option("TIME"), reading(parse_seconds, "TIME")] = None
    """length of the video in seconds, or as 1:30, 60s and 1m30s; default: 10, or what a file of prompts over time
    needs"""
    frames: Annotated[int | None, option("INT")] = None
    """length of the video in pictures"""
    num_output_frames: Annotated[int | None, option("INT")] = None
    """length of the video in latent frames: the first gives one picture, each later one four"""
    preset: Annotated[str | None, option("NAME")] = None
    """method of horizon extension, see `flexkern presets`; default: flex, or the one that --model brings"""
    seed: Annotated[int | None, option("INT")] = None
    """seed of the noise, default: 0; equal seeds give equal videos. Video i of several, from 0, gets seed + i"""
    out: Annotated[Path | None, option("FILE")] = None
    """file to write: .mp4 (H.264), .mov (ProRes 422 HQ), FOLDER/%06d.png for a picture each, or - for stdout; default:
    video.mp4"""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """replace files that exist, and drop what is left of renders to them that were stopped"""
    resume: Annotated[Path | None, option("FILE")] = None
    """go on with the render to this file that was stopped; nothing else need be given"""
    resume_anyway: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """go on where something is damaged, or not as it was when the render began"""
    output_folder: Annotated[Path | None, option("FOLDER")] = None
    """folder to write to, created if needed; the videos of --data-path are called 0000.mp4 and so on"""
    fps: Annotated[float | None, option("RATE"), RATE] = None
    """pictures per second of the file, such as 24, 23.976 or 24000/1001; another rate than the model's shows the same
    pictures faster or slower"""
    crf: Annotated[int | None, option("INT")] = None
    """quality of H.264, 0 (lossless) to 51; default: 18, which looks like the original"""
    format: Annotated[Form | None, option("NAME")] = None
    """mp4, mov or png, as --out is named; for stdout mp4 (fragmented), y4m or rgb24; default: by --out, stdout: mp4"""
    latents: Annotated[Path | None, option("FILE")] = None
    """write latents to this safetensors file instead of a video; needs no VAE"""
    backend: Annotated[str, tyro.conf.arg(metavar="NAME")] = "auto"
    """implementation of attention, one of those that `flexkern doctor` lists; auto takes triton on a GPU that can run
    it, else sdpa, and says which"""
    device: Annotated[str | None, option("NAME")] = None
    """cpu, cuda or cuda:N; default: the first GPU, or the CPU if there is none"""
    gpus: Annotated[int | None, option("INT")] = None
    """number of GPUs that compute each video together, or, on a CPU, of processes; default: 1, or those of torchrun"""
    graphs: bool = True
    """replay passes of the transformer as CUDA graphs where that can be: on a GPU, with the backend triton"""
    threads: Annotated[int | None, option("INT")] = None
    """number of CPU threads that torch uses; default: one for the demo, else torch's own choice"""
    progress: bool = True
    """say what is rendered, the chunk, pictures per second and the time left"""
    preview: Annotated[Path | None, option("FILE")] = None
    """picture (.png or .jpg) that is replaced by the newest one of the video, at most once a second"""
    log: Annotated[Path | None, option("FILE")] = None
    """file to append events to, as JSON lines: started, chunk, switch, warning, finished, failed"""
    metrics_port: Annotated[int | None, option("INT")] = None
    """port at which Prometheus is answered while videos are made, on this machine alone; 0 takes one that is free"""
    manifest: Annotated[Path | None, option("FILE")] = None
    """file to append a line of JSON to for each video; default, for several: manifest.jsonl in --output-folder, or
    JOB.manifest.jsonl beside the job file"""

    def given(self, name: str) -> bool:
        """Whether the option was given, with another value than that of leaving it out."""
        value = getattr(self, name)
        return not (value is None or value is False or value == ())

    def validate_flags(self) -> None:
        """Raises ValueError for a number that is out of range, or flags that exclude or need each other."""
        for one, other in EXCLUSIVE:
            if self.given(one) and self.given(other):
                raise ValueError(f"give {flag(one)} or {flag(other)}, not both")
        for one, other in NEEDS:
            require(not self.given(one) or self.given(other), f"{flag(one)} needs {flag(other)} as well")
        if self.seconds is not None and not (0 < self.seconds < math.inf):
            raise ValueError(f"--seconds must be more than 0, got {self.seconds:g}")
        for name in ("frames", "threads", "num_output_frames", "chunk", "first_chunk", "num_samples", "gpus"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{flag(name)} must be at least 1, got {value}")
        if self.fps is not None and not 1 <= self.fps <= 1000:
            raise ValueError(f"--fps must be 1 to 1000 pictures per second, got {self.fps:g}")
        if self.crf is not None and not 0 <= self.crf <= 51:
            raise ValueError(f"--crf must be 0 to 51, got {self.crf}")
        if self.seed is not None and not 0 <= self.seed < SEEDS:
            raise ValueError(f"seed must be a whole number >= 0 and below 2^64, got {self.seed}")
        for scale in self.lora_scale:
            require(is_float32(scale), f"--lora-scale must be a finite number in float32, got {scale:g}")
        if self.out == Path("-") and (self.num_samples or 1) > 1:
            raise ValueError("--out - takes one video, --num-samples makes several")
        if self.output_folder is not None and self.out is not None and self.out != Path(self.out.name):
            raise ValueError(f"--out must be a name where --output-folder is given, got {self.out}")

    def take(self, research: Research) -> list[str]:
        """Let a configuration stand in for options that are not given. Returns which, for a note.

        Raises:
            FileNotFoundError: A file that it names is not there.
        """
        taken = []
        given = lambda name: self.given(name) or (name == "seed" and self.seed is not None)
        for name, value in research.stand_ins(given).items():
            if name == "lora":
                scale = self.lora_scale[0] if len(self.lora_scale) == 1 else 1.0
                require(len(self.lora_scale) <= 1, f"--lora-scale: {research.path} names one LoRA")
                self.lora, self.lora_scale = (value,), (scale * research.lora_scale,)
            else:
                setattr(self, name, value)
            taken.append(f"{flag(name)} {value}" if value is not True else flag(name))
        return taken

    def validate_loras(self) -> None:
        """Raises ValueError where the numbers of LoRAs and of factors differ."""
        if self.lora_scale and len(self.lora_scale) != len(self.lora):
            told = f"got {len(self.lora)} of --lora and {len(self.lora_scale)} of --lora-scale"
            raise ValueError(f"--lora-scale is given once for each --lora, or not at all: {told}")

    def spec(self) -> "JobSpec":
        """What is said of what makes a video and of its length; what it shows is left out."""
        from flexkern.render.spec import JobSpec

        said: dict[str, Any] = {name: getattr(self, name) for name in MAKING}
        return JobSpec(**said, ema=True if self.ema else False if self.no_ema else None, encoding=self.encoding())

    def encoding(self) -> "Encoding":
        """What is said of the form of the video. Raises ValueError for a number out of range."""
        from flexkern.render.encoding import Encoding

        return Encoding(fps=self.fps, crf=18 if self.crf is None else self.crf, format=self.format)

    def read_size(self) -> tuple[int, int] | None:
        """Height and width in pixels, None where none is given. Raises ValueError for another form."""
        return read_size(self.size)

    def inputs(self) -> dict[str, Path]:
        """The files that are read, by their options."""
        names = ("weights", "vae", "text_encoder", "embeddings", "image", "config_path", "prompts", "data_path")
        found = {flag(name): path for name in (*names, "extended_prompt_path") if (path := getattr(self, name))}
        if self.model != DEMO and Path(self.model).is_file():
            found["--model"] = Path(self.model)
        return found | {f"--lora ({path.name})": path for path in self.lora}

    def validate_for_demo(self) -> None:
        """Raises ValueError where a flag was given that the demo has no use for."""
        validate_for_demo([name for name in NOT_FOR_DEMO if self.given(name)])


def size_words(height: int, width: int) -> str:
    """A size in words that leave no doubt which side is which."""
    form = "landscape" if width > height else "portrait" if height > width else "square"
    other = f"; for landscape give --size {width}x{height}" if height > width else ""
    return f"--size: {height} high, {width} wide ({form}{other})"
