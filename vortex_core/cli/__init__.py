"""The command `vortex`."""

from ..old_names import attributes_of

__getattr__ = attributes_of(__name__, ".main", "app", "run")
