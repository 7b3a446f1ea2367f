"""Names that a language model gives to concepts, each with scores on texts that the model has not seen."""
