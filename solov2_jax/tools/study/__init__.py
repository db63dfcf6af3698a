"""Which setting helps on one's own data: seeds, folds, one lever at a time, a table."""
