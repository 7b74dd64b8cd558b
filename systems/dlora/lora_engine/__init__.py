"""dLoRA's LoRA engine, for real: merged, unmerged and switching on one GPU (paper section 4; sheet, 2.2 to 2.4).

Rooms, in reading order:

* `adapters`: a PEFT folder, checked against the model, as the matrices that the engine copies.
* `bank`: adapters on the device, with three back ends for unmerged batches behind one interface.
* `passes`: merge, unmerge and a -> b in one pass over the weights. `switching`: two schemes that keep them from drifting.
* `slots`: which adapter is where, and who must go: pure decisions. `store`: all adapters in host memory, copied in by layers.
* `modes`: which adapters there are, and which one the weights hold. `runner`: runs one batch in one mode.
* `constants`: what modes and switches cost here. `live`: a replica that runs for real.
"""
