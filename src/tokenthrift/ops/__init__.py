"""Pure tensor functions that methods share. They know tensors and TokenMaps, no model and no method."""
