"""Interpreters for jaxprs: evaluation with weight operators, and a dry run that finds uses."""
