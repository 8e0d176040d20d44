"""The claims about routing under Adam, held against what was measured."""

from experiments.claims import Claim
from experiments.studies._stream_results import ArmResults

SOURCE = "arXiv 2604.22407v1, abstract (a preprint since reported withdrawn)"


def claims(results: dict[str, ArmResults]) -> list[Claim]:
    """One row per claim and control."""
    return []
