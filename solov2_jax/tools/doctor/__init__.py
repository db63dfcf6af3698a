"""Is this data set fit for training? `python -m` runs `__main__`."""
