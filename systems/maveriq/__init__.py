"""MaverIQ (SC '25): deploying LLMs by stated intent. README.md is the paper in a page and the map of this package."""
