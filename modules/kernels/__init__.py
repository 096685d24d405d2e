"""Triton kernels of this project. Import the module you need; importing this package costs nothing."""
