"""Pictures with captions on disk to the batches that a training step learns from."""
