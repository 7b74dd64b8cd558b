"""MaverIQ (SC '25): deploying LLMs by stated intent. Not built yet: README.md says what will be here."""
