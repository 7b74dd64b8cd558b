"""LLMStation (USENIX ATC '25): tuning and serving one LLM on the same GPUs. See README.md."""
