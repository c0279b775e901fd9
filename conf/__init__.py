"""The configuration of spectrim for Hydra: ``pkg://spectrim.conf``."""
