"""How a token classifier for ``llmlingua2`` is made: a large model shortens texts, an encoder learns how.

In the order of use: ``chunks`` cuts texts, ``teacher`` has them shortened, ``align`` finds the words that stayed,
``quality`` drops what went wrong, ``train`` trains. ``tokenthrift distill`` runs them.
"""
