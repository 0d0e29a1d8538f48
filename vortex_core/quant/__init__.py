"""Weights in 4 bits: the NF4 format, and linears that decode it where it is used."""
