"""The knob search: what to ask next, given everything that was answered (docs/search.md).

`propose` is the search; `History` keeps its answers on disk; `read_space` reads what a user wrote.
"""

from harness.search.choice import violation
from harness.search.history import Entry, History
from harness.search.propose import propose, search
from harness.search.space import Answer, Knob, Probe, SearchRules, SearchSpace, Target, Verdict, read_space

__all__ = [
    "Answer",
    "Entry",
    "History",
    "Knob",
    "Probe",
    "SearchRules",
    "SearchSpace",
    "Target",
    "Verdict",
    "propose",
    "read_space",
    "search",
    "violation",
]
