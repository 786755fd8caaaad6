"""From betons to augmented microbatches on the device."""
