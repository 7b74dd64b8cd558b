"""Measuring what tuning and serving do to each other on this GPU: `python -m systems.llmstation.calibrate`.

`mps` and its `child` measure two processes under MPS, by thread percentage; `beside` two streams of one process, by serving
batch, prompt length, length of sample and, with green contexts, share of the SMs; `tasklets` tuning alone. `rows` is what they
give: `corun.csv` and `tuning.csv` of a calibration. On a CPU the same code runs with a tiny shape: so do the tests.
"""
