"""The controller: models come, serve and go on one node (2.10).

* `queues`: which request is sent next; the paper's one queue for all, and a queue per model.
* `core`: the state machine; it decides, and says what its driver must do.
* `commands`: the words of its command line, parsed.
* `driver`: carries out what the core decides, with engine processes.
* `launch`: from a decision to the command of its engine, over one GPU or several.
* `engines`: one engine per deployment, spoken to over HTTP.
* `memory`: what the GPUs hold: NVML, or budgets as bookkeeping (virtual GPUs).
* `library`: what it knows of models; `register` adds to it.
* `http`, `shell`: the two ways to talk to it besides Python.
"""
