"""Weights & Biases: the process beside rank 0, uploads and the dashboard."""
