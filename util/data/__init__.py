"""Images from wherever they lie to normalised batches on a device; knows nothing of models."""
