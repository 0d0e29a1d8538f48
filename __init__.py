"""Vortex for ComfyUI: FLUX.1-schnell in NF4.

ComfyUI loads this folder as a package and reads the node table from it. Pytest imports this file too, without a
package around it, so the body runs only inside one.
"""

if __package__:
    from .nodes import NODE_CLASS_MAPPINGS as NODE_CLASS_MAPPINGS
    from .nodes import NODE_DISPLAY_NAME_MAPPINGS as NODE_DISPLAY_NAME_MAPPINGS

    WEB_DIRECTORY = "./web"
