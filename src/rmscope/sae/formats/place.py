"""The site of an SAE from the hook that its file names; an SAE of another stream than the residual one is refused."""

from __future__ import annotations

from rmscope.errors import InputError
from rmscope.model.site_names import site_of_hook


def site_named(hook: object, place: str, output: object = None) -> str:
    """The site of a hook; empty where there is none. ``output`` is the hook that the SAE reconstructs.

    Raises InputError: the hook is no site, or the SAE reconstructs another stream than it reads.
    """
    if output not in (None, hook):
        raise InputError(
            f"{place} reads {hook} and reconstructs {output}: it is a transcoder, and only SAEs are studied; name an SAE."
        )
    if hook is None or hook == "":
        return ""
    site = site_of_hook(str(hook))
    if site is None:
        raise InputError(
            f"{place} reads {hook}, and only the residual stream after a block (or before block 0) is studied; name an SAE "
            "of that stream, such as blocks.4.hook_resid_post or model.layers.4."
        )
    return site
