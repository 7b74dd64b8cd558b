"""A system that costs nothing, for tests of the harness."""
