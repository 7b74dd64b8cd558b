"""One engine on several ranks: tensor parallel inside a stage, pipeline parallel between stages.

Rank 0 is the caller's process: it holds the engine, decides every batch and has a rank's part of the model like all others. The
other ranks are processes that do what it tells them.

* `wire`: messages from rank 0 to a rank and back. `plan`: a step's calls to the device half as one int64 array.
* `spec`: what a rank must know to build its part. `rank`: the process (`python -m systems.common.torch_engine.parallel.rank`).
* `cluster`: starts the ranks, watches them, ends them. `executor`: the executor that an engine drives.
"""
