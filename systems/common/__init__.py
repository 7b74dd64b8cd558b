"""What all five systems share: vocabulary, workloads, metrics, hardware models, the LLM engine.

Nothing in here imports any other package of Fivefold (`tests/unit/test_imports.py` holds it to that).
"""
