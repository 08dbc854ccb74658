"""Methods on the visual tokens of a model that also reads text: before the language model, and inside it."""
