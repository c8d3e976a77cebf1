"""The pages of flexkern/docs and the README: their code runs, their names exist, their links and figures hold."""

import contextlib
import csv
import importlib
import io
import re
from pathlib import Path

import pytest
import stand_in
import variants
from safetensors.torch import load_file

from flexkern.integrations import longlive, self_forcing
from flexkern.policies import PRESETS, get_preset

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "flexkern" / "docs"
PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "kernels" / "README.md"])
ids = lambda path: str(path.relative_to(ROOT))


def run_blocks(page: Path) -> int:
    """Run a page's Python blocks in order, in one namespace; each prints what the text block below it shows."""
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", page.read_text(), re.DOTALL)
    for code, expected in blocks:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, names)
        assert printed.getvalue() == expected, code
    return len(blocks)


@pytest.mark.parametrize(
    ("page", "least"), [("README.md", 1), ("flexkern/docs/attention.md", 7), ("flexkern/docs/studio.md", 2)]
)
def test_the_code_of_a_page_prints_what_it_says(page, least):
    assert run_blocks(ROOT / page) >= least


def test_a_page_whose_code_prints_something_else_is_caught(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n```\n\n```text\n2\n```\n")
    with pytest.raises(AssertionError, match="print"):
        run_blocks(page)


@pytest.mark.triton(3, 4)  # the page names that backend
def test_every_patch_of_the_page_on_self_forcing_is_taken():
    """Its lines run on stand-ins for the two repositories' pipelines, each undone before the next."""
    weights = load_file(ROOT / "tests" / "data" / "tiny_wan.safetensors")
    pipelines = {
        "self_forcing": stand_in.pipeline(stand_in.SelfForcing, weights, window=9),
        "longlive": stand_in.pipeline(stand_in.LongLive, weights, window=12, sink=3),
    }
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "self_forcing.md").read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if ".patch(" in line]
    assert len(lines) == 4
    names = {"self_forcing": self_forcing, "longlive": longlive, "get_preset": get_preset}
    for line in lines:
        with eval(line, {**names, "pipeline": pipelines[line.partition(".")[0]]}):
            pass


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        aim = (page.parent / path).resolve() if path else page
        assert aim.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(aim), f"{page.name} links to {target}"


def exists(name: str) -> bool:
    """Whether a dotted name can be imported, or is an attribute of something that can."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        try:
            for part in parts[length:]:
                found = getattr(found, part)
        except AttributeError:
            return False
        return True
    return False


# rooms that architecture.md names before they are built
RESERVED = {"flexkern.parallel"}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_names_and_files_that_a_page_mentions_exist(page):
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
    dotted = {name for span in spans for name in re.findall(r"^(flexkern(?:\.\w+)+)", span)} - RESERVED
    paths = {
        span
        for span in spans
        if re.fullmatch(r"(flexkern|kernels|tests|bench|\.ci)(/[\w.]+)+", span) and "verb_noun" not in span
    }
    missing = [name for name in sorted(dotted) if not exists(name)]
    missing += [path for path in sorted(paths) if not (ROOT / path).exists()]
    assert not missing, f"{page.name} names {', '.join(missing)}"


@pytest.mark.parametrize(("name", "there"), [("flexkern.plan.make_plan", True), ("flexkern.plan.nothing", False)])
def test_a_name_that_is_gone_is_caught(name, there):
    assert exists(name) is there


def test_every_floor_is_explained():
    source = (ROOT / "tests" / "test_floors.py").read_text()
    listed = re.findall(r'"(flexkern\.\w+)"', source.partition("FLOORS = [")[2].partition("\n]")[0])
    text = (DOCS / "architecture.md").read_text()
    assert len(listed) > 10
    missing = [name for name in listed if f"`{name}`" not in text and name != "flexkern.__version__"]
    assert not missing, f"architecture.md does not say what {', '.join(missing)} are for"


def test_presets_are_listed_with_their_windows():
    rows = re.findall(
        r"^\| (`[a-z].*?) \| (\d+)(?:, sink (\d+))? \|", (DOCS / "self_forcing.md").read_text(), re.MULTILINE
    )
    told = {name: (window, sink or "0") for names, window, sink in rows for name in re.findall(r"`([\w-]+)`", names)}
    expected = {name: (str(preset.retention.window), str(preset.retention.sink)) for name, preset in PRESETS.items()}
    assert told == expected


