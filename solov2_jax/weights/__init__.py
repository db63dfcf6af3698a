"""Weights of other programs in, ours out; no file is ever executed."""
