"""Benchmarks, on top of `utils.timing` and `device.vram`: `vortex bench` and the ComfyUI nodes measure with them."""
