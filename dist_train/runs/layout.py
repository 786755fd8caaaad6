"""Names of the files in a run folder."""

from __future__ import annotations

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
HISTORY = "history.jsonl"
EVALUATION = "evaluation.json"
MEMBERS = "members.json"  # {name of the run folder: its settings}, as submitted
SETTINGS = "config.toml"
SAMPLES = "system/rank-*.jsonl"  # by system.py, likewise
DIVERGED = "diverged.json"
