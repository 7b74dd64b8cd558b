"""What goes wrong with a lab. Each text is one line."""


class LabError(RuntimeError):
    """A lab did not do what it should; the text says what, with the last words of the log concerned."""


class LabUnavailableError(LabError):
    """This machine can't run the lab at all (not root, no such kernel feature, no packages): tests skip."""
