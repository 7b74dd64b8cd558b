"""dLoRA (OSDI '24): serving many LoRA adapters. Not built yet: README.md says what will be here."""
