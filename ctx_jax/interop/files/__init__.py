"""Containers of tensors: each file format as a mapping from names to tensors that are read when asked for."""
