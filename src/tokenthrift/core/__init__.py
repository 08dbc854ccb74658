"""The words of the library: token maps, views, budgets, methods, plans, sessions and costs. Knows no model.

Nothing is imported here, so that the command line can read plans' words without loading torch.
"""
