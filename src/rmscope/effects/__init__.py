"""Effects of features on the reward: estimates, exact ablations, ledgers, interactions, splices."""
