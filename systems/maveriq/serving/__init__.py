"""The end-to-end evaluation on a virtual clock: workloads, service times, the controller's queue, metrics.

* `workload`: the artifact's deterministic traces, and its Poisson stages.
* `services`: how long one request takes on a configuration, and how much memory it holds.
* `queueing`: the queue disciplines over GPUs that run one request at a time.
* `runs`: a system (MaverIQ or a baseline) replays a workload; what came out.
"""
