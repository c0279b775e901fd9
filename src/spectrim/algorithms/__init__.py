"""Algorithms that choose ranks: one file each, with its settings as typed fields and one method, ``compress``."""
