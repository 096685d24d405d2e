"""What a long command shows while it works."""

import pytest

from tools.stages import progress


@pytest.mark.parametrize(
    ("percent", "text"),
    [(-1.0, ""), (0.5, "   0 %"), (25.0, "  25 %, 60 s left"), (100.0, " 100 %, 0 s left")],
)
def test_progress_gives_the_time_left(percent: float, text: str) -> None:
    assert progress(percent, 20.0) == text
