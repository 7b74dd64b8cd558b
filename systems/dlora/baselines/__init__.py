"""What dLoRA is compared with, one module each: `whole_model` (vLLM), `peft`, `slora`."""
