"""The evidence: what is filmed, what is kept of it, and what is made of that."""

import csv
import json
import math

import evidence
import evidence_tables
import pytest
import torch
from safetensors.torch import save_file

from flexkern.demo import rooms
from flexkern.demo.film_rooms import Case, film, load_engine
from flexkern.demo.train_rooms import SIZES
from flexkern.model.wan import CausalWan, WanConfig
from flexkern.policies import get_preset

SMALL = WanConfig(**{**SIZES["demo"].to_dict(), "dim": 64, "num_heads": 1, "num_layers": 1, "ffn_dim": 64})


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    state = {name: p.detach() for name, p in CausalWan(SMALL).named_parameters()}
    save_file(state, path, {"flexkern_config": json.dumps(SMALL.to_dict())})
    return path


@pytest.fixture
def args(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "PARTS", (evidence.PARTS[0], evidence.PARTS[3], evidence.PARTS[-1]))
    monkeypatch.setattr(evidence, "CHOICES", evidence.CHOICES[:1])
    monkeypatch.setattr(evidence_tables, "RESAMPLES", 50)
    monkeypatch.setenv("FLEXKERN_COMMIT", "abc")
    evidence.machine.commit.cache_clear()
    yield evidence.Args(
        weights=weights,
        out=tmp_path,
        films=2,
        horizons=(1, 3),
        presets=("self-forcing", "riflex", "sink"),
        far=4,
        far_presets=("self-forcing",),
        parts=3,
        choices=3,
        processes=1,
    )
    evidence.machine.commit.cache_clear()


def test_every_variant_is_a_method_of_its_own():
    variants = (*evidence.PARTS, *evidence.CHOICES)
    assert len({one.name for one in variants}) == len(variants)
    presets = [one.preset.describe() | {"name": ""} for one in variants]
    for i, preset in enumerate(presets):
        assert preset not in presets[:i], variants[i].name


def test_parts_are_each_alone_each_pair_and_all():
    on = lambda preset: (preset.position.mode != "none", preset.noise.kind != "iid", preset.retention.sink > 0)
    assert len({on(one.preset) for one in evidence.PARTS}) == 8
    assert on(evidence.PARTS[0].preset) == (False, False, False) and on(evidence.PARTS[-1].preset) == (True, True, True)


def test_one_command_makes_rows_tables_pictures_and_a_reading_and_goes_on_where_it_stopped(args, monkeypatch):
    evidence.main(args)
    rows = evidence.read(args.out / "films.csv")
    # 2 films of: 3 presets at 2 horizons, one of them farther; the part and the choice that are not among them at one
    assert len(rows) == 2 * (3 * 2 + 1 + 2) and {row["commit"] for row in rows} == {"abc"}
    assert {(row["horizon"], row["range"]) for row in rows} == {("1", "3-20"), ("3", "21-62"), ("4", "21-83")}
    tables = {"presets": {"self-forcing"}, "parts": {"self-forcing", "sink"}, "choices": {"flex, all distances"}}
    for name, against in tables.items():
        table = list(csv.DictReader((args.out / f"{name}.csv").open()))
        assert {row["figure"] for row in table} == set(evidence_tables.FIGURES)
        assert {row["films"] for row in table} == {"2"}
        assert {row["against"] for row in table} == against
        assert (args.out / f"{name}.png").stat().st_size > 10_000
    said = (args.out / "reading.md").read_text()
    for title in ("Presets, 1", "Presets, 4", "Parts of FLEX, 3", "What the paper leaves open, 3"):
        assert f"## {title} times the horizon, 2 films" in said
    assert "against sink" in said and "| flex | 0." in said

    monkeypatch.setattr(evidence, "film", lambda *_: pytest.fail("filmed again"))
    evidence.main(args)
    path = args.out / "films.csv"
    text = path.read_text()
    path.write_text(text + "self-for")  # a line that was cut off
    evidence.main(args)
    assert path.read_text() == text
    lines = text.splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    monkeypatch.setattr(evidence, "film", film)
    evidence.main(args)
    again = evidence.read(path)
    assert len(again) == len(rows) and {k: v for k, v in again[-1].items() if k != "seconds"} == {
        k: v for k, v in rows[-1].items() if k != "seconds"
    }


def test_several_processes_make_the_same_rows(args):
    evidence.main(args)
    alone = evidence.read(args.out / "films.csv")
    args.out, args.processes = args.out / "two", 2
    evidence.main(args)
    order = lambda row: (row["variant"], row["horizon"], row["film"])
    timeless = lambda rows: [row | {"seconds": ""} for row in sorted(rows, key=order)]
    assert timeless(evidence.read(args.out / "films.csv")) == timeless(alone)


