"""Tuning beside serving on one GPU, for real: one process, two streams, one set of base weights.

Rooms, in reading order:

* `lanes`: the two streams, and marks that say when work on them ended; on a CPU the same with a clock.
* `tuner`: feeds a trainer's tasklets to the tuning lane, a bounded number ahead, and counts samples.
* `pace`: who decides whether the next tasklet may go: the planner, the artifact's waits, FineInfer, nobody.
* `observed`: from marks to the planner's latencies (l_d0, l_d, l_p); pure.
* `executor`: `TorchExecutor` with tuning beside its steps.
* `driver`: the loop in real time.
* `session`: a model with its engine and trainer, kept from trial to trial.
* `child`, `pair`: serving and tuning as two processes under MPS.
"""
