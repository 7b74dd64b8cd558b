"""What MaverIQ is compared with (sheet, 3): AlpaServe's placement search, the same without dropping models, and Accelerate.

* `alpaserve`: the search with its fast simulator; `keep_all` makes it AlpaServe*.
* `published`: the placements that the artifact's run scripts hold, typed in from AlpaServe's output.
* `accelerate`: Hugging Face's balanced device map, one request at a time for the whole box.
"""
