"""From bytes on disk to tensors: headers, files, uploads, checksums, and the modules that tensors fill."""
