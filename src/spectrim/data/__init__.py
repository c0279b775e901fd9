"""Data sets, one file each: a frozen class of settings whose `load()` gives the train, calibration and test splits."""
