"""Sirius (USENIX ATC '25): inference and training on one GPU. Not built yet: README.md says what will be here."""
