"""Data sets, one file each. A frozen class holds the settings; its ``load()`` returns the four splits."""
