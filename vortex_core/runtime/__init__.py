"""The engine that users call: loading, drawing, memory, captured CUDA graphs."""
