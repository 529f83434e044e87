"""The options of the commands, as typed dataclasses; nothing here imports torch."""
