"""Measuring the engine's operators on this machine's GPU, for the simulator: `python -m systems.common.calibrate`.

What is timed is what the engine runs: its own bodies and kernels, in CUDA graphs where it uses graphs. `grid` says which points
(data), `budget` how many of them there is time for, `clock` how a point is timed, `dense`, `attention`, `adapters`, `links` and
`steps` what; `run` goes through them, `facts` notes what the engine resolved, `write` puts it all into a folder that
`systems.common.hardware.calibrated` reads. `all_reduce` is a command of its own, for several GPUs. On a CPU the same code runs
with a small shape: so do the tests.
"""
