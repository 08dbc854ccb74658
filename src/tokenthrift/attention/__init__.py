"""Attention stage: which entries of a full cache a decoding step reads."""
