"""Suite `peers`: our encoders against the published composition, and against attention."""

from tools.benchmarks import attention, published
from tools.benchmarks.bench import Bench


def run(bench: Bench) -> None:
    for peer in (published, attention):
        with bench.case(peer.__name__.rpartition(".")[2]):
            peer.run(bench)
