"""Footage with one fault each, and the same footage without: what metrics are tried on.

A coloured pattern stands still above and below a band in which a texture wanders, never to return. A fault is one thing
done to these pictures; ``FAULTS`` names them. ``film`` makes footage with FFmpeg's own sources and filters.
"""

from collections.abc import Callable
from fractions import Fraction

import av
import cv2
import numpy as np
from numpy.typing import NDArray

Pictures = NDArray[np.uint8]
FPS = 12
PICTURES = 144
HEIGHT, WIDTH = 64, 96
CHUNK = 12  # pictures
BAND = slice(20, 44)
LATE = round(PICTURES * 0.85)


def blobs(seed: int, height: int, width: int, size: float) -> NDArray:
    """Smooth noise [height, width, 3] of mean 0 and deviation 1, whose blobs are ``size`` pixels wide."""
    grain = np.random.default_rng(seed).standard_normal((height, width, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(grain, (0, 0), size)
    return (smooth - smooth.mean((0, 1))) / smooth.std((0, 1))


def ground() -> NDArray:
    """What stands still, [HEIGHT, WIDTH, 3]."""
    return 120 + 36 * blobs(1, HEIGHT, WIDTH, 4) + [12, 0, -24]


def play(times: NDArray, starts: NDArray | None = None, grounds: Callable[[int], NDArray] | None = None) -> NDArray:
    """Pictures, float [T, HEIGHT, WIDTH, 3], of a texture that moves by (1, 0.5) pixels in a unit of time.

    times: [T]. starts: [T, 2] where the texture starts from, for jumps. grounds: what stands still in picture i.
    """
    texture = blobs(2, 400, 900, 1.5).mean(-1, keepdims=True)
    texture = 30 * texture / texture.std()
    starts = np.full((len(times), 2), [150, 300]) if starts is None else starts
    result = np.stack([ground() if grounds is None else grounds(number) for number in range(len(times))])
    for picture, time, start in zip(result, times, starts, strict=True):
        top, left = (start - np.round(time * np.array([0.5, 1]))).astype(int)
        picture[BAND] = 120 + texture[top : top + HEIGHT, left : left + WIDTH][BAND]
    return result


def develop(pictures: NDArray) -> Pictures:
    return np.rint(np.clip(pictures, 0, 255)).astype(np.uint8)


def clean() -> Pictures:
    return develop(play(np.arange(PICTURES)))


def noise() -> Pictures:
    return develop(clean() + np.random.default_rng(4).normal(0, 20, (PICTURES, HEIGHT, WIDTH, 3)))


def blur() -> Pictures:
    """Sharp at first, then softer and softer."""
    deviations = np.maximum(np.arange(PICTURES) - PICTURES / 2, 0.01) * 1.2 / (PICTURES / 2)
    return np.stack([cv2.GaussianBlur(picture, (0, 0), s) for picture, s in zip(clean(), deviations, strict=True)])


def cuts() -> Pictures:
    """The texture starts anew elsewhere at the start of each chunk."""
    far = np.random.default_rng(3).integers([20, 20], [300, 700], (PICTURES // CHUNK, 2))
    numbers = np.arange(PICTURES)
    return develop(play(numbers % CHUNK, far[numbers // CHUNK]))


def frozen() -> Pictures:
    """Nothing moves in the last 15 %."""
    return clean()[np.minimum(np.arange(PICTURES), LATE)]


def repeat() -> Pictures:
    """From 2 seconds on, to and fro over 15 pictures: a cycle of 28, which never comes back to the first second."""
    numbers = np.arange(PICTURES)
    return develop(play(np.where(numbers < 2 * FPS, numbers, 2 * FPS + 14 - np.abs((numbers - 2 * FPS) % 28 - 14))))


def recall() -> Pictures:
    """Twice, within half a second, pictures of the first second come through."""
    pictures = clean().astype(np.float32)
    for middle in (80, 110):
        for number in range(middle - 4, middle + 5):
            share = 1 - abs(number - middle) / 5
            pictures[number] += share * (pictures[4] - pictures[number])
    return develop(pictures)


def exposure() -> Pictures:
    """Darker and darker, to half the light that a gain of 0.7 leaves."""
    return develop(clean() * np.linspace(1, 0.7, PICTURES)[:, None, None, None])


def hue() -> Pictures:
    """All colours turn by a quarter of the circle in CIELAB, at their lightness."""
    result = []
    for picture, angle in zip(clean(), np.linspace(0, np.pi / 2, PICTURES), strict=True):
        lab = cv2.cvtColor(picture.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
        a, b = lab[..., 1].copy(), lab[..., 2].copy()
        lab[..., 1], lab[..., 2] = a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)
        result.append(255 * cv2.cvtColor(lab, cv2.COLOR_LAB2RGB))
    return develop(np.stack(result))


def elsewhere() -> Pictures:
    """What stands still turns into its own mirror image over two seconds: another composition of the same colours."""
    share = lambda number: np.clip((number - 96) / 24, 0, 1)
    turned = lambda number: (1 - share(number)) * ground() + share(number) * ground()[::-1, ::-1]
    return develop(play(np.arange(PICTURES), grounds=turned))


FAULTS: dict[str, Callable[[], Pictures]] = {
    "noise": noise, "blur": blur, "cuts": cuts, "frozen": frozen, "repeat": repeat, "recall": recall,
    "exposure": exposure, "hue": hue, "elsewhere": elsewhere,
}  # fmt: skip


SOURCE = (  # clouds that change slowly, wider than what is seen of them
    "perlin=size=300x92:rate=12:random_mode=seed:random_seed=1:octaves=4:persistence=0.8:xscale=18:yscale=8:tscale=0.1"
    " | trim=end_frame=144 | setpts=PTS-STARTPTS | format=yuv444p | pseudocolor=preset=turbo"
)
CROP = "crop=96:80:x='n{0}':y=6"  # a camera that pans by a pixel per picture
PAN = CROP.format("")
FILMS = {  # filters of FFmpeg that do one thing each to what SOURCE draws
    "clean": PAN,
    "noise": f"{PAN} | noise=alls=60:allf=t:all_seed=7",
    "blur": f"{PAN} | gblur=sigma=3:enable='gte(t,8)'",
    "cuts": CROP.format("+48*eq(mod(floor(n/12)*floor(n/12)*floor(n/12)+1,7),2)"),
    "frozen": f"{PAN} | trim=end_frame=122 | tpad=stop=22:stop_mode=clone",
    "repeat": f"{PAN} | trim=end_frame=48 | loop=loop=4:size=24:start=24",
    "exposure": f"{PAN} | fade=t=out:st=0:d=36",
    "hue": f"{PAN} | hue=h='7*t'",
}


def film(chain: str, pictures: Pictures | None = None) -> Pictures:
    """The pictures that a chain of FFmpeg's filters makes, uint8 [T, H, W, 3]; ``|`` stands between filters.

    pictures: what goes into it; None where the first filter is a source.
    """
    graph = av.filter.Graph()
    steps = [step.strip().partition("=") for step in chain.split(" | ")]
    nodes = [graph.add(name, options or None) for name, _, options in steps]
    nodes += [graph.add("format", "rgb24"), graph.add("buffersink")]
    if pictures is not None:
        height, width = pictures.shape[1:3]
        nodes.insert(0, graph.add_buffer(width=width, height=height, format="rgb24", time_base=Fraction(1, FPS)))
    for one, next_ in zip(nodes, nodes[1:], strict=False):
        one.link_to(next_)
    graph.configure()
    for number, picture in enumerate(() if pictures is None else pictures):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = number, Fraction(1, FPS)
        graph.push(frame)
    if pictures is not None:
        graph.push(None)
    made = []
    while True:
        try:
            made.append(graph.pull().to_ndarray(format="rgb24"))
        except EOFError:
            return np.stack(made)
