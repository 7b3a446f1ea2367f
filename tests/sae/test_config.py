"""The size of an SAE where it is not said: it grows with the text, between bounds, and what is said stands."""

from __future__ import annotations

import pytest

from rmscope import hardware
from rmscope.errors import InputError
from rmscope.sae import SaeConfig
from rmscope.sae.config import check_memory, devices_for

D = 576


def test_the_dictionary_grows_with_the_text_between_one_and_eight_times_the_width() -> None:
    config = SaeConfig()
    sizes = [(config.features(D, tokens), config.k_for(config.features(D, tokens), D)) for tokens in (1000, 137_084, 10**7)]
    assert sizes == [(576, 4), (685, 5), (4608, 32)]
    assert config.k_for(1728, D) == 12


def test_what_is_said_stands() -> None:
    said = SaeConfig(d_sae=100, k=7)
    assert (said.features(D, 10**7), said.k_for(100, D)) == (100, 7)


def test_a_dictionary_that_no_memory_holds_is_refused_and_one_that_just_fits_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "memory", lambda _device: 32 * 1000 * D)
    for fitting in ([1000], [400, 600], [0]):
        check_memory(fitting, D, "cpu")
    for most, features in ((1001, [1001]), (600, [401, 600]), (501, [501, 501]), (10**15, [10**15])):
        with pytest.raises(InputError, match=rf"d_sae {most}: training.* takes .* GB at least, and cpu has"):
            check_memory(features, D, "cpu")


def test_several_devices_share_the_saes_or_hold_one_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "memory", lambda _device: 32 * 1000 * D)
    assert [devices_for(m, D, "cpu") for m in (1, 1000, 1001, 2000, 2001)] == [1, 1, 2, 2, 3]
    check_memory([700] * 4, D, "cpu", devices=4)
    check_memory([1900], D, "cpu", devices=2)
    check_memory([1900] * 6, D, "cpu", devices=2)  # one after another
    for features, devices in (([700] * 5, 4), ([2001], 2)):
        with pytest.raises(InputError, match="GB at least"):
            check_memory(features, D, "cpu", devices)


def test_an_sae_must_fit_beside_the_pm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "memory", lambda _device: 32 * 1000 * D)
    beside = 32 * 400 * D
    assert [devices_for(m, D, "cpu", beside) for m in (600, 601, 1200)] == [1, 2, 2]
    check_memory([1200], D, "cpu", 2, beside)
    with pytest.raises(InputError, match=r"cpu has .* GB beside the PM"):
        check_memory([601], D, "cpu", 1, beside)


def test_processes_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = hardware.memory("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert hardware.memory("cpu") == alone // 4
