"""Prefill methods: which tokens of a prompt are computed."""
