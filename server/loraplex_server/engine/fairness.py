"""How much service each adapter has had, so that the next row goes to the one that has had least. No torch.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024 (arXiv:2401.00588). A
client is an adapter; the base is one too.
"""

from collections.abc import Set

from loraplex_server.engine.request import Request

PROMPT_TOKEN, OUTPUT_TOKEN = 1, 2  # what a token costs; the paper's weights


class Service:
    """Weighted tokens served to each adapter since the engine was last without work."""

    def __init__(self) -> None:
        self._served: dict[str | None, float] = {}

    def of(self, adapter: str | None) -> float:
        """What an adapter has had."""
        return self._served.get(adapter, 0.0)

    def arrived(self, adapter: str | None, active: Set[str | None]) -> None:
        """A request came; ``active`` are the adapters that had requests before. Who was away saves up nothing."""
        if active and adapter not in active:
            self._served[adapter] = max(self.of(adapter), min(map(self.of, active)))

    def prompt(self, request: Request) -> None:
        """A request's prompt will be computed, but for what was cached."""
        self._charge(request, PROMPT_TOKEN * (len(request.prompt_ids) - request.cached_tokens))

    def output(self, request: Request) -> None:
        """A request gets one more token."""
        self._charge(request, OUTPUT_TOKEN)

    def reset(self) -> None:
        """Nobody waits and nobody runs: there is nobody to be fair to."""
        self._served.clear()

    def _charge(self, request: Request, tokens: int) -> None:
        self._served[request.adapter] = self.of(request.adapter) + tokens / request.weight
