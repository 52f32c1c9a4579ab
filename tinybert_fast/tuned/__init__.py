"""Tuned PyTorch: the ``torch`` implementation of each op, forward and backward written out."""
