"""Triton kernels of this project: import the module you need, this package imports none."""
