"""Transformations of functions: lift, plan, report, covariances, functional."""
