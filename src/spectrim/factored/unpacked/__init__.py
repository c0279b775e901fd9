"""Modules of torch and transformers whose packed matrices are layers of their own."""
