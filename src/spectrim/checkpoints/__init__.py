"""Models on disk: one file, shards, and checkpoints larger than memory."""
