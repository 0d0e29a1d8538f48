"""The command `vortex`."""

from ..moved import attributes_of

__getattr__ = attributes_of(__name__, ".main", "app", "run")
