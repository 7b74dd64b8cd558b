"""What NVIDIA GPUs offer beside kernels: `mps` (the Multi-Process Service) and `green` (streams on some of the SMs)."""
