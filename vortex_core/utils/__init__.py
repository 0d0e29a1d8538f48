"""What every room may use: numbers, paths, files that are written whole, text of others, time. No device."""
