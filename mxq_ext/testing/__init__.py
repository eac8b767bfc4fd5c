"""Shared by the tests and the benchmarks: the one list of cases, the one measure of error, and the one way to take times."""
