"""Which features are told: statistics, candidates, freeze, confirm, flags, the quality of estimates."""
