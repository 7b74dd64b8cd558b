"""The engine's executing half: the transformer that the scheduling half (`systems.common.engine`) drives, in PyTorch.

Rooms, in reading order:

* `numerics`, `weights`: what a shape table leaves out; random weights or safetensors. `linear`, `quantised`: dense, int8, int4.
* `torchao_products`: the same quantised matrices in torchao's hands.
* `placement`: which part of a model a rank holds. `comm`: what ranks say to each other on the device.
* `cache`: KV blocks on the device and who holds them. `memory`: what to lower when it runs out.
* `attention`: one interface, three backends (our Triton kernels, FlashInfer, plain PyTorch); `kernels` holds the kernels.
* `model`: the transformer. `sampling`: the next token, on the device.
* `lora`: low-rank adapters, a different one per sequence.
* `mixed`, `graphs`: batches as arrays; steps as CUDA graphs.
* `flights`: steps on their way. `executor`: runs the engine's batches, deciding on the host; `device`: its device half.
* `drivers`: offline and real-time loops. `parallel`: the same on several ranks.
"""
