"""A converted network beside the program that its weights are from, on one picture."""
