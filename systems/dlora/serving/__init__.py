"""Replicas of dLoRA's engine behind one OpenAI-compatible server.

HTTP (systems.common.serve) - `run`, `manager`, `control`, and `solver` beside - `engine` and `loop`, once per replica

* `file`: the YAML file. `messages`: what manager and replicas say beside what every engine knows. `numbers`: what is counted.
* `control`: who serves a request, who moves (pure). `manager`: the same with messages. `run`: its process.
* `solver`: the integer program, in a process of its own.
* `engine`, `loop`: a replica's process.
"""
