"""Validation of arguments and configurations, with errors that say what was expected."""
