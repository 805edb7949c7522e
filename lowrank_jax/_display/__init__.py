"""Printable text, and tables for terminals and notebooks."""
