"""A small model that continues text, without tools and without a chat template."""

from tests.support.golden import DATA

DEMO = DATA / "demo"
