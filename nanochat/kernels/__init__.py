"""Arithmetic that is written out, because torch's own moves or keeps more than it has to."""
