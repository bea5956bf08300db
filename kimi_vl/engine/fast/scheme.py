"""How many bits the decoder's large matrices have, and which of these choices fits a GPU."""

from dataclasses import dataclass

from kimi_vl.errors import Misconfigured

AUTOMATIC = "auto"


@dataclass(frozen=True)
class Scheme:
    """16 bits leave matrices as they are. Router, norms, embeddings, kv_b_proj and MoonViT always have 16."""

    name: str
    experts: int  # bits of routed and shared experts
    others: int  # of lm_head, attention's other projections and layers without a router


SCHEMES = {scheme.name: scheme for scheme in (Scheme("none", 16, 16), Scheme("int8", 8, 8), Scheme("int4", 4, 8))}


def find_scheme(name: str, needed: dict[str, int], free: int) -> Scheme:
    """The scheme of a name, or for "auto" the first that fits, or else the smallest.

    Args:
        name: of SCHEMES, or "auto".
        needed: bytes of GPU memory that the engine takes with each of SCHEMES.
        free: so many bytes there are.
    Raises:
        Misconfigured: there is no such name.
    """
    if name in SCHEMES:
        return SCHEMES[name]
    if name != AUTOMATIC:
        raise Misconfigured(f"KIMI_VL_QUANTIZATION must be {', '.join((AUTOMATIC, *SCHEMES))}, not {name!r}")
    return next((scheme for scheme in SCHEMES.values() if needed[scheme.name] <= free), SCHEMES["int4"])