def committed(table: str) -> dict[tuple[str, str, int, int], tuple[float, float]]:
    with (ROOT / "bench" / "results" / "demo" / table).open(newline="") as file:
        rows = list(csv.DictReader(file))
    key = lambda row: (row["source"], row["figure"], int(row["first_frame"]), int(row["last_frame"]))
    return {key(row): (float(row["mean"]), float(row["interval95"])) for row in rows}


def test_the_first_world_is_told_over_all_frames_as_its_table_has_it():
    text, table = " ".join((DOCS / "demo.md").read_text().split()), committed("beyond.csv")
    for figure in ("identity", "speed", "course"):
        for preset in ("self-forcing", "flex"):
            mean, interval = table[preset, figure, 0, 251]
            assert f"{mean:.3f} ± {interval:.3f}" in text, f"{figure} of {preset}"


def test_the_proof_of_rooms_is_told_as_its_table_has_it():
    text = (DOCS / "rooms.md").read_text()
    with (ROOT / "bench" / "results" / "rooms" / "proof.csv").open(newline="") as file:
        rows = {row["variant"]: row for row in csv.DictReader(file) if row["figure"] == "ground"}
    for name in ("another room", "self-forcing"):
        assert f"| {float(rows[name]['mean']):.3f} |" in text, name
    for name in ("sink", "sink at slots", "flex"):
        difference, low, high = (float(rows[name][f"difference{end}"]) for end in ("", "_low", "_high"))
        assert f"| {float(rows[name]['mean']):.3f} ({difference:+.3f}, {low:+.3f} to {high:+.3f}) |" in text, name
        assert rows[name]["verdict"] == "better"


H200 = ROOT / "bench" / "results" / "NVIDIA-H200" / "frame_attention.csv"


@pytest.mark.skipif(not H200.exists(), reason="no figures of an H200 are committed")
def test_the_readme_tells_the_h200_as_its_rows_have_it():
    ms: dict[str, dict[str, float]] = {}
    with H200.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["ms"]:
                ms.setdefault(row["shape"], {})[row["provider"]] = float(row["ms"])

    def span(over: str, under: str, digits: int, shapes: str = "") -> str:
        found = [one[over] / one[under] for shape, one in ms.items() if re.search(shapes, shape)]
        assert found, shapes
        return f"{min(found):.{digits}f} to {max(found):.{digits}f}"

    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"takes {span('triton', 'sdpa cudnn', 1)} times the time of cuDNN" in text
    assert f"{span('sdpa cudnn', 'hopper', 2)} times as fast as cuDNN" in text
    fa4 = lambda shapes: span("flash-attn 4", "hopper", 2, shapes)
    assert f"{fa4(r'1.3B 480p B=1 F=1 R=(12|21) ')} times as fast at one frame a chunk" in text
    assert f"equal at three ({fa4('1.3B 480p B=1 F=3 ')})" in text
    assert f"slower for 14B and 720p** ({fa4('14B|720p')})" in text


EVIDENCE = ROOT / "bench" / "results" / "evidence"
FLEX_AND_SINK = ("flex", "sink")


@pytest.mark.parametrize("page", ["README.md", "flexkern/docs/evidence.md"])
def test_flex_is_told_beside_the_sink_as_the_films_have_it(page):
    """Differences with their intervals, and a verdict where the interval excludes zero, on every figure."""
    text = " ".join((ROOT / page).read_text().split())
    with (EVIDENCE / "parts.csv").open(newline="") as file:
        rows = {row["figure"]: row for row in csv.DictReader(file) if (row["variant"], row["against"]) == FLEX_AND_SINK}
    verdicts = {"palette": "better", "ground": "better", "course": "worse", "speed": "undecided"}
    for figure, verdict in verdicts.items():
        row, digits = rows[figure], 4 if figure == "ground" else 3
        difference, low, high = (float(row[f"difference{end}"]) for end in ("", "_low", "_high"))
        assert row["verdict"] == verdict, figure
        assert f"{difference:+.{digits}f}, {low:+.{digits}f} to {high:+.{digits}f}" in text, figure


def test_the_films_behind_the_tables_are_there():
    """Every variant of today's list has its films under its own overrides, each of one commit, all of one model."""
    with (EVIDENCE / "films.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["weights"] for row in rows}) == 1
    assert len({(row["variant"], row["commit"]) for row in rows}) == len({row["variant"] for row in rows})
    told = {row["variant"]: row["overrides"] for row in rows}
    for one in (*variants.PARTS, *variants.CHOICES):
        assert told[one.name] == " ".join(f"{name}={value}" for name, value in one.overrides), one.name
    assert set(PRESETS) <= set(told)
