"""Many replicas: which adapters lie where, which replica a request goes to, and who moves later.

* `placement`: adapters to replicas, and extra copies (long-term, proactive);
* `dispatch`: the replica of a new request;
* `ilp`: requests and adapters of several replicas assigned anew by an integer program;
* `migration`: when that is done, and for whom (reactive);
* `simulated`: the cluster on a virtual clock.
"""
