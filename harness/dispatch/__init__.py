"""Runs a job of the workflow on a host of the inventory, and brings back what it made.

    python -m harness.dispatch --inventory hosts/lab.yaml [--tags serving] -- python -m harness.series ...

The command is the one that would run here. On the chosen host it finds the same code (sent along, named by its hash), the
same inputs and every trial that is here already; what it finishes comes back every second, so a host that dies costs no
finished trial, and another one goes on from there. On the inventory of this machine alone the command simply replaces
this process.

* `job`: what a command reads and writes, and how it is called elsewhere (pure).
* `cargo`: which files travel, and where those that come back belong.
* `slots`: which host is next.
* `run`: the way of one job to one host and back.
"""
