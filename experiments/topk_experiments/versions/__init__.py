"""Versions: a part of the test suite with older and newer versions of torch and transformers.

Nothing is imported here: pytest reads `listener` before it knows any version.
"""
