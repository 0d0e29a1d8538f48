"""From files or a diffusers pipeline to canonical tensors, and from those to modules."""
