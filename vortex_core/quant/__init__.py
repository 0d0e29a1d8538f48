"""Linears with weights in NF4, and the ways to dequantize those where they are used."""
