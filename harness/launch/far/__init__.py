"""What runs on the host of a role, beside it. Standard library only, for any Python from 3.9 on: it is sent there as text.

* `wire`: frames on a byte stream.
* `family`: a process with all its descendants, ended as one.
* `files`: files that come and go by checksum.
* `probes`: whether a role is ready.
* `leash`: the program made of these.
"""
