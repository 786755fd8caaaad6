"""Measurements whose results are in RESULTS.md; each module is a command."""
