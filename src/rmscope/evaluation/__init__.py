"""How much a dictionary explains: reconstruction, splice, keep K, ablate K, their controls; reward-aware fine-tuning."""
