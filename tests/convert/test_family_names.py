"""The list of names that messages show is that of the families there are."""

from mlx_pararnn.convert import families
from mlx_pararnn.convert.families.names import BUILT_IN


def test_every_built_in_family_is_listed_in_the_order_of_detection():
    assert tuple(families.find_family(None, name).name for name in BUILT_IN) == BUILT_IN
    kinds = [kind for kind in vars(families).values() if isinstance(kind, type)]
    found = [kind.name for kind in kinds if hasattr(kind, "detect") and hasattr(kind, "name")]
    assert sorted(BUILT_IN) == sorted(found)
