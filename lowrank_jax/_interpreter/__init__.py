"""Evaluation of a jaxpr some of whose values are weights that know how to multiply themselves."""
