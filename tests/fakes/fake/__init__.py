"""A system that costs nothing: tests copy it into a copy of the project (`tests/end_to_end/conftest.py`)."""
