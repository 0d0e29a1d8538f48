"""FLUX.1-schnell itself: its sizes, text encoders, transformer, sampling and decoder."""
