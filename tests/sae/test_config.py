"""The size of an SAE where it is not said: it grows with the text, between bounds, and what is said stands."""

from __future__ import annotations

from rmscope.sae import SaeConfig

D = 576


def test_the_dictionary_grows_with_the_text_between_one_and_eight_times_the_width() -> None:
    config = SaeConfig()
    sizes = [(config.features(D, tokens), config.k_for(config.features(D, tokens), D)) for tokens in (1000, 137_084, 10**7)]
    assert sizes == [(576, 4), (685, 5), (4608, 32)]
    assert config.k_for(1728, D) == 12


def test_what_is_said_stands() -> None:
    said = SaeConfig(d_sae=100, k=7)
    assert (said.features(D, 10**7), said.k_for(100, D)) == (100, 7)
