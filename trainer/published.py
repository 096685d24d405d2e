"""Published figures to stand beside a run's, and how a run knows that its data set is theirs.

A data set is recognised by what it holds, never by its name: users, items, events, and the training
counts of its items. The counts are what the held-out events leave over, so a split that holds out
other events (another order of equal times is enough) is told from the published one.
"""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class PublishedFigure:
    model: str
    protocol: Literal["filtered", "unfiltered"]
    hr_10: float
    ndcg_10: float


@dataclass(frozen=True)
class PublishedDataSet:
    """training_counts_sha256: `data.statistics.counts_digest` of the published leave-one-out."""

    name: str
    users: int
    items: int
    events: int
    training_counts_sha256: str
    figures: tuple[PublishedFigure, ...]

    def looks_like(self, data: dict[str, Any]) -> bool:
        """Whether a run's `data.statistics.describe` has these users, items and events."""
        sizes = (self.users, self.items, self.events)
        return sizes == (data["users"], data["items"], data["events"])

    def has_the_split_of(self, data: dict[str, Any]) -> bool:
        """Whether it also holds out the same events."""
        same = self.training_counts_sha256 == data["training_counts_sha256"]
        return same and data["split"] == "leave_one_out"


DATA_SETS = (
    PublishedDataSet(
        "MovieLens-1M, 5-core",
        users=6_040,
        items=3_416,
        events=999_611,
        training_counts_sha256="8a4ec7ab932773379ef14accb36a5fe7167e84aef7ecd12b4d8804c18d8aa69f",
        figures=(
            PublishedFigure("SASRec, full cross entropy", "filtered", 0.3159, 0.1857),
            PublishedFigure("FuXi-α", "filtered", 0.3164, 0.1813),
            PublishedFigure("gSASRec", "filtered", 0.3003, 0.1726),
            PublishedFigure("HSTU", "filtered", 0.3037, 0.1719),
            PublishedFigure("Mamba4Rec, its best published run", "unfiltered", 0.3187, 0.1851),
            PublishedFigure("SIGMA", "unfiltered", 0.3083, 0.1814),
            PublishedFigure("Mamba4Rec, its lowest published run", "unfiltered", 0.3046, 0.1748),
            PublishedFigure("SASRec, full cross entropy", "unfiltered", 0.2952, 0.1662),
        ),
    ),
    PublishedDataSet(
        "Amazon Beauty, 5-core",
        users=22_363,
        items=12_101,
        events=198_502,
        training_counts_sha256="2dbc7fdac81d41406bfa2eed82962830b81782a8911dc94637b62543f9abf94a",
        figures=(
            PublishedFigure("SASRec, sampled softmax", "filtered", 0.0921, 0.0531),
            PublishedFigure("eSASRec", "filtered", 0.0928, 0.0523),
            PublishedFigure("Mamba4Rec, its best published run", "unfiltered", 0.0820, 0.0452),
            PublishedFigure("SASRec", "unfiltered", 0.0848, 0.0432),
            PublishedFigure("Mamba4Rec, its lowest published run", "unfiltered", 0.0725, 0.0421),
        ),
    ),
)


def look_alike(data: dict[str, Any]) -> PublishedDataSet | None:
    """The published data set with the sizes of a run's (`data.statistics.describe`), if any."""
    return next((one for one in DATA_SETS if one.looks_like(data)), None)
