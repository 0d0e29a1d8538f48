"""The one table of nodes. Loading it costs milliseconds: torch, ComfyUI and the engine load when a node runs."""

from .latency_probe import LatencyProbe
from .loader import NF4FluxLoader
from .lora import VortexLora
from .nag import VortexNag
from .sampler import SchnellSampler
from .vram_monitor import VRAMMonitor

NODES = {
    "VortexFluxLoader": ("NF4 Flux Loader", NF4FluxLoader),
    "VortexLoRA": ("Vortex LoRA", VortexLora),
    "VortexSchnellSampler": ("Schnell Sampler", SchnellSampler),
    "VortexNAG": ("Vortex NAG", VortexNag),
    "VortexVRAMMonitor": ("VRAM Monitor", VRAMMonitor),
    "VortexLatencyProbe": ("Latency Probe", LatencyProbe),
}
NODE_CLASS_MAPPINGS = {key: node for key, (_, node) in NODES.items()}
NODE_DISPLAY_NAME_MAPPINGS = {key: name for key, (name, _) in NODES.items()}
