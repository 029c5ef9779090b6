"""What a server did, as the results of a run: the row of its mode over all clients' plans."""

from __future__ import annotations

from vla_spec.config import as_tree
from vla_spec.evaluation import figures_of, make_row, series_of
from vla_spec.results import Results, environment
from vla_spec.serving.service import Service
from vla_spec.serving.tally import KEPT_PLANS, Tally


def summary(service: Service, tally: Tally) -> Results:
    """Results of kind ``serve``; episodes and success are not a server's to know.

    Args:
        service: what was served.
        tally: what it came to.
    """
    first = service.assemblies[0]
    mode = first.config.mode
    own = figures_of(first, list(tally.records))
    return Results(
        kind="serve",
        rows=(make_row(first, own, None, None, 0, 0, None),),
        seeds=(),
        tasks=(),
        model_hash=first.engine.info.model_hash,
        series={mode: series_of(own)},
        configs={mode: as_tree(first.config)},
        costs={mode: first.costs.as_json()},
        notes=(
            f"{tally.num_asked} requests of {tally.num_clients} clients: {tally.num_answered} chunks, of these "
            f"{tally.num_late} late by their own deadline and {tally.num_at_once} answered at once by the ladder; "
            f"{tally.num_overtaken} overtaken; {tally.num_bad} messages refused",
            f"the table is over the last {KEPT_PLANS} plans at most; late = cut by the client's deadline, or after it",
        ),
        environment=environment(first.config.num_threads),
    )
