"""Benchmarks that rest on `latency` and `vram`: what `vortex bench` runs, and what the ComfyUI nodes measure with."""
