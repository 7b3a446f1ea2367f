"""The report's words, one meaning each (METHOD.md)."""

FLAGS = {
    "dense": "fires on more than 10 % of the span's tokens",
    "outlier": "half or more of its direction lies on the few dimensions with the largest variance",
    "lexical": "which token it is predicts its activation (held-out R² of .8 or more)",
    "position": "the token's position predicts its activation (R² of .5 or more)",
    "length": "loses half of its preference effect once the length difference is taken out",
    "ending": "80 % or more of its effect comes from final punctuation or template tokens",
    "nonspecific": "moves unrelated completions of the same prompts by half as much or more",
    "strong": "is reported for the prompts on which it fires hardest: elsewhere it does little",
}

GLOSSARY = [
    (
        "Reward, Δr",
        "The number the model gives a completion. It has no zero and means nothing across prompts; Δr = "
        "r(chosen) − r(rejected), within one prompt, does.",
    ),
    (
        "Feature",
        "One direction of a sparse autoencoder (SAE), active on few tokens. Its number names it within "
        "its site. The tokens listed beside it are where it is most active, which need not be what it "
        "means.",
    ),
    (
        "Site",
        "The place in the model that the SAE reads: resid_post.L is the residual stream after block L, from 0.",
    ),
    (
        "Span",
        "The tokens on which features are ablated: from the first token in which chosen and rejected "
        "differ to the token at which the reward is read.",
    ),
    (
        "Ablation effect",
        "Reward with the feature minus reward with its activation set to 0 on the span, everything else "
        "(the error node too) as it was. Above 0: the feature raises the reward. Exact, not estimated. "
        "Effects do not add up: a twin feature can hide one.",
    ),
    (
        "Mean effect",
        "The mean effect over fresh (confirm) prompts where the feature fires; its 95 % interval is a bootstrap by prompt.",
    ),
    (
        "q, reported",
        "q is the false discovery rate at which the feature would just be claimed, among all frozen "
        "features. The test is against the bound .05 SD(Δr), in the sign fixed beforehand. Reported means"
        " q < .05; no other feature is claimed.",
    ),
    (
        "Chosen − rejected",
        "D, the ablation effect on the chosen side minus that on the rejected one: what the feature does to "
        "the preference. The mean is over all fresh pairs, 0 where it is silent; it drives preference when D"
        " exceeds the bound, in the sign fixed beforehand, on the pairs where it fires. Length correlation is"
        " that of D with the length difference at equal Δr.",
    ),
    (
        "Estimate, its quality",
        "An estimate (gradient times activation, unless the run's settings say otherwise) chooses which features to "
        "ablate exactly. "
        "Trust is how well it ranks features within a response against exact ablation, on a sample "
        "weighted back to all active features.",
    ),
    (
        "Contribution",
        "A feature's share of the reward when all features move together from a baseline (integrated "
        "gradients). Contributions add up, so they keep the ledger; they are not ablation effects.",
    ),
    (
        "Error node",
        "What the SAE does not reconstruct, x − x̂. It is kept in every ablation and has its own line in the ledger.",
    ),
    (
        "Ledger",
        "Δr written as features + error + remainder + gap. A part's share is its covariance with Δr over "
        "the variance of Δr; the shares sum to 1 and one may be negative. Remainder: what span length and"
        " position do by themselves. Gap: quadrature.",
    ),
    (
        "Noise floor",
        "How far the reward of one text moves when it is run again in another batch. Smaller effects count as 0.",
    ),
    (
        "Planted bias, ATE",
        "A cue put into training pairs with a known sign. What the model learned of it is measured: the "
        "average treatment effect (ATE), reward with the cue minus with neutral filler of equal length, "
        "on unseen prompts.",
    ),
    (
        "Mediated share",
        "How much of the ATE is gone when the matching features are ablated in both arms. 100 %: all of it.",
    ),
]
