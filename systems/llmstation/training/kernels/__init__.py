"""Triton kernels of tuning, one idea per file: what serving's kernels leave out, above all the backward ones."""
