"""The LLM engine: continuous batching over a paged KV cache, stepped, with an executor that does or prices the work.

Rooms, in reading order:

* `config`: the limits of one engine (blocks, sequences, batched tokens).
* `sequence`: one request inside the engine.
* `decoding`: all sequences that decode, kept so that any number of steps costs the same.
* `state`: waiting, running, free blocks; admission, preemption and completion.
* `policies`: who runs in the next batch: `prefill-first` (vLLM 0.6.3) or `chunked-prefill` (vLLM v1, Sarathi).
* `executor`: what the engine asks of whoever runs a batch; `simulated` prices it with a cost model.
* `engine`: the step; `serve` drives an engine over a list of requests.
"""
