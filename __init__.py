"""Vortex for ComfyUI: FLUX.1-schnell in NF4.

ComfyUI loads this folder as a package and reads the node table from it. Pytest imports this file too, without a
package around it, so the body runs only inside one. There are no nodes yet: the table is empty, and ComfyUI loads
the folder without a complaint.
"""

if __package__:
    NODE_CLASS_MAPPINGS: dict[str, type] = {}
