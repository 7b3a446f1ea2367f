"""Which features are reported: statistics, candidates, tests, flags, and the quality of estimates."""
