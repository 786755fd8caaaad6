"""Trained networks: loading, predicting, exporting."""
