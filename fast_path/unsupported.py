"""Why a part of the fast path is not for this model or this machine."""


class UnsupportedError(TypeError):
    """The loaded model's form, or the machine, is not what a part was written for. The text goes to the report."""
