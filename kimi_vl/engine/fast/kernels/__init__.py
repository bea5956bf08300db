"""Triton kernels, each beside the plain PyTorch that says what it computes."""
