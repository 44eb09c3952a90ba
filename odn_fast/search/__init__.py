"""The searches: `expand` finds the smallest depth of a network that meets a target accuracy."""

from .expansion import Result, expand, resume

__all__ = ["Result", "expand", "resume"]