def test_tables_are_made_again_without_a_model(args, monkeypatch):
    args.tables = True
    with pytest.raises(ValueError, match=r"films.csv has no films"):
        evidence.main(args)
    args.tables, args.far, args.parts, args.choices, args.horizons = False, 0, 0, 0, (1,)
    evidence.main(args)
    first = (args.out / "reading.md").read_text()
    (args.out / "reading.md").unlink()
    monkeypatch.setenv("FLEXKERN_COMMIT", "another")
    evidence.machine.commit.cache_clear()
    monkeypatch.setattr(evidence, "film", lambda *_: pytest.fail("filmed again"))
    args.tables, args.weights = True, args.out / "none"
    evidence.main(args)
    assert (args.out / "reading.md").read_text() == first


def test_rows_of_other_weights_are_refused(args, monkeypatch):
    path = args.out / "films.csv"
    row = dict.fromkeys(evidence.COLUMNS, "0")
    evidence.append(path, [row | {"commit": "other"}])
    with pytest.raises(ValueError, match="has rows of weights 0, this is"):
        evidence.main(args)


def test_rows_of_another_commit_stay_where_films_are_the_same(args, monkeypatch):
    """So that a variant that came later stands beside them; a commit that measures otherwise is refused."""
    args.far, args.parts, args.choices, args.presets = 0, 0, 0, ("self-forcing",)
    evidence.main(args)
    monkeypatch.setenv("FLEXKERN_COMMIT", "later")
    evidence.machine.commit.cache_clear()
    args.presets += ("riflex",)
    evidence.main(args)
    path = args.out / "films.csv"
    rows = evidence.read(path)
    assert {(row["variant"], row["commit"]) for row in rows} == {("self-forcing", "abc"), ("riflex", "later")}
    assert "Commit abc, later, weights" in (args.out / "reading.md").read_text()

    monkeypatch.setenv("FLEXKERN_COMMIT", "broken")
    evidence.machine.commit.cache_clear()
    own = rows[0]["ground"]
    path.write_text(path.read_text().replace(own, f"{float(own) + 1e-5:.5f}", 1))
    args.presets += ("sink",)
    with pytest.raises(ValueError, match="rows of commit abc, which measured films of self-forcing otherwise: move"):
        evidence.main(args)


def test_a_horizon_is_the_beginning_of_a_longer_film(weights):
    engine = load_engine(weights)
    short, long = (Case.random(scenes=1, frames=frames, seed=3) for frames in (21, 42))
    for name in ("self-forcing", "flex", "pi"):
        preset = get_preset(name)
        assert not evidence.depends_on_length(preset)
        assert torch.equal(film(engine, short, preset), film(engine, long, preset)[:, :21])
    static = get_preset("flex", {"position.scale_schedule": "static", "position.reach": "all"})
    assert evidence.depends_on_length(static)
    assert not torch.equal(film(engine, short, static), film(engine, long, static)[:, :21])


def test_intervals_of_paired_differences():
    mean, low, high = evidence_tables.interval([1.0, 2.0, 3.0, 4.0, math.nan])
    assert mean == 2.5 and 1.0 <= low < 2.0 and 3.0 < high <= 4.0
    assert evidence_tables.interval([0.5] * 4) == (0.5, 0.5, 0.5)
    assert all(map(math.isnan, evidence_tables.interval([math.nan])))


@pytest.mark.parametrize(
    ("figure", "difference", "verdict"),
    [
        ("ground", (-0.2, -0.3, -0.1), "better"), ("ground", (0.2, 0.1, 0.3), "worse"),
        ("course", (-0.2, -0.3, -0.1), "worse"), ("course", (0.2, -0.1, 0.3), "undecided"),
        ("area", (0.2, 0.1, 0.3), "undecided"), ("speed", (math.nan,) * 3, "undecided"),
    ],
)  # fmt: skip
def test_verdicts(figure, difference, verdict):
    mean, low, high = difference
    one = evidence_tables.Result(
        variant="v", against="w", horizon=3, figure=figure, films=2, mean=0, low=0, high=0, difference=mean,
        difference_low=low, difference_high=high,
    )  # fmt: skip
    assert one.verdict == verdict


def test_beyond_the_horizon_every_frame_counts():
    assert evidence.scored(1, 21) == slice(3, 21)
    assert evidence.scored(12, 252) == slice(rooms.TRAIN_FRAMES, 252)
