"""Metrics of long video, in the terms that papers use: curves over time, one number each, tables, plots and sheets.

    from flexkern.metrics import measure
    report = measure("video.mp4")
    report.summary["sharpness_drift"], report.curves["sharpness"]

What each figure means stands in the docstring of the function that measures it; flexkern/docs/metrics.md lists them.
"""

from flexkern.metrics.measure import CURVES, LEARNED, WHOLE, Meter, Metric, Report, measure
from flexkern.metrics.plot import plot_curves
from flexkern.metrics.sheet import contact_sheet
from flexkern.metrics.sink import latent_frames, per_picture, sink_alignment
from flexkern.metrics.video import VideoFile, inspect_video, pictures_at, read_pictures
from flexkern.metrics.weights import load_model
from flexkern.metrics.write import table, write_curves, write_json, write_summary

__all__ = [
    "CURVES",
    "LEARNED",
    "WHOLE",
    "Meter",
    "Metric",
    "Report",
    "VideoFile",
    "contact_sheet",
    "inspect_video",
    "latent_frames",
    "load_model",
    "measure",
    "per_picture",
    "pictures_at",
    "plot_curves",
    "read_pictures",
    "sink_alignment",
    "table",
    "write_curves",
    "write_json",
    "write_summary",
]
