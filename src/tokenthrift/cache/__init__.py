"""Cache stage: which keys and values are kept."""
