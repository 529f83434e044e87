"""Finished runs, read again and shown as a page."""
