"""Names of the files in a server's folder; ``flexkern.serve.store`` says what is in them."""

LOCK, JOBS, RECORD = "lock", "jobs", "job.json"
VIDEO, LOG, PREVIEW, THUMBNAIL = "video.mp4", "events.jsonl", "preview.jpg", "thumbnail.jpg"
