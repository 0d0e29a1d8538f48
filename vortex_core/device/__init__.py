"""The device: which one it is, its streams and memory counters, and the one thread that does all work on it."""

from ..old_names import attributes_of

__getattr__ = attributes_of(__name__, ".select", "resolve_device", "host_buffer")
