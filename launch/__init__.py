"""Ways to start a training: quickstart on this machine."""
