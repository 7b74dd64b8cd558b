"""Triton kernels, one per file: what each computes, its shapes, its floor. `triton_guard` says whether they can be used."""
