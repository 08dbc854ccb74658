"""Connector stage: which visual tokens the language model gets, and what they are merged into."""
