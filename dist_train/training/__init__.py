"""Training: assembly, loop, optimizers, evaluation, and what rank 0 writes."""
