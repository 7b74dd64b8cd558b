"""What LLMStation is compared with (sheet 3): each baseline as data, with the one knob that its users turn.

* `inference_only`: serving alone.
* `mps`: vLLM and torchtune as strangers under NVIDIA MPS; knob: torchtune's thread percentage.
* `fineinfer`: shared weights, a tuning sample is never interrupted; knob: how long an idle engine defers a new prompt.
* `chunked`: tuning cut into chunks of the sequence, no thread limit; knob: the chunk size.
"""
