"""Data loading and augmentation: from betons to microbatches on the device."""
