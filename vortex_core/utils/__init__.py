"""Helpers for every room: numbers, paths, files that are written whole, text of others, time. No device."""
