"""Text from a causal model or an encoder-decoder, on any layout that the model runs on."""
