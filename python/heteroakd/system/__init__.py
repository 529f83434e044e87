"""Processes, signals and files."""
