"""The definition of every op in plain PyTorch: the shortest honest code, any float dtype."""
