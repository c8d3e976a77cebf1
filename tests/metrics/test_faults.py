"""Each metric answers to the fault it is for, and not to the others."""

import pytest

for package in ("av", "cv2", "matplotlib"):
    pytest.importorskip(package, reason='needs pip install "flexkern[metrics]"')

import footage

from flexkern.metrics import measure
from flexkern.render import VideoWriter

MARGIN = 3  # what answers must answer so many times as strongly as all that must not
ANSWERS = {  # metric: the faults that move it
    "flicker": {"noise"},
    "sharpness_drift": {"blur"},
    "chunk_discontinuity": {"cuts"},
    "motion_drift": {"frozen"},
    "loop": {"repeat"},
    "sink_collapse": {"recall"},
    "exposure_drift": {"exposure"},
    "palette_drift": {"hue"},
    "structure_drift": {"elsewhere"},
}
FILMED = {name: faults for name, faults in ANSWERS.items() if not faults & {"recall", "elsewhere"}}
FILMED |= {"chunk_discontinuity": {"cuts", "repeat"}}  # the loop filter cuts hard from the end of a cycle to its start


@pytest.fixture(scope="module")
def drawn():
    clips = {"clean": footage.clean, **footage.FAULTS}
    return {name: measure(make(), fps=footage.FPS) for name, make in clips.items()}


@pytest.fixture(scope="module")
def filmed(tmp_path_factory):
    """FFmpeg's source through FFmpeg's filters, into an H.264 file and out of it."""
    pictures, path = footage.film(footage.SOURCE), tmp_path_factory.mktemp("films") / "film.mp4"
    reports = {}
    for name, chain in footage.FILMS.items():
        made = footage.film(chain, pictures)
        with VideoWriter(path, made.shape[2], made.shape[1], fps=footage.FPS) as writer:
            writer.write(made)
        reports[name] = measure(path)
    return reports


def check(reports, metric, faults):
    clean = reports["clean"].summary[metric]
    moved = {name: abs(report.summary[metric] - clean) for name, report in reports.items() if name != "clean"}
    weakest, strongest = min(moved[f] for f in faults), max(moved[f] for f in set(moved) - faults)
    assert weakest >= MARGIN * strongest, {fault: round(value, 4) for fault, value in moved.items()}


def test_every_fault_has_a_metric():
    assert set().union(*ANSWERS.values()) == set(footage.FAULTS)
    assert set().union(*FILMED.values()) == set(footage.FILMS) - {"clean"}


@pytest.mark.parametrize("metric", ANSWERS)
def test_a_metric_answers_to_its_fault_alone(drawn, metric):
    check(drawn, metric, ANSWERS[metric])


@pytest.mark.parametrize("metric", FILMED)
def test_a_metric_answers_to_its_fault_alone_on_film(filmed, metric):
    check(filmed, metric, FILMED[metric])


def test_what_the_answers_say(drawn):
    """Directions and events, on the footage whose faults are known to the picture."""
    value = lambda fault, metric: drawn[fault].summary[metric]
    assert value("frozen", "motion_change") < -0.1 < value("clean", "motion_change") < 0.1
    assert value("noise", "flicker") < value("clean", "flicker") and value("exposure", "exposure_change") < -0.05
    assert drawn["repeat"].events["loop"] == [28 / footage.FPS] and value("repeat", "loop") > 0.5
    assert drawn["recall"].events["sink_dips"] == [80 / footage.FPS, 110 / footage.FPS]
    assert not any(report.events["sink_dips"] for fault, report in drawn.items() if fault != "recall")
