"""Data: tokenizer files, tar shards, packing, order, masks, and the Batch that the model receives.

Nothing is imported here, so that the preparation commands start without torch; import the submodules.
"""
