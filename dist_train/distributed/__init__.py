"""Ranks, devices, heartbeats and the gradient sum of fixed order."""
