"""Checks of what users pass: one error that says what came and what was expected."""
