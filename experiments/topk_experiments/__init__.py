"""Experiments: a configuration goes in, one JSON record comes out; plots read records."""
