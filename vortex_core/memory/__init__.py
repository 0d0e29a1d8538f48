"""What the VRAM is used for: the plan, the arena that calls work in, weights that stream from host memory."""

from ..old_names import attributes_of

__getattr__ = attributes_of(__name__, "..runtime.memory_manager", "MemoryManager", "Place")
