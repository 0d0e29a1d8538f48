"""Bytes on disk to tensors: headers, files, uploads, checksums, and modules that are filled from them."""
