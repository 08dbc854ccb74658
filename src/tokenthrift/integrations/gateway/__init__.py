"""`tokenthrift serve`: an OpenAI-compatible gateway that shortens prompts by policy, in front of any upstream.

Importing this module imports neither Starlette nor torch. ``policy.py`` is what the user writes; ``app.py`` reads from
top to bottom what happens to a request.
"""
