"""Thin files that bring the library to where its users are: each imports its package only when it is used."""
